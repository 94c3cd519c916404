"""The copy engine, between a source and a destination that keep books."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pytest
import zstandard

from layers.compression import decompressor
from layers.errors import Cancelled, DigestMismatch, ImageError, StoreError
from layers.events import Event, Vertex, VertexStatus, VertexWarning
from layers.oci import Descriptor, Digest, Platform
from registry.copy import CopyOptions, CopyResult, HostSlots, copy_image
from registry.transport import BlobInput, ImageSource, RawManifest
from tests.support.images import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Blob,
    Image,
    make_image,
    make_index,
    random_layer,
)
from tests.support.waiting import PATIENCE_S, until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from registry.transport import Reuse


class Source:
    """An image in memory."""

    def __init__(self, image: Image, *, host: str = "", synthetic: bool = False) -> None:
        self.name = "source"
        self.host = host
        self.synthetic = synthetic
        self.image = image
        self.blobs = {b.digest: b for b in (image.top, *image.blobs)}
        self.opened: list[str] = []
        self.fetched: list[str] = []
        self.delay_s = 0.0
        self.together = 0
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        blob = self.blobs[digest or self.image.digest]
        self.fetched.append(blob.digest)
        return RawManifest(blob.data, blob.media_type, Digest(blob.digest))

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> io.BytesIO:
        with self._lock:
            self.opened.append(descriptor.digest)
            self.running += 1
            self.most = max(self.most, self.running)
        until(lambda: self.most >= self.together, lambda: f"there were never {self.together} at once")
        if self.delay_s:
            time.sleep(self.delay_s)
        with self._lock:
            self.running -= 1
        return io.BytesIO(self.blobs[descriptor.digest].data[offset:])

    def blob_path(self, digest: Digest) -> Path | None:
        return None

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        return ()

    def close(self) -> None:
        return


class Destination:
    """Remembers everything in the order in which it came."""

    def __init__(
        self,
        *,
        host: str = "",
        has: Sequence[str] = (),
        reuses: Sequence[str] = (),
        manifests: Sequence[str] = (),
        manifest_types: frozenset[str] | None = None,
        single_platform: bool = False,
        holds_indexes: bool = True,
        compresses: bool = False,
    ) -> None:
        self.name = "destination"
        self.room = "room"
        self.host = host
        self.single_platform = single_platform
        self.holds_indexes = holds_indexes
        self.manifest_types = manifest_types
        self.compresses = compresses
        self.has = set(has)
        self.reuses = set(reuses)
        self.known = set(manifests)
        self.log: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, RawManifest] = {}
        self.top: RawManifest | None = None
        self._lock = threading.Lock()

    def _note(self, what: str, digest: str) -> None:
        with self._lock:
            self.log.append((what, digest))

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        self._note("head", digest or "top")
        wanted = digest or next(iter(self.known), "")
        return Digest(wanted) if wanted in self.known else None

    def has_blob(self, descriptor: Descriptor) -> bool:
        self._note("has", descriptor.digest)
        return descriptor.digest in self.has

    def reuse_blob(self, descriptor: Descriptor, source: ImageSource) -> Reuse | None:
        return "mounted" if descriptor.digest in self.reuses else None

    def put_blob(self, blob: BlobInput) -> None:
        with blob.open_verified() as stream:
            data = stream.read()
        self._note("put", blob.descriptor.digest)
        self.blobs[blob.descriptor.digest] = data

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        self._note("top" if top else "manifest", manifest.digest)
        self.manifests[manifest.digest] = manifest
        if top:
            self.top = manifest

    def commit(self) -> None:
        self._note("commit", "")

    def close(self) -> None:
        return

    def of(self, *kinds: str) -> list[str]:
        return [digest for kind, digest in self.log if kind in kinds]

    def document(self) -> dict[str, Any]:
        assert self.top is not None
        document: dict[str, Any] = json.loads(self.top.raw)
        return document


def copy(source: Source, destination: Destination, *, jobs: int = 4, **options: Any) -> CopyResult:
    return copy_image(source, destination, options=CopyOptions(**options), jobs=jobs)


def test_a_single_image_of_another_platform_is_told() -> None:
    for wanted, warnings in (("linux/arm64", 1), ("linux/amd64", 0)):
        sink = Sink()
        copy_image(
            Source(make_image()), Destination(), events=sink, options=CopyOptions(platform=Platform.parse(wanted))
        )
        assert len([e for e in sink.events if isinstance(e, VertexWarning)]) == warnings


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_blobs_come_before_the_manifest(jobs: int) -> None:
    image = make_image([random_layer(str(i)) for i in range(5)])
    destination = Destination()
    result = copy(Source(image), destination, jobs=jobs)
    assert sorted(destination.of("put")) == sorted(b.digest for b in image.blobs)
    assert destination.log[-1] == ("top", image.digest)
    assert result.descriptor.digest == result.source_digest == image.digest
    assert result.descriptor.media_type == OCI_MANIFEST
    assert result.descriptor.size_bytes == len(image.top.data)
    assert (result.copied_blobs, result.present_blobs, result.reused_blobs) == (6, 0, 0)
    assert result.moved_bytes == sum(len(b.data) for b in image.blobs)
    assert destination.top is not None
    assert destination.top.raw == image.top.data


def test_nothing_is_moved_twice() -> None:
    twice = random_layer("x")
    image = make_image([twice, random_layer("y"), twice])
    source, destination = Source(image), Destination()
    result = copy(source, destination)
    assert len(source.opened) == len(set(source.opened)) == 3
    assert len(destination.of("has")) == 3
    assert result.copied_blobs == 3


def test_what_is_there_is_not_moved_and_asked_for_once() -> None:
    image = make_image([random_layer(str(i)) for i in range(4)])
    digests = [b.digest for b in image.blobs]
    source = Source(image)
    destination = Destination(has=digests[:2], reuses=digests[2:3])
    result = copy(source, destination)
    assert (result.present_blobs, result.reused_blobs, result.copied_blobs) == (2, 1, 2)
    assert sorted(source.opened) == sorted(digests[3:])
    assert sorted(destination.of("has")) == sorted(digests)


def test_a_complete_copy_costs_one_question() -> None:
    image = make_image()
    source, destination = Source(image), Destination(manifests=[image.digest])
    result = copy(source, destination)
    assert destination.log == [("head", "top")]
    assert source.fetched == [image.digest]
    assert source.opened == []
    assert result.descriptor.digest == image.digest
    assert (result.present_blobs, result.moved_bytes) == (3, 0)


def test_the_long_transfers_begin_first() -> None:
    image = make_image([random_layer("a", 100), random_layer("b", 90_000), random_layer("c", 5_000)])
    source = Source(image)
    copy(source, Destination(), jobs=1)
    sizes = [len(source.blobs[d].data) for d in source.opened]
    assert sizes == sorted(sizes, reverse=True)


def test_blobs_go_in_parallel_within_the_hosts_bounds() -> None:
    image = make_image([random_layer(str(i)) for i in range(12)])
    source = Source(image, host="a.example")
    source.together = 4
    copy(source, Destination(), jobs=8)
    bounded = Source(image, host="a.example")
    bounded.delay_s = 0.01
    copy_image(bounded, Destination(host="a.example"), jobs=8, slots=HostSlots(2))
    assert bounded.most <= 2


def test_slots_are_shared_by_copies() -> None:
    slots = HostSlots(1)
    image = make_image([random_layer(str(i)) for i in range(4)])
    source = Source(image, host="a.example")
    source.delay_s = 0.005
    threads = [
        threading.Thread(target=copy_image, args=(source, Destination(host=h)), kwargs={"slots": slots, "jobs": 4})
        for h in ("b.example", "c.example", "a.example")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
    assert source.most == 1
    assert len(source.opened) == 15


def test_copies_that_share_a_blob_move_it_once() -> None:
    base = random_layer("base", 5000)
    images = [make_image([base, random_layer(str(i))]) for i in range(4)]
    slots = HostSlots()

    class Room(Destination):
        """A place whose blobs all copies see."""

        def put_blob(self, blob: BlobInput) -> None:
            super().put_blob(blob)
            self.has.add(blob.descriptor.digest)

    room = Room()
    sources = [Source(image) for image in images]
    for source in sources:
        source.delay_s = 0.03
    threads = [
        threading.Thread(target=copy_image, args=(source, room), kwargs={"slots": slots, "jobs": 2})
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)
    moved = [digest for source in sources for digest in source.opened]
    assert len(moved) == len(set(moved)) == 1 + 4 * 2
    assert slots._busy == {}


# Failures


def test_a_wrong_blob_stops_the_copy_before_the_manifest() -> None:
    image = make_image([random_layer(str(i)) for i in range(6)])
    source, destination = Source(image), Destination()
    bad = image.blobs[3]
    source.blobs[bad.digest] = bad._replace(data=bytes(len(bad.data)))
    with pytest.raises(DigestMismatch, match=bad.digest):
        copy(source, destination)
    assert destination.of("manifest", "top") == []


def test_a_wrong_manifest_is_refused() -> None:
    image = make_image()
    source = Source(image)
    source.get_manifest = lambda digest=None: RawManifest(  # type: ignore[method-assign]
        image.top.data + b" ", OCI_MANIFEST, Digest(image.digest)
    )
    with pytest.raises(DigestMismatch):
        copy(source, Destination())


def test_the_first_failure_is_the_one_that_is_told() -> None:
    image = make_image([random_layer("0", 9000), *(random_layer(str(i)) for i in range(1, 10))])

    class Full(Destination):
        def put_blob(self, blob: BlobInput) -> None:
            if blob.descriptor.digest == image.blobs[1].digest:
                raise StoreError("the disk is full")
            stream = blob.open()
            while stream.read(1):
                time.sleep(0.0005)
            whole.append(blob.descriptor.digest)

    whole: list[str] = []
    with pytest.raises(StoreError, match="full"):
        copy(Source(image), Full(), jobs=3)
    assert image.blobs[0].digest not in whole, "the others go on"


def test_cancelled() -> None:
    image = make_image([random_layer(str(i)) for i in range(4)])
    destination = Destination()
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 4

    with pytest.raises(Cancelled):
        copy_image(Source(image), destination, cancelled=cancelled, jobs=2)
    assert destination.of("manifest", "top") == []


# Events


class Sink:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.parametrize("stop", [Cancelled, KeyboardInterrupt])
def test_a_copy_that_is_stopped_is_told_as_cancelled(stop: type[BaseException]) -> None:
    class Stopped(Source):
        def get_manifest(self, digest: Digest | None = None) -> RawManifest:
            raise stop

    sink = Sink()
    with pytest.raises(stop):
        copy_image(Stopped(make_image()), Destination(), events=sink)
    last = sink.events[-1]
    assert isinstance(last, Vertex)
    assert last.error == "cancelled"


def test_progress_is_told_by_blob() -> None:
    image = make_image([random_layer("a"), random_layer("b"), random_layer("c")])
    sink = Sink()
    destination = Destination(has=[image.blobs[1].digest], reuses=[image.blobs[2].digest])
    copy_image(Source(image), destination, events=sink)
    first, last = sink.events[0], sink.events[-1]
    assert isinstance(first, Vertex)
    assert isinstance(last, Vertex)
    assert (first.id, first.name, first.completed_ns) == (last.id, "copying source to destination", None)
    assert last.completed_ns is not None
    assert last.error is None
    ended = {e.id: e for e in sink.events if isinstance(e, VertexStatus) and e.completed_ns}
    assert {d: e.name.partition(" ")[0] for d, e in ended.items()} == {
        b.digest: "config" if i == 0 else "layer" for i, b in enumerate(image.blobs)
    }
    assert ended[image.blobs[1].digest].name.endswith(" exists")
    assert ended[image.blobs[2].digest].name.endswith(" mounted")
    assert all(e.current == e.total == len(b.data) for b in image.blobs for e in [ended[b.digest]])


def test_a_failure_is_told() -> None:
    image = make_image()
    source, sink = Source(image), Sink()
    source.blobs[image.blobs[1].digest] = Blob(bytes(len(image.blobs[1].data)), "")
    with pytest.raises(DigestMismatch):
        copy_image(source, Destination(), events=sink)
    last = sink.events[-1]
    assert isinstance(last, Vertex)
    assert last.error is not None
    assert image.blobs[1].digest in last.error


# Indexes


def arches() -> dict[str, Image]:
    return {"amd64": make_image(), "arm64": make_image(architecture="arm64"), "arm/v7": make_image(architecture="arm")}


def test_an_index_is_copied_instances_first() -> None:
    images = arches()
    index = make_index(images)
    destination = Destination()
    result = copy(Source(index), destination)
    kinds = [kind for kind, _ in destination.log if kind in {"put", "manifest", "top"}]
    assert kinds == ["put"] * 9 + ["manifest"] * 3 + ["top"]
    assert result.descriptor.media_type == OCI_INDEX
    assert result.descriptor.digest == index.digest


def test_instances_that_are_there_cost_one_question_each() -> None:
    images = arches()
    index = make_index(images)
    there = images["arm64"]
    source, destination = Source(index), Destination(manifests=[there.digest])
    result = copy(source, destination)
    assert sorted(destination.of("head")) == sorted(["top", *(i.digest for i in images.values())])
    assert not {b.digest for b in there.blobs} & set(source.opened + destination.of("has"))
    assert there.digest not in destination.of("manifest")
    assert (result.present_blobs, result.copied_blobs) == (3, 6)


@pytest.mark.parametrize(
    ("platform", "chosen"), [("linux/arm64", "arm64"), ("linux/arm/v7", "arm/v7"), ("linux/amd64", "amd64")]
)
def test_one_platform(platform: str, chosen: str) -> None:
    images = arches()
    destination = Destination()
    result = copy(Source(make_index(images)), destination, platform=Platform.parse(platform))
    assert result.descriptor.digest == images[chosen].digest
    assert destination.of("manifest") == []
    assert sorted(destination.of("put")) == sorted(b.digest for b in images[chosen].blobs)


def test_a_platform_that_there_is_not() -> None:
    with pytest.raises(ImageError, match="s390x"):
        copy(Source(make_index(arches())), Destination(), platform=Platform.parse("linux/s390x"))


def test_some_places_take_this_machines_platform() -> None:
    images = {"amd64": make_image(), "arm64": make_image(architecture="arm64")}
    mine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    destination = Destination(single_platform=True)
    assert copy(Source(make_index(images)), destination).descriptor.digest == images[mine].digest
    everything = Destination(single_platform=True)
    copy(Source(make_index(images)), everything, all_platforms=True)
    assert len(everything.manifests) == 3
    with pytest.raises(ImageError, match="one platform"):
        copy(Source(make_index(images)), Destination(holds_indexes=False), all_platforms=True)


def _nested(depth: int) -> Image:
    image = make_image()
    for _ in range(depth):
        image = Image(make_index({"amd64": image}).top, (image.top, *image.blobs))
    return image


def test_indexes_within_indexes() -> None:
    image = _nested(3)
    destination = Destination()
    copy(Source(image), destination)
    assert len(destination.of("manifest")) == 3
    one = Destination()
    result = copy(Source(image), one, platform=Platform.parse("linux/amd64"))
    assert result.descriptor.media_type == OCI_MANIFEST


@pytest.mark.parametrize("options", [{}, {"platform": Platform()}])
def test_too_deep_a_nest_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match="deep"):
        copy(Source(_nested(6)), Destination(), **options)


def test_an_index_of_something_else_is_refused() -> None:
    raw = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [{"mediaType": "text/plain", "digest": f"sha256:{'1' * 64}", "size": 3}],
        }
    ).encode()
    with pytest.raises(ImageError, match="text/plain"):
        copy(Source(Image(Blob(raw, OCI_INDEX), ())), Destination())


# Conversion


def test_oci_to_docker_and_back_keeps_configs_and_layers() -> None:
    image = make_image(annotations={"k": "v"})
    docker = Destination()
    result = copy(Source(image), docker, format="docker")
    document = docker.document()
    assert result.descriptor.media_type == document["mediaType"] == DOCKER_MANIFEST
    assert document["config"] == image.blobs[0].descriptor() | {
        "mediaType": "application/vnd.docker.container.image.v1+json"
    }
    assert [d["mediaType"] for d in document["layers"]] == ["application/vnd.docker.image.rootfs.diff.tar.gzip"] * 2
    assert "annotations" not in document
    assert docker.top is not None
    back = Destination(manifest_types=frozenset({OCI_MANIFEST, OCI_INDEX}))
    copy(Source(Image(Blob(docker.top.raw, DOCKER_MANIFEST), image.blobs)), back)
    again = back.document()
    original = image.document()
    assert (again["config"], again["layers"]) == (original["config"], original["layers"])
    assert again["mediaType"] == OCI_MANIFEST


def test_an_index_is_converted_with_its_instances() -> None:
    index = make_index(arches())
    destination = Destination(manifests=[i["digest"] for i in index.document()["manifests"]])
    copy(Source(index), destination, format="docker")
    document = destination.document()
    assert document["mediaType"] == DOCKER_INDEX
    for entry, old in zip(document["manifests"], index.document()["manifests"], strict=True):
        assert entry["mediaType"] == DOCKER_MANIFEST
        assert entry["platform"] == old["platform"]
        written = destination.manifests[entry["digest"]]
        assert (len(written.raw), written.media_type) == (entry["size"], DOCKER_MANIFEST)
        assert json.loads(written.raw)["mediaType"] == DOCKER_MANIFEST


def test_asking_for_the_format_that_is_there_changes_nothing() -> None:
    image = make_image()
    assert copy(Source(image), Destination(), format="oci", preserve_digests=True).descriptor.digest == image.digest


@pytest.mark.parametrize(
    "options",
    [{"format": "docker"}, {"compression": "zstd"}, {"compression": "gzip", "force_compression": True}],
)
def test_preserved_digests_forbid_changes(options: dict[str, Any]) -> None:
    for image in (make_image(), make_index(arches())):
        source, destination = Source(image), Destination()
        with pytest.raises(ImageError, match="digest"):
            copy(source, destination, preserve_digests=True, **options)
        assert source.opened == []
        assert destination.of("put", "manifest", "top") == []


def test_preserved_digests_override_what_a_place_prefers() -> None:
    image = make_image(docker=True)
    destination = Destination(manifest_types=frozenset({OCI_MANIFEST, OCI_INDEX}))
    assert copy(Source(image), destination, preserve_digests=True).descriptor.digest == image.digest


def test_an_artifact_cannot_be_dockers() -> None:
    image = make_image()
    document = image.document() | {"artifactType": "application/x.test"}
    artifact = Image(image.top._replace(data=json.dumps(document).encode()), image.blobs)
    with pytest.raises(ImageError, match="artifact"):
        copy(Source(artifact), Destination(), format="docker")
    assert copy(Source(artifact), Destination()).descriptor.digest == artifact.digest


def test_foreign_layers_stay_where_they_are() -> None:
    image = make_image([random_layer("a"), random_layer("b")])
    document = image.document()
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    document["layers"][0] |= {"mediaType": foreign, "urls": ["https://h.example/layer"]}
    source = Source(Image(image.top._replace(data=json.dumps(document).encode()), image.blobs))
    destination = Destination()
    copy(source, destination)
    assert image.blobs[1].digest not in source.opened + destination.of("has")
    assert len(destination.of("put")) == 2


# Compression


def _unpacked(data: bytes, media_type: str) -> bytes:
    if media_type.endswith("zstd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return gzip.decompress(data) if media_type.endswith("gzip") else data


@pytest.mark.parametrize("wanted", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("packed", [True, False])
def test_layers_are_compressed_anew(wanted: str, packed: bool) -> None:
    image = make_image([{"a": b"text " * 40_000}, random_layer("b")], compress=packed)
    destination = Destination()
    result = copy(Source(image), destination, compression=wanted)
    diff_ids = json.loads(image.blobs[0].data)["rootfs"]["diff_ids"]
    document = destination.document()
    assert document["config"]["digest"] == image.blobs[0].digest
    for descriptor, diff_id in zip(document["layers"], diff_ids, strict=True):
        assert descriptor["mediaType"].endswith({"gzip": "+gzip", "zstd": "+zstd", "none": ".tar"}[wanted])
        data = destination.blobs[descriptor["digest"]]
        assert len(data) == descriptor["size"]
        assert f"sha256:{hashlib.sha256(_unpacked(data, descriptor['mediaType'])).hexdigest()}" == diff_id
    unchanged = (wanted == "gzip" and packed) or (wanted == "none" and not packed)
    assert (result.descriptor.digest == image.digest) is unchanged


@pytest.mark.parametrize("wanted", ["estargz", "zstd:chunked"])
@pytest.mark.parametrize("docker", [False, True])
def test_layers_get_a_table_of_contents(wanted: Literal["estargz", "zstd:chunked"], docker: bool) -> None:
    image = make_image([{"a": b"text " * 40_000}, random_layer("b")], docker=docker)
    destination = Destination()
    copy(Source(image), destination, compression=wanted)
    document = destination.document()
    assert document["mediaType"] == OCI_MANIFEST
    config = json.loads(destination.blobs[document["config"]["digest"]])
    assert (document["config"]["digest"] == image.blobs[0].digest) is (wanted == "zstd:chunked")
    assert {**config, "rootfs": 0} == {**json.loads(image.blobs[0].data), "rootfs": 0}
    for layer, diff_id in zip(document["layers"], config["rootfs"]["diff_ids"], strict=True):
        plain = decompressor(cast(BinaryIO, io.BytesIO(destination.blobs[layer["digest"]]))).read()
        assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == diff_id
        assert len(layer["annotations"]) == (2 if wanted == "estargz" else 3)
    assert (image.blobs[0].digest in destination.blobs) is (wanted == "zstd:chunked")
    assert destination.top is not None
    # What has its table already stays; Docker's manifests cannot have one.
    blobs = tuple(Blob(data, "") for data in destination.blobs.values())
    made = Image(Blob(destination.top.raw, OCI_MANIFEST), blobs)
    assert copy(Source(made), Destination(), compression=wanted).descriptor.digest == destination.top.digest
    with pytest.raises(ImageError, match="needs annotations"):
        copy(Source(image), Destination(), compression=wanted, format="docker")


def test_force_compresses_what_is_compressed_so_already() -> None:
    image = make_image([{"a": b"text " * 40_000}])
    destination = Destination()
    copy(Source(image), destination, compression="gzip", compression_level=9, force_compression=True)
    (layer,) = destination.document()["layers"]
    assert layer["digest"] != image.blobs[1].digest
    assert layer["size"] < len(image.blobs[1].data)


def test_what_is_compressed_anew_is_checked_first() -> None:
    image = make_image([{"a": b"text " * 40_000}])
    source, destination = Source(image), Destination()
    bad = bytearray(image.blobs[1].data)
    bad[4] ^= 1  # the time in gzip's header: it unpacks to the same
    source.blobs[image.blobs[1].digest] = Blob(bytes(bad), "")
    with pytest.raises(DigestMismatch):
        copy(source, destination, compression="zstd")
    assert destination.of("top") == []


def test_docker_format_has_no_zstd() -> None:
    image = make_image([{"a": b"text " * 40_000}])
    zstd = Destination()
    copy(Source(image), zstd, compression="zstd")
    assert zstd.top is not None
    blobs = tuple(Blob(data, "") for data in zstd.blobs.values())
    source = Source(Image(Blob(zstd.top.raw, OCI_MANIFEST), blobs))
    destination = Destination()
    copy(source, destination, format="docker")
    (layer,) = destination.document()["layers"]
    assert layer["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"


def test_made_up_manifests_are_compressed_where_that_is_usual() -> None:
    image = make_image([{"a": b"text " * 40_000}], compress=False)
    plain = Destination(compresses=False)
    copy(Source(image, synthetic=True), plain)
    assert plain.document()["layers"][0]["mediaType"].endswith(".tar")
    packed = Destination(compresses=True)
    copy(Source(image, synthetic=True), packed)
    assert packed.document()["layers"][0]["mediaType"].endswith("+gzip")
    real = Destination(compresses=True)
    assert copy(Source(image), real).descriptor.digest == image.digest


def test_one_changed_instance_changes_its_index() -> None:
    images = {"amd64": make_image([{"a": b"x" * 9000}], compress=False), "arm64": make_image(architecture="arm64")}
    index = make_index(images)
    destination = Destination()
    copy(Source(index), destination, compression="gzip")
    entries = destination.document()["manifests"]
    assert entries[0]["digest"] != images["amd64"].digest
    assert entries[1]["digest"] == images["arm64"].digest
    assert set(destination.manifests) >= {e["digest"] for e in entries}
