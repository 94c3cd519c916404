"""Answers the calls of a sandbox that has a single id: owners, ids and devices as a root's build has them.

The sandbox's first process hands over the listener of its filter (`seccomp.supervised_program`); the zygote
forked this one for it. It goes into the sandbox's mount namespace, with a /proc of its own as working
directory: a path that a program names is then looked up where the program would, and there is no way out for
it. What is set is recorded with the file (`layers.ownership`) and told by stat(2); what a process
believes to be (`credentials`) is kept under a number, which is stored where children inherit it and
nothing comes of it: the soft limit RLIMIT_RTTIME, which is for real-time processes and seems to be unlimited.
Whatever has no record is left to the kernel, and so is what fails in looking for one.

No boundary is drawn between the ids: a sandbox of one id has one owner, who may do everything in it.
seccomp_unotify(2). Imported by the zygote before there is an image in sight; imports nothing later.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import struct
from collections.abc import Callable
from typing import Any, NoReturn

from builder.sandbox import channel
from builder.sandbox.channel import Socket
from builder.sandbox.credentials import UNCHANGED, Credentials, Ids
from builder.sandbox.notified import CONTINUE, STATUS, Call, Listener, enter, settle
from layers import linux, ownership
from layers.ownership import Record

_ADD_FD = 0x40182103
_ADDITION = struct.Struct("=QIIII")
_HOW = struct.Struct("=QQQ")

_FIRST_NUMBER = 1 << 40
"""In microseconds of real-time scheduling: 12 days."""
_MAX_GROUPS = 65536
_MAX_KNOWN = 1 << 18
"""Ids that may be remembered at all: this memory is not the sandbox's, and not limited with it."""
_HANDOVER_BYTES = 1 << 17
_CREATE_FLAGS = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
# Of what has no room for a record (/proc, /sys, old tmpfs) the setting of an owner is forgotten.
_NO_RECORDS = frozenset({errno.ENOTSUP, errno.EPERM})
_STATX_IDS = struct.Struct("=IIH")  # at 20: uid, gid, mode
_STATX_DEVICE = struct.Struct("=II")  # at 128


def serve(handover: Socket, pid: int) -> NoReturn:
    """The supervisor's whole life, in the process just forked, for the sandbox whose first is `pid`. Never returns."""
    status = 1
    try:
        settle(handover.fileno())
        data, fds = channel.receive(handover, _HANDOVER_BYTES, 1)
        if fds:
            try:
                shown = enter(pid)
                chroots = not os.path.samestat(os.stat("/"), os.stat(b"%s/root" % shown(pid)))
            except OSError as e:
                handover.send(f"{e.errno} {e.strerror}: {e.filename or 'proc'}".encode())
                raise
            handover.send(b"ready")
            handover.close()
            uid, gid, groups, capabilities = json.loads(data)
            first = Credentials(Ids.all(uid), Ids.all(gid), tuple(sorted(groups)))
            Supervisor(fds[0], first, shown, capabilities, chroots=chroots).loop()
        status = 0
    finally:
        os._exit(status)


class Supervisor(Listener):
    """Answers for one sandbox."""

    def __init__(
        self,
        listener: int,
        first: Credentials,
        shown: Callable[[int], bytes],
        capabilities: int,
        *,
        chroots: bool,
    ) -> None:
        super().__init__(listener, shown)
        held = {name for number, name in enumerate(linux.CAPABILITIES) if capabilities >> number & 1}
        self._set_uid, self._set_gid = "SETUID" in held, "SETGID" in held
        self._chown, self._mknod = "CHOWN" in held, "MKNOD" in held
        self._known = [first]
        self._numbers = {first: 0}
        self._room = _MAX_KNOWN
        self._stat = STATUS[linux.machine()]
        self._chroots = chroots
        self._guarded = _is_shown()
        """Whether the sandbox's /proc has us, and so others, in it, by whose links we could be led out."""
        self._held: list[int] = []

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())

    # ---- who asks -----------------------------------------------------------------------------

    def _who(self, call: Call) -> Credentials:
        number: int = resource.prlimit(call.pid, resource.RLIMIT_RTTIME)[0] - _FIRST_NUMBER
        return self._known[number] if 0 < number < len(self._known) else self._known[0]

    def _become(self, call: Call, new: Credentials) -> int:
        number = self._numbers.get(new)
        if number is None:
            self._room -= 1 + len(new.supplementary)
            if self._room < 0:
                raise OSError(errno.ENOMEM, "credentials")
            number = self._numbers[new] = len(self._known)
            self._known.append(new)
        self._check(call)
        hard = resource.prlimit(call.pid, resource.RLIMIT_RTTIME)[1]
        soft = hard if number == 0 else _FIRST_NUMBER + number
        try:
            resource.prlimit(call.pid, resource.RLIMIT_RTTIME, (soft, hard))
        except ValueError as e:  # a hard limit below our numbers
            raise PermissionError(errno.EPERM, "RLIMIT_RTTIME") from e
        return 0

    def _set_users(self, call: Call, change: Callable[[Ids, bool], Ids]) -> int:
        who = self._who(call)
        return self._become(call, who._replace(users=_permitted(change, who.users, who.privileged and self._set_uid)))

    def _set_groups(self, call: Call, change: Callable[[Ids, bool], Ids]) -> int:
        who = self._who(call)
        return self._become(call, who._replace(groups=_permitted(change, who.groups, who.privileged and self._set_gid)))

    def do_setuid(self, call: Call) -> int:
        return self._set_users(call, lambda ids, may: ids.set(call.word(0), may))

    def do_setgid(self, call: Call) -> int:
        return self._set_groups(call, lambda ids, may: ids.set(call.word(0), may))

    def do_setreuid(self, call: Call) -> int:
        return self._set_users(call, lambda ids, may: ids.set_re(call.word(0), call.word(1), may))

    def do_setregid(self, call: Call) -> int:
        return self._set_groups(call, lambda ids, may: ids.set_re(call.word(0), call.word(1), may))

    def do_setresuid(self, call: Call) -> int:
        return self._set_users(call, lambda ids, may: ids.set_res(call.word(0), call.word(1), call.word(2), may))

    def do_setresgid(self, call: Call) -> int:
        return self._set_groups(call, lambda ids, may: ids.set_res(call.word(0), call.word(1), call.word(2), may))

    def do_setfsuid(self, call: Call) -> int:
        before = self._who(call).users.files
        self._set_users(call, lambda ids, may: ids.set_files(call.word(0), may))
        return before

    def do_setfsgid(self, call: Call) -> int:
        before = self._who(call).groups.files
        self._set_groups(call, lambda ids, may: ids.set_files(call.word(0), may))
        return before

    def do_setgroups(self, call: Call) -> int:
        count = call.word(0)
        who = self._who(call)
        if not (who.privileged and self._set_gid):
            raise PermissionError(errno.EPERM, "setgroups")
        if count > _MAX_GROUPS:
            raise OSError(errno.EINVAL, "setgroups")
        data = linux.read_memory(call.pid, call.args[1], 4 * count) if count else b""
        groups = struct.unpack(f"={len(data) // 4}I", data)
        return self._become(call, who._replace(supplementary=tuple(sorted(groups))))  # as the kernel keeps them

    def do_getuid(self, call: Call) -> int:
        return self._who(call).users.real

    def do_geteuid(self, call: Call) -> int:
        return self._who(call).users.effective

    def do_getgid(self, call: Call) -> int:
        return self._who(call).groups.real

    def do_getegid(self, call: Call) -> int:
        return self._who(call).groups.effective

    def do_getresuid(self, call: Call) -> int:
        return self._tell_three(call, self._who(call).users)

    def do_getresgid(self, call: Call) -> int:
        return self._tell_three(call, self._who(call).groups)

    def _tell_three(self, call: Call, ids: Ids) -> int:
        self._check(call)
        for address, number in zip(call.args[:3], ids, strict=False):
            linux.write_memory(call.pid, address, struct.pack("=I", number))
        return 0

    def do_getgroups(self, call: Call) -> int:
        groups = self._who(call).supplementary
        room = call.descriptor(0)
        if room:
            if room < len(groups):
                raise OSError(errno.EINVAL, "getgroups")
            self._check(call)
            linux.write_memory(call.pid, call.args[1], struct.pack(f"={len(groups)}I", *groups))
        return len(groups)

    def do_setrlimit(self, call: Call) -> int:
        return 0

    def do_getrlimit(self, call: Call) -> int:
        return self._tell_unlimited(call, 1)

    def do_prlimit64(self, call: Call) -> int:
        return self._tell_unlimited(call, 3)

    def _tell_unlimited(self, call: Call, index: int) -> int:
        self._check(call)
        if call.args[index]:
            linux.write_memory(call.pid, call.args[index], b"\xff" * 16)
        return 0

    def do_prctl(self, call: Call) -> Any:
        """PR_SET_KEEPCAPS: who sets it keeps its privileges when it becomes another user."""
        who = self._who(call)
        keeping = who.privileged and bool(call.args[1])
        if who.keeping != keeping:
            self._become(call, who._replace(keeping=keeping))
        return CONTINUE

    def do_execve(self, call: Call) -> Any:
        return self._execute(call, lambda: self._place(call, None, 0)[0])

    def do_execveat(self, call: Call) -> Any:
        return self._execute(call, lambda: self._named_or_open(call, call.word(4))[0])

    def _execute(self, call: Call, find: Callable[[], bytes]) -> Any:
        """Take over the owner of a set-id program. What cannot be executed is left to the kernel to refuse."""
        try:
            place = find()
            mode = os.stat(place).st_mode
            owner = group = None
            if mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(mode) and self._may_gain(call, place):
                record = ownership.load(place, mode, follow=True) or Record()
                owner = record.uid if mode & stat.S_ISUID else None
                group = record.gid if mode & stat.S_ISGID and mode & stat.S_IXGRP else None
            who = self._who(call)
            new = who.executing(owner, group)
            if new != who:
                self._become(call, new)
        except OSError:
            pass
        return CONTINUE

    def _may_gain(self, call: Call, place: bytes) -> bool:
        """Whether set-id bits count: not in a script, nor under no_new_privs. Raises: OSError."""
        fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # whatever it has become meanwhile
        try:
            if os.read(fd, 2) == b"#!":
                return False
        finally:
            os.close(fd)
        with open(call.of_process(b"status"), "rb") as status:
            return b"NoNewPrivs:\t1\n" not in status.read()

    def do_chroot(self, call: Call) -> Any:
        self._chroots = True
        return CONTINUE

    # ---- where it is --------------------------------------------------------------------------

    def _place(self, call: Call, directory: int | None, index: int, *, follow: bool = True) -> tuple[bytes, bool]:
        """A path of ours for what a path of theirs names, and whether that is to be followed. Raises: OSError."""
        if self._guarded:
            name = call.string(index)
            flags = os.O_PATH | (0 if follow else os.O_NOFOLLOW)
            return b"self/fd/%d" % self._hold(self._start(call, directory, name), name, flags), True
        return self._path(call, directory, index), follow

    def _new_place(self, call: Call, directory: int | None, index: int) -> bytes:
        """A path of ours for something that is to be made. Raises: OSError."""
        if not self._guarded:
            return self._path(call, directory, index)
        name = call.string(index)
        head, _, tail = name.rstrip(b"/").rpartition(b"/")
        if tail in (b"", b".", b".."):
            raise FileExistsError(errno.EEXIST, "path")
        parent = self._hold(self._start(call, directory, name), head or b".", os.O_PATH | os.O_DIRECTORY)
        return b"self/fd/%d/%s" % (parent, tail)

    def _path(self, call: Call, directory: int | None, index: int) -> bytes:
        path = call.path(directory, index)
        if self._chroots and path[:1] == b"/":
            return call.of_process(b"root" + path)
        return path

    def _start(self, call: Call, directory: int | None, name: bytes) -> int:
        """Where a lookup begins that no link of /proc may lead elsewhere. Raises: OSError."""
        absolute = name[:1] == b"/"
        fd = os.open(call.of_process(b"root") if absolute else call.base(directory), os.O_PATH | os.O_CLOEXEC)
        self._held.append(fd)
        return fd

    def _hold(self, start: int, name: bytes, flags: int) -> int:
        """Open what is there until the answer is given. Raises: OSError."""
        resolve = linux.RESOLVE_NO_MAGICLINKS | (linux.RESOLVE_IN_ROOT if name[:1] == b"/" else 0)
        fd = linux.openat2(start, name, flags, resolve=resolve)
        self._held.append(fd)
        return fd

    # ---- what files are -----------------------------------------------------------------------

    def do_stat(self, call: Call) -> Any:
        return self._tell_status(call, lambda: self._place(call, None, 0), 1)

    def do_lstat(self, call: Call) -> Any:
        return self._tell_status(call, lambda: self._place(call, None, 0, follow=False), 1)

    def do_fstat(self, call: Call) -> Any:
        return self._tell_status(call, lambda: (call.base(0), True), 1)

    def do_newfstatat(self, call: Call) -> Any:
        return self._tell_status(call, lambda: self._named_or_open(call, call.word(3)), 2)

    def do_statx(self, call: Call) -> Any:
        try:
            place, follow = self._named_or_open(call, call.word(2))
            record = _recorded(place, follow)
            if record is None:
                return CONTINUE
            flags = 0 if follow else linux.AT_SYMLINK_NOFOLLOW
            data = linux.statx(linux.AT_FDCWD, place, flags, call.word(3))
            mode = _STATX_IDS.unpack_from(data, 20)[2]
            if record.kind:
                mode = record.kind | stat.S_IMODE(mode)
                _STATX_DEVICE.pack_into(data, 128, os.major(record.device), os.minor(record.device))
            _STATX_IDS.pack_into(data, 20, record.uid, record.gid, mode)
            self._check(call)
            linux.write_memory(call.pid, call.args[4], bytes(data))
        except OSError:
            return CONTINUE
        return 0

    def _named_or_open(self, call: Call, flags: int) -> tuple[bytes, bool]:
        """What a descriptor and a path name, and whether that is to be followed. Raises: OSError."""
        if flags & linux.AT_EMPTY_PATH and (call.args[1] == 0 or not call.string(1)):
            return call.base(0), True
        return self._place(call, 0, 1, follow=not flags & linux.AT_SYMLINK_NOFOLLOW)

    def _tell_status(self, call: Call, find: Callable[[], tuple[bytes, bool]], buffer: int) -> Any:
        try:
            place, follow = find()
            record = _recorded(place, follow)
            if record is None:
                return CONTINUE
            data = self._stat(record.applied(os.stat(place, follow_symlinks=follow)))
            self._check(call)
            linux.write_memory(call.pid, call.args[buffer], data)
        except OSError:
            return CONTINUE
        return 0

    def do_listxattr(self, call: Call) -> Any:
        return self._tell_attributes(call, *self._place(call, None, 0))

    def do_llistxattr(self, call: Call) -> Any:
        return self._tell_attributes(call, *self._place(call, None, 0, follow=False))

    def do_flistxattr(self, call: Call) -> Any:
        return self._tell_attributes(call, call.base(0), True)

    def _tell_attributes(self, call: Call, place: bytes, follow: bool) -> Any:
        """Records are nobody's to see: a program that copies attributes would copy owners by them."""
        names = os.listxattr(place, follow_symlinks=follow)
        if ownership.ATTRIBUTE not in names and ownership.CAPABILITY not in names:
            return CONTINUE
        mode = os.stat(place, follow_symlinks=follow).st_mode
        data = b"".join(os.fsencode(name) + b"\0" for name in names if not ownership.is_record(name, mode))
        room = call.args[2]
        if room:
            if room < len(data):
                raise OSError(errno.ERANGE, "listxattr")
            self._check(call)
            if data:
                linux.write_memory(call.pid, call.args[1], data)
        return len(data)

    # ---- owners -------------------------------------------------------------------------------

    def do_chown(self, call: Call) -> int:
        return self._own(call, *self._place(call, None, 0), call.word(1), call.word(2))

    def do_lchown(self, call: Call) -> int:
        return self._own(call, *self._place(call, None, 0, follow=False), call.word(1), call.word(2))

    def do_fchown(self, call: Call) -> int:
        return self._own(call, call.base(0), True, call.word(1), call.word(2))

    def do_fchownat(self, call: Call) -> int:
        return self._own(call, *self._named_or_open(call, call.word(4)), call.word(2), call.word(3))

    def _own(self, call: Call, place: bytes, follow: bool, uid: int, gid: int) -> int:
        who = self._who(call)
        fd = os.open(place, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
        try:
            self._check(call)
            mode = os.fstat(fd).st_mode
            held = b"self/fd/%d" % fd
            old = ownership.load(held, mode, follow=True) or Record()
            if not (who.privileged and self._chown) and (
                who.users.files != old.uid or uid not in (UNCHANGED, old.uid)
                or not (gid in (UNCHANGED, old.gid) or who.in_group(gid))
            ):  # fmt: skip
                raise PermissionError(errno.EPERM, "chown")
            # For its errors, and for what it does besides: it takes set-id bits and capabilities.
            os.chown(held, 0, 0)
            new = old._replace(uid=old.uid if uid == UNCHANGED else uid, gid=old.gid if gid == UNCHANGED else gid)
            _keep(held, mode, new, follow=True)
        finally:
            os.close(fd)
        return 0

    # ---- new files ----------------------------------------------------------------------------

    def _owner_of_new(self, who: Credentials, place: bytes) -> Record:
        """Whose a file is that `who` makes at a place. Raises: OSError."""
        parent = os.path.dirname(place.rstrip(b"/")) or b"/"
        gid = who.groups.files
        mode = os.stat(parent).st_mode
        if mode & stat.S_ISGID:
            gid = (ownership.load(parent, mode, follow=True) or Record()).gid
        return Record(who.users.files, gid)

    def _as_if_by(self, call: Call) -> None:
        """Take over the umask. Raises: OSError."""
        with open(call.of_process(b"status"), "rb") as stream:
            for line in stream:
                if line.startswith(b"Umask:"):
                    os.umask(int(line.split()[1], 8))
                    break
        self._check(call)

    def do_creat(self, call: Call) -> Any:
        return self._open(call, None, 0, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, call.word(1))

    def do_open(self, call: Call) -> Any:
        return self._open(call, None, 0, call.word(1), call.word(2))

    def do_openat(self, call: Call) -> Any:
        return self._open(call, 0, 1, call.word(2), call.word(3))

    def do_openat2(self, call: Call) -> Any:
        how = linux.read_memory(call.pid, call.args[2], _HOW.size)
        if len(how) < _HOW.size:
            return CONTINUE
        flags, mode, resolve = _HOW.unpack(how)
        if not flags & (os.O_CREAT | _TMPFILE):
            return CONTINUE
        return self._open(call, 0, 1, flags, mode, resolve)

    def _open(
        self, call: Call, directory: int | None, index: int, flags: int, mode: int, resolve: int | None = None
    ) -> Any:
        """Make the file here if it is not there, and hand its descriptor over: the kernel would own it to 0."""
        try:
            unnamed, inherited = flags & _TMPFILE, flags & os.O_CLOEXEC
            place = self._place(call, directory, index)[0] if unnamed else self._new_place(call, directory, index)
            owner = self._owner_of_new(self._who(call), place + b"/-" if unnamed else place)
            if owner == Record():
                return CONTINUE
            self._as_if_by(call)
            flags |= os.O_CLOEXEC if unnamed else _CREATE_FLAGS
            if resolve is None:
                fd = os.open(place, flags, mode & 0o7777)
            else:
                base = os.open(call.base(0), os.O_PATH | os.O_CLOEXEC)
                try:
                    resolve |= linux.RESOLVE_NO_MAGICLINKS if self._guarded else 0
                    fd = linux.openat2(base, call.string(index), flags, mode, resolve)
                finally:
                    os.close(base)
        except OSError:
            return CONTINUE  # it is there already, or the kernel tells why not
        try:
            _keep(b"self/fd/%d" % fd, stat.S_IFREG, owner, follow=True)
            # Two steps, as before Linux 5.14 the answer does not go along.
            return fcntl.ioctl(self._listener, _ADD_FD, bytearray(_ADDITION.pack(call.id, 0, fd, 0, inherited)))
        finally:
            os.close(fd)

    def do_mkdir(self, call: Call) -> Any:
        return self._make(call, self._new_place(call, None, 0), lambda place: os.mkdir(place, call.word(1) & 0o7777))

    def do_mkdirat(self, call: Call) -> Any:
        return self._make(call, self._new_place(call, 0, 1), lambda place: os.mkdir(place, call.word(2) & 0o7777))

    def do_symlink(self, call: Call) -> Any:
        return self._make(call, self._new_place(call, None, 1), lambda place: os.symlink(call.string(0), place))

    def do_symlinkat(self, call: Call) -> Any:
        return self._make(call, self._new_place(call, 1, 2), lambda place: os.symlink(call.string(0), place))

    def do_mknod(self, call: Call) -> Any:
        return self._node(call, self._new_place(call, None, 0), call.word(1), call.word(2))

    def do_mknodat(self, call: Call) -> Any:
        return self._node(call, self._new_place(call, 0, 1), call.word(2), call.word(3))

    def _node(self, call: Call, place: bytes, mode: int, device: int) -> Any:
        if not ownership.is_node(mode, device):
            return self._make(call, place, lambda place: os.mknod(place, mode, device))
        who = self._who(call)
        if not (who.privileged and self._mknod):
            raise PermissionError(errno.EPERM, "mknod")
        owner = self._owner_of_new(who, place)
        self._as_if_by(call)
        fd = os.open(place, os.O_WRONLY | _CREATE_FLAGS, stat.S_IMODE(mode))
        try:
            ownership.keep(
                b"self/fd/%d" % fd, stat.S_IFREG, owner._replace(kind=stat.S_IFMT(mode), device=device), follow=True
            )
        finally:
            os.close(fd)
        return 0

    def _make(self, call: Call, place: bytes, make: Callable[[bytes], None]) -> Any:
        """Make something that its maker, or its directory, does not own to 0. Raises: OSError."""
        owner = self._owner_of_new(self._who(call), place)
        if owner == Record():
            return CONTINUE
        self._as_if_by(call)
        make(place)
        _keep(place.rstrip(b"/"), os.lstat(place.rstrip(b"/")).st_mode, owner, follow=False)
        return 0


def _is_shown() -> bool:
    try:
        return bool(os.readlink("/proc/self"))
    except OSError:
        return False


def _permitted(change: Callable[[Ids, bool], Ids], ids: Ids, privileged: bool) -> Ids:
    try:
        return change(ids, privileged)
    except PermissionError as e:
        raise PermissionError(errno.EPERM, "set ids") from e


def _keep(place: bytes, mode: int, record: Record, *, follow: bool) -> None:
    try:
        ownership.keep(place, mode, record, follow=follow)
    except OSError as e:
        if e.errno not in _NO_RECORDS:
            raise


def _recorded(place: bytes, follow: bool) -> Record | None:
    """The record of whatever is there: mostly there is none, which one question tells. Raises: OSError."""
    names = os.listxattr(place, follow_symlinks=follow)
    if ownership.ATTRIBUTE not in names and ownership.CAPABILITY not in names:
        return None
    return ownership.load(place, os.stat(place, follow_symlinks=follow).st_mode, follow=follow)
