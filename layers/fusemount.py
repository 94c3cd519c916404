"""Overlays by the program fuse-overlayfs, where the kernel mounts none (before 5.11 in a user namespace, on NFS, …).

What it leaves in an upper directory is what the kernel would leave, but for two files that mark an opaque
directory once more and attributes of its own, which `normalize` removes; so snapshots are shared with the
kernel's overlay. The program takes an open /dev/fuse in place of a mount point: the mount is attached
nowhere, as with the kernel's, and the program ends with the last reference to it. Only `layers.linux` is
imported: the zygote may load this.
"""

from __future__ import annotations

import os
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
    handles: list[int] = []
    device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        tree = _attach_nowhere(device, attributes)
        try:
            # By descriptor: a path may hold the characters that part options from each other.
            paths = [*lower, *([upper, work] if upper is not None and work is not None else [])]
            handles.extend(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in paths)
            names = [f"/proc/self/fd/{fd}" for fd in handles]
            options = "lowerdir=" + ":".join(names[: len(lower)])
            if upper is not None and work is not None:
                options += f",upperdir={names[-2]},workdir={names[-1]},volatile"
            _serve(program, device, options, handles)
        except BaseException:
            os.close(tree)
            raise
        return tree
    finally:
        for fd in [device, *handles]:
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


def _serve(program: str, device: int, options: str, handles: list[int]) -> None:
    """Start the program; it has become a daemon when this returns. Raises: OSError."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        # A dup2 to the same number is how posix_spawn(3) lets a descriptor through.
        actions = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in [device, *handles]]
        actions.append((os.POSIX_SPAWN_DUP2, write, 2))
        argv = [PROGRAM, "-o", options, f"/dev/fd/{device}"]
        pid = os.posix_spawn(program, argv, {}, file_actions=actions)
    finally:
        os.close(write)
    with open(read, "rb") as stream:
        words = stream.read(4096).decode(errors="replace")
    status = os.waitpid(pid, 0)[1]
    if status:
        raise OSError(5, " ".join(words.split()) or f"{PROGRAM} ended with status {status}", program)


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
