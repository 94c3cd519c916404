"""A secret is lent to a RUN and is nowhere else: no layer, config, history, cache record, log or process list."""

from __future__ import annotations

import base64
import gzip
import threading
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context

SECRET = "hunter2-e7c1f0a94b6d"
CONTAINERFILE = """\
FROM {base}
RUN --mount=type=secret,id=file sha1sum /run/secrets/file > /sum && sleep 0.3
RUN --mount=type=secret,id=env,env=TOKEN test -n "$TOKEN" && sleep 0.3
RUN --mount=type=secret,id=file,target=/deep/down/token,mode=0444,uid=33 cat /deep/down/token > /dev/null
RUN test ! -e /run/secrets/file && test ! -e /deep && test -z "$TOKEN"
"""


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    return write_context(tmp_path / "context", CONTAINERFILE.format(base=busybox_base))


def _forms() -> list[bytes]:
    plain = SECRET.encode()
    return [plain, base64.b64encode(plain), plain.hex().encode()]


def _holders(root: Path) -> list[Path]:
    """The files beneath `root`, blobs unpacked, that hold the secret in any form."""
    found = []
    for path in root.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data += gzip.decompress(data)
        if any(form in data for form in _forms()):
            found.append(path)
    return found


def _watch_processes(stop: threading.Event, seen: set[str]) -> None:
    """Collect the arguments of all processes that hold the secret, but for this one."""
    while not stop.is_set():
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if SECRET.encode() in arguments:
                seen.add(arguments.decode(errors="replace"))
        stop.wait(0.02)


def test_a_secret_is_nowhere_but_in_the_run_it_was_lent_to(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    source = tmp_path / "secret"
    source.write_text(SECRET)
    stop, seen = threading.Event(), set[str]()
    watcher = threading.Thread(target=_watch_processes, args=(stop, seen))
    watcher.start()
    try:
        result = pybuild.build(
            context, "-t", "s:1", "--debug", "--secret", f"id=file,src={source}", "--secret", "id=env,env=MY_TOKEN",
            env={"MY_TOKEN": SECRET},
        )  # fmt: skip
    finally:
        stop.set()
        watcher.join()
    assert SECRET not in result.text + result.stderr
    assert not seen, "the secret stood in a process's arguments"
    assert not _holders(pybuild.root)
    root = pybuild.unpack("s:1", tmp_path / "root")
    assert (root / "sum").exists(), "the RUN did see its secret"
    assert not _holders(root)


def test_another_value_of_a_secret_runs_nothing_again(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    source = tmp_path / "secret"
    arguments = ("-t", "s:1", "--secret", f"id=file,src={source}", "--secret", "id=env,env=MY_TOKEN")
    source.write_text(SECRET)
    first = pybuild.build(context, *arguments, env={"MY_TOKEN": "a"})
    source.write_text("other")
    second = pybuild.build(context, *arguments, env={"MY_TOKEN": "b"})
    assert first.text == second.text


def test_a_required_secret_that_is_missing_is_an_error_with_its_line(
    pybuild: Pybuild, tmp_path: Path, busybox_base: str
) -> None:
    text = f"FROM {busybox_base}\nRUN --mount=type=secret,id=nosuch,required=true true\n"
    result = pybuild.build(write_context(tmp_path / "c", text), check=False)
    assert result.status != 0
    assert "nosuch" in result.stderr
    assert "Containerfile:2" in result.stderr
    assert "--secret id=nosuch" in result.stderr


def test_a_secret_by_its_source_lies_under_the_last_part_of_its_name(
    pybuild: Pybuild, tmp_path: Path, busybox_base: str
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    text = (
        f"FROM {busybox_base}\n"
        "RUN --mount=type=secret,source=a/pass test -s /run/secrets/pass\n"
        "RUN --mount=type=secret,id=a/pass test -s /run/secrets/pass && test ! -e /run/secrets/a\n"
        "RUN --mount=type=secret,target=/x/named test -s /x/named\n"
    )
    context = write_context(tmp_path / "c", text)
    pybuild.build(
        context, "--secret", f"id=a/pass,src={tmp_path}/secret", "--secret", f"id=named,src={tmp_path}/secret"
    )
