"""The last step into an image: a few instructions of machine code, in memory, that execute its program.

A script of a hostile image may name `/proc/self/exe` as its interpreter, or be it. Executed by the
interpreter that set the sandbox up, it would be that interpreter again, inside, with the host's own file
to be opened for writing at /proc/self/exe (CVE-2019-5736). So nothing of an image is executed by the
interpreter: it becomes the springboard, which is all that /proc/self/exe can name then, and which nobody
can change. That takes 0.1 ms. An init (`--init`) is such a program, too, and so PID 1 holds none
of the launcher's memory.

Each program is an ELF file of one segment: header, code, data. Where an architecture has no code here
there are no sandboxes either (`layers.linux` and `seccomp` know no other). `setup` and `zygote` call this.
"""

from __future__ import annotations

import errno
import fcntl
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

# name = NULL
# if argv[0] begins with TOKEN: name = argv[2]; error = -execve(argv[1], argv + 2, envp)
# else: error = ELOOP                                       an image's program came here by /proc/self/exe
# for row in table: if row.error in {error, 0}: write(2, name), write(2, row.text); exit_group(row.status)
_JUMP = {
    "x86_64": bytes.fromhex(
        "4531e4488b7c240848b88877665544332211483907b8280000007521488b7c24104c8b642418488b0c24488d742418488d54cc10"
        "b83b0000000f05f7d8488d1d520000008b0b8b530485c9740b39c17407488d5c130cebec4c89e64885f6741931d2803c16008d52"
        "0175f7ffcabf02000000b8010000000f05488d730c8b5304bf02000000b8010000000f058b7b08b8e70000000f05"
    ),
    "aarch64": bytes.fromhex(
        "150080d2e00740f9010040f9020500583f0002eb0005805261010054e00b40f9f50f40f9e30340f9e1630091e2030091420c038b"
        "42400091a81b80d2010000d4e003004b93030010620e4029c20000345f00006b800000547302038b73320091faffff17550100b4"
        "e10315aa020080d22368623842040091c3ffff35420400d1400080d2080880d2010000d461320091620640b9400080d2080880d2"
        "010000d4600a40b9c80b80d2010000d48877665544332211"
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


_TOLD = (errno.EACCES, errno.EPERM, errno.E2BIG, errno.ENOMEM, errno.ETXTBSY, errno.ELOOP, errno.EINVAL, errno.EISDIR)


class Springboard(NamedTuple):
    """A springboard that many sandboxes may use: nobody can change it. It obeys who names the token."""

    fd: int
    token: str

    def jump(self, path: str, args: list[str], environment: dict[str, str]) -> None:
        """Execute `path`, which exists; failures are told on stderr. Returns never. Raises: OSError."""
        _execute(self.fd, [self.token, path, *args], environment)


def prepare() -> Springboard:
    """Raises: OSError."""
    token = os.urandom(4).hex()
    return Springboard(_in_memory(jump_program(linux.machine(), token), "pybuild"), token)


def become_init(child: int) -> None:
    """Be an init that reaps, passes signals on to `child`, and ends as it does. Every signal must be blocked.

    Returns never. Raises: OSError.
    """
    _execute(_in_memory(init_program(linux.machine(), child), "pybuild-init"), ["pybuild-init"], {})


def jump_program(machine: str, token: str) -> bytes:
    """The springboard that obeys an argv[0] of these eight characters alone."""
    rows = [
        (errno.ENOENT, "not found: its interpreter or its dynamic loader is missing in the image", 127),
        (errno.ENOTDIR, "not found", 127),
        (errno.ENOEXEC, "Exec format error: a program for another architecture, or a script without #!", 126),
        *((number, os.strerror(number), 126) for number in _TOLD),
        (0, "cannot be executed", 126),
    ]
    return _elf(machine, _JUMP[machine].replace(_TOKEN, token.encode()) + b"".join(_row(*row) for row in rows))


def init_program(machine: str, child: int) -> bytes:
    """The init of the process `child`."""
    return _elf(machine, _INIT[machine].replace(_CHILD, struct.pack("<I", child)))


def _row(number: int, words: str, status: int) -> bytes:
    text = f": {words}\n".encode()
    return struct.pack("<III", number, len(text), status) + text


def _elf(machine: str, body: bytes) -> bytes:
    entry, size = _BASE + _HEADERS_BYTES, _HEADERS_BYTES + len(body)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, _ELF_MACHINE[machine], 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return ident + header + segment + body


def _in_memory(program: bytes, name: str) -> int:
    """A file that can be executed, and changed by nobody. Raises: OSError."""
    try:
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
        except OSError as e:
            if e.errno != errno.EINVAL:  # before Linux 6.3 all of them can be executed, and none says so
                raise
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        hint = " (sysctl vm.memfd_noexec is 2)" if e.errno == errno.EACCES else ""
        raise OSError(e.errno, f"cannot make a program in memory: {e.strerror}{hint}") from e
    os.write(fd, program)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _execute(fd: int, args: list[str], environment: dict[str, str]) -> None:
    try:
        os.execve(fd, args, environment)  # noqa: S606 - by execveat(2), without a /proc
    except OSError as e:
        if e.errno not in {errno.EPERM, errno.ENOSYS}:
            raise
        os.execve(f"/proc/self/fd/{fd}", args, environment)  # noqa: S606 - a filter of the user's refuses that call
