"""What a sandbox is: a subset of the OCI runtime-spec as one value.

`SandboxSpec` says everything that the kernel is asked for when a RUN (or a container) starts; nothing
is read from the environment later. `builder.solve` makes specs, `launcher` carries them out, and
`operations` turns one into the list of setup steps. Nothing here touches the system.
https://github.com/opencontainers/runtime-spec/blob/main/config.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layers.snapshot import Mount
from layers.values import NamedTuple, dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Network = Literal["host", "none", "private"]
    Namespace = Literal["pid", "ipc", "uts", "cgroup", "net"]
    Isolation = Literal["auto", "pivot", "chroot"]


DEFAULT_CAPABILITIES: frozenset[str] = frozenset(
    (
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    )
)
"""Docker's default set: permitted, effective and bounding; nothing is inheritable or ambient."""

MASKED_PATHS: tuple[str, ...] = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS: tuple[str, ...] = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

DEFAULT_HOSTNAME = "buildkitsandbox"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SandboxMount(NamedTuple):
    """One mount inside the sandbox.

    `target` is a path in the image, hostile: it is resolved with the image as its root. `source` is
    a host path (bind), a `Mount` of which `subpath` is shown (tree: changes go to its upper), bytes
    (file) or None (tmpfs).
    `uid`, `gid` and `mode` are those of a new tmpfs or file; a bind keeps what its source has.
    Missing targets appear without a trace in the image: `is_file` says what to make.
    """

    kind: Literal["bind", "tmpfs", "tree", "file"]
    target: str
    source: Path | Mount | bytes | None = None
    readonly: bool = False
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    size_bytes: int | None = None
    is_file: bool = False
    noexec: bool = False
    recursive: bool = False
    optional: bool = False
    """A bind whose source is missing is left out, silently."""
    subpath: str = "/"
    """For `tree`: the part of it that is mounted, a path inside, hostile like the target."""
    movable: bool = False
    """A bind whose source nobody else uses meanwhile, and which may be moved where nothing can be mounted."""

    def __repr__(self) -> str:
        """Contents may be a secret's."""
        source = f"<{len(self.source)} bytes>" if isinstance(self.source, bytes) else repr(self.source)
        return f"SandboxMount({self.kind!r}, {self.target!r}, {source})"


class Resources(NamedTuple):
    """Limits by cgroup; None leaves one alone. A limit that cannot be applied is an error."""

    memory_bytes: int | None = None
    memory_swap_bytes: int | None = None
    """Memory and swap together, as Docker counts; -1 is unlimited."""
    cpu_shares: int | None = None
    cpu_period_us: int | None = None
    cpu_quota_us: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    pids: int | None = None
    io: tuple[tuple[str, str, int], ...] | None = None
    """(what, device node, limit) each: rbps, wbps in bytes a second; riops, wiops in operations a second."""
    hugetlb: tuple[tuple[str, int], ...] | None = None
    """(page size such as 2MB, bytes) each."""
    freezer: bool | None = None
    """True: `Running.pause` will be wanted."""
    cgroup_parent: str | None = None
    """Where the groups are made: `/a/b` counts from the root of each hierarchy, `a/b` from where they are otherwise."""
    accounting: bool | None = None
    """True: groups of all controllers at hand, for figures, pausing and limits to come; where there is none, none."""

    @property
    def any(self) -> bool:
        """Whether a cgroup has to be made."""
        return any(value is not None for value in self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """Everything about one sandbox. Defaults are Docker's, but for the network, which is the host's.

    `groups` are supplementary ids. `env` is the whole environment. `mounts` are done in order, after
    /proc, /sys and /dev. `files` maps targets such as /etc/hosts to contents or to host paths, bound
    over without entering a layer. `seccomp` is "default", "unconfined" or a profile in Docker's JSON.
    `timeout_s` kills the sandbox and marks its `ExitStatus`.

    Mount points that the image lacks come from directories of stubs on the upper's file system: those in
    `stubs` are kept for other runs (a directory of the store; it may be emptied when nothing runs), those
    in `scratch` (default: the upper's parent) live as long as the sandbox.
    """

    args: tuple[str, ...]
    root: Mount
    env: Mapping[str, str] | tuple[tuple[str, str], ...] = field(default=(), repr=False)
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    umask: int = 0o022
    readonly_root: bool = False
    mounts: tuple[SandboxMount, ...] = ()
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    files_readonly: bool = True
    add_hosts: tuple[tuple[str, str], ...] = ()
    """(name, address) pairs appended to /etc/hosts."""
    hostname: str = DEFAULT_HOSTNAME
    network: Network = "host"
    shared: tuple[tuple[Namespace, Literal["host", "joined"]], ...] = ()
    """Namespaces that are not the sandbox's own: those of this process, or those that `Launcher.run` is given.

    With a network of somebody else's, `network` is "host".
    """
    capabilities: frozenset[str] = DEFAULT_CAPABILITIES
    no_new_privs: bool = False
    seccomp: str | Path = "default"
    masked_paths: tuple[str, ...] = MASKED_PATHS
    readonly_paths: tuple[str, ...] = READONLY_PATHS
    rlimits: tuple[tuple[str, int, int], ...] = ()
    """(name such as "nofile", soft, hard)."""
    oom_score_adj: int | None = None
    sysctls: tuple[tuple[str, str], ...] = ()
    """(name with dots, value), of namespaces that are the sandbox's own."""
    devices: tuple[str, ...] = ()
    """Host device nodes to bind as well, by path; HOST:PATH appears at another path of /dev."""
    resources: Resources = Resources()
    isolation: Isolation = "auto"
    privileged: bool = False
    """RUN --security=insecure: all capabilities, no seccomp, nothing masked, every device."""
    init: bool = False
    """Run a small reaping PID 1 and the command beneath it."""
    terminal: tuple[int, int] | None = None
    """(rows, columns) of a terminal to give to the command in place of the three descriptors."""
    shm_size_bytes: int = 64 << 20
    timeout_s: float | None = None
    scratch: Path | None = None
    stubs: Path | None = None

    def environment(self) -> dict[str, str]:
        """`env` as a dict; later pairs win."""
        return dict(self.env)

    def own(self, namespace: Namespace) -> bool:
        """Whether it has a namespace of this kind of its own (but for the network, which `network` tells)."""
        return all(kind != namespace for kind, _ in self.shared)

    def describe(self) -> str:
        """The setup, one step a line, for debugging."""
        from builder.sandbox.operations import describe, operations

        return "\n".join(describe(operation) for operation in operations(self))
