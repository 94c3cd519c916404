"""Failures: one clear message on stderr, the documented exit status, nothing on stdout, never a traceback."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.ports import free_port
from tests.support.registries import RegistryServer
from tests.support.waiting import PATIENCE_S


def test_a_failing_run_keeps_its_status(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = f"FROM {busybox_base}\nRUN echo fine\nRUN echo last words >&2; \\\n    exit 42\nRUN echo never\n"
    context = write_context(context_dir(pybuild_each, tmp_path) / "c", text)
    result = pybuild_each.build(context, "-t", "failing:1", check=False)
    assert result.status == 42
    assert result.stdout == b""
    assert "last words" in result.stderr
    assert "Containerfile:3" in result.stderr
    assert "RUN echo last words" in result.stderr
    assert "never" not in re.sub(r"RUN echo never", "", result.stderr)
    assert "failing" not in pybuild_each.run("images").text
    # What succeeded before is cached: the next attempt starts at the failing step.
    again = pybuild_each.build(context, "-t", "failing:1", check=False)
    assert again.status == 42
    assert "CACHED" in again.stderr


def test_the_last_output_is_shown_without_progress(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN seq 100; echo the $((40 + 2))nd line; exit 7\n")
    result = pybuild.build(context, "--quiet", check=False)
    assert result.status == 7
    assert "99\n100\nthe 42nd line\n" in result.stderr
    assert "\n50\n" not in result.stderr, "the last lines, not all"


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("RUN nonexistent-command", 127, "nonexistent-command"),
        ('RUN ["/no/such/file"]', 127, "/no/such/file"),
        ("RUN sh -c 'kill -9 $$'; exit $?", 137, ""),  # PID 1 itself cannot be killed from within
        ("RUN touch /etc/passwd/x", 1, "passwd"),
    ],
)
def test_commands_that_cannot_run(
    command: str, status: int, words: str, pybuild: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\n{command}\n")
    result = pybuild.build(context, check=False)
    assert result.status == status, result.stderr
    assert words in result.stderr
    assert "Containerfile:2" in result.stderr


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("FORM scratch\n", 1, "did you mean FROM"),
        ("FROM scratch\nCOPPY a b\n", 2, "did you mean COPY"),
        ("FROM scratch\nCOPY a\n", 2, "COPY"),
        ("RUN echo\n", 1, "FROM"),
        ("FROM scratch\nCOPY --chwon=1 a b\n", 2, "chown"),
        ("FROM scratch\nENV\n", 2, "ENV"),
        ("FROM scratch\nEXPOSE abc\n", 2, "abc"),
        ("FROM scratch\nRUN <<EOF\necho\n", 2, "EOF"),
        ("", None, ""),
    ],
)
def test_a_bad_containerfile_shows_the_line(
    text: str, line: int | None, words: str, pybuild: Pybuild, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", text)
    result = pybuild.build(context, check=False)
    assert result.status not in {0, 130}
    assert result.stdout == b""
    assert words.lower() in result.stderr.lower(), result.stderr
    if line is not None:
        assert f"Containerfile:{line}" in result.stderr, result.stderr
        assert "^" in result.stderr, "no caret"


@pytest.mark.parametrize(
    ("source", "words"),
    [("missing", "missing"), ("../outside", "outside"), ("link/passwd", "link")],
)
def test_copies_of_what_is_not_there_or_not_inside(source: str, words: str, pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM scratch\nCOPY {source} /x\n", {"there": "x"})
    (tmp_path / "outside").write_text("secret")
    (context / "link").symlink_to("/etc")
    result = pybuild.build(context, check=False)
    assert result.status != 0
    assert words in result.stderr
    assert "Containerfile:2" in result.stderr


@pytest.mark.parametrize(
    ("line", "column", "words"),
    [
        ("COPY thre /x", 6, "hint: did you mean there?"),
        ("ADD log/today.log /x", 5, ".dockerignore:2 leaves it out of the build context: **/*.log"),
        ("COPY ./elsewhere /x", 8, "hint: sources are paths in the build context, /"),
        ("RUN --mount=source=sub/gon,target=/x true", 20, "hint: did you mean sub/gone?"),
    ],
)
def test_a_source_that_is_not_there_says_where_and_what_to_do(
    line: str, column: int, words: str, pybuild: Pybuild, tmp_path: Path
) -> None:
    files = {"there": "x", "log/today.log": "x", "sub/gone": "x", ".dockerignore": "# logs\n**/*.log\n"}
    context = write_context(tmp_path / "c", f"FROM scratch\n{line}\n", files)
    result = pybuild.build(context, check=False)
    assert result.status == 1 and f"Containerfile:2:{column}: " in result.stderr, result.stderr
    assert words in result.stderr and f"   2 | {line}\n" in result.stderr, result.stderr


def test_what_cannot_be_pulled(pybuild: Pybuild, registry: RegistryServer, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {registry.host}/no/such:1\n")
    result = pybuild.build(context, check=False)
    assert result.status != 0
    assert f"{registry.host}/no/such" in result.stderr
    result = pybuild.run("pull", f"localhost:{free_port()}/nobody:1", check=False)
    assert result.status != 0
    assert "refused" in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["frobnicate"], 2),
        (["build", "--no-such-flag"], 2),
        (["push"], 2),
        (["push", "not-there:1", "dir:/tmp/x"], 1),
        (["pull", "docker://UPPER/case:1"], None),
        (["copy", "nonsense:x", "dir:/y"], None),
        (["unpack", "oci:/no/such/layout:1", "/tmp/nowhere"], None),
    ],
)
def test_wrong_usage(arguments: list[str], status: int | None, pybuild: Pybuild) -> None:
    result = pybuild.run(*arguments, check=False)
    assert result.status == status if status is not None else result.status != 0, result.stderr
    assert result.stdout == b""
    assert 1 <= len(result.stderr.strip().splitlines()) <= 12, result.stderr


def test_exit_statuses_tell_failures_apart(
    pybuild: Pybuild, registry: RegistryServer, password_registry: RegistryServer, busybox_layout: Path, tmp_path: Path
) -> None:
    assert pybuild.run("pull", f"{registry.host}/no/such:1", check=False).status == 4
    assert pybuild.run("pull", f"localhost:{free_port()}/x:1", check=False).status == 6
    empty = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    assert pybuild.run("pull", f"{password_registry.host}/x/y:1", check=False, env=empty).status == 3
    # A layer whose bytes changed under its digest.
    broken = tmp_path / "broken"
    shutil.copytree(busybox_layout, broken)
    layer = max((broken / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.write_bytes(data)
    result = pybuild.run("pull", f"oci:{broken}:busybox", check=False)
    assert result.status == 8, result.stderr
    assert layer.name[:12] in result.stderr
    assert "busybox" not in pybuild.run("images").text


def test_unpack_does_not_touch_what_is_there(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.mkdir()
    (target / "precious").write_text("data")
    result = pybuild.run("unpack", f"oci:{busybox_layout}:busybox", target, check=False)
    assert result.status != 0
    assert "full" in result.stderr
    assert (target / "precious").read_text() == "data"
    assert sorted(os.listdir(target)) == ["precious"]


def test_the_store_is_not_writable(pybuild: Pybuild, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = Pybuild(tmp_path / "file" / "store").run("images", check=False)
    assert result.status != 0
    assert "file" in result.stderr


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams_take_no_harm(closed: str, pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", "FROM scratch\nCOPY file /\n", {"file": "x"})
    command = shlex.join(pybuild.argv("build", "-t", "app:1", str(context)))
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], env=pybuild.environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "app" in pybuild.run("images").text
    pybuild.run("fsck")
    failing = shlex.join(pybuild.argv("inspect", "missing:1"))
    done = subprocess.run(["sh", "-c", f"{failing} {closed}"], env=pybuild.environ(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""


def test_a_full_disk_under_stdout_is_an_error(pybuild: Pybuild, busybox_layout: Path) -> None:
    pybuild.run("pull", f"oci:{busybox_layout}:busybox")
    with open("/dev/full", "wb") as full:
        argv = pybuild.argv("images")
        done = subprocess.run(argv, env=pybuild.environ(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_of_a_run(
    sent: signal.Signals, pybuild: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    mark = f"4{os.getpid()}{int(sent)}"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN echo started; sleep {mark}\n")
    process = pybuild.start("build", "-t", "never:1", str(context))
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if b" started" in line and b"RUN" not in line:
                break
        process.send_signal(sent)
        _, rest = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in {128 + sent, -sent}, rest
    assert b"Traceback" not in rest
    assert not _running(mark.encode())
    assert "never" not in pybuild.run("images").text


def _running(word: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
