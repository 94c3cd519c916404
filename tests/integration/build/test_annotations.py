"""Annotations at every level of an image, and labels that are not inherited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Pybuild, write_context


def documents(layout: Path) -> list[dict[str, Any]]:
    found = []
    for path in (layout / "blobs" / "sha256").iterdir():
        data = path.read_bytes()
        if data.startswith(b"{"):
            found.append(json.loads(data))
    return found


def test_levels_and_platforms(pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "context", "FROM scratch\nCOPY file /\n", {"file": "x"})
    pybuild.build(
        context, "--platform", "linux/amd64,linux/arm64", "-o", f"type=oci,tar=false,dest={tmp_path / 'out'}",
        "--annotation", "everywhere=1", "--annotation", "manifest:with:colon=2", "--annotation", "index:whole=3",
        "--annotation", "manifest[linux/arm64],manifest-descriptor[linux/arm64]:one=4",
    )  # fmt: skip
    found = documents(tmp_path / "out")
    index = next(d for d in found if "manifests" in d)
    assert index["annotations"] == {"whole": "3"}
    entries = {m["platform"]["architecture"]: m for m in index["manifests"]}
    assert "annotations" not in entries["amd64"]
    assert entries["arm64"]["annotations"] == {"one": "4"}
    manifests = sorted((d["annotations"] for d in found if "layers" in d), key=len)
    common = {"everywhere": "1", "with:colon": "2"}
    assert manifests == [common, {**common, "one": "4"}]


@pytest.mark.parametrize("text", ["index:a=1", "manifest-descriptor:a=1", "nowhere:a=1", "index[linux/amd64]:a=1", "a"])
def test_an_annotation_without_a_place_is_refused(pybuild: Pybuild, tmp_path: Path, text: str) -> None:
    context = write_context(tmp_path / "context", "FROM scratch\n")
    result = pybuild.build(context, "--annotation", text, check=False)
    assert result.status == 2
    assert "--annotation" in result.stderr


def test_labels_of_the_base_can_be_left_behind(pybuild: Pybuild, tmp_path: Path) -> None:
    base = write_context(tmp_path / "base", "FROM scratch\nLABEL of=base same=base\n")
    pybuild.build(base, "-t", "base:1")
    context = write_context(tmp_path / "context", "FROM base:1 AS one\nLABEL of=stage\nFROM one\nLABEL same=own\n")
    for flags, labels in (
        ([], {"of": "stage", "same": "own"}),
        (["--inherit-labels=false"], {"same": "own"}),
    ):
        pybuild.build(context, *flags, "--label", "more=1", "--pull=never", "-t", "app:1")
        config = pybuild.run("inspect", "--config", "app:1").json()
        assert config["config"]["Labels"] == {**labels, "more": "1"}
