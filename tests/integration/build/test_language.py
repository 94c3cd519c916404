"""What the language says, seen in whole builds: stages in an order, users' groups, files from cpp, odd sources."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context


def test_a_stage_comes_after_one_that_it_copies_nothing_of(pybuild: Pybuild, tmp_path: Path, busybox_base: str) -> None:
    """The cache mount is what both share; without the order the second would find nothing in it."""
    text = (
        f"FROM {busybox_base} AS first\n"
        "RUN --mount=type=cache,id=order,target=/c sleep 1; echo made > /c/file\n"
        f"FROM --after=first {busybox_base}\n"
        "RUN --mount=type=cache,id=order,target=/c cp /c/file /copied\n"
    )
    context = write_context(tmp_path / "c", text)
    pybuild.build(context, "-o", f"type=local,dest={tmp_path}/out")
    assert (tmp_path / "out/copied").read_text() == "made\n"


def test_the_groups_of_a_user(pybuild: Pybuild, tmp_path: Path, busybox_base: str) -> None:
    """The primary group is always one of them: a file that the others may not read is not to be read so."""
    checks = {
        "root": "0:0 0 10",
        "1234": "1234:0 0",
        "1234:1234": "1234:1234 1234",
        "some": "1001:1001 1001 1002",
        "1001": "1001:1001 1001 1002",
        "some:more": "1001:1002 1002",
    }
    passwd = "root:x:0:0::/:/bin/sh\nsome:x:1001:1001::/:/bin/sh\n"
    group = "root:x:0:\nwheel:x:10:root\nsome:x:1001:\nmore:x:1002:some\n"
    text = f"FROM {busybox_base}\nCOPY passwd group /etc/\n" + "".join(
        f'USER {user}\nRUN test "$(id -u):$(id -g) $(id -G)" = "{wanted}"\n' for user, wanted in checks.items()
    )
    pybuild.build(write_context(tmp_path / "c", text, {"passwd": passwd, "group": group}))


def test_a_socket_of_the_context_is_an_empty_file(
    pybuild: Pybuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = write_context(tmp_path / "c", "FROM scratch\nCOPY . /\n")
    monkeypatch.chdir(context)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("s")
        pybuild.build(context, "-o", f"type=local,dest={tmp_path}/out")
    assert (tmp_path / "out/s").is_file()
    assert (tmp_path / "out/s").read_bytes() == b""


@pytest.mark.skipif(shutil.which("cpp") is None, reason="needs cpp")
def test_a_containerfile_that_cpp_makes(pybuild: Pybuild, tmp_path: Path) -> None:
    text = '#include "base.in"\n#ifdef LABELLED\nLABEL made=LABELLED\n#endif\n'
    context = write_context(tmp_path / "c", "", {"Containerfile.in": text, "base.in": "FROM scratch\n"})
    flags = ("-f", context / "Containerfile.in", "-t", "cpp:1")
    pybuild.build(context, *flags, "--cpp-flag=-DLABELLED=yes")
    assert pybuild.run("inspect", "--config", "cpp:1").json()["config"]["Labels"] == {"made": "yes"}


def test_windows_by_its_version(pybuild: Pybuild, tmp_path: Path) -> None:
    """The base is chosen by it, and the image that is built on it has it, asked or not."""
    text = "FROM scratch\nARG TARGETPLATFORM TARGETOSVERSION\nLABEL is=$TARGETPLATFORM version=$TARGETOSVERSION\n"
    context = write_context(tmp_path / "c", text, {"on": "FROM w:1\nLABEL more=yes\n"})
    pybuild.build(context, "-t", "w:1", "--platform", "windows(10.0.2)/amd64,windows(10.0.1)/amd64")
    for asked, version in (("windows(10.0.1)/amd64", "10.0.1"), ("windows/amd64", "10.0.2")):
        pybuild.build(context, "-f", context / "on", "-t", "w:2", "--platform", asked, "--pull=never")
        config = pybuild.run("inspect", "--config", "w:2").json()
        assert config["os.version"] == version
        assert config["config"]["Labels"] == {"is": f"windows({version})/amd64", "version": version, "more": "yes"}
