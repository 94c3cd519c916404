"""The flags of `run` and `create`: all are declared here; those that `run` does not read itself are read here, too."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from builder.cli.options import boolean, duration
from builder.cli.sandboxflags import HEALTH_TIMES, add_sandbox_options
from builder.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.container.options import VolumeMount

_ZONES = Path("/usr/share/zoneinfo")
_IPC = ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
_IN_MEMORY = ("/run", "/tmp", "/var/tmp")  # noqa: S108 - those of the container


def configure(parser: ArgumentParser) -> None:
    """The flags of `run` and `create` alone."""
    _add_basics(parser)
    _add_files(parser)
    add_sandbox_options(parser, containers=True)
    _add_surroundings(parser)
    _add_life(parser)
    _add_more(parser)


def _add_basics(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--rm", action="store_true", help="remove the container when it ends")
    add("--name", metavar="NAME", help="the container's name (default: two words)")
    add("--cidfile", metavar="FILE", help="write the container's ID there")
    add(
        "--detach-keys",
        default="ctrl-p,ctrl-q",
        metavar="KEYS",
        help="with -it: leave it running by these keys (default: ctrl-p,ctrl-q)",
    )
    add(
        "--pull",
        choices=["always", "missing", "never"],
        default="missing",
        help="when to fetch the image (default: missing)",
    )
    add("--authfile", metavar="FILE", help="credentials file for a pull")
    add("--tls-verify", type=boolean, metavar="BOOL", help="ask for verified TLS in a pull (default: true)")
    add("--platform", metavar="OS/ARCH", help="the image for this platform (default: this machine's)")
    add("--entrypoint", metavar="COMMAND", help="in place of the image's; a JSON array, or one word; empty: none")
    add("-q", "--quiet", action="store_true", help="show no progress of a pull")
    add("--unsetenv", action="append", default=[], metavar="KEY", help="take a variable of the image away")
    add("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the container")
    add("--label-file", action="append", default=[], metavar="FILE", help="labels, a line each")


def _add_files(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("-v", "--volume", action="append", default=[], metavar="HOST:CTR[:ro]",
        help="a directory of the host, or a named volume, at CTR")  # fmt: skip
    add(
        "--mount",
        action="append",
        default=[],
        metavar="type=TYPE,target=CTR,…",
        help="the same in words; TYPE: bind, volume or tmpfs",
    )
    add(
        "--tmpfs",
        action="append",
        default=[],
        metavar="CTR[:OPTIONS]",
        help="an empty file system in memory, such as /run:size=64m,mode=1777",
    )
    add("--read-only", action="store_true", help="the root file system read-only")


def _add_surroundings(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--hostname", metavar="NAME", help="its host name (default: its ID)")
    add("--network", "--net", metavar="NETWORK",
        help="private (bridge): its own, behind NAT; host; none; container:NAME (default: private)")  # fmt: skip
    add(
        "-p",
        "--publish",
        action="append",
        default=[],
        metavar="[[IP:]HOST:]CTR[/udp]",
        help="a port of the host for one of the container; without HOST a free one",
    )
    add(
        "-P", "--publish-all", action="store_true", help="every port that the image exposes, on free ones of the host's"
    )
    add("--group-add", action="append", default=[], metavar="GROUP", help="a supplementary group")
    add(
        "--isolation",
        choices=["auto", "pivot", "chroot", "oci"],
        default="auto",
        help="oci: by an OCI runtime (default: the best that works here)",
    )
    add("--runtime", metavar="NAME", help="the runtime of --isolation oci: runc, crun, … (default: what is installed)")


def _add_life(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--init", action="store_true", help="a small first process that reaps and passes signals on")
    add(
        "--restart",
        default="no",
        metavar="POLICY",
        help="when to start it again: no (default), on-failure[:N], always, unless-stopped",
    )
    add(
        "--log-driver",
        choices=["json-file", "none"],
        default="json-file",
        help="json-file (default); none keeps nothing for `logs`",
    )
    add(
        "--log-opt",
        action="append",
        default=[],
        metavar="max-size=SIZE",
        help="how much of what it says is kept (default: 10m)",
    )
    add("--stop-signal", metavar="SIGNAL", help="what `stop` sends (default: the image's, else TERM)")
    add(
        "--stop-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long `stop` waits before it kills (default: 10)",
    )
    add("--health-cmd", metavar="COMMAND", help="a command of the shell's that tells whether the container is well")
    for name, told in HEALTH_TIMES.items():
        add(f"--health-{name}", type=duration, metavar="TIME", help=told)
    add("--health-retries", type=int, metavar="N", help="failures in a row that make it unhealthy (default: 3)")
    add("--no-healthcheck", action="store_true", help="no health check, whatever the image says")


def _add_more(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("more of its life").add_argument
    add("--env-host", action="store_true", help="the caller's whole environment, but PATH, HOME and HOSTNAME")
    add("--expose", action="append", default=[], metavar="PORT[/udp]", help="a port that the image exposes, for -P")
    add("--volumes-from", action="append", default=[], metavar="CONTAINER[:ro]",
        help="the volumes and directories that another container has")  # fmt: skip
    add("--read-only-tmpfs", action="store_true", help="with --read-only: /run, /tmp and /var/tmp in memory")
    add("--sysctl", action="append", default=[], metavar="NAME=VALUE",
        help="a parameter of the kernel's, of the container's own network (net.*) or IPC namespace")  # fmt: skip
    add("--umask", metavar="MASK", help="of the command, in octal (default: 022)")
    add("--tz", metavar="ZONE", help="its time zone, such as Europe/Paris; or local, this machine's")
    add(
        "--timeout", type=float, default=0.0, metavar="SECONDS", help="kill it when it has run so long (default: never)"
    )
    add("--pidfile", metavar="FILE", help="write the number of its first process there")
    add("--replace", action="store_true", help="remove a container of that --name first, killing it if it runs")


def refuse(options: Namespace) -> None:
    """Raises: UsageError for what cannot be, or contradicts itself."""
    if options.read_only_tmpfs and not options.read_only:
        raise UsageError("--read-only-tmpfs goes with --read-only")
    if options.replace and not options.name:
        raise UsageError("--replace needs --name")
    if options.timeout < 0:
        raise UsageError(f"--timeout {options.timeout:g}: expected seconds")


def host_environment(options: Namespace) -> tuple[tuple[str, str], ...]:
    """The caller's variables, for --env-host; where to look for programs is the image's to say."""
    if not options.env_host:
        return ()
    return tuple((name, value) for name, value in os.environ.items() if name not in {"PATH", "HOME", "HOSTNAME"})


def exposed(options: Namespace) -> tuple[str, ...]:
    """`--expose` as an image's config has it, ranges written out. Raises: UsageError."""
    if not options.expose:
        return ()
    from builder.errors import ParseError
    from builder.frontend.ports import parse_ports

    try:
        return parse_ports(options.expose)
    except ParseError as e:
        raise UsageError(f"--expose: {e}") from e


def sysctls(options: Namespace) -> tuple[tuple[str, str], ...]:
    """Parameters that a namespace of the container's own has. Raises: UsageError for those of the whole machine."""
    found = []
    for text in options.sysctl:
        name, equals, value = text.partition("=")
        name = name.replace("/", ".")
        parts = name.split(".")
        if not equals or not all(part.replace("-", "").replace("_", "").isalnum() for part in parts):
            raise UsageError(f"--sysctl {text!r}: expected NAME=VALUE")
        ipc = name.startswith("fs.mqueue.") or (parts[0] == "kernel" and name.removeprefix("kernel.") in _IPC)
        if not ipc and parts[0] != "net":
            hint = "there are net.*, fs.mqueue.* and kernel.msg*, sem, shm*"
            raise UsageError(f"--sysctl {name}: it is the whole machine's", hint=hint)
        if ipc and (options.ipc or "private") not in {"private", "shareable"}:
            raise UsageError(f"--sysctl {name} with --ipc {options.ipc}: the namespace is not the container's own")
        if not ipc and (options.network or "").startswith(("host", "container:")):
            raise UsageError(f"--sysctl {name} with --network {options.network}: it is not the container's own")
        found.append((name, value))
    return tuple(found)


def umask(options: Namespace) -> int:
    """Raises: UsageError."""
    text = options.umask or "022"
    if len(text) > 4 or not all(c in "01234567" for c in text) or int(text, 8) > 0o777:
        raise UsageError(f"--umask {text!r}: expected up to three octal digits")
    return int(text, 8)


def time_zone(options: Namespace) -> bytes | None:
    """What /etc/localtime is to be. Raises: UsageError for a zone that this machine does not know."""
    if options.tz is None:
        return None
    path = Path("/etc/localtime") if options.tz == "local" else _ZONES / options.tz
    try:
        if ".." not in path.parts and path.is_relative_to("/etc" if options.tz == "local" else _ZONES):
            data = path.read_bytes()
            if data.startswith(b"TZif"):
                return data
    except OSError:
        pass
    raise UsageError(f"--tz {options.tz}: there is no such time zone in {_ZONES}")


def more_mounts(options: Namespace, root: Path, targets: set[str]) -> list[VolumeMount]:
    """What --volumes-from and --read-only-tmpfs mean, where nothing else is mounted. Raises: NoSuchContainer."""
    from builder.container import records
    from builder.container.options import VolumeMount

    found: list[VolumeMount] = []
    for text in options.volumes_from:
        name, _, mode = text.partition(":")
        if mode not in {"", "ro", "rw", "z"}:
            raise UsageError(f"--volumes-from {text!r}: expected CONTAINER[:ro]")
        settings = records.find(root, name).settings
        named = {volume["target"]: str(volume["name"]) for volume in settings.get("volumes", [])}
        for mount in settings["sandbox"]["mounts"]:
            target = str(mount["target"])
            if mount["kind"] != "bind" or target in targets:
                continue
            targets.add(target)
            kind, source = ("volume", named[target]) if target in named else ("bind", str(mount["source"]))
            kept = {"recursive": bool(mount["recursive"]), "noexec": bool(mount["noexec"]), "copy": False}
            readonly = mode == "ro" or bool(mount["readonly"])
            found.append(VolumeMount(kind, target, source, readonly=readonly, **kept))  # type: ignore[arg-type]
    if options.read_only_tmpfs:
        found += [VolumeMount("tmpfs", target, mode=0o1777) for target in _IN_MEMORY if target not in targets]
    return found
