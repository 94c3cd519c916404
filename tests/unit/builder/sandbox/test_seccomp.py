"""Compiled filters, run by an interpreter of classic BPF against what the profile means."""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import SandboxError
from builder.sandbox import seccomp
from builder.sandbox.seccomp import ALLOW, KILL_PROCESS, Comparison, Profile, Rule
from builder.sandbox.spec import DEFAULT_CAPABILITIES
from builder.sandbox.syscalls import X32_BIT, numbers

ERRNO = 0x00050000
X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028


def verdict(program: bytes, arch: int, number: int, *args: int) -> int:
    """Run a filter as the kernel does. Fails on a bad instruction, a jump past the end or a loop."""
    padded = [*args, *[0] * (6 - len(args))]
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arg & (1 << 64) - 1 for arg in padded))
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        op, true, false, operand = code[at]
        at += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif op == 0x05:
            at += operand
        elif op == 0x06:
            return int(operand)
        elif op == 0x54:
            accumulator &= operand
        else:
            holds = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}[op]
            at += true if holds else false


def default(machine: str = "x86_64", *extra: str) -> bytes:
    return seccomp.default_program(DEFAULT_CAPABILITIES | set(extra), machine)


def ask(program: bytes, name: str, *args: int, arch: int = X86_64, table: str = "x86_64") -> int:
    return verdict(program, arch, numbers(table)[name], *args)


def test_everyday_calls_are_allowed_on_every_architecture() -> None:
    for machine, pairs in {
        "x86_64": [("x86_64", X86_64), ("i386", I386), ("x32", X86_64)],
        "aarch64": [("aarch64", AARCH64), ("arm", ARM)],
    }.items():
        program = default(machine)
        for table, arch in pairs:
            for name in (
                "read",
                "write",
                "execve",
                "openat",
                "mmap",
                "mmap2",
                "statx",
                "futex",
                "futex_time64",
                "prctl",
            ):
                if name in numbers(table):
                    assert ask(program, name, arch=arch, table=table) == ALLOW, (table, name)
            for name in (
                "mount",
                "unshare",
                "setns",
                "bpf",
                "keyctl",
                "kexec_load",
                "init_module",
                "pivot_root",
                "swapon",
            ):
                if name in numbers(table):
                    assert ask(program, name, arch=arch, table=table) == ERRNO | 1, (table, name)


def test_the_program_is_exactly_the_profile() -> None:
    """Every number of every table, called without arguments."""
    profile = seccomp.default_profile(DEFAULT_CAPABILITIES, "x86_64")
    program = seccomp.compile_profile(profile)
    always = {name for rule in profile.rules if rule.action == ALLOW and not rule.comparisons for name in rule.names}
    # With zeros for arguments these conditions hold.
    always |= {"socket", "personality", "clone"}
    for table, arch in (("x86_64", X86_64), ("i386", I386), ("x32", X86_64)):
        for name, number in numbers(table).items():
            expected = ALLOW if name in always else ERRNO | (38 if name == "clone3" else 1)
            assert verdict(program, arch, number) == expected, (table, name)


def test_what_nobody_knows_yet_does_not_exist() -> None:
    program = default()
    for number in (600, 5000, 0x3FFFFFFF, 0xFFFFFFFF, X32_BIT | 600):
        assert verdict(program, X86_64, number) == ERRNO | 38
    assert verdict(program, I386, 600) == ERRNO | 38


def test_a_foreign_architecture_is_killed() -> None:
    assert verdict(default(), AARCH64, 0) == KILL_PROCESS


@pytest.mark.parametrize(
    ("family", "allowed"),
    [(1, True), (2, True), (11, True), (12, False), (16, True), (38, False), (40, False), (39, True), (46, False)],
)
def test_socket_families(family: int, allowed: bool) -> None:
    assert ask(default(), "socket", family) == (ALLOW if allowed else ERRNO | 1)
    # The kernel takes an int, but the filter sees all 64 bits.
    assert ask(default(), "socket", family | 1 << 32) == ERRNO | 1


def test_clone_makes_no_namespaces() -> None:
    program = default()
    assert ask(program, "clone", 0x1200011) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(program, "clone", flag | 17) == ERRNO | 1
    assert ask(program, "clone3") == ERRNO | 38


def test_personalities() -> None:
    program = default()
    for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert ask(program, "personality", value) == ALLOW
    assert ask(program, "personality", 0x40000) == ERRNO | 1


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("CAP_SYS_ADMIN", ["mount", "unshare", "setns", "clone3", "umount2", "fsopen", "bpf"]),
        ("CAP_SYS_MODULE", ["init_module", "finit_module", "delete_module"]),
        ("CAP_DAC_READ_SEARCH", ["open_by_handle_at"]),
        ("CAP_SYS_PTRACE", ["kcmp", "pidfd_getfd", "process_madvise"]),
        ("CAP_SYSLOG", ["syslog"]),
        ("CAP_SYS_TIME", ["settimeofday", "clock_settime"]),
    ],
)
def test_capabilities_open_calls(capability: str, names: list[str]) -> None:
    for name in names:
        assert ask(default(), name) != ALLOW
        assert ask(default("x86_64", capability), name) == ALLOW


def test_chroot_goes_with_its_capability() -> None:
    assert ask(default(), "chroot") == ALLOW
    assert ask(seccomp.default_program(frozenset(), "x86_64"), "chroot") == ERRNO | 1


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", X86_64), ("aarch64", AARCH64)])
def test_devices_alone_are_asked_for(machine: str, arch: int) -> None:
    program = seccomp.nodes_program(machine)
    high = 0xABCD << 32  # the kernel looks at the low bits
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, 0):
        wanted = seccomp.NOTIFY if kind in {stat.S_IFCHR, stat.S_IFBLK} else ALLOW
        for mode in (kind | 0o666, kind | 0o4755 | high, kind | 0x10000):
            if machine == "x86_64":
                assert ask(program, "mknod", 1, mode, 2) == wanted
            assert ask(program, "mknodat", 1, 2, mode, 3, arch=arch, table=machine) == wanted
    assert ask(program, "openat", 1, stat.S_IFCHR, stat.S_IFCHR, arch=arch, table=machine) == ALLOW
    assert verdict(program, I386, numbers("i386")["mknod"], 1, stat.S_IFCHR, 2) == ALLOW  # the kernel's refusal


def test_an_unknown_machine_is_a_clear_error() -> None:
    with pytest.raises(SandboxError, match="s390x") as caught:
        seccomp.default_program(DEFAULT_CAPABILITIES, "s390x")
    assert caught.value.hint


values = st.one_of(
    st.integers(0, 5), st.sampled_from([1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1])
)
comparisons = st.builds(
    Comparison, st.integers(0, 2), st.sampled_from(["EQ", "NE", "LT", "LE", "GT", "GE", "MASKED_EQ"]), values, values
)


def holds(c: Comparison, args: list[int]) -> bool:
    value = args[c.argument]
    return {
        "EQ": value == c.value,
        "NE": value != c.value,
        "LT": value < c.value,
        "LE": value <= c.value,
        "GT": value > c.value,
        "GE": value >= c.value,
        "MASKED_EQ": value & c.value == c.other,
    }[c.op]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["read", "write", "open"]), st.lists(comparisons, max_size=3)), max_size=5),
    st.lists(values, min_size=3, max_size=3),
    st.sampled_from(["read", "write", "open", "close"]),
)
def test_any_rules_mean_what_they_say(drawn: list[tuple[str, list[Comparison]]], args: list[int], called: str) -> None:
    rules = tuple(Rule((name,), ERRNO | 10 + n, tuple(cs)) for n, (name, cs) in enumerate(drawn))
    program = seccomp.compile_profile(Profile(ALLOW, rules, ("x86_64",)))
    mine = [rule for rule in rules if called in rule.names]
    conditional = [rule for rule in mine if rule.comparisons and all(holds(c, args) for c in rule.comparisons)]
    plain = [rule for rule in mine if not rule.comparisons]
    expected = (conditional or plain or [Rule((), ALLOW)])[0].action
    assert ask(program, called, *args) == expected


def profile_file(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def load(path: Path, *capabilities: str, kernel: tuple[int, int] = (6, 1)) -> bytes:
    return seccomp.compile_profile(seccomp.load_profile(path, frozenset(capabilities), "x86_64", kernel))


def test_a_profile_in_dockers_format(tmp_path: Path) -> None:
    document = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 13,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["reboot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_BOOT"]}},
            {"names": ["write"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "5.9"}},
            {"names": ["open"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
            {"names": ["close"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_KILL"]}},
            {
                "names": ["kill"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 1, "value": 9, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
            },
            {"name": "stat", "action": "SCMP_ACT_KILL_PROCESS"},
        ],
    }
    path = profile_file(tmp_path, document)
    program = load(path)
    refused = ERRNO | 13
    assert ask(program, "read") == ask(program, "write") == ask(program, "close") == ALLOW
    assert ask(program, "reboot") == ask(program, "open") == refused
    assert ask(program, "kill", 1, 9) == ALLOW
    assert ask(program, "kill", 1, 15) == refused
    assert ask(program, "stat") == KILL_PROCESS
    assert ask(program, "read", arch=I386, table="i386") == ALLOW
    assert verdict(program, X86_64, numbers("x32")["read"]) == ERRNO | 38
    assert ask(load(path, "CAP_SYS_BOOT"), "reboot") == ALLOW
    assert ask(load(path, "CAP_KILL"), "close") == refused
    assert ask(load(path, kernel=(5, 4)), "write") == refused


@pytest.mark.parametrize(
    "document",
    [
        "not json",
        [],
        {},
        {"defaultAction": "SCMP_ACT_NOTIFY"},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [1], "action": "SCMP_ACT_ERRNO"}]},
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["x"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 9, "value": 0, "op": "SCMP_CMP_EQ"}]}
            ],
        },
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["x"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 0, "op": "LIKE"}]}
            ],
        },
    ],
)
def test_a_bad_profile_is_a_clear_error(tmp_path: Path, document: Any) -> None:
    path = profile_file(tmp_path, document)
    with pytest.raises(SandboxError) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_profile_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="No such file"):
        load(tmp_path / "none.json")


def test_a_program_too_long_for_the_kernel_is_refused() -> None:
    rules = tuple(
        Rule((name,), ERRNO | 5, tuple(Comparison(n, "GT", number << 33) for n in range(6)))
        for number, name in enumerate(numbers("x86_64"))
    )
    with pytest.raises(SandboxError, match="instructions"):
        seccomp.compile_profile(Profile(ALLOW, rules, ("x86_64",)))


def test_numbers_of_some_calls() -> None:
    assert numbers("x86_64")["clone3"] == numbers("aarch64")["clone3"] == numbers("i386")["clone3"] == 435
    assert numbers("x86_64")["seccomp"] == 317
    assert numbers("x86_64")["uretprobe"] == 335
    assert numbers("aarch64")["openat"] == 56
    assert numbers("i386")["socketcall"] == 102
    assert numbers("arm")["cacheflush"] == 983042
    assert numbers("x32")["execve"] == X32_BIT | 520
