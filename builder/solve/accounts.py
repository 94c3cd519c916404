"""Users and groups inside an image: what `--chown` and `USER` mean by their names.

Names are looked up in the image's own /etc/passwd and /etc/group, read through the descriptor of
its root, with bounds. The two lookups differ, as they do in BuildKit: `--chown` takes a number as
it is, gives a lone number to the group too, and takes a name that nobody knows for root; `USER`
looks a lone number up for its groups, and refuses unknown names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from builder.errors import ContextError
from builder.solve import rootpath
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Mount

_FILE_MAX_BYTES = 16 * 1024 * 1024
_ID_MAX = 2**31 - 1  # runc's bound for ids in USER; those of --chown have 32 bits too


Root = int | Callable[[str], "int | None"]
"""An image's files: a descriptor of its root, or what opens a file of it (None: it is not there)."""


class ResolvedUser(NamedTuple):
    """The identity of a process: `groups` are the supplementary ones, `name` is "" where no entry was found."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    name: str


class _Passwd(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def _lines(root: Root, path: str) -> Iterator[list[str]]:
    """The fields of each line of a file that may be missing. Raises: ContextError."""
    try:
        opened = root(path) if callable(root) else rootpath.open_file(root, rootpath.resolve(root, path))
        if opened is None:
            return
        fd = opened
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise ContextError(f"cannot read {rootpath.shown(path)} of the image: {e.strerror}") from e
    try:
        data = bytearray()
        while chunk := os.read(fd, 65536):
            data += chunk
            if len(data) > _FILE_MAX_BYTES:
                raise ContextError(f"{rootpath.shown(path)} of the image is larger than {_FILE_MAX_BYTES >> 20} MiB")
    except OSError as e:
        raise ContextError(f"cannot read {rootpath.shown(path)} of the image: {e.strerror}") from e
    finally:
        os.close(fd)
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            yield line.split(":")


def _number(text: str) -> int:
    """An id as libcontainer reads a field: what is no number counts as 0."""
    try:
        return int(text) if text.isascii() and text.lstrip("+-").isdigit() else 0
    except ValueError:
        return 0


def _field(fields: list[str], index: int) -> str:
    return fields[index].strip() if index < len(fields) else ""


def _passwd(root: Root) -> Iterator[_Passwd]:
    for f in _lines(root, "/etc/passwd"):
        yield _Passwd(_field(f, 0), _number(_field(f, 2)), _number(_field(f, 3)), _field(f, 5))


def _groups(root: Root) -> Iterator[_Group]:
    for f in _lines(root, "/etc/group"):
        members = tuple(m for m in _field(f, 3).split(",") if m)
        yield _Group(_field(f, 0), _number(_field(f, 2)), members)


def _plain_id(text: str) -> int | None:
    """A number of `--chown`, `root` being one; None for a name. Raises: ContextError for one out of range."""
    if text == "root":
        return 0
    if not _is_plain(text):
        return None
    if len(text) > 10 or int(text) >= 2**32 - 1:
        raise ContextError(f"{text} is not a user or group id", hint="ids go from 0 to 4294967294")
    return int(text)


def _is_plain(text: str) -> bool:
    return text == "root" or (text.isascii() and text.isdigit())


def resolve_owner(root_fd: int | None, owner: str, *, warn: Callable[[str], None] | None = None) -> tuple[int, int]:
    """The uid and gid of `--chown=user[:group]`.

    `root_fd` is None for `FROM scratch` with nothing in it yet, where names mean nothing. A name that
    is not in the image's files counts as root, as BuildKit has it; `warn` is told. Raises: ContextError.
    """
    user, colon, group = owner.partition(":")
    uid = gid = 0
    number = _plain_id(user)
    if number is not None:
        uid = gid = number
    else:
        entry = next((p for p in _passwd(_image(root_fd, user)) if p.name == user), None)
        if entry is not None:
            uid, gid = entry.uid, entry.gid
        elif user and warn is not None:
            warn(f"user {user!r} is not in /etc/passwd of the image: root is used")
    if colon:
        number = _plain_id(group)
        if number is not None:
            gid = number
        else:
            found = next((g for g in _groups(_image(root_fd, group)) if g.name == group), None)
            if found is not None:
                gid = found.gid
            elif warn is not None:
                warn(f"group {group!r} is not in /etc/group of the image: that of the user is used")
    return uid, gid


def _image(root_fd: int | None, name: str) -> int:
    if root_fd is None:
        raise ContextError(
            f"--chown={name}: an empty image has no /etc/passwd to look a name up in",
            hint="use numbers: --chown=1000:1000",
        )
    return root_fd


def _user_id(text: str) -> int | None:
    """A number in USER, or None for a name. Raises: ContextError for one out of range."""
    if not (text.isascii() and text.lstrip("-").isdigit()):
        return None
    if len(text) > 11 or not 0 <= int(text) <= _ID_MAX:
        raise ContextError(f"uids and gids must be in range 0-{_ID_MAX}: {text}")
    return int(text)


def resolve_user(root: Root, user: str) -> ResolvedUser:
    """The identity of `USER user[:group]`, "" for root, as a process of RUN takes it on.

    Supplementary groups are those that name the user, unless a group is given; the primary one is always
    among them, lest a file that is closed to its group be open to who left it (CVE-2023-25173). A number
    for both is taken as it is. The home is that of the first entry with the resulting id, else "/".
    Raises: ContextError for a name that is not in the image's files, or a number out of range.
    """
    wanted, _, group = user.partition(":")
    accounts = list(_passwd(root))
    if group and wanted and _is_plain(wanted) and _is_plain(group):
        return _with_home(accounts, _plain_id(wanted) or 0, _plain_id(group) or 0, (), "")
    number = _user_id(wanted or "0")
    entry = next((p for p in accounts if (p.uid == number if number is not None else p.name == wanted)), None)
    if entry is None and number is None:
        raise ContextError(
            f"unable to find user {wanted}: no matching entries in passwd file",
            hint="make it with RUN useradd or adduser, or give its number",
        )
    uid = entry.uid if entry is not None else number or 0
    gid = entry.gid if entry is not None else 0
    name = entry.name if entry is not None else ""
    groups: tuple[int, ...] = ()
    if group:
        gid = _group_id(root, group)
    elif name:
        groups = tuple(dict.fromkeys(g.gid for g in _groups(root) if name in g.members))
    if not (0 <= uid <= _ID_MAX and 0 <= gid <= _ID_MAX):
        raise ContextError(f"uids and gids must be in range 0-{_ID_MAX}: user {wanted} has {uid}:{gid}")
    return _with_home(accounts, uid, gid, groups, name)


def _group_id(root: Root, group: str) -> int:
    number = _user_id(group)
    for entry in _groups(root):
        if entry.gid == number if number is not None else entry.name == group:
            return entry.gid
    if number is None:
        raise ContextError(f"unable to find group {group}: no matching entries in group file")
    return number


def _with_home(accounts: list[_Passwd], uid: int, gid: int, groups: tuple[int, ...], name: str) -> ResolvedUser:
    first = next((p for p in accounts if p.uid == uid), None)
    home = first.home if first is not None else ""
    groups = tuple(dict.fromkeys((gid, *groups)))
    return ResolvedUser(uid, gid, groups, home or "/", name or (first.name if first is not None else ""))


# In a tree that may not be mounted yet


def user_in(mount: Mount, user: str) -> ResolvedUser:
    """Who `user` is in a tree whose upper, if any, is still empty. Raises: ContextError."""
    from layers.snapshotters.overlay import open_tree

    if mount.type == "overlay":
        try:
            return resolve_user(_etc_opener(mount), user)
        except _NotPlain:
            pass
    root = open_tree(mount)
    try:
        return resolve_user(root, user)
    finally:
        os.close(root)


class _NotPlain(Exception):
    """/etc or a file in it is a symlink, say: only the merged tree tells where it leads."""


def _etc_opener(mount: Mount) -> Callable[[str], int | None]:
    """Opens files of /etc in a fresh snapshot, from the layer that has them: a mount would take 1 ms."""
    from layers import lowerview

    dirs = tuple(map(os.fsencode, mount.lower))
    found = lowerview.find(dirs, b"etc", mount.dialect)

    def open_file(path: str) -> int | None:
        if found is None:
            return None
        file = lowerview.find(found.dirs, os.fsencode(path.removeprefix("/etc/")), mount.dialect)
        if file is None:
            return None
        if not stat.S_ISREG(file.st.st_mode):
            raise _NotPlain
        return os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    if found is not None and not found.dirs:
        raise _NotPlain
    return open_file
