"""Entering a user namespace: what turns an ordinary user into the root of a small world.

`enter` is called by the main process, once, before it starts a thread or the zygote (unshare(2)
refuses a process with threads). Root stays where it is. A user with subordinate ids (/etc/subuid,
/etc/subgid) gets 0 mapped to itself and 1.. to those, by a forked helper that runs the setuid programs
`newuidmap` and `newgidmap`; without them, 0 alone is mapped. Root of a container that lacks CAP_SYS_ADMIN
alone, as podman's has, maps its own ids to themselves. user_namespaces(7), subuid(5).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from functools import cache

from builder.errors import SandboxError
from layers import linux
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, NoReturn

    from layers.snapshot import Dialect

    Tier = Literal["root", "subordinate", "single"]

IdRange = tuple[int, int, int]
"""(first id inside, first id outside, how many), as in uid_map."""

_WHOLE = 4294967295
_MAX_RANGES = 340  # the kernel's limit of lines in uid_map


class Identity(NamedTuple):
    """Who the process is now. `note` says why a lower tier than the best was taken."""

    tier: Tier
    dialect: Dialect
    uid_map: tuple[IdRange, ...]
    gid_map: tuple[IdRange, ...]
    note: str | None = None


def enter(*, subordinate: bool = True) -> Identity:
    """Become root of a user and mount namespace, unless this process has the powers of one already.

    Not idempotent in effect, but harmless when called again: the second call finds the powers.
    Raises: SandboxError where the kernel refuses, or where this process has threads.
    """
    if has_powers():
        return current()
    if threads() > 1:
        raise SandboxError(
            "cannot enter a user namespace: this process has started threads",
            operation="unshare",
            errno=errno.EINVAL,
            hint="call builder.sandbox.userns.enter() first, or run pybuild as a command",
        )
    uid, gid = os.geteuid(), os.getegid()
    uids, gids, note = subordinate_ids(uid) if subordinate else ((), (), "subordinate ids were not asked for")
    mapper = _Mapper(uid, gid, uids, gids) if uids and gids else None
    try:
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
    except OSError as e:
        if mapper:
            mapper.cancel()
        raise _refused(e) from e
    if mapper:
        note = mapper.map()
    if note is not None:
        _map_single(uid, gid)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    if not has_powers():
        raise SandboxError(
            "the kernel made a user namespace but gave it no capabilities",
            operation="unshare",
            errno=errno.EPERM,
            hint=_apparmor_hint() or "a security module restricts user namespaces here",
        )
    return current(note)


def current(note: str | None = None) -> Identity:
    """The identity of this process as the kernel tells it."""
    uid_map, gid_map = read_map("uid_map"), read_map("gid_map")
    if uid_map == ((0, 0, _WHOLE),):
        return Identity("root", "trusted", uid_map, gid_map, note)
    size = sum(count for _inside, _outside, count in uid_map)
    return Identity("single" if size == 1 else "subordinate", "user", uid_map, gid_map, note)


def has_powers() -> bool:
    """Whether this process may mount and make namespaces: CAP_SYS_ADMIN, effective."""
    return bool(linux.capget()[0] >> linux.CAPABILITIES.index("SYS_ADMIN") & 1)


def chroot_only() -> bool:
    """Whether this is root without CAP_SYS_ADMIN and cannot get it in a user namespace: `builder.sandbox.bare`.

    A namespace with a single id would be worse: root in a container has true owners without.
    """
    capabilities = linux.capget()[0]
    if os.geteuid() != 0 or has_powers() or not capabilities >> linux.CAPABILITIES.index("SYS_CHROOT") & 1:
        return False
    return subordinate_ids(0)[2] is not None or _unshare_refused()


@cache
def _unshare_refused() -> bool:
    """By trying it in a child, once: what a container forbids it goes on forbidding."""
    return in_child(lambda: linux.unshare(linux.CLONE_NEWUSER)) is not None


def threads() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def read_map(name: str) -> tuple[IdRange, ...]:
    """`uid_map` or `gid_map` of this process."""
    with open(f"/proc/self/{name}", encoding="utf-8") as stream:
        rows = [tuple(int(field) for field in line.split()) for line in stream]
    return tuple((row[0], row[1], row[2]) for row in rows)


def in_child(function: Callable[[], str | None]) -> str | None:
    """Call `function` in a forked child, whose namespaces and ids die with it; returns what it returned.

    An exception's words count as its result, and so does a signal.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            words = function()
            status = 0
            if words is not None:
                os.write(write, words.encode(errors="replace")[:4000])
                status = 2
        except BaseException as e:  # noqa: BLE001 - the process boundary
            hint = getattr(e, "hint", None)
            os.write(write, (f"{e}\n{hint}" if hint else str(e)).encode(errors="replace")[:4000])
        finally:
            os._exit(status)
    os.close(write)
    with open(read, "rb") as stream:
        words = stream.read().decode(errors="replace")
    status = os.waitpid(pid, 0)[1]
    return None if status == 0 else words or f"ended with status {status}"


def subordinate_ids(uid: int) -> tuple[tuple[IdRange, ...], tuple[IdRange, ...], str | None]:
    """(uid ranges, gid ranges, what is missing): ids 1.. inside, by /etc/subuid and /etc/subgid."""
    if uid == 0 and maps_itself():
        return _own_ids("uid_map"), _own_ids("gid_map"), None
    import pwd

    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    uids, gids = _ranges("/etc/subuid", names), _ranges("/etc/subgid", names)
    for program in ("newuidmap", "newgidmap"):
        if find_program(program) is None:
            return (), (), f"{program} is not installed (Debian: apt install uidmap)"
    if not uids or not gids:
        name = max(names, key=len)
        absent = "/etc/subuid" if not uids else "/etc/subgid"
        return (
            (),
            (),
            f"no ids for {name} in {absent} (usermod --add-subuids 100000-165535 --add-subgids 100000-165535)",
        )
    return uids, gids, None


def maps_itself() -> bool:
    """Whether this is root that may map all of its ids into a namespace, without a setuid helper."""
    needed = sum(1 << linux.CAPABILITIES.index(name) for name in ("SETUID", "SETGID", "SETFCAP"))
    return os.geteuid() == 0 and linux.capget()[0] & needed == needed


def _own_ids(name: str) -> tuple[IdRange, ...]:
    """Every id of this namespace but 0, each for itself."""
    rows = ((max(first, 1), count - (first == 0)) for first, _outside, count in read_map(name))
    return tuple((first, first, count) for first, count in rows if count > 0)


def find_program(name: str) -> str | None:
    """The path of a program of the system; PATH may lack the sbin directories."""
    for directory in [*os.environ.get("PATH", "").split(":"), "/usr/bin", "/usr/sbin", "/bin", "/sbin"]:
        path = os.path.join(directory, name)
        if directory.startswith("/") and os.access(path, os.X_OK):
            return path
    return None


def _ranges(path: str, names: set[str]) -> tuple[IdRange, ...]:
    ranges: list[IdRange] = []
    inside = 1
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            rows = [line.strip().split(":") for line in stream]
    except OSError:
        return ()
    for row in rows:
        if len(row) == 3 and row[0] in names and row[1].isdigit() and row[2].isdigit() and int(row[2]) > 0:
            ranges.append((inside, int(row[1]), int(row[2])))
            inside += int(row[2])
    return tuple(ranges[: _MAX_RANGES - 1])


def _map_single(uid: int, gid: int) -> None:
    """Map 0 to this user alone, which needs no helper. Raises: SandboxError."""
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as e:
        raise SandboxError(
            f"cannot map this user into its namespace: {e.strerror}",
            operation="uid_map",
            errno=e.errno,
            path=str(e.filename),
            hint=_apparmor_hint(),
        ) from e


class _Mapper:
    """A child that stays outside and runs newuidmap and newgidmap on its parent.

    Each side keeps only its ends of the two pipes, so that neither waits for the other's ghost.
    """

    def __init__(self, uid: int, gid: int, uids: tuple[IdRange, ...], gids: tuple[IdRange, ...]) -> None:
        go_read, self._go = os.pipe()
        self._answer, answer_write = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._go)
            os.close(self._answer)
            _mapper_main(parent, go_read, answer_write, (((0, uid, 1), *uids), ((0, gid, 1), *gids)))
        os.close(go_read)
        os.close(answer_write)

    def cancel(self) -> None:
        os.close(self._go)
        os.close(self._answer)
        os.waitpid(self._pid, 0)

    def map(self) -> str | None:
        """Let it run; returns what went wrong, None if nothing did."""
        os.write(self._go, b"1")
        os.close(self._go)
        with open(self._answer, "rb") as stream:
            words = stream.read(4096).decode(errors="replace").strip()
        _pid, status = os.waitpid(self._pid, 0)
        if status == 0:
            return None
        return " ".join(words.split()) or f"newuidmap failed with status {status}"


def _mapper_main(parent: int, go: int, answer: int, maps: tuple[tuple[IdRange, ...], tuple[IdRange, ...]]) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.read(go, 1):
            map_ids = _write_maps if maps_itself() else _run_helpers
            status = 0 if map_ids(parent, answer, maps) else 1
    except OSError as e:
        os.write(answer, str(e).encode())
    finally:
        os._exit(status)


def _write_maps(parent: int, _answer: int, maps: tuple[tuple[IdRange, ...], tuple[IdRange, ...]]) -> bool:
    """Root's way. Raises: OSError."""
    for name, ranges in zip(("uid_map", "gid_map"), maps, strict=True):
        with open(f"/proc/{parent}/{name}", "w", encoding="utf-8") as stream:
            stream.write("".join(f"{inside} {outside} {count}\n" for inside, outside, count in ranges))
    return True


def _run_helpers(parent: int, answer: int, maps: tuple[tuple[IdRange, ...], tuple[IdRange, ...]]) -> bool:
    """An ordinary user's way; whether they succeeded. Raises: OSError."""
    for program, ranges in zip(("newuidmap", "newgidmap"), maps, strict=True):
        numbers = [str(number) for row in ranges for number in row]
        path = find_program(program) or program
        # The dup2 clears close-on-exec: the program's complaints are the answer.
        pid = os.posix_spawn(
            path, [program, str(parent), *numbers], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, answer, 2)]
        )
        if os.waitpid(pid, 0)[1] != 0:
            return False
    return True


def _refused(error: OSError) -> SandboxError:
    """Say which switch of the system forbids user namespaces."""
    hint = "a seccomp filter or security module refuses unshare(CLONE_NEWUSER)"
    if _read("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        hint = "user namespaces are off for ordinary users: sysctl -w kernel.unprivileged_userns_clone=1"
    elif _read("/proc/sys/user/max_user_namespaces") == "0" or error.errno == errno.ENOSPC:
        hint = "there may be no more user namespaces: sysctl -w user.max_user_namespaces=28633"
    elif apparmor := _apparmor_hint():
        hint = apparmor
    elif _in_container():
        hint = (
            "the container that pybuild runs in forbids them; start it with --security-opt seccomp=unconfined "
            "(and --security-opt apparmor=unconfined), or with a pod's hostUsers: false"
        )
    return SandboxError(
        f"cannot make a user namespace: {os.strerror(error.errno or 0)}",
        operation="unshare",
        errno=error.errno,
        hint=hint,
    )


def _apparmor_hint() -> str | None:
    if _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") != "1":
        return None
    return "AppArmor restricts user namespaces: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"


def _in_container() -> bool:
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except OSError:
        return None
