"""The flags of the world that a command runs in, spelled and read alike by `build`, `run` and their kin."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable

from builder.cli.options import InvalidValue, key_value, size
from builder.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")


_IO_FLAGS = {
    "device-read-bps": "rbps",
    "device-write-bps": "wbps",
    "device-read-iops": "riops",
    "device-write-iops": "wiops",
}
_NAMESPACES = {
    "pid": "processes that are seen",
    "ipc": "shared memory and queues",
    "uts": "host name",
    "cgroupns": "control groups as they are seen",
}
_MAX_PATH = 1024
HEALTH_TIMES = {
    "interval": "time between two health checks (default: 30s)",
    "timeout": "how long a health check may take (default: 30s)",
    "start-period": "how long failures do not count at first (default: 0s)",
    "start-interval": "time between two health checks at first (default: 5s)",
}
_MAX_CPUS = 1 << 20
_ULIMITS = ("core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
            "rttime", "sigpending", "stack")  # fmt: skip


def add_sandbox_options(parser: ArgumentParser, *, containers: bool = False) -> None:
    """Names and name servers, capabilities, security, devices, namespaces and limits of processes.

    `containers`: namespaces of other ones may be joined.
    """
    add = parser.add_argument_group("its names, rights and devices").add_argument
    add("--add-host", action="append", default=[], metavar="NAME:IP",
        help="a line of /etc/hosts; the IP host-gateway is this machine")  # fmt: skip
    add("--dns", action="append", default=[], metavar="IP", help="a name server in place of the host's")
    add("--dns-search", action="append", default=[], metavar="DOMAIN",
        help="a search domain in place of the host's; . is none")  # fmt: skip
    add("--dns-option", action="append", default=[], metavar="OPTION", help="a resolver's option, such as ndots:2")
    add("--no-hosts", action="store_true", help="leave the image's /etc/hosts as it is")
    add("--device", action="append", default=[], metavar="PATH[:PATH]|VENDOR/CLASS=NAME",
        help="a device of the host, perhaps by another name; or one that a CDI file describes")  # fmt: skip
    add("--cdi-spec-dir", action="append", default=[], metavar="DIR",
        help="where CDI files are (default: /etc/cdi and /var/run/cdi)")  # fmt: skip
    add("--cap-add", action="append", default=[], metavar="CAP", help="a capability more, or ALL")
    add("--cap-drop", action="append", default=[], metavar="CAP", help="a capability less, or ALL")
    add("--security-opt", action="append", default=[], metavar="OPTION",
        help="seccomp=FILE|unconfined, no-new-privileges, label=disable, apparmor=unconfined")  # fmt: skip
    add("--ulimit", action="append", default=[], metavar="NAME=SOFT[:HARD]",
        help="a limit of each process, such as nofile=1024:4096")  # fmt: skip
    add("--shm-size", type=shm_size, metavar="SIZE", help="size of /dev/shm (default: 64m)")
    for name, what in _NAMESPACES.items():
        words = "private or host" + (", container:NAME" if containers and name != "cgroupns" else "")
        add(f"--{name}", metavar="NAMESPACE", help=f"{what}: {words} (default: private)")
    add("--userns", metavar="host", help="no other user namespace than that pybuild runs in, which is so anyway")
    add("--cgroup-parent", metavar="PATH", help="the group beneath which those of the limits are made")


def shm_size(text: str) -> int:
    """The size of /dev/shm; 0 is the default, as docker has it, where a tmpfs would have none."""
    found = size(text)
    if found < 0:
        raise InvalidValue(f"invalid size {text!r}")
    return found


def add_limit_options(parser: ArgumentParser, *, manager: bool = False) -> None:
    """The limits by cgroup; with `manager` also who makes the groups that they are set in."""
    add = parser.add_argument_group("limits").add_argument
    add("-m", "--memory", type=size, metavar="SIZE", help="of memory; SIZE: bytes, or with k, m, g, t")
    add("--memory-swap", type=size, metavar="SIZE", help="of memory and swap together; -1 is unlimited")
    add("--cpus", type=float, metavar="N", help="of processor time, in processors, such as 1.5")
    add("--cpu-shares", "-c", type=int, metavar="N", help="weight beside others, where a usual group has 1024")
    add("--cpu-period", type=int, metavar="US", help="period of the CFS scheduler in microseconds (default: 100000)")
    add("--cpu-quota", type=int, metavar="US", help="processor time in each period, in microseconds")
    add("--cpuset-cpus", metavar="LIST", help="processors that may be used, such as 0-2,4")
    add("--cpuset-mems", metavar="LIST", help="memory nodes that may be used, such as 0")
    add("--pids-limit", type=int, metavar="N", help="processes and threads")
    for flag, what in _IO_FLAGS.items():
        unit = "SIZE" if what.endswith("bps") else "N"
        done = "read from" if what.startswith("r") else "written to"
        told = f"{'bytes' if unit == 'SIZE' else 'operations'} a second {done} a disk"
        add(f"--{flag}", action="append", default=[], metavar=f"DEVICE:{unit}", help=told)
    add("--hugetlb-limit", action="append", default=[], metavar="PAGE:SIZE", help="of huge pages, as 2MB:64m")
    if manager:
        add("--cgroup-manager", choices=["auto", "cgroupfs", "systemd"], default="auto",
            help="who makes the groups of limits: pybuild itself, or systemd a scope for it (default: systemd where "
            "an ordinary user has no group to write to)")  # fmt: skip


def enter_scope(options: Namespace) -> None:
    """Go into the group that `--cgroup-manager` wants, perhaps by executing this command anew. Raises: SandboxError."""
    limited = any(value is not None for value in limits(options, lambda **found: found).values())
    if limited or options.cgroup_manager == "systemd":
        from builder.sandbox import scope

        parent = options.cgroup_parent or ""
        slice = parent.rsplit("/", 1)[-1] if parent.endswith(".slice") else None
        scope.enter(options.cgroup_manager, [sys.executable, *sys.orig_argv[1:]], os.environ, slice=slice)


def limits(options: Namespace, make: Callable[..., T]) -> T:
    """What `add_limit_options` took, as a `ResourceLimits` or `Resources`. Raises: UsageError."""
    quota, period = options.cpu_quota, options.cpu_period
    if options.cpus is not None:
        if quota is not None:
            raise UsageError("--cpus and --cpu-quota exclude each other")
        period = period or 100_000
        if not 0 <= options.cpus <= _MAX_CPUS:
            raise UsageError(f"--cpus {options.cpus}: expected a number of processors")
        quota = int(options.cpus * period) or None  # 0 is no limit, as docker has it
    found: dict[str, Any] = {
        "memory_bytes": options.memory,
        "memory_swap_bytes": options.memory_swap,
        "cpu_shares": options.cpu_shares,
        "cpu_period_us": period,
        "cpu_quota_us": quota,
        "cpuset_cpus": options.cpuset_cpus,
        "cpuset_mems": options.cpuset_mems,
        "pids": options.pids_limit,
        "io": _io_limits(options),
        "hugetlb": tuple(_limited(text, "--hugetlb-limit", size) for text in options.hugetlb_limit) or None,
    }
    if getattr(options, "cgroup_parent", None) is not None:
        found["cgroup_parent"] = cgroup_parent(options)
    return make(**found)


def cgroup_parent(options: Namespace) -> str | None:
    """`--cgroup-parent` as a path of groups; None where it is a slice, which systemd makes. Raises: UsageError."""
    text: str = options.cgroup_parent
    parts = [part for part in text.split("/") if part]
    if not parts or {".", ".."} & {*parts} or any(not c.isprintable() for c in text) or len(text) > _MAX_PATH:
        raise UsageError(f"--cgroup-parent {text!r}: expected the path of a group, such as /builds or builds/nightly")
    if parts[-1].endswith(".slice"):
        if getattr(options, "cgroup_manager", None) != "systemd":
            hint = "--cgroup-manager systemd" if hasattr(options, "cgroup_manager") else "systemd-run --scope --slice=…"
            raise UsageError(f"--cgroup-parent {text}: a slice is systemd's to make", hint=hint)
        return None
    return ("/" if text.startswith("/") else "") + "/".join(parts)


def shared(options: Namespace) -> dict[str, str]:
    """`--pid`, `--ipc`, `--uts`, `--cgroupns`, but for private ones: "host" or "container:NAME". Raises: UsageError."""
    if options.userns not in {None, "", "host"}:
        raise UsageError(
            f"--userns {options.userns}: not possible",
            hint="an ordinary user has a user namespace anyway, root has none; as root, run it as an ordinary user",
        )
    if options.shm_size is not None and options.ipc not in {None, "", "private", "shareable"}:
        raise UsageError("--shm-size means nothing with the shared memory of others (--ipc)")
    found: dict[str, str] = {}
    for flag in _NAMESPACES:
        value = getattr(options, flag)
        if value == "host" or (value and value.startswith("container:") and len(value) > len("container:")):
            found["cgroup" if flag == "cgroupns" else flag] = value
        elif value not in {None, "", "private", "shareable"} or (value == "shareable" and flag != "ipc"):
            raise UsageError(f"--{flag} {value}: there are private and host")
    return found


def of_host(options: Namespace) -> tuple[str, ...]:
    """`shared` where there are no other containers. Raises: UsageError."""
    found = shared(options)
    for kind, value in found.items():
        if value != "host":
            raise UsageError(f"--{kind} {value}: a build joins no container", hint="there are private and host")
    return tuple(sorted(found))


def _io_limits(options: Namespace) -> tuple[tuple[str, str, int], ...] | None:
    found: list[tuple[str, str, int]] = []
    for flag, what in _IO_FLAGS.items():
        unit = size if what.endswith("bps") else int
        values = getattr(options, flag.replace("-", "_"))
        found += [(what, *_limited(text, f"--{flag}", unit)) for text in values]
    return tuple(found) or None


def _limited(text: str, flag: str, unit: Callable[[str], int]) -> tuple[str, int]:
    name, separator, value = text.rpartition(":")
    try:
        if separator and name:
            return name, unit(value)
    except (ValueError, ArgumentTypeError):
        pass
    raise UsageError(f"{flag} {text!r}: expected NAME:LIMIT")


def added_hosts(options: Namespace) -> tuple[tuple[str, str], ...]:
    """`--add-host` as (name, address); `host-gateway` is this machine. Raises: UsageError."""
    if options.no_hosts and options.add_host:
        raise UsageError("--no-hosts and --add-host exclude each other")
    return tuple(_host(text) for text in options.add_host)


def _host(text: str) -> tuple[str, str]:
    import ipaddress

    name, separator, address = text.partition("=" if "=" in text else ":")
    address = address.strip("[]")
    if address == "host-gateway":
        address = "127.0.0.1"
    try:
        ipaddress.ip_address(address)
    except ValueError:
        separator = ""
    if not separator or not name or any(c.isspace() for c in name):
        raise UsageError(f"--add-host {text!r}: expected NAME:IP")
    return name, address


def name_servers(options: Namespace) -> tuple[str, ...]:
    """`--dns`. Raises: UsageError for what is no address."""
    for text in options.dns:
        import ipaddress

        try:
            ipaddress.ip_address(text)
        except ValueError as e:
            raise UsageError(f"--dns {text!r}: expected an IP address") from e
    return tuple(options.dns)


def one_line(values: list[str], flag: str) -> tuple[str, ...]:
    """Words for a line of /etc/resolv.conf. Raises: UsageError for what would begin another."""
    for text in values:
        if not text or any(c.isspace() or not c.isprintable() for c in text):
            raise UsageError(f"{flag} {text!r}: expected one word")
    return tuple(values)


def devices(options: Namespace) -> tuple[str, ...]:
    """Device nodes of the host, each as HOST or HOST:PATH. Raises: UsageError."""
    return tuple(_device(text) for text in options.device if text.startswith("/"))


def cdi_devices(options: Namespace) -> tuple[str, ...]:
    """Devices by CDI names; there must be such. Raises: UsageError, SandboxError."""
    names = tuple(text for text in options.device if not text.startswith("/"))
    if names:
        from builder.sandbox import cdi

        for name in names:
            if not cdi.is_name(name):
                raise UsageError(f"--device {name!r}: expected a path, or a CDI name such as vendor.com/class=name")
        cdi.find(names, cdi_directories(options))
    return names


def cdi_directories(options: Namespace) -> tuple[str, ...]:
    """Where CDI files are; the last of them counts most."""
    return tuple(map(os.path.abspath, options.cdi_spec_dir)) or ("/etc/cdi", "/var/run/cdi")


def _device(text: str) -> str:
    path, *rest = text.split(":")
    if rest and rest[-1] in {"r", "w", "m", "rw", "rm", "wm", "rwm"}:
        rest.pop()
    inside = rest[0] if rest else path
    if not path.startswith("/dev/") or ".." in path.split("/") or not os.path.exists(path):
        raise UsageError(f"--device {text!r}: {path} is no device of this machine")
    if len(rest) > 1 or not inside.startswith("/dev/") or ".." in inside.split("/") or inside == "/dev/":
        raise UsageError(f"--device {text!r}: a device appears beneath /dev", hint=f"--device {path}")
    return path if inside == path else f"{path}:{inside}"


def ulimits(options: Namespace) -> tuple[tuple[str, int, int], ...]:
    """`--ulimit` as (name, soft, hard); -1 is unlimited. Raises: UsageError."""
    return tuple(_ulimit(text) for text in options.ulimit)


def _ulimit(text: str) -> tuple[str, int, int]:
    name, value = key_value(text, "--ulimit")
    soft, _, hard = value.partition(":")
    if name not in _ULIMITS:
        raise UsageError(f"--ulimit {text!r}: there is no limit {name!r}", hint=f"there are {', '.join(_ULIMITS)}")
    try:
        first, last = (-1 if word in {"unlimited", "-1"} else int(word) for word in (soft, hard or soft))
    except ValueError as e:
        raise UsageError(f"--ulimit {text!r}: expected NAME=SOFT[:HARD]") from e
    if last != -1 and (first == -1 or first > last):
        raise UsageError(f"--ulimit {text!r}: the soft limit is above the hard one")
    return name, first, last
