"""Random trees and random edits, as data: operations that are applied to a directory, failing ones skipped.

Only the stdlib: an ordinary user runs this, too, with an interpreter that has no test tools.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Sequence
from typing import NamedTuple

# Few places, so that edits meet each other.
PATHS = (
    b"a", b"b", b"dir", b"dir/a", b"dir/b", b"dir/sub", b"dir/sub/a", b"dir/sub/b",
    b"n\xff\xfe", b"b/x", b"b/y", b"long" * 30 + b"/" + b"name" * 30,
)  # fmt: skip
CAPABILITY = ("security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
"""cap_net_bind_service=ep, in the form that a process within its own user namespace sees."""
MODES = (0o644, 0o600, 0o755, 0o4755, 0o2750, 0o1777, 0o000)


class Edit(NamedTuple):
    """One operation. `other` is the second path of links and renames; `number` chooses variants."""

    verb: str
    path: bytes
    other: bytes
    number: int


VERBS = (
    "write", "write", "write", "append", "mkdir", "mkdir", "remove", "remove", "symlink", "hardlink", "hardlink",
    "rename", "rename", "chmod", "chown", "xattr", "fifo", "device", "rebuild", "retouch",
)  # fmt: skip


def random_edits(seed: int, count: int) -> list[Edit]:
    """Edits drawn from `seed`."""
    source = random.Random(seed)
    return [
        Edit(source.choice(VERBS), source.choice(PATHS), source.choice(PATHS), source.randrange(7))
        for _ in range(count)
    ]


def apply_edits(root: bytes, many: Sequence[Edit], *, time_s: int) -> None:
    """Do all of them in `root`. Times of files are set, so that they survive a tar's whole seconds.

    A child does it, with `root` as its root: symlinks lead wherever they like, but never out of there.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chroot(root)
            os.chdir("/")
            for position, edit in enumerate(many):
                _attempt(edit, time_s + position)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0


def _attempt(edit: Edit, time_s: int) -> None:
    path = b"/" + edit.path
    try:
        _apply(path, edit)
        if not stat.S_ISDIR(os.lstat(path).st_mode) and edit.verb != "retouch":
            when = time_s * 1_000_000_000
            os.utime(path, ns=(when, when), follow_symlinks=False)
    except OSError:
        # Not every operation suits the tree as it is by now; what was done of it stays.
        return


def _apply(path: bytes, edit: Edit) -> None:
    other = b"/" + edit.other
    verb, number = edit.verb, edit.number
    if verb in {"write", "append"}:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        flags = os.O_APPEND if verb == "append" else os.O_TRUNC
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags, 0o644)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.write(fd, b"%d" % number * (1 + number * 700))
        finally:
            os.close(fd)
    elif verb == "mkdir":
        os.makedirs(path)
    elif verb == "remove":
        _remove(path)
    elif verb == "symlink":
        os.symlink((b"/a", b"../b", b"missing", b"c/dir", b"/", b".", b"x" * 150)[number], path)
    elif verb == "hardlink":
        os.link(other, path, follow_symlinks=False)
    elif verb == "rename":
        os.rename(other, path)
    elif verb == "chmod":
        os.chmod(path, MODES[number])
    elif verb == "chown":
        os.lchown(path, 1000 + number, (5, 3_000_000)[number % 2])
    elif verb == "xattr":
        name, value = (("user.k", b"\0\xff\n"), ("user.l", b"="), ("user.k", b"v" * 200), CAPABILITY)[number % 4]
        os.setxattr(path, name, value, follow_symlinks=False)
    elif verb == "fifo":
        os.mkfifo(path, 0o640)
    elif verb == "device":
        os.mknod(path, (stat.S_IFCHR, stat.S_IFBLK)[number % 2] | 0o660, os.makedev(7, number + 1))
    elif verb == "rebuild":
        _rebuild(path, number)
    elif verb == "retouch":
        # Copied up without a change.
        info = os.lstat(path)
        if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
            return  # overlayfs would part it from its other names, which is no change that a layer mentions
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _rebuild(path: bytes, number: int) -> None:
    """Replace a directory by a new one that holds a part of the same names: overlayfs makes it opaque."""
    if os.path.islink(path):
        return
    held = [(name, os.path.isfile(path + b"/" + name)) for name in sorted(os.listdir(path))[: number % 3]]
    _remove(path)
    os.mkdir(path)
    for name, is_file in held:
        if is_file:
            with open(path + b"/" + name, "xb") as file:
                file.write(b"again")
        else:
            os.mkdir(path + b"/" + name)


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
