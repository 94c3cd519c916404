"""Several images in one archive or layout."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from layers.errors import PybuildError
from registry.errors import InvalidReference
from registry.several import copy_several
from registry.transport import TransportContext, parse_location
from tests.support.extract import extract_all
from tests.support.images import Image, check_layout, layout_names, make_image, random_layer, write_layout


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Image]:
    base = random_layer("base", 9000)
    made = {"one": make_image([base]), "two": make_image([base, random_layer("own")])}
    write_layout(tmp_path / "made", **made)
    return made


def run(tmp_path: Path, destination: str, *names: str) -> None:
    sources = [parse_location(f"oci:{tmp_path}/made:{n}") for n in names]
    copy_several(sources, parse_location(destination), TransportContext(scratch_dir=tmp_path))


def test_a_docker_archive(tmp_path: Path, images: dict[str, Image]) -> None:
    run(tmp_path, f"docker-archive:{tmp_path}/x.tar", "one", "two")
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = tar.getnames()
        listed = tar.extractfile("manifest.json")
        assert listed is not None
        entries = json.load(listed)
    assert len(names) == len(set(names))
    assert [e["RepoTags"] for e in entries] == [["one:latest"], ["two:latest"]]
    assert entries[1]["Layers"][0] == entries[0]["Layers"][0]


@pytest.mark.parametrize("kind", ["oci", "oci-archive"])
def test_layouts_and_their_archives(tmp_path: Path, images: dict[str, Image], kind: str) -> None:
    run(tmp_path, f"{kind}:{tmp_path}/x", "one", "two")
    if kind == "oci-archive":
        with tarfile.open(tmp_path / "x") as tar:
            extract_all(tar, tmp_path / "y")
    path = tmp_path / ("x" if kind == "oci" else "y")
    assert layout_names(path) == {f"{n}:latest": i.digest for n, i in images.items()}
    for image in images.values():
        check_layout(path, image.digest)


def test_what_cannot_be(tmp_path: Path, images: dict[str, Image]) -> None:
    for destination in (f"dir:{tmp_path}/x", "docker://h.example/x", f"oci:{tmp_path}/x:tag"):
        with pytest.raises(InvalidReference, match="several"):
            run(tmp_path, destination, "one", "two")
    with pytest.raises(InvalidReference, match="one:latest"):
        run(tmp_path, f"oci:{tmp_path}/x", "one", "one")
    sources = [parse_location(f"dir:{tmp_path}/d")]
    with pytest.raises(InvalidReference, match="no name"):
        copy_several(sources, parse_location(f"oci:{tmp_path}/x"), TransportContext())
    assert not (tmp_path / "x").exists()


def test_a_failed_archive_is_not_there(tmp_path: Path, images: dict[str, Image]) -> None:
    for kind in ("docker-archive", "oci-archive"):
        with pytest.raises(PybuildError):
            run(tmp_path, f"{kind}:{tmp_path}/x.tar", "one", "missing")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]
