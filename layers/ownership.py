"""Owners and devices that the disk cannot hold: what is recorded of them in a user namespace.

No user namespace can make a device, and in one that maps a single id every file belongs to that one.
What an image says of a file is then kept beside it, so that it follows the file through renames, links
and overlayfs's copying up, and goes when the file goes:

    regular files, directories   user.pybuild.owner = UID:GID, or UID:GID:c:MAJOR:MINOR of a device,
                                 for which an empty file stands (b: of a block device)
    links, fifos, sockets        cannot have user attributes; security.capability, which says nothing
                                 of them, holds the numbers where a program's capabilities would be

A file without a record is 0:0. Modes, set-id bits and capabilities are the disk's own. Where there are
ids enough, owners are the disk's, too: only devices are recorded, as `::c:MAJOR:MINOR`.

`here` gives the way of this process: who unpacks, copies or reads trees asks it once and calls its
methods in place of the system's. The calls of a RUN are answered by `builder.sandbox.supervisor`, with
`load` and `keep`, and by `builder.sandbox.nodes`, with `keep_device`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from functools import cache

from layers.values import NamedTuple

ATTRIBUTE = "user.pybuild.owner"
CAPABILITY = "security.capability"

_CARRIER = struct.Struct("<5I")
_REVISION, _MARK = 0x02000000, 0x6E776F70
_LETTERS = {b"c": stat.S_IFCHR, b"b": stat.S_IFBLK}
_KINDS = {kind: letter for letter, kind in _LETTERS.items()}
_MAX_ID = 0xFFFFFFFE  # -1 means "leave it" to chown(2)
_NOTHING = frozenset({errno.ENODATA, errno.ENOTSUP, errno.EPERM})

Place = bytes | str | int
"""A path, whose last component is not followed unless that is asked for, or an open descriptor."""


class Record(NamedTuple):
    """What is said of a file. `kind` is S_IFCHR or S_IFBLK for one that stands for a device, else 0."""

    uid: int = 0
    gid: int = 0
    kind: int = 0
    device: int = 0

    def applied(self, st: os.stat_result) -> os.stat_result:
        """The status that the file would have if the disk could hold this."""
        mode = self.kind | stat.S_IMODE(st.st_mode) if self.kind else st.st_mode
        times = (int(st.st_atime), int(st.st_mtime), int(st.st_ctime))
        size = 0 if self.kind else st.st_size
        fields = (mode, st.st_ino, st.st_dev, st.st_nlink, self.uid, self.gid, size, *times)
        more = {
            "st_atime_ns": st.st_atime_ns,
            "st_mtime_ns": st.st_mtime_ns,
            "st_ctime_ns": st.st_ctime_ns,
            "st_blksize": st.st_blksize,
            "st_blocks": st.st_blocks,
            "st_rdev": self.device if self.kind else st.st_rdev,
        }
        return os.stat_result(fields, more)


def is_record(name: str, mode: int, value: bytes | None = None) -> bool:
    """Whether an attribute of a file of that type is a record, which never enters a layer.

    Without its `value`, a capability of what bears no attributes of users counts as one.
    """
    if name != CAPABILITY or _bears_attributes(mode):
        return name == ATTRIBUTE
    return value is None or parse(value, mode) is not None


def without_records(attributes: dict[str, bytes], mode: int) -> dict[str, bytes]:
    """Those attributes of a file of that type that an image has, too."""
    return {name: value for name, value in attributes.items() if not is_record(name, mode, value)}


def load(place: Place, mode: int, *, follow: bool = False) -> Record | None:
    """The record of a file of that type; None if it has none, or one that is not ours. Raises: OSError."""
    value = _get(place, ATTRIBUTE if _bears_attributes(mode) else CAPABILITY, follow)
    return None if value is None else parse(value, mode)


def parse(value: bytes, mode: int) -> Record | None:
    """A record's text or numbers; None for what anybody else wrote there."""
    if not _bears_attributes(mode):
        if len(value) != _CARRIER.size:
            return None
        revision, uid, gid, mark, _ = _CARRIER.unpack(value)
        return Record(uid, gid) if (revision, mark) == (_REVISION, _MARK) and max(uid, gid) <= _MAX_ID else None
    if value[:2] == b"::":
        value = b"0:0" + value[1:]
    parts = value.split(b":")
    numbers = [int(part) for part in (*parts[:2], *parts[3:]) if part.isdigit() and len(part) <= 10]
    if len(parts) == 2 and len(numbers) == 2 and max(numbers) <= _MAX_ID:
        return Record(*numbers)
    if (
        len(parts) == 5
        and len(numbers) == 4
        and max(numbers) <= _MAX_ID
        and stat.S_ISREG(mode)
        and parts[2] in _LETTERS
    ):
        return Record(numbers[0], numbers[1], _LETTERS[parts[2]], os.makedev(numbers[2], numbers[3]))
    return None


def keep(place: Place, mode: int, record: Record, *, follow: bool = False) -> None:
    """Make this the record of a file of that type. Raises: OSError (ENOTSUP where there are no attributes)."""
    name = ATTRIBUTE if _bears_attributes(mode) else CAPABILITY
    if record == Record():
        try:
            if isinstance(place, int):
                os.removexattr(place, name)
            else:
                os.removexattr(place, name, follow_symlinks=follow)
        except OSError as e:
            if e.errno not in {errno.ENODATA, errno.ENOTSUP}:
                raise
        return
    if name == CAPABILITY:
        value = _CARRIER.pack(_REVISION, record.uid, record.gid, _MARK, 0)
    else:
        value = b"%d:%d" % (record.uid, record.gid)
        if record.kind:
            value += _device(record.kind, record.device)
    if isinstance(place, int):
        os.setxattr(place, name, value)
    else:
        os.setxattr(place, name, value, follow_symlinks=follow)


def keep_device(fd: int, kind: int, device: int) -> None:
    """Make an open empty file, which has its owner, stand for a device. Raises: OSError."""
    os.setxattr(fd, ATTRIBUTE, b":" + _device(kind, device))


def _device(kind: int, device: int) -> bytes:
    return b":%s:%d:%d" % (_KINDS[kind], os.major(device), os.minor(device))


def is_node(mode: int, device: int) -> bool:
    """Whether mknod(2) is asked for a device: overlayfs's whiteout is one of 0:0, which anybody may make."""
    kind = stat.S_IFMT(mode)
    return kind == stat.S_IFBLK or (kind == stat.S_IFCHR and device != 0)


class Owners:
    """The ways of root: the disk holds all. `Deviceless` and `Recorded` have those of user namespaces."""

    recording = False
    """Whether owners are recorded, too: those on the disk say nothing."""
    deviceless = False
    """Whether devices are recorded."""

    def fchown(self, fd: int, uid: int, gid: int) -> None:
        """fchown(2). Raises: OSError."""
        os.fchown(fd, uid, gid)

    def lchown(self, name: bytes | str, uid: int, gid: int, *, dir_fd: int) -> None:
        """fchownat(2) of an entry itself. Raises: OSError."""
        os.chown(name, uid, gid, dir_fd=dir_fd, follow_symlinks=False)

    def mknod(self, name: bytes | str, mode: int, device: int, *, dir_fd: int) -> None:
        """mknodat(2). Raises: OSError."""
        os.mknod(name, mode, device, dir_fd=dir_fd)

    def concerns(self, st: os.stat_result) -> bool:
        """Whether a file of that status may be something else to an image, so that `seen` has to tell."""
        return False

    def seen(self, place: Place, st: os.stat_result) -> os.stat_result:
        """The status `st` of what is at `place`, as an image has it. Raises: OSError."""
        return st


class Deviceless(Owners):
    """The ways of a process in a user namespace of many ids."""

    deviceless = True

    def mknod(self, name: bytes | str, mode: int, device: int, *, dir_fd: int) -> None:
        if not is_node(mode, device):
            os.mknod(name, mode, device, dir_fd=dir_fd)
            return
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IMODE(mode), dir_fd=dir_fd)
        try:
            self._keep_device(fd, stat.S_IFMT(mode), device)
        except OSError as e:
            os.unlink(name, dir_fd=dir_fd)
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) if e.errno == errno.ENOTSUP else e from e
        finally:
            os.close(fd)

    def _keep_device(self, fd: int, kind: int, device: int) -> None:
        keep_device(fd, kind, device)

    def concerns(self, st: os.stat_result) -> bool:
        return stat.S_ISREG(st.st_mode)

    def seen(self, place: Place, st: os.stat_result) -> os.stat_result:
        record = load(place, st.st_mode) if self.concerns(st) else None
        return st if record is None or not record.kind else record._replace(uid=st.st_uid, gid=st.st_gid).applied(st)


class Recorded(Deviceless):
    """The ways of a process with a single id."""

    recording = True

    def fchown(self, fd: int, uid: int, gid: int) -> None:
        os.fchown(fd, 0, 0)  # for what the kernel does besides: it takes capabilities and set-id bits
        _own(fd, os.fstat(fd).st_mode, uid, gid)

    def lchown(self, name: bytes | str, uid: int, gid: int, *, dir_fd: int) -> None:
        os.chown(name, 0, 0, dir_fd=dir_fd, follow_symlinks=False)
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        _own(b"/proc/self/fd/%d/%s" % (dir_fd, os.fsencode(name)), mode, uid, gid)

    def _keep_device(self, fd: int, kind: int, device: int) -> None:
        keep(fd, stat.S_IFREG, Record(0, 0, kind, device))

    def concerns(self, st: os.stat_result) -> bool:
        return True

    def seen(self, place: Place, st: os.stat_result) -> os.stat_result:
        record = load(place, st.st_mode)
        return st if record is None else record.applied(st)


def _own(place: Place, mode: int, uid: int, gid: int) -> None:
    old = load(place, mode) or Record()
    keep(place, mode, old._replace(uid=old.uid if uid == -1 else uid, gid=old.gid if gid == -1 else gid))


def here() -> Owners:
    """The way of this process as it is now: not to be kept while it enters a namespace."""
    if os.geteuid() != 0:
        return NATIVE
    try:
        return _of_namespace(os.stat("/proc/self/ns/user").st_ino)
    except OSError:
        return NATIVE


NATIVE, DEVICELESS, RECORDED = Owners(), Deviceless(), Recorded()
_ALL_IDS = 4294967295


@cache
def _of_namespace(_inode: int) -> Owners:
    """The way in this process's user namespace, whose map is set once. Raises: OSError."""
    with open("/proc/self/uid_map", encoding="utf-8") as stream:
        counts = [int(line.split()[2]) for line in stream]
    return RECORDED if counts == [1] else NATIVE if counts == [_ALL_IDS] else DEVICELESS


def _bears_attributes(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _get(place: Place, name: str, follow: bool) -> bytes | None:
    try:
        if isinstance(place, int):
            return os.getxattr(place, name)
        return os.getxattr(place, name, follow_symlinks=follow)
    except OSError as e:
        if e.errno in _NOTHING:
            return None
        raise
