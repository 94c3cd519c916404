"""Builds with SOURCE_DATE_EPOCH: the same manifest whatever the time, the umask, the path, the order, the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.integration.images.stock import readable_context, stock_base
from tests.support.cli import Pybuild, write_context

CONTAINERFILE = (
    "FROM base:1\nRUN mkdir -p /made/b && date > /dev/null; echo x > /made/b/file; ln /made/b/file /made/link\n"
    "WORKDIR /work\nCOPY . /work\nADD --chown=5:6 z /z\n"
)
EPOCH = 1_600_000_000


@pytest.fixture
def context(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> Path:
    pybuild.run("copy", f"oci:{busybox_layout}:busybox", "storage:base:1")
    return write_context(tmp_path / "context", CONTAINERFILE, {"a/1": "one", "a/2": "two", "z": "zed"})


def manifest(pybuild: Pybuild, context: Path, *flags: str, **options: Any) -> str:
    pybuild.build(context, "-t", "made:1", "--timestamp", str(EPOCH), *flags, **options)
    return str(pybuild.run("inspect", "made:1", "--format", "{{.Digest}}").text.strip())


def test_a_cached_step_gets_the_times_that_are_asked_for(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context, "-t", "plain:1")
    first = manifest(pybuild, context)
    assert manifest(pybuild, context, "--no-cache") == first
    pybuild.run("prune", "--all", "--force")
    assert manifest(pybuild, context) == first


def test_equal_wherever_and_whenever(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    first = manifest(pybuild, context)
    other = tmp_path / "elsewhere" / "deeper"
    other.parent.mkdir()
    shutil.copytree(context, other)
    for path in sorted(other.rglob("*"), reverse=True):
        path.touch()  # another checkout has other times
    before = os.umask(0o077)
    try:
        assert manifest(pybuild, other, "--no-cache") == first
    finally:
        os.umask(before)


def test_a_level_is_not_another_ones_layer(pybuild: Pybuild, context: Path) -> None:
    (context / "text").write_bytes(b"".join(b"%d lines of text\n" % (i * i) for i in range(30_000)))
    sizes = []
    for flags in ((), ("--compression-level", "9"), ("--compression-level", "1")):
        pybuild.build(context, "-t", "made:1", *flags)
        sizes.append(sum(d["size"] for d in pybuild.run("inspect", "made:1").json()["Layers"][1:]))
    assert len(set(sizes)) == 3
    assert sizes[1] == min(sizes)


def test_verify_says_that_a_build_reproduces(pybuild: Pybuild, context: Path) -> None:
    before = pybuild.run("images", "--json").json()
    result = pybuild.run("verify", "-q", context)
    assert result.text.startswith("reproducible: sha256:")
    # Nor does the umask of the caller, the host's name, the place or the order of directories show.
    nosy = write_context(
        context.parent / "nosy",
        "FROM base:1\nCOPY . /c\nRUN umask > /u; hostname > /h; date +%Z > /z; find /c > /f; ls -lR /c > /l\n",
        {f"d/{n}": n for n in "zyxwvutsrqponm"},
    )
    assert pybuild.run("verify", "-q", "--json", nosy).json()["reproducible"] is True
    assert pybuild.run("images", "--json").json() == before


def test_verify_names_the_first_differing_file_and_field(pybuild: Pybuild, context: Path) -> None:
    text = "FROM base:1\nRUN echo fixed > /a\nRUN echo fixed > /b; date +%s > /c; mktemp /dXXXXXX\n"
    place = write_context(context.parent / "differs", text)
    result = pybuild.run("verify", "-q", place, check=False)
    assert result.status == 1
    first, layer, file = result.text.splitlines()
    assert first.startswith("not reproducible: sha256:")
    assert layer.startswith("layer 3: RUN /bin/sh -c echo fixed > /b")
    assert file == "c: content"
    write_context(place, "FROM base:1\nRUN mktemp /XXXXXX\n")
    found = pybuild.run("verify", "-q", "--json", place, check=False)
    assert found.status == 1
    assert found.json()["file"]["change"] in {"added", "removed"}


def test_driver_and_tier_do_not_show(
    pybuild: Pybuild, pybuild_rootless: Pybuild, busybox_layout: Path, context: Path
) -> None:
    stock_base(pybuild_rootless, busybox_layout)
    mine = readable_context(pybuild_rootless, context)
    assert manifest(pybuild, context) == manifest(pybuild_rootless, mine)


def test_the_epoch_of_a_context(pybuild: Pybuild, tmp_path: Path) -> None:
    """An archive's newest file; a directory has no time that means anything."""
    context = write_context(tmp_path / "context", "FROM scratch\nARG SOURCE_DATE_EPOCH\nCOPY f /f\n", {"f": "f"})
    for name, time_s in (("f", 1_600_000_000), ("Containerfile", 1_500_000_000)):
        os.utime(context / name, (time_s, time_s))
    archive = subprocess.run(["tar", "-C", context, "-c", "."], capture_output=True, check=True).stdout
    flag = ("--build-arg", "SOURCE_DATE_EPOCH=context")
    pybuild.run("build", "-t", "a:1", *flag, "-", stdin=archive)
    pybuild.run("build", "-t", "b:1", "--timestamp", "1600000000", "-", stdin=archive)
    documents = [pybuild.run("inspect", name).json() for name in ("a:1", "b:1")]
    assert documents[0]["Created"] == documents[1]["Created"] == "2020-09-13T12:26:40Z"
    assert documents[0]["Layers"] == documents[1]["Layers"]
    pybuild.build(context, "-t", "c:1", env={"SOURCE_DATE_EPOCH": "context"})
    assert pybuild.run("inspect", "c:1").json()["Created"] > "2020-09-14"
    assert pybuild.build(context, "--build-arg", "SOURCE_DATE_EPOCH=now", check=False).status == 2


@pytest.mark.parametrize(
    ("declared", "flags", "env", "wanted"),
    [
        ("ARG SOURCE_DATE_EPOCH=1600000000\n", (), {}, 1_600_000_000),
        ("ARG T=160000\nARG SOURCE_DATE_EPOCH=${T}0000\n", (), {}, 1_600_000_000),
        ("ARG SOURCE_DATE_EPOCH=1\n", ("--build-arg", "SOURCE_DATE_EPOCH=2"), {"SOURCE_DATE_EPOCH": "3"}, 2),
        ("ARG SOURCE_DATE_EPOCH=1\n", (), {"SOURCE_DATE_EPOCH": "3"}, 3),
        ("ARG SOURCE_DATE_EPOCH=1\n", ("--build-arg", "SOURCE_DATE_EPOCH="), {}, None),
        ("ARG SOURCE_DATE_EPOCH=context\n", (), {}, None),
    ],
)
def test_the_epoch_that_a_containerfile_declares(
    pybuild: Pybuild, tmp_path: Path, declared: str, flags: tuple[str, ...], env: dict[str, str], wanted: int | None
) -> None:
    text = f"{declared}FROM scratch\nARG SOURCE_DATE_EPOCH\nLABEL epoch=$SOURCE_DATE_EPOCH\nCOPY f /f\n"
    context = write_context(tmp_path / "context", text, {"f": "f"})
    pybuild.build(context, "-t", "e:1", *flags, env=env)
    document = pybuild.run("inspect", "--config", "e:1").json()
    created = datetime.fromisoformat(document["created"]).timestamp()
    assert created == wanted if wanted is not None else created > 1_700_000_000
    assert document["config"]["Labels"]["epoch"] == ("" if wanted is None else str(wanted))


def test_an_epoch_that_is_none(pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "context", "ARG SOURCE_DATE_EPOCH=noon\nFROM scratch\nCOPY f /f\n", {"f": "f"})
    result = pybuild.build(context, check=False)
    assert result.status == 2
    assert "invalid SOURCE_DATE_EPOCH: 'noon'" in result.stderr


def test_no_step_sees_a_time_that_is_newer_than_the_epoch(pybuild: Pybuild, context: Path) -> None:
    """`verify` moves them, so that it would show where one did."""
    text = "FROM base:1\nCOPY . /a\nRUN --mount=type=bind,target=/c stat -c %Y /c/a/1 /a/a/1 > /seen; ls -l /c > /l\n"
    (context / "Containerfile").write_text(text)
    assert pybuild.run("verify", "-q", "--timestamp", str(EPOCH), context).text.startswith("reproducible")


def test_verify_moves_the_machines_start(pybuild: Pybuild, context: Path) -> None:
    """Not by the second that passes between the two builds, but by a day."""
    (context / "Containerfile").write_text(
        "FROM base:1\nRUN read up rest < /proc/uptime; echo $((${up%.*} / 20000)) > /up\n"
    )
    result = pybuild.run("verify", "-q", context, check=False)
    if Path("/proc/self/timens_offsets").exists() and os.geteuid() == 0:
        assert "up:" in result.stdout.decode()
