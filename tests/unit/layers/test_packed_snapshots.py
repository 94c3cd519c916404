"""Snapshots whose layer is all there is of them, until somebody asks for their files."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from layers.errors import DigestMismatch, StoreError
from layers.fsck import fsck
from layers.oci import MEDIA_OCI_LAYER_GZIP, Digest
from layers.records import LayerRecord
from layers.snapshotters.overlay import OverlaySnapshotter
from layers.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver="overlay", boot="one") as opened:
        yield opened


def overlay(store: Store) -> OverlaySnapshotter:
    assert isinstance(store.snapshots, OverlaySnapshotter)
    return store.snapshots


def put_layer(store: Store, *names: str) -> LayerRecord:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid = len(name), os.geteuid(), os.getegid()
            archive.addfile(info, io.BytesIO(name.encode()))
    tar = out.getvalue()
    blob = store.put(gzip.compress(tar, mtime=0), MEDIA_OCI_LAYER_GZIP)
    return LayerRecord(Digest.of(tar), blob, len(tar))


def defer(store: Store, *names: str, parent: str | None = None) -> str:
    return overlay(store).defer(parent, put_layer(store, *names), compression="gzip").id


def directories(store: Store) -> list[str]:
    return os.listdir(store.root / "snapshots")


def test_its_files_are_there_when_they_are_asked_for(store: Store) -> None:
    base = defer(store, "below")
    id = defer(store, "a", "b", parent=base)
    assert directories(store) == []
    assert [part.id for part in store.snapshots.chain(id)] == [base, id]
    top, bottom = store.snapshots.view(id).lower
    assert sorted(os.listdir(top)) == ["a", "b"]
    assert os.listdir(bottom) == ["below"]
    assert (top / "a").read_text() == "a"
    assert len(directories(store)) == 2
    assert store.snapshots.view(id).lower == (top, bottom)
    found = store.snapshots.get(id)
    assert found is not None and found.path == top and found.parent == base
    store.barrier()  # fsck finds another boot than this fixture's
    assert fsck(store.root, driver="overlay").problems == ()


def test_it_is_built_upon(store: Store) -> None:
    id = defer(store, "a")
    active = store.snapshots.prepare(id)
    (lower,) = active.mount.lower
    assert os.listdir(lower) == ["a"]
    (active.path / "c").write_text("c")
    child = store.snapshots.commit(active).id
    other = store.snapshots.rebase(defer(store, "moved"), child)
    assert sorted(name for path in store.snapshots.view(other.id).lower for name in os.listdir(path)) == [
        "a", "c", "moved",
    ]  # fmt: skip


def test_two_who_want_it_at_once_unpack_it_once(store: Store, tmp_path: Path) -> None:
    id = defer(store, *map(str, range(50)))
    trees: list[Path] = []
    with Store.open(tmp_path / "store", driver="overlay", boot="one") as other:
        wanted = [partial(each.snapshots.view, id) for each in (store, other) * 2]
        workers = [threading.Thread(target=lambda view=view: trees.append(view().lower[0])) for view in wanted]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(trees) == 4 and len(set(trees)) == 1
    assert len(os.listdir(trees[0])) == 50
    assert len(directories(store)) == 1


def test_it_keeps_its_layer_from_gc_and_goes_with_it(store: Store, tmp_path: Path) -> None:
    id = defer(store, "a")
    store.cache.put("key", id, b"{}")
    store.barrier()
    store.close()
    with Store.open(tmp_path / "store", driver="overlay", boot="one") as later:
        assert later.gc().blobs == 0
        found = later.cache.get("key")
        assert found is not None and found.snapshot_id == id
        record = later.layers.lookup(id, "gzip")
        assert record is not None and later.stat(record.descriptor.digest) is not None
        assert later.prune(all=True).records == 1
        assert later.snapshots.get(id) is None
        assert later.stat(record.descriptor.digest) is None
    assert fsck(tmp_path / "store", driver="overlay").problems == ()


def test_removed(store: Store) -> None:
    id = defer(store, "a")
    store.snapshots.remove(id)
    assert store.snapshots.get(id) is None
    with pytest.raises(StoreError, match="not in the store"):
        store.snapshots.view(id)
    with pytest.raises(StoreError, match="absent"):
        defer(store, "b", parent="absent")


def test_a_power_cut_forgets_files_that_no_barrier_covered(store: Store, tmp_path: Path) -> None:
    still, filled, durable = defer(store, "a"), defer(store, "b"), defer(store, "c")
    store.snapshots.view(durable)
    store.barrier()
    store.snapshots.view(filled)
    fresh = defer(store, "d")
    store.close()
    with Store.open(tmp_path / "store", driver="overlay", boot="two") as later:
        assert later.snapshots.get(filled) is None
        assert later.snapshots.get(fresh) is None
        assert len(directories(later)) == 1
        assert os.listdir(later.snapshots.view(durable).lower[0]) == ["c"]
        assert os.listdir(later.snapshots.view(still).lower[0]) == ["a"]


def test_a_lost_layer_is_one_error_and_repaired(store: Store, tmp_path: Path) -> None:
    id = defer(store, "a")
    store.cache.put("key", id, b"{}")
    record = store.layers.lookup(id)
    assert record is not None
    store.barrier()
    store.delete(record.descriptor.digest)
    with pytest.raises(StoreError, match="lost its layer") as raised:
        store.snapshots.view(id)
    assert "fsck --repair" in str(raised.value.hint)
    assert directories(store) == []
    store.close()
    found = fsck(tmp_path / "store", repair=True, driver="overlay")
    assert {("snapshot", id), ("cache", "key")} <= {(problem.kind, problem.subject) for problem in found.problems}
    with Store.open(tmp_path / "store", driver="overlay", boot="one") as later:
        assert later.snapshots.get(id) is None
        assert later.cache.get("key") is None
    assert fsck(tmp_path / "store", driver="overlay").problems == ()


def test_another_layer_than_was_said_is_not_unpacked(store: Store) -> None:
    other = put_layer(store, "other")
    id = overlay(store).defer(None, put_layer(store, "a")._replace(diff_id=other.diff_id), compression="gzip").id
    with pytest.raises(DigestMismatch):
        store.snapshots.view(id)
    assert directories(store) == []
    assert store.layers.lookup(id) is not None
