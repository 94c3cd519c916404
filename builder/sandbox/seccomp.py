"""Seccomp profiles: Docker's default one as data, JSON profiles in its format, and their compiler.

A profile becomes a classic-BPF program by a small assembler of our own: per architecture a binary
search over ranges of call numbers, whose leaves are verdicts or comparisons of arguments. No library
is needed, and the kernel's verdict cache understands the result. Pure: nothing is loaded here.
seccomp(2), https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#seccomp
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from resource import RLIMIT_RTTIME

from builder.errors import SandboxError
from builder.sandbox.syscalls import X32_BIT, numbers
from layers.linux import PR_SET_KEEPCAPS
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LOAD, _JUMP, _JEQ, _JGT, _JGE, _AND, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x35, 0x54, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16
_MAX_INSTRUCTIONS = 4096
_EPERM, _ENOSYS = 1, 38

ALLOW, LOG, NOTIFY, TRAP = 0x7FFF0000, 0x7FFC0000, 0x7FC00000, 0x00030000
KILL_PROCESS, KILL_THREAD, _ERRNO, _TRACE = 0x80000000, 0x00000000, 0x00050000, 0x7FF00000
_ACTIONS = {
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_TRAP": TRAP,
    "SCMP_ACT_KILL": KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_ERRNO": _ERRNO,
    "SCMP_ACT_TRACE": _TRACE,
}

_AUDIT = {
    "x86_64": 0xC000003E,
    "i386": 0x40000003,
    "x32": 0xC000003E,
    "aarch64": 0xC00000B7,
    "arm": 0x40000028,
}
_FAMILY = {"x86_64": ("x86_64", "i386", "x32"), "aarch64": ("aarch64", "arm")}
_DOCKER_ARCH = {"x86_64": "amd64", "i386": "x86", "x32": "x32", "aarch64": "arm64", "arm": "arm"}
_SCMP_ARCH = {
    "SCMP_ARCH_X86_64": "x86_64",
    "SCMP_ARCH_X86": "i386",
    "SCMP_ARCH_X32": "x32",
    "SCMP_ARCH_AARCH64": "aarch64",
    "SCMP_ARCH_ARM": "arm",
}


class Comparison(NamedTuple):
    """`op` is libseccomp's, without SCMP_CMP_; for MASKED_EQ, `value` is the mask and `other` the wanted bits."""

    argument: int
    op: str
    value: int
    other: int = 0


class Rule(NamedTuple):
    """Calls by name that get an action if all the comparisons hold."""

    names: tuple[str, ...]
    action: int
    comparisons: tuple[Comparison, ...] = ()


class Profile(NamedTuple):
    """What to do by default, and the exceptions, already reduced to one machine and capability set."""

    default: int
    rules: tuple[Rule, ...]
    architectures: tuple[str, ...]
    foreign: int = KILL_PROCESS
    """What an architecture of no name here gets."""


# ---- Docker's default profile -----------------------------------------------------------------

_ALWAYS = """
_llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32
geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid
getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt
gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1
inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl
ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32
lgetxattr link linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat lstat64
madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2
mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc
pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease
process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink
readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename
renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg
sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid
setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid
setresuid32 setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt
shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs
statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create
timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask
uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write
writev
"""
_BY_CAPABILITY = {
    "DAC_READ_SEARCH": "open_by_handle_at",
    "SYS_ADMIN": "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr "
    "lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl "
    "quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "delete_module init_module finit_module",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "SYS_RAWIO": "iopl ioperm",
    "SYS_TIME": "settimeofday stime clock_settime clock_settime64",
    "SYS_TTY_CONFIG": "vhangup",
    "SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "SYSLOG": "syslog",
    "BPF": "bpf",
    "PERFMON": "perf_event_open",
}
_BY_FAMILY = {
    "x86_64": "arch_prctl modify_ldt",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls",
}
# No AF_ALG (38), AF_VSOCK (40) and families that nothing but exploits uses.
_SOCKET_FAMILIES = (13, 14, 15, 16, 17, 18, 21, 22, 24, *range(26, 34), 35, 36, 39, *range(41, 46))
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
_CLONE_NAMESPACES = 0x7E020000


def default_profile(capabilities: frozenset[str], machine: str) -> Profile:
    """Docker's default profile as it applies with these capabilities. Raises: SandboxError (unknown machine)."""
    held = {name.removeprefix("CAP_") for name in capabilities}
    family = _family(machine)
    rules = [
        Rule(tuple(_ALWAYS.split()), ALLOW),
        Rule(tuple(_BY_FAMILY[machine].split()), ALLOW),
        Rule(("socket",), ALLOW, (Comparison(0, "LT", 12),)),
    ]
    rules += [Rule(("socket",), ALLOW, (Comparison(0, "EQ", number),)) for number in _SOCKET_FAMILIES]
    rules += [Rule(("personality",), ALLOW, (Comparison(0, "EQ", number),)) for number in _PERSONALITIES]
    rules += [Rule(tuple(names.split()), ALLOW) for name, names in _BY_CAPABILITY.items() if name in held]
    if "SYS_ADMIN" not in held:
        rules.append(Rule(("clone",), ALLOW, (Comparison(0, "MASKED_EQ", _CLONE_NAMESPACES, 0),)))
        # libc falls back to clone, whose flags can be seen, only when clone3 does not exist.
        rules.append(Rule(("clone3",), _ERRNO | _ENOSYS))
    return Profile(_ERRNO | _EPERM, tuple(rules), family)


@lru_cache(maxsize=8)
def default_program(capabilities: frozenset[str], machine: str) -> bytes:
    """The compiled default profile. Raises: SandboxError."""
    return compile_profile(default_profile(capabilities, machine))


# ---- what a supervisor answers ----------------------------------------------------------------

SUPERVISED = (
    "chown lchown fchown fchownat mknod mknodat mkdir mkdirat symlink symlinkat creat chroot execve execveat "
    "setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups "
    "getuid geteuid getgid getegid getresuid getresgid getgroups stat lstat fstat newfstatat statx "
    "openat2 listxattr llistxattr flistxattr"
)
"""The calls whose answer depends on ids that a single-id namespace has not; open and openat where they create."""


@lru_cache(maxsize=1)
def supervised_program(machine: str) -> bytes:
    """The filter that lets `builder.sandbox.supervisor` answer; programs of other architectures go without.

    Raises: SandboxError (unknown machine).
    """
    creating = [
        Rule((name,), NOTIFY, (Comparison(argument, "MASKED_EQ", bit, bit),))
        for name, argument in (("open", 1), ("openat", 2))
        for bit in (os.O_CREAT, os.O_TMPFILE & ~os.O_DIRECTORY)
    ]
    # What the supervisor keeps in a limit is not to be seen, nor to be lost where pam_limits sets them all.
    chosen = (
        (("prctl",), Comparison(0, "EQ", PR_SET_KEEPCAPS)),
        (("setrlimit", "getrlimit"), Comparison(0, "EQ", RLIMIT_RTTIME)),
        (("prlimit64",), Comparison(1, "EQ", RLIMIT_RTTIME)),
    )
    some = [Rule(names, NOTIFY, (comparison,)) for names, comparison in chosen]
    rules = (Rule(tuple(SUPERVISED.split()), NOTIFY), *creating, *some)
    return compile_profile(Profile(ALLOW, rules, _family(machine)[:1], ALLOW))


@lru_cache(maxsize=1)
def nodes_program(machine: str) -> bytes:
    """The filter that lets `builder.sandbox.nodes` answer where a device is to be made.

    Raises: SandboxError (unknown machine).
    """
    kinds = (stat.S_IFCHR, stat.S_IFBLK)
    rules = (
        Rule((name,), NOTIFY, (Comparison(argument, "MASKED_EQ", stat.S_IFMT(0o177777), kind),))
        for name, argument in (("mknod", 1), ("mknodat", 2))
        for kind in kinds
    )
    return compile_profile(Profile(ALLOW, tuple(rules), _family(machine)[:1], ALLOW))


# ---- profiles of the user ---------------------------------------------------------------------


def load_profile(path: Path, capabilities: frozenset[str], machine: str, kernel: tuple[int, int]) -> Profile:
    """Read a profile in Docker's JSON format. `kernel` is (major, minor), for `minKernel`.

    Raises: SandboxError naming the file and what in it is wrong.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as e:
        raise SandboxError(
            f"cannot read the seccomp profile {path}: {e.strerror}", operation="seccomp", errno=e.errno, path=str(path)
        ) from e
    except ValueError as e:
        raise _bad(path, f"is not JSON: {e}") from e
    try:
        return parse_profile(document, capabilities, machine, kernel)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _bad(path, f"is not a seccomp profile: {type(e).__name__}: {e}") from e


def parse_profile(
    document: Mapping[str, Any], capabilities: frozenset[str], machine: str, kernel: tuple[int, int]
) -> Profile:
    """A profile from its parsed JSON. Raises: KeyError, TypeError, ValueError for what it cannot be."""
    held = {name.removeprefix("CAP_") for name in capabilities}
    family = _family(machine)
    listed = {machine}
    for name in document.get("architectures") or ():
        listed.add(_SCMP_ARCH.get(name, ""))
    for row in document.get("archMap") or ():
        if _SCMP_ARCH.get(row["architecture"]) == machine:
            listed.update(_SCMP_ARCH.get(name, "") for name in row.get("subArchitectures") or ())
    default = _action(document["defaultAction"], document.get("defaultErrnoRet"))
    rules: list[Rule] = []
    for row in document.get("syscalls") or ():
        if not _applies(row, held, machine, kernel):
            continue
        names = row.get("names") or [row["name"]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("names must be strings")
        comparisons = tuple(
            Comparison(int(a["index"]), _operator(a["op"]), int(a["value"]), int(a.get("valueTwo", 0)))
            for a in row.get("args") or ()
        )
        if any(
            not 0 <= c.argument <= 5 or not 0 <= c.value < 1 << 64 or not 0 <= c.other < 1 << 64 for c in comparisons
        ):
            raise ValueError("an argument's index or value is out of range")
        action = _action(row["action"], row.get("errnoRet"))
        if action != default:
            rules.append(Rule(tuple(names), action, comparisons))
    return Profile(default, tuple(rules), tuple(arch for arch in family if arch in listed))


def _applies(row: Mapping[str, Any], held: set[str], machine: str, kernel: tuple[int, int]) -> bool:
    includes, excludes = row.get("includes") or {}, row.get("excludes") or {}
    arches = {_DOCKER_ARCH[arch] for arch in _family(machine)[:1]}

    def caps(condition: Mapping[str, Any]) -> set[str]:
        return {str(name).removeprefix("CAP_") for name in condition.get("caps") or ()}

    def old(condition: Mapping[str, Any]) -> bool:
        wanted = condition.get("minKernel")
        if not wanted:
            return False
        major, minor = str(wanted).split(".")[:2]
        return kernel < (int(major), int(minor))

    if includes.get("arches") and not arches & set(includes["arches"]):
        return False
    if not caps(includes) <= held or old(includes):
        return False
    if arches & set(excludes.get("arches") or ()) or caps(excludes) & held:
        return False
    return not excludes.get("minKernel") or old(excludes)


def _operator(name: str) -> str:
    op = name.removeprefix("SCMP_CMP_")
    if op not in {"EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"}:
        raise ValueError(f"unknown comparison {name}")
    return op


def _action(name: str, errno: int | None) -> int:
    if name not in _ACTIONS:
        raise ValueError(f"unsupported action {name}")
    action = _ACTIONS[name]
    if action in {_ERRNO, _TRACE}:
        action |= (_EPERM if errno is None else int(errno)) & 0xFFFF
    return action


def _family(machine: str) -> tuple[str, ...]:
    try:
        return _FAMILY[machine]
    except KeyError:
        raise SandboxError(
            f"no seccomp filter is known for {machine}",
            operation="seccomp",
            hint="run with --security-opt seccomp=unconfined",
        ) from None


def _bad(path: Path, words: str) -> SandboxError:
    return SandboxError(f"the seccomp profile {path} {words}", operation="seccomp", path=str(path))


# ---- the compiler -----------------------------------------------------------------------------

_Code = list[tuple[int, int, int, int]]
"""Instructions: (code, jump if true, jump if false, operand)."""


def compile_profile(profile: Profile) -> bytes:
    """An array of struct sock_filter for seccomp(2). Raises: SandboxError where it is too long for the kernel."""
    blocks = {arch: _architecture(profile, arch) for arch in profile.architectures}
    absent = _ERRNO | _ENOSYS if profile.foreign == KILL_PROCESS else profile.foreign
    x32 = blocks.pop("x32", None) or [(_RETURN, 0, 0, absent)]
    code: _Code = [(_LOAD, 0, 0, _OFFSET_ARCH)]
    for arch, block in blocks.items():
        body: _Code = [(_LOAD, 0, 0, _OFFSET_NUMBER)]
        if arch == "x86_64":
            body += [(_JGE, 0, 1, X32_BIT), (_JUMP, 0, 0, len(block))]
            block = block + x32
        body += block
        code += [(_JEQ, 1, 0, _AUDIT[arch]), (_JUMP, 0, 0, len(body)), *body]
    code.append((_RETURN, 0, 0, profile.foreign))
    if len(code) > _MAX_INSTRUCTIONS:
        raise SandboxError(
            f"the seccomp profile needs {len(code)} instructions; the kernel takes {_MAX_INSTRUCTIONS}",
            operation="seccomp",
        )
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _architecture(profile: Profile, arch: str) -> _Code:
    """The search over one architecture's call numbers, which the accumulator holds."""
    table = numbers(arch)
    leaves: dict[int, _Code] = {}
    conditional: dict[int, list[Rule]] = {}
    final: dict[int, int] = {}
    for rule in profile.rules:
        for name in rule.names:
            number = table.get(name)
            if number is None:
                continue
            if rule.comparisons:
                conditional.setdefault(number, []).append(rule)
            else:
                final.setdefault(number, rule.action)
    for number, action in final.items():
        leaves[number] = [(_RETURN, 0, 0, action)]
    for number, rules in conditional.items():
        otherwise = final.get(number, profile.default)
        leaves[number] = [instruction for rule in rules for instruction in _check(rule)]
        leaves[number].append((_RETURN, 0, 0, otherwise))
    default: _Code = [(_RETURN, 0, 0, profile.default)]
    # What is newer than our tables does not exist, so that libc falls back: as runc does.
    newest = max(number for number in table.values() if number & 0xFFFFF < 0xF0000)
    unknown: _Code = default if profile.default == ALLOW else [(_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    return _search(_intervals(leaves, default, newest, unknown))


def _intervals(leaves: Mapping[int, _Code], default: _Code, newest: int, unknown: _Code) -> list[tuple[int, _Code]]:
    """The number line as (first number, code) in order, neighbours of equal code merged."""
    rows: list[tuple[int, _Code]] = [(0, default)]
    bounds = sorted({*leaves, *(number + 1 for number in leaves), newest + 1})
    for bound in bounds:
        code = leaves.get(bound, default if bound <= newest else unknown)
        if bound == 0:
            rows = [(0, code)]
        elif rows[-1][1] != code:
            rows.append((bound, code))
    return rows


def _search(rows: list[tuple[int, _Code]]) -> _Code:
    if len(rows) == 1:
        return rows[0][1]
    middle = len(rows) // 2
    left, right = _search(rows[:middle]), _search(rows[middle:])
    if len(left) < 256:
        return [(_JGE, len(left), 0, rows[middle][0]), *left, *right]
    return [(_JGE, 0, 1, rows[middle][0]), (_JUMP, 0, 0, len(left)), *left, *right]


def _check(rule: Rule) -> Iterable[tuple[int, int, int, int]]:
    """Return the rule's action if all comparisons hold, else fall through to what follows."""
    parts = [_compare(c) for c in rule.comparisons]
    verdict = (_RETURN, 0, 0, rule.action)
    code: _Code = [verdict]
    for part in reversed(parts):
        miss = len(code)
        code = [_aim(instruction, len(part) - index - 1, miss) for index, instruction in enumerate(part)] + code
    return code


_HIT, _MISS = 254, 255


def _aim(instruction: tuple[int, int, int, int], rest: int, miss: int) -> tuple[int, int, int, int]:
    """Turn the symbolic jumps of `_compare` into distances."""
    code, true, false, operand = instruction
    if code in {_LOAD, _AND}:
        return instruction
    distance = {_HIT: rest, _MISS: rest + miss}
    return code, distance.get(true, true), distance.get(false, false), operand


def _compare(c: Comparison) -> _Code:
    """Compare a 64-bit argument, in two halves, unsigned; jumps are _HIT, _MISS or short distances."""
    low_offset = _OFFSET_ARGS + 8 * c.argument
    load_high, load_low = (_LOAD, 0, 0, low_offset + 4), (_LOAD, 0, 0, low_offset)
    high, low = c.value >> 32, c.value & 0xFFFFFFFF
    if c.op == "MASKED_EQ":
        return [
            load_high,
            (_AND, 0, 0, high),
            (_JEQ, 0, _MISS, c.other >> 32),
            load_low,
            (_AND, 0, 0, low),
            (_JEQ, _HIT, _MISS, c.other & 0xFFFFFFFF),
        ]
    if c.op == "EQ":
        return [load_high, (_JEQ, 0, _MISS, high), load_low, (_JEQ, _HIT, _MISS, low)]
    if c.op == "NE":
        return [load_high, (_JEQ, 0, _HIT, high), load_low, (_JEQ, _MISS, _HIT, low)]
    upper = c.op in {"GT", "GE"}
    last = _JGT if c.op in {"GT", "LE"} else _JGE
    decided = (_HIT, _MISS) if upper else (_MISS, _HIT)
    # high > value: decided; high < value: the opposite; equal: the low halves tell
    return [
        load_high,
        (_JGT, decided[0], 0, high),
        (_JEQ, 0, decided[1], high),
        load_low,
        (last, decided[0], decided[1], low),
    ]
