"""OCI layouts: what is written, several writers, resumption, and layouts that mean harm."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from layers.errors import BlobNotFound, DigestMismatch, ImageError, PybuildError, SizeMismatch, StoreError
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest
from registry.copy import CopyOptions, copy_location
from registry.transport import BlobInput, RawManifest, TransportContext, parse_location
from registry.transports.oci import LayoutDir, OciDestination, OciLocation
from tests.support.images import (
    Blob,
    Image,
    check_layout,
    layout_names,
    make_image,
    make_index,
    random_layer,
    write_layout,
)


@pytest.fixture
def context(tmp_path: Path) -> TransportContext:
    return TransportContext(scratch_dir=tmp_path)


def copy(source: str, destination: str, context: TransportContext, **options: object) -> str:
    result = copy_location(
        parse_location(source),
        parse_location(destination),
        context,
        options=CopyOptions(**options),  # type: ignore[arg-type]
    )
    return result.descriptor.digest


def test_a_copy_is_whole_and_named(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    assert copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:two", context) == image.digest
    assert layout_names(tmp_path / "b") == {"two": image.digest}
    check_layout(tmp_path / "b", image.digest)
    assert json.loads((tmp_path / "b/oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["blobs", "index.json", "oci-layout"]


def test_a_tag_moves_and_others_stay(tmp_path: Path, context: TransportContext) -> None:
    first, second = make_image(), make_image()
    write_layout(tmp_path / "a", one=first, two=second)
    for name in ("x", "y"):
        copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:{name}", context)
    copy(f"oci:{tmp_path}/a:two", f"oci:{tmp_path}/b:x", context)
    assert layout_names(tmp_path / "b") == {"x": second.digest, "y": first.digest}


def test_untagged_images_accumulate_once_each(tmp_path: Path, context: TransportContext) -> None:
    first, second = make_image(), make_image()
    write_layout(tmp_path / "a", one=first, two=second)
    for name in ("one", "two", "one"):
        copy(f"oci:{tmp_path}/a:{name}", f"oci:{tmp_path}/b", context)
    entries = json.loads((tmp_path / "b/index.json").read_bytes())["manifests"]
    assert sorted(e["digest"] for e in entries) == sorted([first.digest, second.digest])


def test_reading_without_a_tag_wants_exactly_one(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    assert copy(f"oci:{tmp_path}/a", f"oci:{tmp_path}/b", context) == image.digest
    write_layout(tmp_path / "a", one=image, two=make_image())
    with pytest.raises(ImageError) as caught:
        copy(f"oci:{tmp_path}/a", f"oci:{tmp_path}/b", context)
    assert caught.value.hint == "there is: one, two"
    with pytest.raises(ImageError) as caught:
        copy(f"oci:{tmp_path}/a:three", f"oci:{tmp_path}/b", context)
    assert caught.value.hint == "there is: one, two"


def test_two_names_of_one_image_are_not_ambiguous(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image, two=image)
    assert copy(f"oci:{tmp_path}/a", f"oci:{tmp_path}/b", context) == image.digest


def test_reading_by_digest_finds_instances_too(tmp_path: Path, context: TransportContext) -> None:
    arm = make_image(architecture="arm64")
    index = make_index({"amd64": make_image(), "arm64": arm})
    write_layout(tmp_path / "a", one=index)
    assert copy(f"oci:{tmp_path}/a@{index.digest}", f"oci:{tmp_path}/b:i", context) == index.digest
    assert copy(f"oci:{tmp_path}/a@{arm.digest}", f"oci:{tmp_path}/b:arm", context) == arm.digest
    with pytest.raises(BlobNotFound):
        copy(f"oci:{tmp_path}/a@sha256:{'0' * 64}", f"oci:{tmp_path}/b:x", context)


def test_buildkits_full_name_is_understood(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    index = json.loads((tmp_path / "a/index.json").read_bytes())
    index["manifests"][0]["annotations"]["io.containerd.image.name"] = "docker.io/library/x:1"
    (tmp_path / "a/index.json").write_text(json.dumps(index))
    assert copy(f"oci:{tmp_path}/a:docker.io/library/x:1", f"oci:{tmp_path}/b", context) == image.digest


def test_unknown_entries_of_the_index_survive(tmp_path: Path, context: TransportContext) -> None:
    write_layout(tmp_path / "a", one=make_image())
    write_layout(tmp_path / "b", old=make_image())
    index = json.loads((tmp_path / "b/index.json").read_bytes())
    index["manifests"].append({"mediaType": "text/x", "digest": f"sha256:{'1' * 64}", "size": 1, "later": [1]})
    index["annotations"] = {"k": "v"}
    (tmp_path / "b/index.json").write_text(json.dumps(index))
    copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:one", context)
    after = json.loads((tmp_path / "b/index.json").read_bytes())
    assert after["annotations"] == {"k": "v"}
    assert index["manifests"][1] in after["manifests"]


def test_blobs_are_written_once(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:one", context)
    before = {p: p.stat().st_ino for p in (tmp_path / "b/blobs/sha256").iterdir() if p.name not in image.digest}
    copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:two", context)
    assert {p: p.stat().st_ino for p in before} == before


def test_a_blob_of_the_wrong_size_is_written_anew(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    write_layout(tmp_path / "a", one=image)
    write_layout(tmp_path / "b", one=image)
    torn = tmp_path / "b/blobs" / image.blobs[1].digest.replace(":", "/")
    torn.write_bytes(image.blobs[1].data[:10])
    copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:one", context)
    check_layout(tmp_path / "b", image.digest)


# Several writers


def test_many_writers_lose_no_name(tmp_path: Path, context: TransportContext) -> None:
    shared = random_layer("shared", 300_000)
    images = {f"t{i}": make_image([shared, random_layer(f"own{i}")]) for i in range(8)}
    write_layout(tmp_path / "a", **images)
    errors: list[BaseException] = []

    def one(tag: str) -> None:
        try:
            copy(f"oci:{tmp_path}/a:{tag}", f"oci:{tmp_path}/b:{tag}", context)
        except BaseException as e:  # noqa: BLE001  # shown by the assertion below
            errors.append(e)

    threads = [threading.Thread(target=one, args=(tag,)) for tag in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert layout_names(tmp_path / "b") == {tag: image.digest for tag, image in images.items()}
    for image in images.values():
        check_layout(tmp_path / "b", image.digest)


# Resumption


class Fragile:
    """A source of one blob that can break after some bytes; knows from where it was read."""

    name = "fragile"
    host = ""
    synthetic = False

    def __init__(self, data: bytes, breaks_after: int | None = None) -> None:
        self.data = data
        self.breaks_after = breaks_after
        self.offsets: list[int] = []

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> Fragile:
        self.offsets.append(offset)
        self.position = offset
        return self

    def read(self, size: int = -1, /) -> bytes:
        end = self.position + size
        if self.breaks_after is not None and end > self.breaks_after:
            end = self.breaks_after
            if self.position >= end:
                raise ConnectionResetError
        data = self.data[self.position : end]
        self.position += len(data)
        return data

    def blob_path(self, digest: Digest) -> Path | None:
        return None

    def close(self) -> None:
        return


def put(layout: Path, source: Fragile, descriptor: Descriptor) -> None:
    destination = OciDestination(OciLocation(layout, "t"))
    try:
        destination.put_blob(BlobInput(descriptor, source))  # type: ignore[arg-type]  # the rest is not needed
    finally:
        destination.close()


def test_an_interrupted_blob_goes_on(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    descriptor = Descriptor.of(data, "x")
    with pytest.raises((ConnectionError, StoreError)):
        put(tmp_path / "l", Fragile(data, breaks_after=2_000_000), descriptor)
    again = Fragile(data)
    put(tmp_path / "l", again, descriptor)
    assert again.offsets == [2_000_000]
    assert (tmp_path / "l/blobs" / descriptor.digest.replace(":", "/")).read_bytes() == data


def test_a_wrong_beginning_is_not_gone_on_from(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    descriptor = Descriptor.of(data, "x")
    LayoutDir(tmp_path / "l", create=True).close()
    ingest = tmp_path / "l/.pybuild-ingest"
    ingest.mkdir()
    (ingest / descriptor.digest.replace(":", "-")).write_bytes(b"x" * 5000)
    with pytest.raises(DigestMismatch):
        put(tmp_path / "l", Fragile(data), descriptor)
    again = Fragile(data)
    put(tmp_path / "l", again, descriptor)
    assert again.offsets == [0]


@pytest.mark.parametrize("change", [b"", b"more"])
def test_wrong_sizes_are_refused(tmp_path: Path, change: bytes) -> None:
    data = os.urandom(1000)
    descriptor = Descriptor.of(data, "x")
    with pytest.raises(SizeMismatch):
        put(tmp_path / "l", Fragile(data + change if change else data[:-1]), descriptor)
    assert not (tmp_path / "l/blobs" / descriptor.digest.replace(":", "/")).exists()


def test_a_commit_clears_what_dead_writers_left(tmp_path: Path, context: TransportContext) -> None:
    LayoutDir(tmp_path / "b", create=True).close()
    ingest = tmp_path / "b/.pybuild-ingest"
    ingest.mkdir()
    (ingest / f"sha256-{'0' * 64}").write_bytes(b"left")
    write_layout(tmp_path / "a", one=make_image())
    copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:one", context)
    assert not ingest.exists()


# Harm


def _without(path: Path, name: str) -> None:
    (path / name).unlink()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "no oci-layout"),
        ("{}", "malformed"),
        ("[" * 4000, "malformed"),
        ('{"imageLayoutVersion": "2.0"}', "version"),
        ("x" * 10_000, "larger"),
    ],
)
def test_what_is_no_layout_is_refused(tmp_path: Path, context: TransportContext, text: str | None, what: str) -> None:
    layout = write_layout(tmp_path / "a", one=make_image())
    (layout / "oci-layout").unlink()
    if text is not None:
        (layout / "oci-layout").write_text(text)
    with pytest.raises(PybuildError, match=what):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b", context)
    assert not (tmp_path / "b").exists()


def test_an_index_that_is_no_layout_is_not_touched(tmp_path: Path, context: TransportContext) -> None:
    write_layout(tmp_path / "a", one=make_image())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/index.json").write_text("mine")
    with pytest.raises(StoreError, match="not touched"):
        copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b", context)
    assert (tmp_path / "b/index.json").read_text() == "mine"


def test_large_documents_are_not_read(tmp_path: Path, context: TransportContext) -> None:
    layout = write_layout(tmp_path / "a", one=make_image())
    with (layout / "index.json").open("ab") as f:
        f.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ImageError, match="larger"):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b", context)
    image = make_image()
    huge = Image(Blob(image.top.data + b" " * MAX_MANIFEST_BYTES, image.top.media_type), image.blobs)
    write_layout(tmp_path / "c", one=huge)
    with pytest.raises(ImageError, match="larger"):
        copy(f"oci:{tmp_path}/c:one", f"oci:{tmp_path}/b", context)


@pytest.mark.parametrize("target", ["secret", "missing", "directory", "fifo"])
def test_blobs_that_are_no_plain_files_are_refused(tmp_path: Path, context: TransportContext, target: str) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    blob = layout / "blobs" / image.blobs[1].digest.replace(":", "/")
    blob.unlink()
    if target == "secret":
        (tmp_path / "secret").write_bytes(image.blobs[1].data)  # even the right bytes
        blob.symlink_to(tmp_path / "secret")
    elif target == "directory":
        blob.mkdir()
    elif target == "fifo":
        os.mkfifo(blob)
    with pytest.raises(PybuildError):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b", context)
    assert layout_names(tmp_path / "b") == {}


def test_directories_are_not_followed_through_links(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    real = write_layout(tmp_path / "real", one=image)
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("oci-layout", "index.json"):
        (trap / name).write_bytes((real / name).read_bytes())
    outside = tmp_path / "outside"
    outside.mkdir()
    (trap / "blobs").symlink_to(outside)
    with pytest.raises(StoreError):
        copy(f"oci:{trap}:one", f"oci:{tmp_path}/b", context)
    with pytest.raises(StoreError):
        copy(f"oci:{real}:one", f"oci:{trap}:two", context)
    assert list(outside.iterdir()) == []


def test_an_index_that_is_a_link_is_replaced_not_written_through(tmp_path: Path, context: TransportContext) -> None:
    write_layout(tmp_path / "a", one=make_image())
    layout = write_layout(tmp_path / "b", old=make_image())
    victim = tmp_path / "victim"
    victim.write_bytes((layout / "index.json").read_bytes())
    before = victim.read_bytes()
    (layout / "index.json").unlink()
    (layout / "index.json").symlink_to(victim)
    with pytest.raises(StoreError):
        copy(f"oci:{tmp_path}/a:one", f"oci:{tmp_path}/b:one", context)
    assert victim.read_bytes() == before


def test_an_ingest_that_is_a_hard_link_is_not_written(tmp_path: Path) -> None:
    data = os.urandom(1000)
    descriptor = Descriptor.of(data, "x")
    LayoutDir(tmp_path / "l", create=True).close()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "l/.pybuild-ingest").mkdir()
    os.link(victim, tmp_path / "l/.pybuild-ingest" / descriptor.digest.replace(":", "-"))
    with pytest.raises(StoreError):
        put(tmp_path / "l", Fragile(data), descriptor)
    assert victim.read_bytes() == b"precious"


def test_wrong_bytes_are_found_before_the_name(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    blob = layout / "blobs" / image.blobs[2].digest.replace(":", "/")
    blob.write_bytes(bytes(len(image.blobs[2].data)))
    with pytest.raises(DigestMismatch):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b:one", context)
    assert layout_names(tmp_path / "b") == {}
    assert not (tmp_path / "b/blobs" / image.blobs[2].digest.replace(":", "/")).exists()


def test_a_manifest_with_wrong_bytes_is_refused(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    path = layout / "blobs" / image.digest.replace(":", "/")
    path.write_bytes(image.top.data.replace(b'"schemaVersion": 2', b'"schemaVersion":  2'))
    with pytest.raises(DigestMismatch):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b:one", context)


@pytest.mark.parametrize("digest", ["../../../etc/passwd", "sha256:../../../../etc/passwd", "sha256:" + "A" * 64, 7])
def test_digests_cannot_be_paths(tmp_path: Path, context: TransportContext, digest: object) -> None:
    layout = write_layout(tmp_path / "a", one=make_image())
    index = json.loads((layout / "index.json").read_bytes())
    index["manifests"][0]["digest"] = digest
    (layout / "index.json").write_text(json.dumps(index))
    with pytest.raises(ImageError, match="digest"):
        copy(f"oci:{layout}:one", f"oci:{tmp_path}/b:one", context)


# Sharing with the store


def test_a_verified_file_is_linked_not_copied(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    descriptor = Descriptor.of(data, "x")
    file = tmp_path / "stored"
    file.write_bytes(data)
    layout = LayoutDir(tmp_path / "l", create=True)
    try:
        assert layout.link_blob(file, descriptor)
        assert layout.link_blob(file, descriptor)  # again, over itself
        blob = tmp_path / "l/blobs" / descriptor.digest.replace(":", "/")
        assert blob.stat().st_ino == file.stat().st_ino
        assert len(list(blob.parent.iterdir())) == 1
        other = Descriptor.of(b"other", "x")
        assert not layout.link_blob(file, other)  # another size
        private = tmp_path / "private"
        private.write_bytes(b"other")
        private.chmod(0o600)
        assert not layout.link_blob(private, other)
        assert not layout.link_blob(tmp_path / "missing", other)
        assert len(list(blob.parent.iterdir())) == 1
    finally:
        layout.close()


def test_other_algorithms_have_their_own_directory(tmp_path: Path) -> None:
    data = b"hello"
    digest = Digest("sha512:" + hashlib.sha512(data).hexdigest())
    descriptor = Descriptor(media_type="x", digest=digest, size_bytes=5)
    put(tmp_path / "l", Fragile(data), descriptor)
    assert (tmp_path / "l/blobs/sha512" / digest.encoded).read_bytes() == data


def test_manifests_are_checked_before_they_are_written(tmp_path: Path) -> None:
    destination = OciDestination(OciLocation(tmp_path / "l", "t"))
    try:
        with pytest.raises(DigestMismatch):
            destination.put_manifest(RawManifest(b"{}", "x", Digest.of(b"other")), top=True)
        with pytest.raises(StoreError, match="nothing"):
            destination.commit()
    finally:
        destination.close()


# What is there already


@pytest.mark.parametrize("kind", ["oci", "dir"])
def test_a_repeated_copy_writes_nothing(tmp_path: Path, context: TransportContext, kind: str) -> None:
    index = make_index({"amd64": make_image(), "arm64": make_image(architecture="arm64")})
    write_layout(tmp_path / "a", one=index)
    source = parse_location(f"oci:{tmp_path}/a:one")
    target = parse_location(f"oci:{tmp_path}/b:one" if kind == "oci" else f"dir:{tmp_path}/b")
    assert copy_location(source, target, context).written
    before = {p: p.stat().st_ino for p in (tmp_path / "b").rglob("*")}
    again = copy_location(source, target, context)
    assert (again.written, again.moved_bytes, again.descriptor.digest) == (False, 0, index.digest)
    assert {p: p.stat().st_ino for p in (tmp_path / "b").rglob("*")} == before
    # A part is missing, or torn: the copy is not complete, whatever its name says.
    blobs = sorted(p for p in (tmp_path / "b").rglob("*") if len(p.name) == 64 and p.stat().st_size > 1500)
    blobs[0].unlink()
    assert copy_location(source, target, context).copied_blobs == 1
    blobs[1].write_bytes(b"torn")
    assert copy_location(source, target, context).copied_blobs == 1


def test_a_moved_tag_is_written_though_all_blobs_are_there(tmp_path: Path, context: TransportContext) -> None:
    first, second = make_image(), make_image()
    write_layout(tmp_path / "a", one=first, two=second)
    write_layout(tmp_path / "b", x=first, y=second)
    result = copy_location(parse_location(f"oci:{tmp_path}/a:two"), parse_location(f"oci:{tmp_path}/b:x"), context)
    assert (result.written, result.copied_blobs) == (True, 0)
    assert layout_names(tmp_path / "b") == {"x": second.digest, "y": second.digest}
