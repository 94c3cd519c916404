"""Builds with SOURCE_DATE_EPOCH: the same manifest whatever the time, the umask, the path, the order, the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

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


def manifest(pybuild: Pybuild, context: Path, *flags: str, **options: object) -> str:
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
