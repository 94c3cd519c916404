"""`dir:` as skopeo has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layers.errors import BlobNotFound, DigestMismatch, ImageError, PybuildError, SizeMismatch, StoreError
from layers.oci import MAX_MANIFEST_BYTES
from registry.copy import CopyOptions, copy_location
from registry.transport import TransportContext, parse_location
from tests.support.images import Image, check_layout, layout_names, make_image, make_index, write_layout


def copy(source: str, destination: str, **options: Any) -> str:
    result = copy_location(
        parse_location(source), parse_location(destination), TransportContext(), options=CopyOptions(**options)
    )
    return result.descriptor.digest


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Image]:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    copy(f"oci:{tmp_path}/a:one", f"dir:{tmp_path}/d")
    return tmp_path / "d", image


def test_what_is_written(written: tuple[Path, Image]) -> None:
    path, image = written
    assert (path / "version").read_bytes() == b"Directory Transport Version: 1.1\n"
    assert (path / "manifest.json").read_bytes() == image.top.data
    for blob in image.blobs:
        assert (path / blob.digest[7:]).read_bytes() == blob.data
    assert len(list(path.iterdir())) == 2 + len(image.blobs)


def test_an_index_keeps_its_instances(tmp_path: Path) -> None:
    index = make_index({"amd64": make_image(), "arm64": make_image(architecture="arm64")})
    write_layout(tmp_path / "a", one=index)
    assert copy(f"oci:{tmp_path}/a:one", f"dir:{tmp_path}/d") == index.digest
    for entry in index.document()["manifests"]:
        assert (tmp_path / "d" / f"{entry['digest'][7:]}.manifest.json").exists()
    assert copy(f"dir:{tmp_path}/d", f"oci:{tmp_path}/b:t") == index.digest
    check_layout(tmp_path / "b", index.digest)


def test_docker_types_are_kept_here_and_converted_for_layouts(tmp_path: Path) -> None:
    image = make_image(docker=True)
    write_layout(tmp_path / "a", one=image)
    assert copy(f"oci:{tmp_path}/a:one", f"dir:{tmp_path}/d") == image.digest
    converted = copy(f"dir:{tmp_path}/d", f"oci:{tmp_path}/b:t")
    assert converted != image.digest
    check_layout(tmp_path / "b", converted)
    assert copy(f"dir:{tmp_path}/d", f"oci:{tmp_path}/b:kept", preserve_digests=True) == image.digest
    assert layout_names(tmp_path / "b") == {"t": converted, "kept": image.digest}


def test_the_next_image_replaces_this_one(written: tuple[Path, Image], tmp_path: Path) -> None:
    path, old = written
    (path / "signature-1").write_bytes(b"of the old image")
    (path / "README").write_bytes(b"not ours")
    image = make_image()
    write_layout(tmp_path / "b", one=image)
    copy(f"oci:{tmp_path}/b:one", f"dir:{path}")
    names = {p.name for p in path.iterdir()}
    assert names == {"version", "manifest.json", "README", *(b.digest[7:] for b in image.blobs)}
    copy(f"oci:{tmp_path}/b:one", f"dir:{path}")
    assert {p.name for p in path.iterdir()} == names
    assert old.digest != image.digest


def test_other_directories_are_not_touched(tmp_path: Path) -> None:
    write_layout(tmp_path / "a", one=make_image())
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not touched"):
        copy(f"oci:{tmp_path}/a:one", f"dir:{tmp_path}/d")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["thesis.txt"]


def test_a_failed_copy_leaves_the_old_image(written: tuple[Path, Image], tmp_path: Path) -> None:
    path, image = written
    bad = make_image()
    layout = write_layout(tmp_path / "b", one=bad)
    (layout / "blobs" / bad.blobs[1].digest.replace(":", "/")).write_bytes(bytes(len(bad.blobs[1].data)))
    with pytest.raises(DigestMismatch):
        copy(f"oci:{layout}:one", f"dir:{path}")
    assert copy(f"dir:{path}", f"oci:{tmp_path}/c:t") == image.digest


def test_harm(written: tuple[Path, Image], tmp_path: Path) -> None:
    path, image = written
    blob = path / image.blobs[1].digest[7:]
    target = f"oci:{tmp_path}/c:t"
    secret = tmp_path / "secret"
    secret.write_bytes(blob.read_bytes())
    blob.write_bytes(bytes(len(image.blobs[1].data)))
    with pytest.raises(DigestMismatch):
        copy(f"dir:{path}", target)
    blob.write_bytes(b"short")
    with pytest.raises(SizeMismatch):
        copy(f"dir:{path}", target)
    blob.unlink()
    with pytest.raises(BlobNotFound):
        copy(f"dir:{path}", target)
    blob.symlink_to(secret)
    with pytest.raises(StoreError):
        copy(f"dir:{path}", target)
    (path / "manifest.json").write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(ImageError, match="larger"):
        copy(f"dir:{path}", target)
    (path / "manifest.json").write_text(json.dumps({"schemaVersion": 1}))
    with pytest.raises(ImageError, match="schema 1"):
        copy(f"dir:{path}", target)
    (path / "manifest.json").unlink()
    with pytest.raises(ImageError, match="holds no image"):
        copy(f"dir:{path}", target)
    with pytest.raises(PybuildError):
        copy(f"dir:{tmp_path}/none", target)


def test_writing_goes_through_no_link(written: tuple[Path, Image], tmp_path: Path) -> None:
    path, image = written
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    blob = path / image.blobs[1].digest[7:]
    blob.unlink()
    (path / f".pybuild-{blob.name}").symlink_to(victim)
    with pytest.raises(StoreError):
        copy(f"oci:{tmp_path}/a:one", f"dir:{path}")
    assert victim.read_bytes() == b"precious"


def test_an_index_over_one_of_its_instances_keeps_both(tmp_path: Path) -> None:
    amd, arm = make_image(), make_image(architecture="arm64")
    index = make_index({"amd64": amd, "arm64": arm})
    write_layout(tmp_path / "a", amd=amd, both=index)
    copy(f"oci:{tmp_path}/a:amd", f"dir:{tmp_path}/d")
    copy(f"oci:{tmp_path}/a:both", f"dir:{tmp_path}/d")
    copy(f"oci:{tmp_path}/a:both", f"dir:{tmp_path}/d")
    assert copy(f"dir:{tmp_path}/d", f"oci:{tmp_path}/b:t") == index.digest
    check_layout(tmp_path / "b", index.digest)
    copy(f"oci:{tmp_path}/a:amd", f"dir:{tmp_path}/d")
    assert len(list((tmp_path / "d").iterdir())) == 2 + len(amd.blobs)


def test_a_copy_that_failed_can_be_begun_again(tmp_path: Path) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    blob = layout / "blobs" / image.blobs[1].digest.replace(":", "/")
    blob.write_bytes(bytes(len(image.blobs[1].data)))
    with pytest.raises(DigestMismatch):
        copy(f"oci:{layout}:one", f"dir:{tmp_path}/d")
    blob.write_bytes(image.blobs[1].data)
    assert copy(f"oci:{layout}:one", f"dir:{tmp_path}/d") == image.digest
