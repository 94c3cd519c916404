"""The last step into an image: a few instructions of machine code, in memory, that execute its program.

A script of a hostile image may name `/proc/self/exe` as its interpreter, or be it. Executed by the
interpreter that set the sandbox up, it would be that interpreter again, inside, with the host's own file
to be opened for writing at /proc/self/exe (CVE-2019-5736). So nothing of an image is executed by the
interpreter: it becomes the springboard, which is all that /proc/self/exe can name, and which belongs to
this sandbox alone. That takes 0.1 ms. An init (`--init`) is such a program, too, and so PID 1 holds none
of the launcher's memory.

Each program is an ELF file of one segment: header, code, data. Where an architecture has no code here
there are no sandboxes either (`layers.linux` and `seccomp` know no other). `setup` and `zygote` call this.
"""

from __future__ import annotations

import errno
import os
import struct

from layers import linux
from layers.values import NamedTuple

_BASE = 0x400000
_HEADERS_BYTES = 64 + 56
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
_MFD_EXEC = 0x10
_TOKEN = struct.pack("<Q", 0x1122334455667788)
_CHILD = struct.pack("<I", 0x11223344)

# if argv[0] begins with TOKEN: error = -execve(argv[1], argv + 2, envp)
# else: error = ELOOP                                       an image's program came here by /proc/self/exe
# for row in table: if row.error in {error, 0}: write(2, row.text, row.length); exit_group(row.status)
_JUMP = {
    "x86_64": bytes.fromhex(
        "488b7c240848b88877665544332211483907b828000000751c488b7c2410488b0c24488d742418488d54cc10b83b0000000f05f7d8"
        "488d35300000008b0e8b560485c9740b39c17407488d74160cebec8b5e084883c60cbf02000000b8010000000f0589dfb8e7000000"
        "0f05"
    ),
    "aarch64": bytes.fromhex(
        "e00740f9010040f9c20300583f0002eb0005805241010054e00b40f9e30340f9e1630091e2030091420c038b42400091a81b80d201"
        "0000d4e003004b61020010220c4029c20000345f00006b800000542100038b21300091faffff17330840b9e203032a21300091"
        "400080d2080880d2010000d4e003132ac80b80d2010000d48877665544332211"
    ),
}
# options = WNOHANG
# loop: signal = rt_sigtimedwait(all, info, NULL, 8)
#       if signal > 0 and signal != SIGCHLD: kill(CHILD, signal); continue
#       if signal < 0: options = 0                         a filter refuses that call: only reap then
#       while (ended = wait4(-1, &status, options, NULL)) > 0:
#           if ended == CHILD: exit_group(the status as a shell tells it)
_INIT = {
    "x86_64": bytes.fromhex(
        "bb44332211bd01000000488d3d660000004889e631d241ba08000000b8800000000f0583f811740685c07f3e31edbfffffffff4889"
        "e689ea4531d2b83d0000000f0585c07ec439d875e48b3c2489f883e07f7509c1ef08400fb6ffeb068db880000000b8e70000000f05"
        "89df89c6b83e0000000f05eb93ffffffffffffffff"
    ),
    "aarch64": bytes.fromhex(
        "b304001834008052ff0302d160040010e1030091020080d2030180d2281180d2010000d41f440071800000541f0000718c02005414"
        "00805200008012e1030091e203142a030080d2882080d2010000d41f000071cdfdff541f00136be1feff54e00340b9011800726100"
        "0054003c08530200001420000211c80b80d2010000d4e103002ae003132a281080d2010000d4dfffff1744332211ffffffffffffffff"
    ),
}


class Failure(NamedTuple):
    """What is said, and the exit status, where execve(2) fails with `number`; 0 stands for all others."""

    number: int
    text: bytes
    status: int


def jump(path: str, args: list[str], environment: dict[str, str], failures: list[Failure]) -> None:
    """Execute `path` by way of the springboard, which tells its failures on stderr. Returns never.

    Raises: OSError where not even the springboard can be executed.
    """
    token = os.urandom(4).hex()
    program = jump_program(linux.machine(), token, failures)
    _execute(program, "pybuild", [token, path, *args], environment)


def become_init(child: int) -> None:
    """Be an init that reaps, passes signals on to `child`, and ends as it does. Every signal must be blocked.

    Returns never. Raises: OSError.
    """
    _execute(init_program(linux.machine(), child), "pybuild-init", ["pybuild-init"], {})


def jump_program(machine: str, token: str, failures: list[Failure]) -> bytes:
    """The springboard that obeys an argv[0] of these eight characters alone."""
    table = b"".join(_row(failure) for failure in [*(f for f in failures if f.number), _other(failures)])
    return _elf(machine, _JUMP[machine].replace(_TOKEN, token.encode()) + table)


def init_program(machine: str, child: int) -> bytes:
    """The init of the process `child`."""
    return _elf(machine, _INIT[machine].replace(_CHILD, struct.pack("<I", child)))


def _other(failures: list[Failure]) -> Failure:
    return next((failure for failure in failures if not failure.number), Failure(0, b"", 126))


def _row(failure: Failure) -> bytes:
    return struct.pack("<III", failure.number, len(failure.text), failure.status) + failure.text


def _elf(machine: str, body: bytes) -> bytes:
    entry, size = _BASE + _HEADERS_BYTES, _HEADERS_BYTES + len(body)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, _ELF_MACHINE[machine], 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return ident + header + segment + body


def _execute(program: bytes, name: str, args: list[str], environment: dict[str, str]) -> None:
    try:
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | _MFD_EXEC)
        except OSError as e:
            if e.errno != errno.EINVAL:  # before Linux 6.3 all of them can be executed, and none says so
                raise
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.write(fd, program)
        try:
            os.execve(fd, args, environment)  # noqa: S606 - by execveat(2), without a /proc
        except OSError as e:
            if e.errno not in {errno.EPERM, errno.ENOSYS}:
                raise
            os.execve(f"/proc/self/fd/{fd}", args, environment)  # noqa: S606 - a filter of the user's refuses that call
    except OSError as e:
        hint = " (sysctl vm.memfd_noexec is 2)" if e.errno == errno.EACCES else ""
        words = f"cannot execute a program in memory: {e.strerror}{hint}"
        raise OSError(e.errno, words) from e
