"""Overlays by the program fuse-overlayfs, where the kernel mounts none (before 5.11 in a user namespace, on NFS, …).

What it leaves in an upper directory is what the kernel would leave, but for two files that mark an opaque
directory once more and attributes of its own, which `normalize` removes; so snapshots are shared with the
kernel's overlay. The program takes an open /dev/fuse in place of a mount point: the mount is attached
nowhere, as with the kernel's, and the program, a child of the caller's, ends with the last reference to
it. Only `layers.linux` is imported: the zygote may load this.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from layers import linux

PROGRAM = "fuse-overlayfs"
OPAQUE_MARKS = (".wh..wh..opq", ".wh..opq")
_OWN_ATTRIBUTES = "user.fuseoverlayfs."
"""Where a file was copied up from, and as an ordinary user's, that a directory is opaque."""
_DEVICE = "/dev/fuse"


def find_program() -> str | None:
    """The path of fuse-overlayfs, where that and its device are to be had."""
    for directory in ("/usr/bin", "/usr/local/bin", "/bin"):
        path = f"{directory}/{PROGRAM}"
        if os.access(path, os.X_OK) and os.access(_DEVICE, os.R_OK | os.W_OK):
            return path
    return None


def mount(
    program: str, lower: list[str], upper: str | None = None, work: str | None = None, attributes: int = 0
) -> int:
    """Mount an overlay without attaching it anywhere; the descriptor is an O_PATH dirfd of its root.

    `lower` runs from the topmost to the base. May be called from any thread. Raises: OSError with the
    program's words.
    """
    handles = [os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)]
    try:
        tree = _attach_nowhere(handles[0], attributes)
        try:
            # By descriptor: a path may hold the characters that part options from each other.
            paths = [*lower, *([upper, work] if upper is not None and work is not None else [])]
            handles.extend(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in paths)
            names = [f"/proc/self/fd/{fd}" for fd in handles[1:]]
            options = "lowerdir=" + ":".join(names[: len(lower)])
            if upper is not None and work is not None:
                options += f",upperdir={names[-2]},workdir={names[-1]},volatile"
            _serve(program, tree, options, handles)
        except BaseException:
            os.close(tree)
            raise
        return tree
    finally:
        for fd in handles:
            os.close(fd)


def _attach_nowhere(device: int, attributes: int) -> int:
    fs = linux.fsopen("fuse")
    try:
        settings = (("fd", device), ("rootmode", "40000"), ("user_id", os.geteuid()), ("group_id", os.getegid()))
        for key, value in settings:
            linux.fsconfig_set_string(fs, key, str(value))
        linux.fsconfig_set_flag(fs, "default_permissions")
        linux.fsconfig_set_flag(fs, "allow_other")
        linux.fsconfig_create(fs)
        return linux.fsmount(fs, attributes)
    finally:
        os.close(fs)


def _serve(program: str, tree: int, options: str, handles: list[int]) -> None:
    """Start the program, which takes over the first handle, and wait until it answers. Raises: OSError."""
    _reap()
    device = handles[0]
    words = os.memfd_create(PROGRAM, os.MFD_CLOEXEC)
    try:
        # A dup2 to the same number is how posix_spawn(3) lets a descriptor through.
        actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in handles]
        actions.append((os.POSIX_SPAWN_DUP2, words, 2))
        argv = [PROGRAM, "-f", "-o", options, f"/dev/fd/{device}"]
        # In a session of its own: a terminal's interrupt is for who has the mount.
        pid = os.posix_spawn(program, argv, {}, file_actions=actions, setsid=True)
        # Ours would keep the mount waiting for a program that has died.
        os.close(handles.pop(0))
        try:
            os.stat(".", dir_fd=tree)
        except OSError as e:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            said = " ".join(os.pread(words, 4096, 0).decode(errors="replace").split())
            raise OSError(e.errno, said or e.strerror, program) from e
        _serving.add(pid)
    finally:
        os.close(words)


_serving: set[int] = set()
"""Children that end with their mounts, and are reaped when the next one is started: none lingers for long."""


_reaping = threading.Lock()


def _reap() -> None:
    with _reaping:
        for pid in tuple(_serving):
            with suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            _serving.discard(pid)


def normalize(upper: str, dialect: str) -> None:
    """Make an upper directory what the kernel would have left, in its dialect. Raises: OSError."""
    for _directory, names, files, fd in os.fwalk(upper):
        marked = OPAQUE_MARKS[0] in files
        for name in {*names, *files}.difference(OPAQUE_MARKS if marked else ()):
            _forget_origin(f"/proc/self/fd/{fd}/{name}")
        if marked:
            os.setxattr(fd, f"{dialect}.overlay.opaque", b"y")
            for name in OPAQUE_MARKS:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=fd)


def _forget_origin(path: str) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(_OWN_ATTRIBUTES):
            os.removexattr(path, name, follow_symlinks=False)
