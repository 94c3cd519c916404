"""Images read, unpacked and written, by either driver; layers are hand-made tar files."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from layers.errors import Cancelled, DigestMismatch, ImageError, LayerError, SizeMismatch
from layers.image import Image, UnpackOptions, chain_ids, load_image, unpack_image, write_image
from layers.oci import (
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_LAYER_GZIP,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    chain_id,
    encode_json,
)
from layers.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.store import Driver

AMD64 = Platform("linux", "amd64")
Entry = tuple[str, str] | tuple[str, str, int]


@pytest.fixture(params=["overlay", "native"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver=cast("Driver", request.param)) as opened:
        yield opened


def tar(*entries: Entry) -> bytes:
    """`("name/", "")` is a directory, `("name", "-> target")` a symlink, `"== target"` a hardlink."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content, *mode in entries:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.uid, info.gid = os.geteuid(), os.getegid()
            info.mtime = 1_000_000_000
            info.mode = mode[0] if mode else 0o755
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif content[:3] in {"-> ", "== "}:
                info.type = tarfile.SYMTYPE if content[0] == "-" else tarfile.LNKTYPE
                info.linkname = content[3:]
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content.encode()))
    return out.getvalue()


def put_image(store: Store, *layers: bytes, diff_ids: Sequence[Digest] | None = None) -> Image:
    blobs = [store.put(gzip.compress(layer, mtime=0), MEDIA_OCI_LAYER_GZIP) for layer in layers]
    ids = diff_ids if diff_ids is not None else [Digest.of(layer) for layer in layers]
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(ids)}}
    return load_image(store, write_image(store, document, blobs), AMD64)


def seen(store: Store, snapshot: str) -> dict[str, Path]:
    """What the snapshot's tree shows, by the layers' directories: no mount, so no whiteouts here."""
    found: dict[str, Path] = {}
    for path in reversed(store.snapshots.view(snapshot).lower):
        for top, dirs, files in os.walk(path):
            for name in [*dirs, *files]:
                full = Path(top, name)
                found[str(full.relative_to(path))] = full
    return found


class TestLoad:
    def test_a_manifest(self, store: Store) -> None:
        image = put_image(store, tar(("a", "1")))
        assert load_image(store, image.descriptor, Platform("linux", "arm64")) == image
        assert image.image_id == image.manifest.config.digest
        assert len(image.layers) == len(image.diff_ids) == 1

    def test_an_index(self, store: Store) -> None:
        image = put_image(store, tar(("a", "1")))
        here = Descriptor(
            media_type=image.descriptor.media_type,
            digest=image.descriptor.digest,
            size_bytes=image.descriptor.size_bytes,
            platform=AMD64,
        )
        index = Index.build([here])
        stored = store.put(index.raw, index.media_type)
        assert load_image(store, stored, AMD64).manifest == image.manifest
        with pytest.raises(ImageError, match="linux/amd64"):
            load_image(store, stored, Platform("linux", "s390x"))

    def test_indexes_that_lead_nowhere(self, store: Store) -> None:
        stored = put_image(store, tar()).descriptor
        for _ in range(4):
            entry = Descriptor(
                media_type=stored.media_type, digest=stored.digest, size_bytes=stored.size_bytes, platform=AMD64
            )
            index = Index.build([entry])
            stored = store.put(index.raw, index.media_type)
        with pytest.raises(ImageError, match="nested"):
            load_image(store, stored, AMD64)

    def test_layers_and_diff_ids_must_agree(self, store: Store) -> None:
        with pytest.raises(ImageError, match="names 0 diff IDs"):
            put_image(store, tar(("a", "1")), diff_ids=[])

    def test_artifacts_are_no_images(self, store: Store) -> None:
        config = store.put(b"{}", "application/vnd.oci.empty.v1+json")
        manifest = Manifest.build(config=config, layers=[])
        stored = store.put(manifest.raw, manifest.media_type)
        with pytest.raises(ImageError, match="not a container image"):
            load_image(store, stored, AMD64)

    def test_a_config_beyond_all_bounds(self, store: Store) -> None:
        config = store.put(b" " * (17 << 20), "application/vnd.oci.image.config.v1+json")
        manifest = Manifest.build(config=config, layers=[])
        stored = store.put(manifest.raw, manifest.media_type)
        with pytest.raises(SizeMismatch):
            load_image(store, stored, AMD64)


def test_what_is_no_character_is_written_and_read_as_one_that_stands_for_it() -> None:
    assert encode_json({"a\udc80": ["\ud800é", "😀"]}) == '{"a\ufffd":["\ufffdé","😀"]}'.encode()
    raw = rb'{"architecture":"a","os":"o","rootfs":{"type":"layers","diff_ids":[]},"x":"\uD800 \ud83d\ude00"}'
    assert ImageConfig.parse(raw).document["x"] == "\ufffd 😀"


def test_chain_ids() -> None:
    ids = [Digest.of(b"%d" % i) for i in range(4)]
    assert chain_ids(ids) == [chain_id(ids[: i + 1]) for i in range(4)]
    assert chain_ids([]) == []


class TestUnpack:
    def test_layers_are_stacked(self, store: Store) -> None:
        image = put_image(
            store,
            tar(("etc/", ""), ("etc/a", "base")),
            tar(("etc/", ""), ("etc/a", "top"), ("etc/b", "new")),
            tar(("usr/", ""), ("usr/c", "-> /etc/a")),
        )
        snapshot = unpack_image(store, image)
        assert snapshot == chain_ids(image.diff_ids)[-1]
        tree = seen(store, snapshot)
        assert tree["etc/a"].read_text() == "top"
        assert tree["etc/b"].read_text() == "new"
        assert os.readlink(tree["usr/c"]) == "/etc/a"
        record = store.layers.lookup(snapshot, "gzip")
        assert record is not None
        assert (record.descriptor, record.diff_id) == (image.layers[-1], image.diff_ids[-1])

    def test_no_layers(self, store: Store) -> None:
        assert unpack_image(store, put_image(store)) is None

    def test_again_does_nothing(self, store: Store) -> None:
        image = put_image(store, tar(("a", "1")), tar(("b", "2")))
        fetched: list[Descriptor] = []
        options = UnpackOptions(fetch=fetched.append)
        first = unpack_image(store, image, options)
        assert fetched == list(image.layers) or sorted(d.digest for d in fetched) == sorted(
            d.digest for d in image.layers
        )
        assert unpack_image(store, image, options) == first
        assert len(fetched) == 2
        assert os.listdir(store.root / "flights") == []

    def test_directories_that_a_layer_does_not_mention_keep_the_lower_ones_attributes(self, store: Store) -> None:
        image = put_image(
            store,
            tar(("tmp/", "", 0o1777), ("home/", "", 0o711), ("home/user/", "", 0o700)),
            tar(("tmp/x", "1"), ("home/user/y", "2")),
        )
        snapshot = unpack_image(store, image, UnpackOptions(threads=2))
        assert snapshot is not None
        tree = seen(store, snapshot)
        assert [tree[n].stat().st_mode & 0o7777 for n in ("tmp", "home", "home/user")] == [0o1777, 0o711, 0o700]
        assert tree["tmp/x"].read_text() == "1"

    def test_the_root_directory_too(self, store: Store) -> None:
        image = put_image(
            store, tar(("./", "", 0o700), ("a", "1")), tar(("b", "2")), tar(("./", "", 0o711)), tar(("c", "3"))
        )
        snapshot = unpack_image(store, image, UnpackOptions(threads=4))
        assert snapshot is not None
        chain = store.snapshots.chain(snapshot)
        expected = [0o700, 0o700, 0o711, 0o711] if store.snapshots.driver == "overlay" else [0o711]
        assert [s.path.stat().st_mode & 0o7777 for s in chain] == expected

    def test_hardlinks_to_lower_files(self, store: Store) -> None:
        image = put_image(store, tar(("a", "data")), tar(("b", "== a")))
        snapshot = unpack_image(store, image, UnpackOptions(threads=2))
        assert snapshot is not None
        tree = seen(store, snapshot)
        assert tree["b"].read_text() == "data"
        assert os.path.samefile(tree["a"], tree["b"])

    def test_content_that_is_not_what_the_config_says(self, store: Store) -> None:
        good, bad = tar(("a", "1")), tar(("b", "2"))
        image = put_image(store, good, bad, diff_ids=[Digest.of(good), Digest.of(b"something else")])
        for threads in (1, 2):
            with pytest.raises(DigestMismatch, match="config says"):
                unpack_image(store, image, UnpackOptions(threads=threads))
        assert store.snapshots.get(chain_ids(image.diff_ids)[-1]) is None
        store.close()
        with Store.open(store.root, driver=cast("Driver", store.snapshots.driver)) as again:
            again.gc()
            assert os.listdir(again.root / "snapshots") == []

    def test_a_broken_layer_names_its_blob(self, store: Store) -> None:
        layers = [tar(("a", "1")), tar(("b", "1" * 5000))[:2048]]
        image = put_image(store, *layers)
        with pytest.raises(LayerError, match=str(image.layers[1].digest)):
            unpack_image(store, image, UnpackOptions(threads=2))

    def test_cancellation(self, store: Store) -> None:
        image = put_image(store, tar(("a", "1")), tar(("b", "2")))
        with pytest.raises(Cancelled):
            unpack_image(store, image, UnpackOptions(threads=2, cancelled=lambda: True))
        active = store.database.rows("SELECT id FROM snapshots WHERE owner IS NOT NULL")
        assert active == []

    def test_the_error_of_the_fetch_is_the_error(self, store: Store) -> None:
        image = put_image(store, *(tar((f"f{i}", "1")) for i in range(5)))

        def fetch(descriptor: Descriptor) -> None:
            if descriptor == image.layers[3]:
                raise ImageError("no network")

        with pytest.raises(ImageError, match="no network"):
            unpack_image(store, image, UnpackOptions(fetch=fetch, threads=3))

    def test_images_share_their_common_base(self, store: Store) -> None:
        base = tar(("a", "1"))
        done: list[str] = []

        def note(descriptor: Descriptor) -> None:
            done.append(descriptor.digest)

        applied: list[Any] = []

        def fetch(descriptor: Descriptor) -> None:
            applied.append(descriptor.digest)

        one = put_image(store, base, tar(("b", "2")))
        other = put_image(store, base, tar(("c", "3")))
        unpack_image(store, one, UnpackOptions(fetch=fetch, done=note))
        unpack_image(store, other, UnpackOptions(fetch=fetch, done=note))
        shared = applied.count(one.layers[0].digest)
        # The native driver keeps no tree for a stage in between.
        assert shared == (1 if store.snapshots.driver == "overlay" else 2)

    def test_what_was_found_stays_while_it_is_used(self, store: Store) -> None:
        image = put_image(store, tar(("a", "1")), tar(("b", "2")))
        unpack_image(store, image)
        store.close()
        driver = cast("Driver", store.snapshots.driver)
        with Store.open(store.root, driver=driver) as user, Store.open(store.root, driver=driver) as collector:
            snapshot = unpack_image(user, image)
            collector.gc()
            assert user.snapshots.prepare(snapshot).parent == snapshot

    def test_threads_and_processes_unpack_once(self, store: Store) -> None:
        image = put_image(store, *(tar((f"f{i}", "1")) for i in range(6)))
        calls: list[str] = []
        lock = threading.Lock()

        def fetch(descriptor: Descriptor) -> None:
            with lock:
                calls.append(descriptor.digest)

        results: list[str | None] = []

        def work() -> None:
            with Store.open(store.root, driver=cast("Driver", store.snapshots.driver)) as mine:
                results.append(unpack_image(mine, image, UnpackOptions(fetch=fetch, threads=3)))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [chain_ids(image.diff_ids)[-1]] * 4
        assert len(calls) == len(set(calls)) == 6


class TestWrite:
    def document(self, *diff_ids: Digest) -> dict[str, Any]:
        return {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}

    def test_formats(self, store: Store) -> None:
        layer = store.put(b"x", MEDIA_OCI_LAYER_GZIP)
        docker = write_image(store, self.document(Digest.of(b"")), [layer], format="docker")
        assert docker.media_type == MEDIA_DOCKER_MANIFEST
        image = load_image(store, docker, AMD64)
        assert image.layers[0].media_type == MEDIA_DOCKER_LAYER_GZIP
        oci = write_image(store, image.config, image.layers, annotations={"b": "2", "a": "1"})
        again = load_image(store, oci, AMD64)
        assert again.layers == (layer,)
        assert again.config.raw == image.config.raw
        assert list(again.manifest.annotations) == ["a", "b"]
        assert oci.digest == "sha256:" + hashlib.sha256(again.manifest.raw).hexdigest()

    def test_the_same_arguments_give_the_same_bytes(self, store: Store) -> None:
        layer = store.put(b"x", MEDIA_OCI_LAYER_GZIP)
        assert write_image(store, self.document(Digest.of(b"")), [layer]) == write_image(
            store, self.document(Digest.of(b"")), [layer]
        )

    def test_what_docker_cannot_say(self, store: Store) -> None:
        with pytest.raises(ImageError, match="annotations"):
            write_image(store, self.document(), [], annotations={"a": "b"}, format="docker")

    def test_layers_and_config_must_agree(self, store: Store) -> None:
        with pytest.raises(ImageError):
            write_image(store, self.document(Digest.of(b"")), [])
