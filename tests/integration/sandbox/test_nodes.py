"""Devices in a sandbox with subordinate ids: a file with a record where root would have one, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.ownership import ATTRIBUTE
from tests.integration.sandbox.boxes import UserBox, make_image
from tests.integration.sandbox.test_supervisor import MASK, python
from tests.support.accounts import Account
from tests.support.machine import need_tool

pytestmark = [pytest.mark.root, pytest.mark.rootless]

HELPERS = """
NULL = os.makedev(1, 3)
def record(name):
    try:
        return os.getxattr(name, "user.pybuild.owner", follow_symlinks=False).decode()
    except OSError:
        return None
def char(name, mode=0o666, device=NULL, **where):
    os.mknod(name, stat.S_IFCHR | mode, device, **where)
def owner(name):
    st = os.lstat(name)
    assert stat.S_ISREG(st.st_mode) and st.st_size == 0, name
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)
def acl(name):
    entries = ((1, 7, -1), (4, 5, -1), (8, 6, 50), (16, 7, -1), (32, 0, -1))  # of group 50 too
    data = struct.pack("=I", 2) + b"".join(struct.pack("=HHi", *entry) for entry in entries)
    os.setxattr(name, "system.posix_acl_default", data)
"""


@pytest.fixture(params=["its own /proc", "masked /proc"])
def user(request: pytest.FixtureRequest, workplace: Path, rootless_user: Account) -> Iterator[UserBox]:
    need_tool("busybox", "python3", "unshare")
    make_image(workplace / "lower")
    for path in [workplace, *workplace.rglob("*")]:
        os.chown(path, rootless_user.uid, rootless_user.gid, follow_symlinks=False)
    box = UserBox(workplace, rootless_user, "subordinate", MASK if request.param == "masked /proc" else ())
    assert box.identity.tier == "subordinate"
    yield box
    box.close()


def test_what_is_made(user: UserBox) -> None:
    python(
        user,
        HELPERS
        + """
os.umask(0o027)
char("null"); os.mknod("disk", stat.S_IFBLK | 0o6640, os.makedev(259, 1048575)); os.mknod("zero", stat.S_IFBLK, 0)
assert (record("null"), record("disk"), record("zero")) == ("::c:1:3", "::b:259:1048575", "::b:0:0")
assert owner("null") == (0, 0, 0o640) and owner("disk") == (0, 0, 0o6640) and owner("zero")[2] == 0
os.mkfifo("pipe"); os.mknod("file", 0o644); os.mknod("socket", stat.S_IFSOCK | 0o600)
assert stat.S_ISFIFO(os.lstat("pipe").st_mode) and record("file") is record("pipe") is None
os.chown("null", 33, 34); os.chmod("null", 0o606); os.link("null", "second"); os.rename("null", "moved")
assert record("second") == record("moved") == "::c:1:3" and owner("second") == (33, 34, 0o606)
os.mkdir("shared"); os.chown("shared", 0, 50); os.chmod("shared", 0o2777)
char("shared/x")
assert owner("shared/x") == (0, 50, 0o640)
os.mkdir("acl"); acl("acl"); char("acl/x"); os.mknod("acl/y", 0o666)
assert owner("acl/x") == owner("acl/y") and owner("acl/x")[2] == 0o660
assert os.getxattr("acl/x", "system.posix_acl_access") == os.getxattr("acl/y", "system.posix_acl_access")
os.mkdir("/dev/shm/deep"); char("/dev/shm/deep/../x"); char("/dev/own")
assert record("/dev/shm/x") == record("/dev/own") == "::c:1:3"
char(b"\\xff name"); assert record(b"\\xff name")
many = [f"many{n}" for n in range(100)]
for name in many: char(name, device=os.makedev(4, 5))
assert {record(name) for name in many} == {"::c:4:5"}
""",
    )


def test_where_it_is_made(user: UserBox) -> None:
    """As the kernel finds it: from the caller's root and working directory, through its links."""
    python(
        user,
        HELPERS
        + """
import threading
os.makedirs("a/b/deep"); os.symlink("b", "a/link"); os.symlink("/var/tmp/a", "absolute")
char("a/link/../b/one"); char("absolute/b/two")
fd = os.open("a/b", os.O_PATH)
char("three", dir_fd=fd); char("../four", dir_fd=fd); char("/var/tmp/five", dir_fd=fd)
def elsewhere():
    assert libc.unshare(0x200) == 0  # CLONE_FS: a working directory of its own
    os.chdir("/var/tmp/a"); char("six")
thread = threading.Thread(target=elsewhere); thread.start(); thread.join()
if os.fork() == 0:
    os.makedirs("jail/etc"); os.makedirs("jail/var/tmp/a"); os.symlink("/var/tmp/a", "jail/etc/link")
    os.chdir("jail"); os.chroot(".")
    char("/etc/seven"); char("etc/link/eight"); char("../../../nine"); char("/etc/link/../../../../ten")
    os._exit(0)
assert os.wait()[1] == 0
for name in ("a/b/one", "a/b/two", "a/b/three", "a/four", "five", "a/six", "jail/etc/seven", "jail/var/tmp/a/eight",
             "jail/nine", "jail/ten"):
    assert record(name) == "::c:1:3", name
assert sorted(os.listdir(".")) == ["a", "absolute", "five", "jail"]
""",
        privileged=True,
    )


def test_what_is_refused(user: UserBox) -> None:
    python(
        user,
        HELPERS
        + """
char("null"); os.symlink("nowhere", "dangling"); os.mkdir("d")
for name, error in {"null": "EEXIST", "dangling": "EEXIST", "d": "EEXIST", "d/": "EEXIST", "d/..": "EEXIST",
                    ".": "EEXIST", "/": "EEXIST", "no/where": "ENOENT", "new/": "ENOENT", "null/x": "ENOTDIR",
                    "": "ENOENT", "x" * 256: "ENAMETOOLONG", "x/" * 2100: "ENAMETOOLONG", "/etc/new": "EROFS"}.items():
    found = refused(char, name)
    assert found == error, (name[:20], found)
char("whiteout", device=0)  # anybody may
assert stat.S_ISCHR(os.lstat("whiteout").st_mode)
assert refused(lambda: char("x", dir_fd=999)) == "EBADF"
assert refused(lambda: char("x", dir_fd=os.open("null", os.O_PATH))) == "ENOTDIR"
assert refused(char, "/proc/self/cwd/x") == "EPERM" and not os.path.exists("x")
assert refused(char, "/dev/mqueue/x") == "EPERM" and not os.path.exists("/dev/mqueue/x")  # nothing is recorded there
NODES = {"x86_64": 259, "aarch64": 33}[os.uname().machine]
assert call(NODES, -100, ctypes.c_void_p(0xdead0000), stat.S_IFCHR, 259) == -errno.EFAULT
page = ctypes.create_string_buffer(b"x" * 8192, 8192)
assert call(NODES, -100, page, stat.S_IFCHR, 259) == -errno.ENAMETOOLONG
if os.fork() == 0:
    os.chmod(".", 0o777)
    os.setgid(33); os.setuid(33)
    assert refused(char, "his") == "EPERM" and refused(char, "null") == "EEXIST"
    os._exit(0)
assert os.wait()[1] == 0
""",
    )


def test_as_whom_it_is_made(user: UserBox) -> None:
    """The capability to make devices brings no other along: the kernel says who may write where."""
    python(
        user,
        HELPERS
        + """
KEEP, MKNOD, OVERRIDE = 8, 1 << 27, 1 << 1
def become(uid, gid, capabilities):
    libc.prctl(KEEP, 1, 0, 0, 0)
    os.setgroups([60]); os.setresgid(gid, gid, gid); os.setresuid(uid, uid, uid)
    header = struct.pack("=Ii", 0x20080522, 0)
    data = struct.pack("=6I", capabilities, capabilities, 0, 0, 0, 0)
    assert libc.capset(header, data) == 0
os.mkdir("open", 0o777); os.chmod("open", 0o777); os.mkdir("closed", 0o700); os.mkdir("group"); os.chmod("group", 0o770)
os.chown("group", 0, 60)
def run(function):
    if os.fork() == 0:
        function(); os._exit(0)
    assert os.wait()[1] == 0
def his():
    become(33, 34, MKNOD)
    char("open/his", 0o000); char("group/his")
    assert refused(char, "closed/his") == "EACCES" and refused(char, "closed/x/y") == "EACCES"
run(his)
assert owner("open/his") == (33, 34, 0) and record("open/his") == "::c:1:3" and owner("group/his")[:2] == (33, 34)
def allowed():
    become(33, 34, MKNOD | OVERRIDE)
    char("closed/his")
run(allowed)
assert owner("closed/his")[:2] == (33, 34)
def weak():  # root without power over others' files
    os.chown("closed", 33, 33)
    header = struct.pack("=Ii", 0x20080522, 0)
    assert libc.capset(header, struct.pack("=6I", MKNOD, MKNOD, 0, 0, 0, 0)) == 0
    assert refused(char, "closed/weak") == "EACCES"
run(weak)
char("closed/again")
assert sorted(os.listdir("closed")) == ["again", "his"] and os.listdir("open") == ["his"]
""",
    )


def test_without_the_capability(user: UserBox) -> None:
    found = python(
        user,
        HELPERS + 'print(refused(char, "null"), os.path.exists("null"), os.getuid())',
        capabilities=frozenset({"CAP_DAC_OVERRIDE"}),
    )
    assert found.out == "EPERM False 0\n"


def test_within_a_namespace_of_its_own(user: UserBox) -> None:
    """Mount and user namespaces of a command's own: what it makes is where it sees it, and its rights end there."""
    python(
        user,
        HELPERS
        + """
os.mkdir("mine"); os.mkdir("root"); os.chmod("root", 0o700); os.mkdir("covered")
if os.fork() == 0:
    assert libc.unshare(0x00020000) == 0 and libc.mount(b"none", b"covered", b"tmpfs", 0, None) == 0
    char("covered/inner")
    assert record("covered/inner") == "::c:1:3"
    os._exit(0)
assert os.wait()[1] == 0 and os.listdir("covered") == []
os.chown("mine", 1000, 1000)
if os.fork() == 0:
    os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its map is root's
    assert libc.unshare(0x10000000) == 0
    for name, text in (("setgroups", "deny"), ("uid_map", "0 1000 1"), ("gid_map", "0 1000 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    assert os.getuid() == 0
    char("mine/inner")
    assert owner("mine/inner")[0] == 0 and refused(char, "root/inner") == "EACCES"
    os._exit(0)
assert os.wait()[1] == 0
assert owner("mine/inner")[:2] == (1000, 1000) and record("mine/inner") == "::c:1:3" and os.listdir("root") == []
""",
        privileged=True,
    )


def test_nothing_of_the_host_is_in_reach(user: UserBox, workplace: Path) -> None:
    outside = workplace / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    found = user.sh(
        f"ln -s /proc/1/root{outside} one; ln -s {outside} two; ln -s /proc/self/cwd/../../..{outside} three;"
        "for n in one two three; do mknod $n/x c 1 3; done;"
        "for p in /proc/[0-9]*; do for w in self/cwd self/root/proc thread-self/cwd; do"
        f" n=/proc/$w/${{p#/proc/}}/root{outside}; ln -s $n /l; for n in $n /l; do mknod $n/x c 1 3; done;"
        " rm /l; done; done;"
        "for n in 3 4 5 6 7 8 9; do mknod /proc/self/fd/$n/x c 1 3; mknod /proc/self/cwd/y c 1 3; done;"
        " exit 0"
    )
    assert found.code == 0, found
    assert os.listdir(outside) == []
    assert not any(name.endswith(("/x", "/y")) or name in {"x", "y"} for name in user.changes())


def test_who_answers_comes_when_asked_and_goes(user: UserBox, request: pytest.FixtureRequest) -> None:
    """The first question waits for it; nobody in the sandbox sees it; it outlives no sandbox."""
    masked = request.node.callspec.params["user"] == "masked /proc"
    for _ in range(3):
        found = user.sh("mknod /null c 1 3 & mknod /zero c 1 5 & wait; cat /proc/[0-9]*/comm; true")
        assert found.code == 0 and (masked or "python" not in found.out), found
        assert {name: os.getxattr(user.upper / name, ATTRIBUTE) for name in ("null", "zero")} == {
            "null": b"::c:1:3",
            "zero": b"::c:1:5",
        }
    assert user.sh("(sleep 100; mknod /late c 1 3) & mknod /null c 1 3").code == 0
    assert user.sh("true").code == 0
