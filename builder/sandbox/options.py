"""What the words of Docker's flags mean for a sandbox: capabilities, `--security-opt`, resolvers, hosts.

`builder.solve` uses it for every RUN, `builder.container` for containers. Nothing here touches the system
but for reading the host's own /etc/resolv.conf and /etc/hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from builder.errors import UsageError
from builder.sandbox.spec import DEFAULT_CAPABILITIES
from layers.linux import CAPABILITIES
from layers.values import NamedTuple

_KNOWN = frozenset(f"CAP_{name}" for name in CAPABILITIES)
_OWN_LABEL = Path("/proc/self/attr/current")
_NO_LABELS = {("label", "disable"), ("apparmor", "unconfined")}
"""They hold already, unless pybuild itself is confined: nothing here sets a label."""
_HOSTS = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


class Security(NamedTuple):
    """What `--security-opt` says. `seccomp` is "default", "unconfined" or a profile's path."""

    seccomp: str | Path = "default"
    no_new_privs: bool = False


def capabilities(add: Iterable[str], drop: Iterable[str]) -> frozenset[str]:
    """Docker's default set with `--cap-add` and `--cap-drop`, ALL included. Raises: UsageError for an unknown name."""
    added, dropped = _names(add, "--cap-add"), _names(drop, "--cap-drop")
    if dropped >= _KNOWN:
        return added
    return (DEFAULT_CAPABILITIES | added) - dropped


def _names(words: Iterable[str], flag: str) -> frozenset[str]:
    found: set[str] = set()
    for word in words:
        name = word.upper()
        if name == "ALL":
            return _KNOWN
        name = name if name.startswith("CAP_") else f"CAP_{name}"
        if name not in _KNOWN:
            raise UsageError(f"{flag} {word}: there is no such capability", hint="capabilities(7) names them")
        found.add(name)
    return frozenset(found)


def security(words: Iterable[str]) -> Security:
    """`seccomp=FILE|unconfined|default` and `no-new-privileges[=BOOL]`; `:` may stand for `=`.

    Raises: UsageError for any other, such as a label that nothing here would apply.
    """
    found = Security()
    for word in words:
        key, _, value = word.replace(":", "=", 1).partition("=")
        if key == "seccomp" and value:
            plain = value in {"unconfined", "default"}
            found = found._replace(seccomp=value if plain else Path(value).absolute())
        elif key == "no-new-privileges" and value in {"", "true", "false"}:
            found = found._replace(no_new_privs=value != "false")
        elif (key, value) not in _NO_LABELS or confined_by(_read(_OWN_LABEL)):
            raise UsageError(
                f"--security-opt {word}: not possible",
                hint="there are seccomp=FILE, seccomp=unconfined and no-new-privileges; a command has the label of "
                "pybuild itself, to SELinux and AppArmor",
            )
    return found


def confined_by(label: str) -> str | None:
    """The AppArmor profile or SELinux domain that a process of this label is confined by, if any."""
    label = label.rstrip("\0\n ")
    domain = label.split(":")[2] if label.count(":") >= 3 else label.partition(" ")[0]
    return None if domain in {"", "unconfined", "kernel"} or domain.startswith("unconfined_") else domain


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def resolv_conf(servers: Iterable[str] = (), search: Iterable[str] = (), options: Iterable[str] = ()) -> bytes:
    """/etc/resolv.conf: the host's, but for the kinds of lines that something else was given for.

    A search of "." alone takes the host's away.
    """
    try:
        lines = Path("/etc/resolv.conf").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        lines = []
    given = {
        ("nameserver",): [f"nameserver {server}" for server in servers],
        ("search", "domain"): [f"search {' '.join(search)}"] if search else [],
        ("options",): [f"options {' '.join(options)}"] if options else [],
    }
    for keys, instead in given.items():
        if instead:
            lines = [line for line in lines if not line.startswith(keys)] + [t for t in instead if t != "search ."]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def hosts(hostname: str, *, of_host: bool) -> bytes:
    """/etc/hosts: the host's own names if `of_host`, else those of a loopback; and the sandbox's."""
    text = _HOSTS
    if of_host:
        try:
            text = Path("/etc/hosts").read_bytes().rstrip(b"\n") + b"\n"
        except OSError:
            pass
    return text + b"127.0.0.1\t" + hostname.encode() + b"\n"
