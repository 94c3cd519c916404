"""The store on disk: names, blobs, barriers, leases, garbage, and what it refuses."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers import linux
from layers.content import ContentStore
from layers.errors import BlobNotFound, DigestMismatch, ForeignStore, SizeMismatch, StoreError
from layers.fsck import fsck
from layers.oci import (
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_LAYER_GZIP,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Platform,
)
from layers.records import FileStat, LayerRecord
from layers.store import Store, default_root

NAME = "registry.example/team/app:1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store.open(root, driver="native", boot="boot-1") as opened:
        yield opened


def reopen(root: Path, boot: str = "boot-1") -> Store:
    return Store.open(root, driver="native", boot=boot)


def put_image(store: Store, text: str = "x", layer: bytes | None = None) -> Descriptor:
    """A manifest with a config and one layer, all stored."""
    blob = store.put(layer if layer is not None else b"layer " + text.encode(), MEDIA_OCI_LAYER_GZIP)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [blob.digest]}}
    described = store.put(json.dumps(config | {"author": text}).encode(), MEDIA_OCI_CONFIG)
    manifest = Manifest.build(config=described, layers=[blob])
    return store.put(manifest.raw, manifest.media_type)


def blob_file(root: Path, digest: Digest) -> Path:
    return root / "blobs" / digest.algorithm / digest.encoded


def snapshot(store: Store, name: str, parent: str | None = None) -> str:
    active = store.snapshots.prepare(parent)
    (active.path / name).write_text(name)
    return store.snapshots.commit(active, id=name).id


class TestRoot:
    def test_environment_decides(self) -> None:
        assert default_root({"PYBUILD_ROOT": "/x", "HOME": "/h"}, 0) == Path("/x")
        assert default_root({"HOME": "/root"}, 0) == Path("/var/lib/pybuild")
        assert default_root({"HOME": "/h"}, 7) == Path("/h/.local/share/pybuild")
        assert default_root({"HOME": "/h", "XDG_DATA_HOME": "/d"}, 7) == Path("/d/pybuild")
        assert default_root({"HOME": "/h", "XDG_DATA_HOME": "relative"}, 7) == Path("/h/.local/share/pybuild")

    def test_no_home_is_an_error_that_says_what_to_do(self) -> None:
        with pytest.raises(StoreError) as e:
            default_root({}, 7)
        assert e.value.hint is not None and "--root" in e.value.hint


class TestOpen:
    def test_makes_an_oci_layout(self, store: Store, root: Path) -> None:
        assert json.loads((root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        assert json.loads((root / "index.json").read_text())["manifests"] == []
        assert (root / "snapshots").stat().st_mode & 0o77 == 0

    def test_is_a_content_store(self, store: Store) -> None:
        content: ContentStore = store
        assert list(content.walk()) == []

    def test_a_directory_with_other_things_is_refused(self, root: Path) -> None:
        root.mkdir()
        (root / "thesis.txt").write_text("precious")
        with pytest.raises(StoreError, match=r"thesis\.txt"):
            Store.open(root)
        assert os.listdir(root) == ["thesis.txt"]

    def test_a_file_in_its_place(self, root: Path) -> None:
        root.write_text("")
        with pytest.raises(StoreError, match="cannot create the store"):
            Store.open(root)

    def test_another_version(self, store: Store, root: Path) -> None:
        store.close()
        connection = sqlite3.connect(root / "store.db")
        connection.execute("PRAGMA user_version=99")
        connection.close()
        with pytest.raises(ForeignStore, match="format 99, newer than"):
            reopen(root)
        with pytest.raises(ForeignStore, match="format 99"):
            fsck(root, repair=True)
        connection = sqlite3.connect(root / "store.db")
        assert connection.execute("PRAGMA user_version").fetchone() == (99,), "a repair leaves it alone"
        connection.execute("PRAGMA user_version=-1")
        connection.close()
        with pytest.raises(ForeignStore, match="older than"):
            reopen(root)

    def test_a_foreign_database(self, root: Path) -> None:
        root.mkdir()
        connection = sqlite3.connect(root / "store.db")
        connection.execute("CREATE TABLE cats(name)")
        connection.close()
        with pytest.raises(StoreError, match="something else"):
            reopen(root)

    def test_a_damaged_database(self, store: Store, root: Path) -> None:
        store.close()
        (root / "store.db").write_bytes(b"no database" * 1000)
        with pytest.raises(StoreError, match="damaged") as e:
            reopen(root)
        assert e.value.hint is not None and "fsck" in e.value.hint

    def test_names_survive_the_loss_of_the_database(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        store.close()
        (root / "store.db").unlink()
        with reopen(root) as again:
            assert again.names.get(NAME) == image
            assert again.stat(image.digest) is not None

    def test_a_damaged_index_is_not_taken_for_an_empty_one(self, store: Store, root: Path) -> None:
        store.close()
        (root / "store.db").unlink()
        (root / "index.json").write_text("{")
        with pytest.raises(StoreError, match=r"index\.json is damaged"):
            reopen(root)
        assert (root / "index.json").read_text() == "{"

    def test_closing_twice_and_using_after(self, root: Path) -> None:
        store = reopen(root)
        store.close()
        store.close()
        with pytest.raises(StoreError):
            store.names.list()


class TestBlobs:
    def test_round_trip(self, store: Store) -> None:
        blob = store.put(b"some bytes", "text/plain")
        info = store.stat(blob.digest)
        assert info is not None and info.size_bytes == 10
        assert store.read(blob.digest, 100) == b"some bytes"
        with store.open(blob.digest) as f:
            assert f.read() == b"some bytes"
            f.seek(5)
            assert f.read() == b"bytes"
        path = store.path(blob.digest)
        assert path is not None and path.read_bytes() == b"some bytes"
        assert [i.digest for i in store.walk()] == [blob.digest]

    def test_the_empty_blob(self, store: Store) -> None:
        blob = store.put(b"", "text/plain")
        assert store.read(blob.digest, 0) == b""

    def test_sha512(self, store: Store) -> None:
        import hashlib

        digest = Digest("sha512:" + hashlib.sha512(b"long").hexdigest())
        with store.ingest(expected=Descriptor(media_type="x", digest=digest, size_bytes=4)) as ingest:
            ingest.write(b"long")
            ingest.commit()
        assert store.read(digest, 10) == b"long"

    def test_other_bytes_than_promised(self, store: Store, root: Path) -> None:
        expected = Descriptor.of(b"right", "x")
        with pytest.raises(DigestMismatch), store.ingest(expected=expected, ref="r") as ingest:
            ingest.write(b"wrong")
            ingest.commit()
        with pytest.raises(SizeMismatch), store.ingest(expected=expected, ref="r") as ingest:
            assert ingest.offset == 0, "wrong bytes must not be resumed"
            ingest.write(b"righ")
            ingest.commit()
        with pytest.raises(SizeMismatch), store.ingest(expected=expected) as ingest:
            ingest.write(b"righ")
            ingest.write(b"ty-o")
        assert store.stat(expected.digest) is None
        assert os.listdir(root / "ingest") == []

    def test_uncommitted_bytes_are_dropped_without_a_ref(self, store: Store, root: Path) -> None:
        with store.ingest() as ingest:
            ingest.write(b"half")
        assert os.listdir(root / "ingest") == []

    def test_resumption_by_ref(self, store: Store) -> None:
        expected = Descriptor.of(b"first second", "x")
        with store.ingest(expected=expected, ref="pull") as ingest:
            ingest.write(b"first ")
        with store.ingest(expected=expected, ref="pull") as ingest:
            assert ingest.offset == 6
            ingest.write(b"second")
            assert ingest.commit() == expected
        assert store.read(expected.digest, 100) == b"first second"

    def test_restart(self, store: Store) -> None:
        expected = Descriptor.of(b"clean", "x")
        with store.ingest(expected=expected, ref="pull") as ingest:
            ingest.write(b"junk")
            ingest.restart()
            assert ingest.offset == 0
            ingest.write(b"clean")
            ingest.commit()
        assert store.read(expected.digest, 100) == b"clean"

    def test_more_than_expected_lies_there_already(self, store: Store) -> None:
        with store.ingest(ref="pull") as ingest:
            ingest.write(b"x" * 100)
        with store.ingest(expected=Descriptor.of(b"short", "x"), ref="pull") as ingest:
            assert ingest.offset == 0

    def test_a_live_ref_is_refused(self, store: Store, root: Path) -> None:
        with reopen(root) as other, store.ingest(ref="pull"):
            with pytest.raises(StoreError, match="already fetching pull"):
                other.ingest(ref="pull")
            with store.ingest(ref="another"):
                pass

    def test_commit_is_idempotent(self, store: Store, root: Path) -> None:
        first, second = store.put(b"same", "x"), store.put(b"same", "x")
        assert first == second
        assert os.listdir(root / "ingest") == []

    def test_missing(self, store: Store) -> None:
        digest = Digest.of(b"nothing")
        assert store.stat(digest) is None
        assert store.path(digest) is None
        with pytest.raises(BlobNotFound):
            store.open(digest)
        with pytest.raises(BlobNotFound):
            store.read(digest, 1)

    def test_read_beyond_the_limit(self, store: Store) -> None:
        blob = store.put(b"x" * 100, "x")
        with pytest.raises(SizeMismatch):
            store.read(blob.digest, 99)

    def test_damage_is_seen_by_readers(self, store: Store, root: Path) -> None:
        data = os.urandom(300_000)
        blob = store.put(data, "x")
        blob_file(root, blob.digest).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DigestMismatch), store.open(blob.digest) as f:
            while f.read(65536):
                pass
        with pytest.raises(DigestMismatch):
            store.read(blob.digest, 1 << 20)

    def test_the_last_bytes_of_a_damaged_blob_are_never_handed_out(self, store: Store, root: Path) -> None:
        data = b"a" * 400_000
        blob = store.put(data, "x")
        blob_file(root, blob.digest).write_bytes(b"b" + data[1:])
        seen = 0
        with pytest.raises(DigestMismatch), store.open(blob.digest) as f:
            while chunk := f.read(1000):
                seen += len(chunk)
        assert seen < len(data)

    def test_a_truncated_blob_is_no_blob(self, store: Store, root: Path) -> None:
        blob = store.put(b"x" * 100, "x")
        os.truncate(blob_file(root, blob.digest), 50)
        assert store.stat(blob.digest) is None
        assert store.put(b"x" * 100, "x") == blob
        assert store.read(blob.digest, 100) == b"x" * 100

    def test_files_of_other_tools_are_hashed_before_they_count(self, store: Store, root: Path) -> None:
        good, bad = Digest.of(b"good"), Digest.of(b"bad")
        blob_file(root, good).write_bytes(b"good")
        blob_file(root, bad).write_bytes(b"other")
        assert store.stat(good) is not None
        assert store.stat(bad) is None
        assert not blob_file(root, bad).exists()

    def test_delete(self, store: Store) -> None:
        blob = store.put(b"x", "x")
        assert store.delete(blob.digest)
        assert not store.delete(blob.digest)
        assert store.stat(blob.digest) is None

    def test_threads(self, store: Store) -> None:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(20):
                    blob = store.put(b"shared %d" % (i % 5), "x")
                    assert store.read(blob.digest, 100)
                    store.cache.put(f"{number}-{i}", None, b"")
            except BaseException as e:  # noqa: BLE001 - raised in the main thread
                failures.append(e)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(list(store.walk())) == 5
        assert len(store.cache.list()) == 120


class TestNames:
    def test_set_get_list_delete(self, store: Store, root: Path) -> None:
        one, two = put_image(store, "1"), put_image(store, "2")
        store.names.set("b/x:1", one)
        store.names.set("a/y:2", two)
        assert store.names.get("b/x:1") == one
        assert [(n.name, n.descriptor) for n in store.names.list()] == [("a/y:2", two), ("b/x:1", one)]
        assert store.names.of(one.digest) == ["b/x:1"]
        assert store.names.delete("b/x:1")
        assert not store.names.delete("b/x:1")
        assert store.names.get("b/x:1") is None
        index = json.loads((root / "index.json").read_text())
        assert [m["annotations"]["org.opencontainers.image.ref.name"] for m in index["manifests"]] == ["a/y:2"]

    def test_an_incomplete_image_gets_no_name(self, store: Store) -> None:
        config = Descriptor.of(b"{}", MEDIA_OCI_CONFIG)
        manifest = Manifest.build(config=config, layers=[])
        stored = store.put(manifest.raw, manifest.media_type)
        with pytest.raises(BlobNotFound, match=str(config.digest)):
            store.names.set(NAME, stored)
        with pytest.raises(BlobNotFound):
            store.names.set(NAME, Descriptor.of(b"never stored", "x"))
        assert store.names.list() == []

    def test_platforms_of_an_index_may_be_missing(self, store: Store) -> None:
        here = put_image(store)
        away = Descriptor.of(b"arm", here.media_type)
        platforms = [Platform("linux", "amd64"), Platform("linux", "arm64")]
        index = Index.build(
            Descriptor(media_type=d.media_type, digest=d.digest, size_bytes=d.size_bytes, platform=p)
            for d, p in zip((here, away), platforms, strict=True)
        )
        store.names.set(NAME, store.put(index.raw, index.media_type))
        assert store.names.get(NAME) is not None

    def test_all_names_or_none(self, store: Store) -> None:
        with pytest.raises(BlobNotFound):
            store.publish({"a:1": put_image(store), "a:2": Descriptor.of(b"absent", "x")})
        assert store.names.list() == []

    def test_naming_the_same_again_changes_nothing(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.publish({NAME: image})
        before = (store.names.list(), os.stat(root / "index.json").st_ino, store.database.meta())
        store.publish({NAME: image})
        assert (store.names.list(), os.stat(root / "index.json").st_ino, store.database.meta()) == before

    def test_a_second_name_needs_no_barrier(self, store: Store) -> None:
        image = put_image(store)
        store.publish({NAME: image})
        epoch = store.database.meta()["epoch"]
        store.publish({"other:1": image})
        assert store.database.meta()["epoch"] == epoch

    def test_the_index_catches_up_after_a_crash_behind_the_commit(self, store: Store, root: Path) -> None:
        store.names.set(NAME, put_image(store))
        store.close()
        (root / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')
        connection = sqlite3.connect(root / "store.db")
        connection.execute("UPDATE meta SET value=value-1 WHERE key='index_generation'")
        connection.commit()
        connection.close()
        with reopen(root):
            assert len(json.loads((root / "index.json").read_text())["manifests"]) == 1


class TestRestart:
    """After a new boot only what a barrier covered counts."""

    def test_names_and_their_blobs_stay(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        snapshot(store, "late")
        store.cache.put("late", "late", b"")
        loose = store.put(b"loose", "x")
        store.close()
        with reopen(root, "boot-2") as again:
            assert again.closure(image)
            assert again.cache.get("late") is None
            assert again.snapshots.get("late") is None
            assert os.listdir(root / "snapshots") == []
            assert again.stat(loose.digest) is not None, "intact: it was hashed"

    def test_torn_blobs_are_found_out(self, store: Store, root: Path) -> None:
        blob = store.put(b"x" * 5000, "x")
        store.close()
        blob_file(root, blob.digest).write_bytes(b"\0" * 5000)
        with reopen(root, "boot-2") as again:
            assert again.stat(blob.digest) is None

    def test_a_barrier_keeps_snapshots_and_cache(self, store: Store, root: Path) -> None:
        snapshot(store, "base")
        store.cache.put("k", "base", b"r")
        store.barrier()
        snapshot(store, "child", "base")
        store.close()
        with reopen(root, "boot-2") as again:
            assert again.cache.get("k") is not None
            assert again.snapshots.get("base") is not None
            assert again.snapshots.get("child") is None

    def test_what_is_written_during_a_barrier_is_not_covered_by_it(self, store: Store, root: Path) -> None:
        snapshot(store, "before")
        with store.database.write() as c:
            epoch = c.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()[0]
            c.execute("UPDATE meta SET value=? WHERE key='epoch'", (epoch + 1,))
        snapshot(store, "during")  # between the barrier's first transaction and its second
        with store.database.write() as c:
            c.execute("UPDATE meta SET value=max(value, ?) WHERE key='durable_epoch'", (epoch,))
        store.close()
        with reopen(root, "boot-2") as again:
            assert again.snapshots.get("before") is not None
            assert again.snapshots.get("during") is None

    def test_the_same_boot_keeps_all(self, store: Store, root: Path) -> None:
        snapshot(store, "s")
        store.cache.put("k", "s", b"r")
        store.close()
        with reopen(root) as again:
            assert again.cache.get("k") is not None

    def test_working_snapshots_stay(self, store: Store, root: Path) -> None:
        snapshot(store, "base")
        store.barrier()
        store.snapshots.prepare("base", keep="container")
        store.close()
        with reopen(root, "boot-2") as again:
            kept = again.snapshots.kept("container")
            assert kept is not None and (kept.path / "base").exists()

    def test_what_working_snapshots_stand_on_stays_but_for_nobody_else(self, store: Store, root: Path) -> None:
        """No barrier covered it: it is the container's whatever the disk made of it, and nothing that a build finds."""
        snapshot(store, "base")
        snapshot(store, "middle", "base")
        snapshot(store, "work:1", "middle")
        snapshot(store, "other", "middle")
        store.snapshots.pin("container", "work:1")
        store.close()
        for boot in ("boot-2", "boot-3"):
            with reopen(root, boot) as again:
                assert [again.snapshots.get(id) for id in ("base", "middle", "other")] == [None] * 3
                names = [part.id.rpartition(":")[2] for part in again.snapshots.chain("work:1")]
                assert names == ["base", "middle", "1"]
                kept = again.snapshots.kept("container")
                assert kept is not None and kept.parent == "work:1"
                again.gc()
        with reopen(root, "boot-3") as again:
            snapshot(again, "base")  # unpacked once more, by somebody who needs it whole
            again.snapshots.unpin("container")
        with reopen(root, "boot-3") as again:
            again.gc()
            assert os.listdir(root / "snapshots") == []


class TestCache:
    def test_records(self, store: Store) -> None:
        snapshot(store, "s")
        store.cache.put("a", "s", b"one")
        store.cache.put("b", None, b"two")
        store.cache.put("b", None, b"three")
        assert {k: r.record for k, r in store.cache.get_many(["a", "b", "c"]).items()} == {"a": b"one", "b": b"three"}
        assert store.cache.delete(["a", "c"]) == 1
        assert store.cache.get("a") is None

    def test_many_keys(self, store: Store) -> None:
        keys = [f"k{i}" for i in range(1300)]
        for key in keys[:700]:
            store.cache.put(key, None, b"")
        assert len(store.cache.get_many(keys)) == 700

    def test_a_record_without_its_snapshot_is_not_seen(self, store: Store) -> None:
        snapshot(store, "s")
        store.cache.put("a", "s", b"")
        store.cache.put("never", "absent", b"")
        store.snapshots.remove("s")
        assert store.cache.get_many(["a", "never"]) == {}

    def test_another_driver_does_not_see_it(self, store: Store, root: Path) -> None:
        snapshot(store, "s")
        store.cache.put("a", "s", b"")
        with Store.open(root, driver="overlay", boot="boot-1") as overlay:
            assert overlay.cache.get("a") is None

    def test_prefix_and_order(self, root: Path) -> None:
        now = [10**18]
        with Store.open(root, driver="native", clock=lambda: now[0]) as store:
            for key in ("x%2", "x%1", "x_", "y"):
                store.cache.put(key, None, b"")
                now[0] += 1
            store.cache.touch(["x%2"])
            assert [r.key for r in store.cache.list("x%")] == ["x%2", "x%1"], "ten minutes have not passed"
            now[0] += 601 * 10**9
            store.cache.touch(["x%2", "unknown"])
            assert [r.key for r in store.cache.list("x%")] == ["x%1", "x%2"]
            assert [r.key for r in store.cache.list("x")] == ["x%1", "x_", "x%2"]


class TestLayers:
    def test_lookup(self, store: Store) -> None:
        gzip, zstd = store.put(b"gz", MEDIA_OCI_LAYER_GZIP), store.put(b"zs", "application/x.tar+zstd")
        diff = Digest.of(b"diff")
        for blob in (gzip, zstd):
            store.layers.record("s", LayerRecord(diff, blob, 100))
        assert store.layers.lookup("s", "gzip") == LayerRecord(diff, gzip, 100)
        assert store.layers.lookup("s", "zstd") == LayerRecord(diff, zstd, 100)
        assert store.layers.lookup("s", "none") is None
        assert store.layers.lookup("s") is not None
        store.delete(gzip.digest)
        assert store.layers.lookup("s", "gzip") is None


class TestFileStats:
    SECOND = 10**9

    def stats(self, count: int = 3) -> list[FileStat]:
        return [FileStat(1, 2**64 - 1 - i, 5, 100 * self.SECOND + 1, 100 * self.SECOND + 1) for i in range(count)]

    @pytest.mark.parametrize("count", [3, 2500])
    def test_unchanged_files_are_known(self, store: Store, count: int) -> None:
        stats = self.stats(count)
        store.filestats.put_many(((s, b"%d" % i) for i, s in enumerate(stats)), observed_ns=200 * self.SECOND)
        assert store.filestats.get_many(stats) == [b"%d" % i for i in range(count)]
        for field in FileStat._fields[1:]:
            changed = [s._replace(**{field: getattr(s, field) - 10**5}) for s in stats]
            assert store.filestats.get_many(changed) == [None] * count, field

    def test_racily_clean_files_are_not_remembered(self, store: Store) -> None:
        (stat,) = self.stats(1)
        for observed in (stat.ctime_ns - 5, stat.ctime_ns, stat.ctime_ns + 4_000_000):
            store.filestats.put_many([(stat, b"d")], observed_ns=observed)
            assert store.filestats.get_many([stat]) == [None]
        coarse = stat._replace(ctime_ns=101 * self.SECOND)
        store.filestats.put_many([(coarse, b"d")], observed_ns=102 * self.SECOND)
        assert store.filestats.get_many([coarse]) == [None], "a file system of two seconds' granularity"
        store.filestats.put_many([(stat, b"d")], observed_ns=101 * self.SECOND)
        assert store.filestats.get_many([stat]) == [b"d"]

    def test_trim(self, store: Store) -> None:
        stats = self.stats(10)
        for i, stat in enumerate(stats):
            store.filestats.put_many([(stat, b"d")], observed_ns=(200 + i) * self.SECOND)
        assert store.filestats.trim(4) == 6
        assert store.filestats.get_many(stats) == [None] * 6 + [b"d"] * 4


class TestGarbage:
    """Another process's view: what a live store wrote itself is protected until it is closed."""

    def test_named_things_stay_and_others_go(self, store: Store, root: Path) -> None:
        image = put_image(store)
        store.names.set(NAME, image)
        loose = store.put(b"loose", "x")
        snapshot(store, "loose")
        snapshot(store, "cached", snapshot(store, "parent"))
        store.cache.put("k", "cached", b"")
        blob = store.put(b"its layer", MEDIA_OCI_LAYER_GZIP)
        store.layers.record("cached", LayerRecord(Digest.of(b"d"), blob, 1))
        store.close()
        with reopen(root) as other:
            report = other.gc()
            assert (report.blobs, report.snapshots) == (1, 1)
            assert report.bytes > 0
            assert other.stat(loose.digest) is None
            assert other.stat(blob.digest) is not None
            assert other.closure(image)
            assert other.snapshots.get("parent") is not None
            assert other.snapshots.get("loose") is None
            assert len(os.listdir(root / "snapshots")) == 2
            assert other.gc() == (0, 0, 0, 0)

    def test_the_snapshots_of_a_named_image_stay(self, store: Store, root: Path) -> None:
        image = put_image(store, layer=b"base")
        store.names.set(NAME, image)
        active = store.snapshots.prepare(None)
        chain = Digest.of(b"base")  # put_image takes the blob's digest for its diff ID
        store.snapshots.commit(active, id=chain)
        store.close()
        with reopen(root) as other:
            other.gc()
            assert other.snapshots.get(chain) is not None
            other.names.delete(NAME)
            other.gc()
            assert other.snapshots.get(chain) is None
            assert list(other.walk()) == []

    def test_what_a_live_process_wrote_stays(self, store: Store, root: Path) -> None:
        blob = store.put(b"fresh", "x")
        snapshot(store, "fresh")
        active = store.snapshots.prepare("fresh")
        with reopen(root) as other:
            other.gc()
        assert store.stat(blob.digest) is not None
        assert store.snapshots.get("fresh") is not None
        assert active.path.is_dir()

    def test_leases(self, store: Store, root: Path) -> None:
        blob = store.put(b"old", "x")
        snapshot(store, "old")
        store.close()
        with reopen(root) as user, reopen(root) as collector:
            with user.lease(blobs=[blob.digest], snapshots=["old"]):
                collector.gc()
                assert user.stat(blob.digest) is not None
                assert user.snapshots.get("old") is not None
            collector.gc()
            assert user.stat(blob.digest) is None
            assert user.snapshots.get("old") is None
            with pytest.raises(StoreError, match="snapshot old"), user.lease(snapshots=["old"]):
                pass

    def test_claims_last_as_long_as_the_process(self, store: Store, root: Path) -> None:
        blob = store.put(b"old", "x")
        snapshot(store, "old")
        store.close()
        with reopen(root) as collector:
            user = reopen(root)
            assert user.claim(blobs=[blob.digest], snapshots=["old", "absent"]) == {blob.digest, "old"}
            collector.gc()
            assert user.snapshots.prepare("old").parent == "old"
            user.close()
            collector.sweep()
            collector.gc()
            assert collector.claim(blobs=[blob.digest], snapshots=["old"]) == set()

    def test_blobs_of_a_cache_record(self, store: Store, root: Path) -> None:
        blob = store.put(b"download", "x")
        store.cache.put("k", None, b"", blobs=[blob.digest])
        store.close()
        with reopen(root) as other:
            other.gc()
            assert other.stat(blob.digest) is not None
            other.cache.delete(["k"])
            other.gc()
            assert other.stat(blob.digest) is None

    def test_live_and_resumable_ingests_stay(self, store: Store, root: Path) -> None:
        with store.ingest(ref="resumable") as ingest:
            ingest.write(b"x")
        (root / "ingest" / "debris").write_bytes(b"of a dead process")
        live = store.ingest()
        live.write(b"live")
        with reopen(root) as other:
            assert other.gc().ingests == 1
        assert len(os.listdir(root / "ingest")) == 2
        live.commit()

    def test_stray_directories_go(self, store: Store, root: Path) -> None:
        (root / "snapshots" / "stray" / "fs").mkdir(parents=True)
        store.gc()
        assert os.listdir(root / "snapshots") == []

    def test_an_index_keeps_what_is_there_of_it(self, store: Store, root: Path) -> None:
        image = put_image(store)
        index = Index.build([image, Descriptor.of(b"elsewhere", image.media_type)])
        store.names.set(NAME, store.put(index.raw, index.media_type))
        store.close()
        with reopen(root) as other:
            assert other.gc().blobs == 0

    def test_the_dead_are_swept_at_open(self, root: Path) -> None:
        pid = os.fork()
        if pid == 0:  # dies without closing anything, as by SIGKILL
            victim = reopen(root)
            victim.snapshots.prepare(None)
            victim.ingest().write(b"half")
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(os.listdir(root / "snapshots")) == 1
        with reopen(root):
            for name in ("snapshots", "ingest", "leases", "trash"):
                assert os.listdir(root / name) == [], name


class TestForks:
    def test_a_forked_child_keeps_no_lock(self, store: Store, root: Path) -> None:
        """The zygote lives as long as the build, with copies of whatever was open when it was forked."""
        reader, writer = os.pipe()
        with store.lock.shared(), store.flight("work"), store.ingest(ref="pull"):
            pid = os.fork()
            if pid == 0:
                os.close(writer)
                os.read(reader, 1)  # until the parent is done
                os._exit(0)
        try:
            store.close()
            with reopen(root) as other:
                with other.flight("work", wait=False) as mine:
                    assert mine
                with other.ingest(ref="pull"):
                    pass
                other.gc()
                assert len(os.listdir(root / "leases")) <= 1
        finally:
            os.close(writer)
            os.close(reader)
            os.waitpid(pid, 0)


class TestFlights:
    def test_one_at_a_time(self, store: Store, root: Path) -> None:
        order: list[str] = []
        inside = threading.Event()

        def second() -> None:
            inside.wait(10)
            with reopen(root) as other, other.flight("step"):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        with store.flight("step"):
            inside.set()
            with store.flight("step", wait=False) as mine:
                assert not mine
            thread.join(0.2)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]
        assert os.listdir(root / "flights") == []


def test_writing_out_is_begun_before_many_files_are_a_layer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(linux, "syncfs", synced.append)
    store.flush_ahead()
    for thread in threading.enumerate():
        if thread.name == "flush":
            thread.join()
    assert len(synced) == 1, "in another thread, and once"
