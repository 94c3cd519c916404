"""What a caller asks of a container: every input, explicit. `builder.cli.run` fills it from flags."""

from __future__ import annotations

from builder.sandbox.spec import Resources
from layers.values import NamedTuple, dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    NetworkChoice = Literal["default", "private", "host", "none"]

_NO_LIMITS = Resources()


class VolumeMount(NamedTuple):
    """One `-v` or `--mount`. `source` is a host path (bind), a volume's name or "" for a new one (volume).

    `copy` fills an empty volume with what the image has at the target.
    """

    type: Literal["bind", "volume", "tmpfs"]
    target: str
    source: str = ""
    readonly: bool = False
    recursive: bool = True
    noexec: bool = False
    size_bytes: int | None = None
    mode: int | None = None
    copy: bool = True


class Port(NamedTuple):
    """One `-p`: host address ("" for all), host port (0: any that is free), container port, tcp or udp."""

    host_ip: str
    host_port: int
    port: int
    protocol: str = "tcp"


class Restart(NamedTuple):
    """A restart policy; `max_retries` 0 is without end."""

    name: Literal["no", "on-failure", "always", "unless-stopped"] = "no"
    max_retries: int = 0


class Healthcheck(NamedTuple):
    """How a container's health is asked for; times in seconds. `test` as an image's config has it."""

    test: tuple[str, ...]
    interval_s: float = 30.0
    timeout_s: float = 30.0
    start_period_s: float = 0.0
    start_interval_s: float = 5.0
    retries: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerOptions:
    """One container. What is None, or empty, is the image's.

    `entrypoint` () is none at all. `env` are pairs, later ones win. `workdir` is made if it is missing.
    """

    image: str
    command: tuple[str, ...] = ()
    name: str | None = None
    entrypoint: tuple[str, ...] | None = None
    env: tuple[tuple[str, str], ...] = ()
    unset_env: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    workdir: str | None = None
    user: str | None = None
    group_add: tuple[str, ...] = ()
    hostname: str | None = None
    add_hosts: tuple[tuple[str, str], ...] = ()
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    no_hosts: bool = False
    """The image's own /etc/hosts is what is seen."""
    network: NetworkChoice = "default"
    shared: tuple[tuple[str, str], ...] = ()
    """Namespaces (pid, ipc, uts, cgroup, net) of others: "host", or "container:NAME". With net, `network` is "host"."""
    ports: tuple[Port, ...] = ()
    publish_all: bool = False
    exposed: tuple[str, ...] = ()
    """Ports as an image's config has them, such as 80/tcp."""
    mounts: tuple[VolumeMount, ...] = ()
    read_only: bool = False
    tty: bool = False
    stdin: bool = False
    init: bool = False
    auto_remove: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    privileged: bool = False
    devices: tuple[str, ...] = ()
    """Nodes of the host, each HOST or HOST:PATH."""
    cdi_devices: tuple[str, ...] = ()
    cdi_directories: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    ulimits: tuple[tuple[str, int, int], ...] = ()
    limits: Resources = _NO_LIMITS
    shm_size_bytes: int = 64 << 20
    oom_score_adj: int | None = None
    sysctls: tuple[tuple[str, str], ...] = ()
    umask: int = 0o022
    time_zone: bytes | None = None
    """What /etc/localtime is."""
    timeout_s: float | None = None
    """It is killed when it has run so long."""
    pid_file: Path | None = None
    """Where its first process is told, each time that it starts."""
    isolation: Literal["auto", "pivot", "chroot", "oci"] = "auto"
    runtime: str | None = None
    """The OCI runtime of isolation "oci", by name or path; None: the first that is installed."""
    restart: Restart = Restart()
    stop_signal: str | None = None
    stop_timeout_s: float = 10.0
    health: Healthcheck | None = None
    no_healthcheck: bool = False
    log_bytes: int = 10 << 20
    """How much of what it says is kept at most; 0 is nothing."""
    window: tuple[int, int] = (24, 80)
    """(rows, columns) of the terminal at the start."""
