"""What a sandboxed process sees and may do, asked from the inside, in both tiers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from builder.sandbox.operations import capability_mask
from builder.sandbox.spec import DEFAULT_CAPABILITIES, MASKED_PATHS, READONLY_PATHS
from tests.integration.sandbox.boxes import Box

PROBE = """
import ctypes, errno, json, os, socket, stat
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(*args):
    ctypes.set_errno(0)
    result = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "ok"
def attempt(function, *args, **options):
    try:
        function(*args, **options)
        return "ok"
    except OSError as e:
        return errno.errorcode[e.errno]
def status():
    return dict(line.rstrip().split(":", 1) for line in open("/proc/self/status") if ":" in line)
r = {}
"""


def probe(box: Box, script: str, **spec: Any) -> dict[str, Any]:
    """Run a script that fills `r` in the sandbox, and return it."""
    outcome = box.python(PROBE + script + "\nprint(json.dumps(r))", **spec)
    assert outcome.code == 0, outcome
    found: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return found


def test_namespaces_are_its_own(box: Box) -> None:
    names = ["mnt", "uts", "pid", "ipc", "cgroup", "net", "user"]
    script = f"for n in {names}: r[n] = os.readlink('/proc/self/ns/' + n)"
    inside = probe(box, script, network="none")
    outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in names}
    alike = {name for name in names if inside[name] == outside[name]}
    assert alike == ({"user"} if box.identity.tier == "root" else set())


def test_the_host_network_is_shared_only_when_asked(box: Box) -> None:
    inside = probe(box, "r['net'] = os.readlink('/proc/self/ns/net')", network="host")
    assert inside["net"] == os.readlink("/proc/self/ns/net")


def test_pid_1_is_the_command_and_nothing_else_runs(box: Box) -> None:
    script = "r['pid'] = os.getpid(); r['all'] = [p for p in os.listdir('/proc') if p.isdigit()]"
    assert probe(box, script) == {"pid": 1, "all": ["1"]}


def test_capabilities_are_dockers_in_all_five_sets(box: Box) -> None:
    script = "s = status()\nfor n in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'): r[n] = int(s[n], 16)"
    mask = capability_mask(DEFAULT_CAPABILITIES)
    assert mask == 0x00000000A80425FB  # what `docker run` shows
    assert probe(box, script) == {"CapInh": 0, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": 0}


def test_an_ordinary_user_has_the_bounding_set_alone(box: Box) -> None:
    script = (
        "s = status()\nfor n in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'): r[n] = int(s[n], 16)\n"
        "r['ids'] = [os.getresuid(), os.getresgid(), os.getgroups()]"
    )
    found = probe(box, script, uid=33, gid=34, groups=(5, 7))
    assert found["ids"] == [[33, 33, 33], [34, 34, 34], [5, 7]]
    bounding = capability_mask(DEFAULT_CAPABILITIES)
    assert [found[n] for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [0, 0, 0, bounding, 0]


def test_chosen_capabilities(box: Box) -> None:
    script = "s = status()\nfor n in ('CapPrm', 'CapBnd'): r[n] = int(s[n], 16)"
    assert probe(box, script, capabilities=frozenset()) == {"CapPrm": 0, "CapBnd": 0}
    only = 1 << 10
    assert probe(box, script, capabilities=frozenset({"CAP_NET_BIND_SERVICE"})) == {"CapPrm": only, "CapBnd": only}


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_seccomp_filters_and_no_new_privs(box: Box, no_new_privs: bool) -> None:
    script = "s = status(); r['mode'] = int(s['Seccomp']); r['nnp'] = int(s['NoNewPrivs'])"
    assert probe(box, script, no_new_privs=no_new_privs) == {"mode": 2, "nnp": int(no_new_privs)}


def test_dockers_profile_refuses_what_it_should(box: Box) -> None:
    script = """
r['unshare'] = call(272, 0x10000000); r['mount'] = call(165, 0, 0, 0, 0, 0); r['keyctl'] = call(250, 0, 0)
r['bpf'] = call(321, 0, 0, 0); r['open_by_handle_at'] = call(304, 0, 0, 0); r['kexec_load'] = call(246, 0, 0, 0, 0)
r['clone3'] = call(435, 0, 0); r['io_uring_setup'] = call(425, 1, 0); r['setns'] = call(308, 0, 0)
r['personality'] = call(135, 0xffffffff); r['personality_vm'] = call(135, 0x40000); r['unknown'] = call(600)
r['pivot_root'] = call(155, 0, 0); r['init_module'] = call(175, 0, 0, 0); r['clone'] = call(56, 0x10000011, 0, 0, 0, 0)
r['sockets'] = [attempt(socket.socket, f, t) for f, t in ((1, 1), (2, 1), (10, 1), (16, 3), (38, 5), (40, 1))]
"""
    if os.uname().machine != "x86_64":
        pytest.skip("call numbers of x86_64")
    found = probe(box, script)
    assert found.pop("sockets") == ["ok", "ok", "ok", "ok", "EPERM", "EPERM"]
    assert found.pop("clone3") == "ENOSYS"
    assert found.pop("unknown") == "ENOSYS"
    assert found.pop("personality") == "ok"
    assert set(found.values()) == {"EPERM"}, found


def unfiltered(box: Box) -> int:
    """The mode of who has no profile: in a user namespace there is the filter that asks for devices."""
    return 0 if box.identity.tier == "root" else 2


def test_seccomp_can_be_unconfined_or_a_file(box: Box) -> None:
    script = "r['mode'] = int(status()['Seccomp']); r['mkdir'] = attempt(os.mkdir, '/dev/shm/x')"
    assert probe(box, script, seccomp="unconfined") == {"mode": unfiltered(box), "mkdir": "ok"}
    profile = box.base / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    assert probe(box, script, seccomp=profile) == {"mode": 2, "mkdir": "ENOSPC"}


def test_masked_paths_show_nothing(box: Box) -> None:
    script = f"""
for path in {MASKED_PATHS}:
    try: r[path] = os.listdir(path) if os.path.isdir(path) else open(path).read(1)
    except FileNotFoundError: pass
"""
    found = probe(box, script)
    assert "/proc/kcore" in found or not Path("/proc/kcore").exists()
    assert all(not content for content in found.values()), found


def test_readonly_paths_and_sys(box: Box) -> None:
    writes = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"]
    script = f"""
for path in {writes}:
    r[path] = attempt(open, path, 'w')
r['sys'] = bool(os.statvfs('/sys').f_flag & os.ST_RDONLY)
for path in {READONLY_PATHS}:
    if os.path.exists(path): r[path] = 'EROFS' if os.statvfs(path).f_flag & os.ST_RDONLY else 'writable'
"""
    found = probe(box, script)
    assert found.pop("sys") is True
    # An ordinary user is refused by the owner's permissions before the mount is asked.
    assert set(found.values()) <= {"EROFS", "EACCES", "ENOENT"}, found


def test_dev_is_minimal(box: Box) -> None:
    script = """
r['names'] = sorted(os.listdir('/dev'))
r['nodes'] = sorted(n for n in os.listdir('/dev') if stat.S_ISCHR(os.lstat('/dev/' + n).st_mode))
open('/dev/null', 'w').write('x'); r['zero'] = open('/dev/zero', 'rb').read(2) == bytes(2)
r['full'] = attempt(lambda: os.write(os.open('/dev/full', os.O_WRONLY), b'x'))
r['random'] = len(open('/dev/urandom', 'rb').read(4)); open('/dev/shm/x', 'w').write('x')
m, s = os.openpty(); r['pty'] = os.ttyname(s)
r['links'] = [os.readlink('/dev/' + n) for n in ('fd', 'stdin', 'stdout', 'stderr', 'ptmx')]
"""
    found = probe(box, script)
    nodes = ["full", "null", "random", "tty", "urandom", "zero"]
    assert found["nodes"] == nodes
    links = ["core", "fd", "ptmx", "stderr", "stdin", "stdout"]
    assert found["names"] == sorted([*nodes, *links, "mqueue", "pts", "shm"])
    assert (found["zero"], found["full"], found["random"], found["pty"]) == (True, "ENOSPC", 4, "/dev/pts/0")
    procs = [f"/proc/self/fd/{n}" for n in (0, 1, 2)]
    assert found["links"] == ["/proc/self/fd", *procs, "pts/ptmx"]


def test_no_device_that_it_makes_can_be_opened(box: Box) -> None:
    script = """
for place in ('/dev/', '/dev/shm/'):
    made = attempt(os.mknod, place + 'disk', stat.S_IFBLK | 0o666, os.makedev(254, 0))
    opened = attempt(os.open, place + 'disk', os.O_RDONLY)
    file = opened == 'ok' and stat.S_ISREG(os.lstat(place + 'disk').st_mode)
    r[place] = [made, 'file' if file else opened]
"""
    # Docker lets root make the node and refuses to open it; in a user namespace there is a file in its place.
    wanted = ["ok", "EACCES" if box.identity.tier == "root" else "file"]
    assert probe(box, script) == {"/dev/": wanted, "/dev/shm/": wanted}
    outcome = box.sh("mknod /disk b 254 0; wc -c < /disk")
    assert outcome.out.split() == (["0"] if wanted[1] == "file" else []), outcome


def test_nothing_leaks_from_the_caller(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    script = """
r['fds'] = sorted(int(fd) for fd in os.listdir('/proc/self/fd')); r['env'] = dict(os.environ)
r['stdin'] = os.readlink('/proc/self/fd/0'); r['umask'] = os.umask(0); r['session'] = os.getsid(0) in (0, 1)
r['blocked'] = status()['SigBlk'].strip(); r['ignored'] = status()['SigIgn'].strip()
"""
    found = probe(box, script, env={"PATH": "/bin", "ONLY": "this"})
    # Listing the directory opens a descriptor of its own.
    assert len(found["fds"]) == 4
    assert found["fds"][:3] == [0, 1, 2]
    environment = {key: value for key, value in found["env"].items() if key != "LC_CTYPE"}
    assert environment == {"PATH": "/bin", "ONLY": "this"}
    assert found["stdin"] == "/dev/null"
    assert found["umask"] == 0o022
    assert int(found["blocked"], 16) == 0
    # The interpreter itself ignores SIGPIPE and SIGXFSZ.
    ignored = int(found["ignored"], 16) & 0x7FFFFFFF  # beyond: what libc keeps to itself
    assert ignored == (1 << 12) | (1 << 24)


def test_network_none_has_a_loopback_that_is_up_and_nothing_else(box: Box) -> None:
    script = """
r['names'] = [n for _, n in socket.if_nameindex()]
s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); c = socket.create_connection(s.getsockname()); r['lo'] = 'ok'
r['out'] = attempt(socket.create_connection, ('192.0.2.1', 80), 1)
"""
    assert probe(box, script, network="none") == {"names": ["lo"], "lo": "ok", "out": "ENETUNREACH"}


def test_the_host_cannot_be_reached(box: Box) -> None:
    script = f"""
r['kill'] = attempt(os.kill, {os.getpid()}, 0)
r['ptrace'] = call(101, 16, {os.getpid()}, 0, 0)
r['root'] = os.listdir('/proc/1/root') == os.listdir('/')
r['mount'] = call(165, b'tmpfs', b'/dev/shm', b'tmpfs', 0, 0)
r['sethostname'] = attempt(socket.sethostname, 'x')
"""
    found = probe(box, script)
    assert found == {"kill": "ESRCH", "ptrace": "ESRCH", "root": True, "mount": "EPERM", "sethostname": "EPERM"}


@pytest.mark.parametrize("interpreter", ["/proc/self/exe", "/proc/1/exe -c import"])
def test_the_interpreter_of_the_host_is_out_of_reach(box: Box, interpreter: str) -> None:
    """A script of the image that names whoever executes it as its interpreter finds nothing of the host's there."""
    root = box.overlay()
    command = f"echo '#!{interpreter}' > /evil && chmod 755 /evil && ln -s {interpreter.split()[0]} /link"
    assert box.sh(command, root=root).code == 0
    assert root.upper is not None
    for args in (("/evil",), ("/link", "-c", "print('py' + 'thon')"), ("/proc/self/exe", "--version")):
        outcome = box.run(*args, root=box.overlay(root.upper, box.lower), timeout_s=200)
        # It came to the springboard again, which tells it so; the host's interpreter would not find its loader.
        assert (outcome.code, outcome.out) == (126, ""), outcome
        assert outcome.err.endswith(": Too many levels of symbolic links\n")
    script = "readlink /proc/1/exe; (echo x >> /proc/1/exe) 2>/dev/null && echo written; readlink /proc/self/exe"
    outcome = box.sh(script, init=True, capabilities=DEFAULT_CAPABILITIES | {"CAP_SYS_PTRACE"})
    assert outcome.out == "/memfd:pybuild-init (deleted)\n/bin/busybox\n"


def test_cgroups_cannot_be_written(box: Box) -> None:
    script = """
for root, dirs, files in os.walk('/sys/fs/cgroup'):
    for name in ('cgroup.procs', 'tasks', 'release_agent'):
        if name in files: r[root + name] = attempt(open, os.path.join(root, name), 'w')
"""
    assert set(probe(box, script).values()) <= {"EROFS", "EACCES"}


def test_the_old_root_is_gone_from_the_mount_table(box: Box) -> None:
    outcome = box.sh("cat /proc/self/mountinfo")
    places = [line.split()[4] for line in outcome.out.splitlines()]
    allowed = ("/proc", "/sys", "/dev")
    assert all(place == "/" or place.startswith(allowed) for place in places), places
    assert places.count("/") == 1


def test_the_session_keyring_is_new(box: Box) -> None:
    """Docker's filter hides keyctl; without it the caller's keys must be out of reach all the same."""
    script = "libc.syscall(250, 0, -3, 0); r['id'] = libc.syscall(250, 0, -3, 0)"
    found = probe(box, script, seccomp="unconfined")
    import ctypes

    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    if os.uname().machine != "x86_64":
        pytest.skip("call numbers of x86_64")
    assert found["id"] != libc.syscall(250, 0, -3, 0)


def test_hostname(box: Box) -> None:
    assert box.sh("hostname", hostname="build.example").out == "build.example\n"


def test_privileged_lifts_the_masks(box: Box) -> None:
    script = (
        "s = status(); r['caps'] = int(s['CapEff'], 16) >> 21 & 1; r['mode'] = int(s['Seccomp'])\n"
        "r['mount'] = call(165, b'tmpfs', b'/dev/shm', b'tmpfs', 0, 0)"
    )
    assert probe(box, script, privileged=True) == {"caps": 1, "mode": unfiltered(box), "mount": "ok"}
