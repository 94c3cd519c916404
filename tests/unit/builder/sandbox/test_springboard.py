"""The springboard and the init as programs of their own: what they execute, say and pass on."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from builder.sandbox import springboard
from layers import linux

MACHINES = ["x86_64", "aarch64"]


def runner(machine: str) -> list[str]:
    """What runs a program of this architecture here."""
    if machine == linux.machine():
        return []
    emulator = shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")
    if emulator is None:
        pytest.skip(f"no emulator of {machine} is installed")
    return [emulator]


def written(path: Path, program: bytes) -> str:
    path.write_bytes(program)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("machine", MACHINES)
def test_it_executes_with_arguments_and_environment(tmp_path: Path, machine: str) -> None:
    program = written(tmp_path / "jump", springboard.jump_program(machine, "01234567"))
    shell = ["/bin/sh", "name", "-c", 'echo "$0 $1 $VALUE"', "zero", "one"]
    # An emulator puts the program's path where argv[0] goes, unless told otherwise.
    argv = [*runner(machine), *(["-0", "01234567"] if runner(machine) else []), program, *shell]
    argv = argv if runner(machine) else ["01234567", *shell]
    done = subprocess.run(
        argv, executable=None if runner(machine) else program, env={"VALUE": "v"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"zero one v\n", b"")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("path", "status", "words"),
    [("/no/where", 127, b"interpreter"), ("plain", 126, b"Exec format error"), ("/", 126, b"Permission denied")],
)
def test_it_tells_why_it_cannot(tmp_path: Path, machine: str, path: str, status: int, words: bytes) -> None:
    written(tmp_path / "plain", b"plain text\n")
    program = written(tmp_path / "jump", springboard.jump_program(machine, "01234567"))
    emulator = runner(machine)
    argv = [*emulator, "-0", "01234567", program, path, path] if emulator else ["01234567", path, path]
    done = subprocess.run(
        argv, executable=None if emulator else program, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == status
    assert done.stderr.startswith(path.encode() + b": ") and done.stderr.endswith(b"\n") and words in done.stderr


def test_it_obeys_nobody_else(tmp_path: Path) -> None:
    """A script whose interpreter is /proc/self/exe comes here again, and ends."""
    program = written(tmp_path / "jump", springboard.jump_program(linux.machine(), "01234567"))
    done = subprocess.run([program, "/bin/echo", "x"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (126, b"", b": Too many levels of symbolic links\n")
    script = written(tmp_path / "script", b"#!/proc/self/exe\n")
    done = subprocess.run(
        ["01234567", script, script], executable=program, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (126, b": Too many levels of symbolic links\n")


def start_init(machine: str, tmp_path: Path, script: str) -> subprocess.Popen[bytes]:
    """A process that starts `script` and becomes its init."""
    code = (
        "import os, signal, sys; from pathlib import Path; from builder.sandbox import springboard\n"
        "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())\n"
        "pid = os.posix_spawn('/bin/sh', ['sh', '-c', sys.argv[1]], os.environ, setsigmask=())\n"
        "if not sys.argv[4:]: springboard.become_init(pid)\n"
        "Path(sys.argv[3]).write_bytes(springboard.init_program(sys.argv[2], pid))\n"
        "os.execv(sys.argv[4], sys.argv[4:] + [sys.argv[3]])\n"
    )
    argv = [sys.executable, "-c", code, script, machine, written(tmp_path / "init", b""), *runner(machine)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("sleep 0.1; exit 0", 0)])
def test_an_init_ends_as_its_child_does(tmp_path: Path, script: str, status: int, machine: str) -> None:
    process = start_init(machine, tmp_path, script)
    assert process.wait(20) == status
    assert process.stdout
    process.stdout.close()


@pytest.mark.parametrize("machine", MACHINES)
def test_an_init_passes_signals_on(tmp_path: Path, machine: str) -> None:
    script = "trap 'echo got it' USR1; trap 'exit 5' TERM; echo on; while :; do sleep 0.05; done"
    process = start_init(machine, tmp_path, script)
    assert process.stdout
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == b"got it\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 5
    process.stdout.close()


@pytest.mark.parametrize("machine", MACHINES)
def test_the_programs_are_one_small_segment(machine: str) -> None:
    for program in (springboard.jump_program(machine, "01234567"), springboard.init_program(machine, 77)):
        assert program[:4] == b"\x7fELF" and len(program) < 1000
        kind, flags, offset, address, _, file_size, size, _ = struct.unpack_from("<IIQQQQQQ", program, 64)
        assert (kind, flags, offset, file_size, size) == (1, 5, 0, len(program), len(program))
        assert struct.unpack_from("<Q", program, 24)[0] == address + 120
    assert struct.pack("<I", 77) in springboard.init_program(machine, 77)
    assert os.fsencode("01234567") in springboard.jump_program(machine, "01234567")


def test_nobody_can_change_it() -> None:
    board = springboard.prepare()
    try:
        with pytest.raises(PermissionError):
            os.pwrite(board.fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(board.fd, 0)
    finally:
        os.close(board.fd)
