"""What the store takes, what pruning frees, and what fsck finds."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.errors import StoreError
from layers.fsck import FsckReport, fsck
from layers.oci import MEDIA_OCI_CONFIG, MEDIA_OCI_LAYER_GZIP, Descriptor, Digest, Manifest
from layers.records import LayerRecord
from layers.store import Store

NAME = "registry.example/team/app:1"
SECOND = 10**9


class Clock:
    now = 10**18

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(root: Path, clock: Clock) -> Iterator[Store]:
    with Store.open(root, driver="native", clock=clock) as opened:
        yield opened


def put_image(store: Store, layer: bytes = b"layer") -> Descriptor:
    blob = store.put(layer, MEDIA_OCI_LAYER_GZIP)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [blob.digest]}}
    described = store.put(json.dumps(config).encode(), MEDIA_OCI_CONFIG)
    manifest = Manifest.build(config=described, layers=[blob])
    return store.put(manifest.raw, manifest.media_type)


def step(store: Store, key: str, size_bytes: int, parent: str | None = None) -> str:
    """A cached build step that wrote one file."""
    active = store.snapshots.prepare(parent)
    (active.path / key).write_bytes(os.urandom(size_bytes))
    id = store.snapshots.commit(active, id=f"s-{key}").id
    store.cache.put(key, id, b"{}")
    return id


def end(store: Store) -> None:
    """End the writer, so that its work is no longer protected as a live process's."""
    store.close()


def blob_file(root: Path, digest: Digest) -> Path:
    return root / "blobs" / digest.algorithm / digest.encoded


class TestUsage:
    def test_equals_the_blocks_that_du_counts(self, store: Store, root: Path) -> None:
        store.names.set(NAME, put_image(store, os.urandom(50_000)))
        step(store, "a", 30_000)
        (root / "remote").mkdir()
        (root / "remote" / "f").write_bytes(b"x" * 9000)
        os.link(root / "remote" / "f", root / "remote" / "g")
        du = subprocess.run(["du", "-s", "-B1", str(root)], capture_output=True, check=True, text=True)
        assert store.usage().total_bytes == int(du.stdout.split()[0])

    def test_states(self, store: Store, root: Path, clock: Clock) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        step(store, "a", 10)
        loose = store.put(b"loose", "x")
        end(store)
        with Store.open(root, driver="native") as other:
            report = other.usage()
            states = {item.id: item.state for item in report.items}
            assert states[image.digest] == "named"
            assert states[loose.digest] == "garbage"
            (cached,) = [item for item in report.items if item.kind == "snapshot"]
            assert (cached.state, cached.used_ns) == ("cached", clock.now)
            freed = other.prune(all=True)
            assert freed.bytes == report.reclaimable_bytes
            assert (freed.records, freed.blobs, freed.snapshots) == (1, 1, 1)


class TestDownloads:
    def fetched(self, root: Path) -> list[Path]:
        (root / "remote").mkdir()
        files = [root / "remote" / name for name in ("a" * 64, "b" * 64, "c.json", "dead-build")]
        for file in files[:3]:
            file.write_bytes(bytes(9000))
        files[3].mkdir()
        (files[3] / "left").touch()
        return files

    def test_they_go_with_a_prune(self, store: Store, root: Path) -> None:
        self.fetched(root)
        report = store.prune()
        assert report.downloads == 3
        assert report.bytes >= 3 * 9000
        assert os.listdir(root / "remote") == []

    def test_what_another_process_may_be_using_stays(self, store: Store, root: Path) -> None:
        self.fetched(root)
        with Store.open(root, driver="native") as other:
            other.leases.owner()
            assert store.prune(all=True).downloads == 0
        assert store.prune(until_ns=0).downloads == 0
        assert store.prune(match=lambda record: True).downloads == 0
        assert store.prune(all=True).downloads == 3

    def test_only_as_many_go_as_are_too_much(self, store: Store, root: Path) -> None:
        files = self.fetched(root)
        os.utime(files[0])  # used once more
        assert store.prune(keep_bytes=store.usage().total_bytes - 1).downloads == 1
        assert files[0].exists()
        assert not files[1].exists()


class TestPrune:
    def test_records_of_named_images_stay_unless_all_is_said(self, store: Store, root: Path) -> None:
        used, unused = step(store, "used", 10), step(store, "unused", 10)
        image = put_image(store, b"the layer")
        store.names.set(NAME, image)
        layer = Manifest.parse(store.read(image.digest)).layers[0]
        store.layers.record(used, LayerRecord(layer.digest, layer, 9))
        end(store)
        with Store.open(root, driver="native") as other:
            assert other.prune().records == 1
            assert other.snapshots.get(used) is not None
            assert other.snapshots.get(unused) is None
            assert other.prune(all=True).records == 1
            assert other.snapshots.get(used) is None
            assert other.closure(image)

    def test_until(self, store: Store, root: Path, clock: Clock) -> None:
        step(store, "old", 10)
        clock.now += 3600 * SECOND
        step(store, "new", 10)
        end(store)
        with Store.open(root, driver="native", clock=clock) as other:
            assert other.prune(until_ns=clock.now - 60 * SECOND, all=True).records == 1
            assert [r.key for r in other.cache.list()] == ["new"]

    def test_keep_storage_lets_the_least_recently_used_go(self, store: Store, root: Path, clock: Clock) -> None:
        for key in ("a", "b", "c", "d"):
            step(store, key, 200_000)
            clock.now += SECOND
        clock.now += 3600 * SECOND
        store.cache.touch(["a"])
        end(store)
        with Store.open(root, driver="native", clock=clock) as other:
            before = other.usage().total_bytes
            assert other.prune(keep_bytes=before).records == 0
            report = other.prune(keep_bytes=before - 300_000)
            assert report.records == 2
            assert [r.key for r in other.cache.list()] == ["d", "a"]
            assert other.usage().total_bytes <= before - 300_000
            assert other.prune(keep_bytes=0).records == 2

    def test_a_step_goes_with_those_that_build_on_it_only(self, store: Store, root: Path, clock: Clock) -> None:
        base = step(store, "base", 100_000)
        clock.now += 1000 * SECOND
        step(store, "child", 100_000, base)
        end(store)
        with Store.open(root, driver="native", clock=clock) as other:
            report = other.prune(until_ns=clock.now - SECOND, all=True)
            assert (report.records, report.snapshots) == (1, 0), "the child still stands on it"
            assert other.snapshots.get("s-child") is not None

    def test_match(self, store: Store, root: Path) -> None:
        step(store, "run:1", 10)
        step(store, "copy:1", 10)
        end(store)
        with Store.open(root, driver="native") as other:
            other.prune(all=True, match=lambda record: record.key.startswith("run:"))
            assert [r.key for r in other.cache.list()] == ["copy:1"]

    def test_a_live_build_loses_nothing(self, store: Store, root: Path) -> None:
        id = step(store, "a", 10)
        with Store.open(root, driver="native") as other:
            assert other.prune(all=True).records == 1
        assert store.snapshots.prepare(id).parent == id


class TestMakeRoom:
    def test_nothing_to_do(self, store: Store) -> None:
        assert store.make_room(min_free_bytes=1) is None
        assert store.make_room(max_bytes=store.usage().total_bytes) is None

    def test_a_quota(self, store: Store, root: Path, clock: Clock) -> None:
        for key in ("a", "b", "c"):
            step(store, key, 300_000)
            clock.now += SECOND
        end(store)
        with Store.open(root, driver="native", clock=clock) as other:
            limit = other.usage().total_bytes - 200_000
            report = other.make_room(max_bytes=limit)
            assert report is not None and report.records == 1
            assert [r.key for r in other.cache.list()] == ["b", "c"]
            assert other.usage().total_bytes <= limit

    def test_more_free_space_than_there_is(self, store: Store, root: Path) -> None:
        store.names.set(NAME, put_image(store))
        step(store, "a", 300_000)
        end(store)
        with Store.open(root, driver="native") as other:
            assert other.make_room(min_free_bytes=1 << 60) is not None
            assert other.cache.list() == []
            assert other.names.get(NAME) is not None

    def test_a_blob_that_cannot_fit_is_refused_at_once(self, store: Store, root: Path) -> None:
        huge = Descriptor(media_type="x", digest=Digest.of(b""), size_bytes=1 << 60)
        with pytest.raises(StoreError, match="bytes left"):
            store.ingest(expected=huge)
        assert os.listdir(root / "ingest") == []


class TestFsck:
    def check(self, root: Path, *, repair: bool = False) -> FsckReport:
        return fsck(root, repair=repair, driver="native")

    def expect(self, root: Path, kind: str, words: str) -> None:
        """Found, left alone; found, repaired; then gone."""
        report = self.check(root)
        assert any(p.kind == kind and words in p.what for p in report.problems), report
        assert not report.clean
        again = self.check(root)
        assert again.problems == report.problems, "a check changes nothing"
        repaired = self.check(root, repair=True)
        assert repaired.clean and repaired.problems
        assert self.check(root).problems == ()

    def test_a_sound_store(self, store: Store, root: Path) -> None:
        store.names.set(NAME, put_image(store))
        step(store, "a", 10)
        end(store)
        report = self.check(root)
        assert report.problems == () and report.clean
        assert (report.blobs, report.snapshots, report.names) == (3, 1, 1)

    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="no store"):
            fsck(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    def test_a_rotten_blob(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        layer = Manifest.parse(store.read(image.digest)).layers[0].digest
        end(store)
        blob_file(root, layer).write_bytes(b"rot!!")
        self.expect(root, "blob", "does not have the bytes")
        with Store.open(root, driver="native") as other:
            assert other.names.list() == [], "its image had to go"

    def test_a_missing_blob(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        end(store)
        blob_file(root, image.digest).unlink()
        self.expect(root, "name", str(image.digest))

    def test_a_missing_snapshot(self, store: Store, root: Path) -> None:
        base = step(store, "base", 10)
        step(store, "child", 10, base)
        found = store.snapshots.get(base)
        end(store)
        assert found is not None
        shutil.rmtree(found.path.parent)
        self.expect(root, "snapshot", "its directory is missing")
        with Store.open(root, driver="native") as other:
            assert other.cache.get_many(["base", "child"]) == {}

    def test_a_missing_parent(self, store: Store, root: Path) -> None:
        base = step(store, "base", 10)
        step(store, "child", 10, base)
        end(store)
        connection = sqlite3.connect(root / "store.db")
        connection.execute("DELETE FROM snapshots WHERE id=?", (base,))
        connection.commit()
        connection.close()
        self.expect(root, "snapshot", "beneath it")

    def test_a_cache_record_that_leads_nowhere(self, store: Store, root: Path) -> None:
        store.cache.put("k", "absent", b"")
        end(store)
        self.expect(root, "cache", "snapshot that is missing")

    def test_a_lost_layer(self, store: Store, root: Path) -> None:
        id = step(store, "a", 10)
        blob = store.put(b"l", MEDIA_OCI_LAYER_GZIP)
        store.layers.record(id, LayerRecord(blob.digest, blob, 1))
        end(store)
        connection = sqlite3.connect(root / "store.db")
        connection.execute("DELETE FROM blobs")
        connection.commit()
        connection.close()
        blob_file(root, blob.digest).unlink()
        self.expect(root, "cache", str(blob.digest))

    def test_debris(self, store: Store, root: Path) -> None:
        end(store)
        (root / "snapshots/stray/fs").mkdir(parents=True)
        (root / "trash/half").mkdir()
        self.expect(root, "debris", "belongs to no snapshot")

    def test_a_lost_layout(self, store: Store, root: Path) -> None:
        end(store)
        (root / "oci-layout").unlink()
        (root / "flights").rmdir()
        self.expect(root, "layout", "missing")

    def test_an_index_of_somebody_else(self, store: Store, root: Path) -> None:
        store.names.set(NAME, put_image(store))
        end(store)
        (root / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')
        self.expect(root, "layout", "does not list")

    @pytest.mark.parametrize("damage", ["garbage", "page"])
    def test_a_damaged_database_is_replaced(self, store: Store, root: Path, damage: str) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        for i in range(300):
            store.cache.put(f"key{i}", None, b"x" * 200)
        step(store, "a", 10)
        end(store)
        database = root / "store.db"
        if damage == "garbage":
            database.write_bytes(b"garbage" * 1000)
            with pytest.raises(StoreError, match="damaged"):
                self.check(root)
        else:
            with database.open("r+b") as f:
                for page in range(10, 20):
                    f.seek(page * 4096)
                    f.write(b"\xff" * 4096)
        report = self.check(root, repair=True)
        assert any(p.kind == "database" and p.repaired for p in report.problems)
        assert report.clean
        with Store.open(root, driver="native") as other:
            assert other.names.get(NAME) == image
            assert other.closure(image)
        assert any(name.startswith("damaged-") for name in os.listdir(root))
        assert os.listdir(root / "snapshots") == []
