"""Images found in other stores, read only, before a registry is asked."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.images.stock import stock_base
from tests.support.cli import Pybuild, write_context

CONTAINERFILE = "FROM base:1\nRUN echo made > /made\n"


def state(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in root.rglob("*"))


def test_builds_and_containers_find_images_there(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    pybuild.run("tag", "base:1", "second:1")
    before = state(pybuild.root)
    context = write_context(tmp_path / "context", CONTAINERFILE)
    mine = Pybuild(tmp_path / "mine")
    never = ("--pull=never",)
    found = mine.build(context, "-t", "made:1", *never, check=False)
    assert found.status == 1
    assert "not in the store" in found.stderr
    environ = {"PYBUILD_ADDITIONAL_STORES": f"{tmp_path}/other:{pybuild.root}"}
    mine.run("copy", f"oci:{busybox_layout}:busybox", f"oci:{tmp_path}/other:else")
    mine.build(context, "-t", "made:1", *never, env=environ)
    # What it took it has now, and needs the other store no more.
    mine.build(context, "-t", "made:2", *never, "--no-cache")
    flags = ("--rm", *never, "--additional-store", pybuild.root)
    assert mine.run("run", *flags, "second:1", "echo", "hello").text == "hello\n"
    assert mine.run("run", *flags, "third:1", "true", check=False).status == 125
    assert state(pybuild.root) == before


def test_what_is_no_store_is_an_error(pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "context", CONTAINERFILE)
    os.mkdir(tmp_path / "none")
    found = pybuild.build(context, "--additional-store", tmp_path / "none", check=False)
    assert found.status == 1
    assert str(tmp_path / "none") in found.stderr
