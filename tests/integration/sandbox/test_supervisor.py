"""A sandbox with a single id: what programs set of owners and ids they find again, and nothing comes of nonsense."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.sandbox.spec import SandboxMount
from tests.integration.sandbox.boxes import UserBox, make_image
from tests.integration.sandbox.driver import Outcome
from tests.support.accounts import Account
from tests.support.machine import need_tool

pytestmark = [pytest.mark.root, pytest.mark.rootless]

PRELUDE = """
import ctypes, errno, os, resource, signal, socket, stat, struct, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
NR = {"x86_64": {"setfsuid": 122, "statx": 332, "fchownat": 260, "newfstatat": 262, "getgroups": 115},
      "aarch64": {"setfsuid": 151, "statx": 291, "fchownat": 54, "newfstatat": 79, "getgroups": 158}}
NR = NR[os.uname().machine]
def call(number, *args):
    result = libc.syscall(NR.get(number, number), *args)
    return result if result >= 0 else -ctypes.get_errno()
def refused(function, *args):
    try:
        function(*args)
    except OSError as e:
        return errno.errorcode[e.errno]
os.chdir("/var/tmp")
"""


MASK = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc/irq && exec "$@"', "sh"]
"""What makes the kernel refuse another /proc: the sandbox then has the caller's, with everybody in it."""


@pytest.fixture(params=["its own /proc", "masked /proc"])
def single(request: pytest.FixtureRequest, workplace: Path, rootless_user: Account) -> Iterator[UserBox]:
    need_tool("busybox", "python3", "unshare")
    make_image(workplace / "lower")
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    box = UserBox(workplace, rootless_user, "single", MASK if request.param == "masked /proc" else ())
    assert box.identity.tier == "single"
    yield box
    box.close()


def python(box: UserBox, script: str, **spec: object) -> Outcome:
    """Run a script on the machine's own root, in a directory of the user's, to its end."""
    (place,) = box.directory("place")
    spec["mounts"] = (SandboxMount("bind", "/var/tmp", place),)
    found = box.python(PRELUDE + script, **spec)
    assert (found.error, found.code) == (None, 0), found.err
    assert found.err == ""
    return found


def test_ids(single: UserBox) -> None:
    python(
        single,
        """
assert os.getresuid() == os.getresgid() == (0, 0, 0) and os.getgroups() == [5, 7]
os.setgroups([50, 8, 8])
assert os.getgroups() == [8, 8, 50]
assert call("getgroups", 1, ctypes.create_string_buffer(4)) == -errno.EINVAL
os.setresgid(-1, 33, 34)
assert os.getresgid() == (0, 33, 34)
os.setreuid(-1, 1000)
assert os.getresuid() == (0, 1000, 1000) and os.geteuid() == 1000
assert refused(os.setgroups, []) == "EPERM" and refused(os.setuid, 7) == "EPERM"
os.seteuid(0)
if os.fork() == 0:
    os.setuid(1000)
    os._exit(os.getresuid() != (1000,) * 3 or refused(os.setuid, 0) != "EPERM" or refused(os.setreuid, 1, 1) != "EPERM")
assert os.wait()[1] == 0
assert os.getuid() == 0
assert call("setfsuid", 12) == 0 and call("setfsuid", -1) == 12
os.setresuid(1, 1, 1)
child = subprocess.run(["id", "-u"], capture_output=True)
assert child.stdout == b"1\\n", child
assert resource.getrlimit(resource.RLIMIT_RTTIME) == (-1, -1)
resource.setrlimit(resource.RLIMIT_RTTIME, (5, 5))
assert os.getuid() == 1 and resource.prlimit(0, resource.RLIMIT_RTTIME) == (-1, -1)
""",
        groups=(7, 5),
    )


def test_kept_capabilities(single: UserBox) -> None:
    python(
        single,
        """
KEEP = 8
if os.fork() == 0:
    libc.prctl(KEEP, 1, 0, 0, 0)
    os.setresuid(33, 33, 33)
    os.setresgid(34, 34, 34)
    os.setgroups([])
    os.execvp("sh", ["sh", "-c", "exec 2>/dev/null; chgrp 35 /var/tmp"])
assert os.wait()[1]
os.setuid(33)
libc.prctl(KEEP, 1, 0, 0, 0)
assert refused(os.setgid, 5) == "EPERM"
""",
    )


def test_owners(single: UserBox) -> None:
    python(
        single,
        """
open("file", "w").close(); os.mkdir("folder"); os.symlink("file", "link"); os.mkfifo("fifo")
os.chmod("file", 0o6755)
for name in ("file", "folder", "link", "fifo"):
    os.chown(name, 33, 34, follow_symlinks=False)
    st = os.lstat(name)
    assert (st.st_uid, st.st_gid) == (33, 34), name
assert os.lstat("file").st_mode == stat.S_IFREG | 0o755  # as the kernel has it
assert os.stat("link").st_ino == os.stat("file").st_ino
os.chown("link", 35, -1)
assert (os.stat("file").st_uid, os.lstat("link").st_uid) == (35, 33)
fd = os.open("file", os.O_RDONLY)
os.fchown(fd, -1, 36)
assert os.fstat(fd).st_gid == 36
os.rename("file", "moved"); os.link("moved", "second"); os.unlink("moved")
assert (os.fstat(fd).st_uid, os.stat("second").st_gid) == (35, 36)
EMPTY, NOFOLLOW, CWD = 0x1000, 0x100, -100
assert call("fchownat", fd, b"", 40, 41, EMPTY) == 0 and os.fstat(fd).st_uid == 40
buffer = ctypes.create_string_buffer(256)
assert call("statx", CWD, b"link", NOFOLLOW, 0x7ff, buffer) == 0
uid, gid, mode = struct.unpack_from("=IIH", buffer, 20)
assert (uid, gid, mode) == (33, 34, stat.S_IFLNK | 0o777)
native = os.stat("second")
assert native.st_nlink == 1 and native.st_size == 0 and abs(native.st_mtime - os.stat("folder").st_mtime) < 60
os.chown("second", 0, 0)
assert os.listxattr("second") == [] and os.stat("second").st_uid == 0
os.setxattr("folder", "user.k", b"v")
assert os.listxattr("folder") == ["user.k"] and os.listxattr("link", follow_symlinks=False) == []
folder = os.open("folder", os.O_PATH)
os.chdir("/usr")
open(os.open("folder/x", os.O_CREAT | os.O_WRONLY, dir_fd=os.open("/var/tmp", os.O_PATH)), "w").close()
os.chown("x", 5, 5, dir_fd=folder)
assert os.stat("/var/tmp/folder/x").st_uid == 5 and os.stat("../var/tmp/folder/x").st_uid == 5
assert refused(os.chown, "/nowhere", 1, 1) == "ENOENT" and refused(os.chown, "/etc/passwd/x", 1, 1) == "ENOTDIR"
assert refused(os.chown, "/etc/passwd", 1, 1) == "EROFS"
""",
    )


def test_new_files(single: UserBox) -> None:
    python(
        single,
        """
def owner(name):
    st = os.lstat(name)
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)
os.umask(0o027)
os.mkdir("shared"); os.chown("shared", 0, 50); os.chmod("shared", 0o2777)
open("shared/root", "w").close(); os.mkdir("shared/sub"); os.symlink("x", "shared/link")
assert owner("shared/root") == (0, 50, 0o640) and owner("shared/sub") == (0, 50, 0o2750)
assert owner("shared/link")[1] == 50
os.setgid(44); os.setuid(33)
open("shared/his", "w").close()
assert owner("shared/his") == (33, 50, 0o640)
os.mkdir("plain")
fd = os.open("plain/file", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o444)
os.write(fd, b"written"); os.lseek(fd, 0, 0)
assert os.read(fd, 9) == b"written" and os.fstat(fd).st_uid == 33 and not os.get_inheritable(fd)
assert owner("plain/file") == (33, 44, 0o440) and owner("plain") == (33, 44, 0o750)
assert refused(os.open, "plain/file", os.O_CREAT | os.O_EXCL) == "EEXIST"
open("plain/file", "a").close(); open("plain/again", "w").close(); open("plain/again", "w").close()
unnamed = os.open("plain", os.O_TMPFILE | os.O_RDWR, 0o600)
assert libc.linkat(-100, b"/proc/self/fd/%d" % unnamed, -100, b"plain/named", 0x400) == 0
assert owner("plain/named") == (33, 44, 0o600)
os.mkfifo("plain/fifo"); os.mknod("plain/node")
listener = socket.socket(socket.AF_UNIX); listener.bind("plain/socket")
assert owner("plain/fifo")[:2] == owner("plain/node")[:2] == (33, 44)
how = struct.pack("=QQQ", os.O_CREAT | os.O_RDWR, 0o600, 0x08)
assert call(437, -100, b"plain/beneath", how, len(how)) > 2
assert owner("plain/beneath") == (33, 44, 0o600)
assert call(437, -100, b"../outside", how, len(how)) == -errno.EXDEV
assert refused(os.mknod, "plain/null", stat.S_IFCHR | 0o600, os.makedev(1, 3)) == "EPERM"
assert refused(os.chown, "plain/file", 0, -1) == "EPERM" and refused(os.chown, "shared", 33, -1) == "EPERM"
os.chown("plain/file", 33, 44)
assert refused(os.mkdir, "plain") == "EEXIST" and refused(os.mkdir, "no/where") == "ENOENT"
assert refused(os.symlink, "x", "plain") == "EEXIST"
""",
    )


def test_devices(single: UserBox) -> None:
    python(
        single,
        """
os.mknod("null", stat.S_IFCHR | 0o620, os.makedev(1, 3))
os.chown("null", 0, 5)
os.chmod("null", 0o666)
for st in (os.stat("null"), os.lstat("null"), os.fstat(os.open("null", os.O_RDONLY))):
    assert st.st_mode == stat.S_IFCHR | 0o666 and st.st_rdev == os.makedev(1, 3) and st.st_gid == 5
buffer = ctypes.create_string_buffer(256)
assert call("statx", -100, b"null", 0, 0x7ff, buffer) == 0 and struct.unpack_from("=II", buffer, 128) == (1, 3)
assert refused(os.mknod, "null", stat.S_IFBLK, os.makedev(8, 1)) == "EEXIST"
os.mknod("whiteout", stat.S_IFCHR, 0)  # anybody may
""",
    )


def test_programs_with_set_id_bits(single: UserBox) -> None:
    python(
        single,
        """
import shutil
shutil.copy("/usr/bin/id", "set"); os.chown("set", 12, 13); os.chmod("set", 0o6755)
with open("script", "w") as file:
    file.write("#!/bin/sh\\nexec /usr/bin/id -u\\n")
os.chown("script", 12, 13); os.chmod("script", 0o6755)
os.setresuid(33, 33, 33)
def run(*argv):
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip()
assert run("./set", "-u") == "12" and run("./set", "-ru") == "33" and run("./set", "-g") == "13"
assert run("./script") == "33" and run("id", "-u") == "33"
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
assert run("./set", "-u") == "33"
""",
    )


def test_nonsense(single: UserBox) -> None:
    """Bad pointers, endless names, odd flags: the kernel's errors, and the supervisor lives on."""
    python(
        single,
        """
page = ctypes.create_string_buffer(b"x" * 8192, 8192)
address = ctypes.addressof(page)
EFAULT, LONG = -errno.EFAULT, -errno.ENAMETOOLONG
far = ctypes.c_void_p(0xdead0000)
assert call("fchownat", -100, far, 1, 1, 0) == EFAULT
assert call("fchownat", -100, page, 1, 1, 0) == LONG
assert call("fchownat", 999, b"x", 1, 1, 0) in (-errno.EBADF, -errno.ENOENT)
assert call("fchownat", -100, b"", 1, 1, 0) == -errno.ENOENT
assert call("newfstatat", -100, far, page, 0) == EFAULT and call("newfstatat", -100, b"/", far, 0) == EFAULT
open("mine", "w").close(); os.chown("mine", 5, 5)
assert call("newfstatat", -100, b"mine", far, 0) == EFAULT
assert call("statx", -100, b"mine", 0, 0x7ff, far) == EFAULT
assert call("getgroups", 70000, far) in (0, EFAULT)
for value in (b"garbage", b"5:5:c:1:3:9", b"99999999999:1", b"\\xff" * 200):
    os.setxattr("mine", "user.pybuild.owner", value)
    assert os.stat("mine").st_uid == 0
os.mkdir("d"); os.setxattr("d", "user.pybuild.owner", b"1:1:c:1:3")
assert stat.S_ISDIR(os.stat("d").st_mode)
pids = []
for number in range(30):  # killed while they ask
    pid = os.fork()
    if pid == 0:
        while True:
            os.chown("mine", number, number)
    pids.append(pid)
for pid in pids:
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
os.chown("mine", 1, 2)
assert os.stat("mine").st_gid == 2
os.mkfifo("stuck"); os.chmod("stuck", 0o6777)
assert refused(os.execv, "stuck", ["stuck"]) == "EACCES"
many = 0
while many < 20 and refused(os.setgroups, range(many, many + 65536)) is None:
    many += 1
assert many < 20 and os.getuid() == 0
""",
    )


def test_nothing_of_the_host_is_in_reach(single: UserBox, workplace: Path) -> None:
    """A path is looked up where the program is: links of the image lead the supervisor nowhere else."""
    outside = workplace / "outside"
    outside.write_text("kept")
    os.chown(outside, 12345, 12345)
    found = single.sh(
        f"ln -s /proc/1/root{outside} one; ln -s {outside} two; ln -s /proc/self/cwd/../../..{outside} three;"
        "for n in one two three; do chown 7:8 $n; stat $n; echo x > $n; mkdir $n/d; done;"
        "for p in /proc/[0-9]*; do for w in self/cwd self/root/proc thread-self/cwd; do"
        f" n=/proc/$w/${{p#/proc/}}/root{outside}; ln -s $n /l;"
        " for n in $n /l; do chown 7:8 $n; stat $n; echo x > $n; mkdir $n.d; ln -s x $n.l; mknod $n.n p; done;"
        " rm /l; done; done; exit 0",
        uid=33,
    )
    assert found.code == 0, found
    assert os.listxattr(outside) == []
    assert (outside.stat().st_uid, outside.read_text()) == (12345, "kept")
    assert sorted(path.name for path in workplace.iterdir() if not path.is_dir() or ".d" in path.name) == ["outside"]


def test_without_capabilities(single: UserBox) -> None:
    python(
        single,
        """
open("file", "w").close()
assert refused(os.chown, "file", 5, 0) == "EPERM" and os.stat("file").st_uid == 0
assert refused(os.setuid, 5) == "EPERM" and refused(os.setgid, 5) == "EPERM" and refused(os.setgroups, []) == "EPERM"
assert refused(os.mknod, "null", stat.S_IFCHR, os.makedev(1, 3)) == "EPERM"
os.chown("file", 0, 0)
os.setuid(0)
""",
        capabilities=frozenset({"CAP_DAC_OVERRIDE"}),
    )


def test_nobody_sees_who_answers(workplace: Path, rootless_user: Account) -> None:
    """The supervisor is no process of the sandbox."""
    make_image(workplace / "lower")
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    box = UserBox(workplace, rootless_user, "single")
    found = python(box, "print([name for name in os.listdir('/proc') if name.isdigit()])")
    assert found.out == "['1']\n"
    box.close()
