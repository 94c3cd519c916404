"""Snapshots by either driver, without mounting; what overlay mounts show is in tests/integration/store."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from layers.errors import StoreError
from layers.oci import Digest, chain_id
from layers.snapshot import ActiveSnapshot, Snapshotter
from layers.snapshotters.native import NativeSnapshotter
from layers.snapshotters.overlay import OverlaySnapshotter
from layers.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.store import Driver


@pytest.fixture(params=["overlay", "native"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", driver=cast("Driver", request.param)) as opened:
        yield opened


@pytest.fixture
def snapshots(store: Store) -> OverlaySnapshotter | NativeSnapshotter:
    return store.snapshots


def commit(snapshots: Snapshotter, parent: str | None, *files: str, id: str | None = None) -> str:
    active = snapshots.prepare(parent)
    for name in files:
        (active.path / name).write_text(name)
    return snapshots.commit(active, id=id).id


def test_both_are_snapshotters(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    protocol: Snapshotter = snapshots
    assert protocol.driver in {"overlay", "native"}


def test_chain_and_get(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    ids = [commit(snapshots, None, "a", id="a")]
    for name in ("b", "c"):
        ids.append(commit(snapshots, ids[-1], name))
    assert [s.id for s in snapshots.chain(ids[-1])] == ids
    assert [s.parent for s in snapshots.chain(ids[-1])] == [None, *ids[:-1]]
    found = snapshots.get("a")
    assert found is not None and (found.path / "a").read_text() == "a"
    assert snapshots.get("absent") is None
    with pytest.raises(StoreError, match="absent"):
        snapshots.chain("absent")


def test_unknown_parents(snapshots: OverlaySnapshotter | NativeSnapshotter, store: Store) -> None:
    with pytest.raises(StoreError, match="absent"):
        snapshots.prepare("absent")
    with pytest.raises(StoreError, match="absent"):
        snapshots.view("absent")
    active = snapshots.prepare(None)
    with pytest.raises(StoreError, match="active:"):
        snapshots.prepare(active.id)
    assert len(os.listdir(store.root / "snapshots")) == 1


def test_commit_under_a_taken_name_gives_that_one(
    snapshots: OverlaySnapshotter | NativeSnapshotter, store: Store
) -> None:
    commit(snapshots, None, "first", id="same")
    assert commit(snapshots, None, "second", id="same") == "same"
    found = snapshots.get("same")
    assert found is not None and os.listdir(found.path) == ["first"]
    assert len(os.listdir(store.root / "snapshots")) == 1


def test_commit_twice_or_after_discard(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    active = snapshots.prepare(None)
    snapshots.commit(active, id="one")
    with pytest.raises(StoreError, match="not being written"):
        snapshots.commit(active, id="two")
    active = snapshots.prepare(None)
    snapshots.discard(active)
    snapshots.discard(active)
    assert not active.path.exists()
    with pytest.raises(StoreError, match="not being written"):
        snapshots.commit(active)


def test_work_directories_go_with_the_commit(store: Store) -> None:
    active = store.snapshots.prepare(commit(store.snapshots, None))
    if active.mount.work is not None:  # as the kernel leaves it
        (active.mount.work / "work").mkdir(mode=0)
        (active.mount.work / "incompat" / "volatile").mkdir(parents=True)
    snapshot = store.snapshots.commit(active)
    assert os.listdir(snapshot.path.parent) == ["fs"]


def test_remove(snapshots: OverlaySnapshotter | NativeSnapshotter, store: Store) -> None:
    base = commit(snapshots, None, "a")
    child = commit(snapshots, base, "b")
    with pytest.raises(StoreError, match="builds on it"):
        snapshots.remove(base)
    active = snapshots.prepare(child)
    with pytest.raises(StoreError, match="builds on it"):
        snapshots.remove(child)
    snapshots.discard(active)
    snapshots.remove(child)
    snapshots.remove(base)
    snapshots.remove("absent")
    assert os.listdir(store.root / "snapshots") == []


def test_a_scratch_snapshot_has_the_mode_of_a_root_directory_whatever_the_umask(
    snapshots: OverlaySnapshotter | NativeSnapshotter,
) -> None:
    before = os.umask(0o077)
    try:
        active = snapshots.prepare(None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(active.path.stat().st_mode) == 0o755
    assert active.mount == ("bind", (active.path,), None, None, False, snapshots.dialect, None)


def test_the_root_directory_keeps_what_the_base_made_of_it(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    active = snapshots.prepare(None)
    active.path.chmod(0o1750)
    os.utime(active.path, ns=(5, 7_000_000_001))
    base = snapshots.commit(active)
    child = snapshots.prepare(base.id).path.stat()
    assert (stat.S_IMODE(child.st_mode), child.st_mtime_ns) == (0o1750, 7_000_000_001)


def test_views(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    nothing = snapshots.view(None)
    assert nothing.type == "bind" and nothing.readonly and os.listdir(nothing.lower[0]) == []
    base = commit(snapshots, None, "a")
    one = snapshots.view(base)
    assert one.type == "bind" and one.readonly and os.listdir(one.lower[0]) == ["a"]
    two = snapshots.view(commit(snapshots, base, "b"))
    if snapshots.driver == "native":
        assert two.type == "bind" and sorted(os.listdir(two.lower[0])) == ["a", "b"]
    else:
        assert two.type == "overlay" and [os.listdir(p) for p in two.lower] == [["b"], ["a"]]
        assert two.upper is None and two.work is None


def test_kept_snapshots_are_found_again(store: Store) -> None:
    base = commit(store.snapshots, None, "a")
    active = store.snapshots.prepare(base, keep="container")
    with pytest.raises(StoreError, match="container"):
        store.snapshots.prepare(None, keep="container")
    store.close()
    with Store.open(store.root, driver=cast("Driver", store.snapshots.driver)) as again:
        again.gc()
        assert again.snapshots.kept("container") == active
        assert again.snapshots.kept("other") is None
        assert again.snapshots.commit(active, id="done").id == "done"
        assert again.snapshots.kept("container") is None


def test_a_pin_keeps_a_chain_and_moves(snapshots: OverlaySnapshotter | NativeSnapshotter, store: Store) -> None:
    lower = commit(snapshots, None, "a", id="a")
    upper = commit(snapshots, lower, "b", id="b")
    snapshots.pin("work", upper)
    with pytest.raises(StoreError, match="absent"):
        snapshots.pin("work", "absent")
    assert set_of(store) == {"a", "b", "keep:work"}
    snapshots.pin("work", lower)
    snapshots.remove(upper)
    with pytest.raises(StoreError, match="builds on it"):
        snapshots.remove(lower)
    snapshots.unpin("work")
    snapshots.unpin("work")
    snapshots.remove(lower)
    assert set_of(store) == set()
    assert os.listdir(store.root / "snapshots") == []


def test_a_pin_outlives_its_process_and_gc(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", driver="native") as store:
        store.snapshots.pin("work", commit(store.snapshots, None, "a", id="a"))
        commit(store.snapshots, None, "b", id="b")
    with Store.open(tmp_path / "store", driver="native") as store:
        store.gc()
        assert set_of(store) == {"a", "keep:work"}


def set_of(store: Store) -> set[str]:
    return {str(row[0]) for row in store.database.rows("SELECT id FROM snapshots")}


def test_base_layers_are_shared_by_chain_id(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    first, second = Digest.of(b"1"), Digest.of(b"2")
    calls: list[str] = []

    def apply(active: ActiveSnapshot, lower: Sequence[Path]) -> None:
        calls.append(active.id)
        assert all(path.is_dir() for path in lower)
        (active.path / str(len(calls))).touch()

    base = snapshots.import_layer(None, first, apply)
    top = snapshots.import_layer(base.id, second, apply)
    assert (base.id, top.id) == (first, chain_id([first, second]))
    assert snapshots.import_layer(base.id, second, apply) == top
    assert len(calls) == 2


def test_a_failed_import_leaves_nothing(snapshots: OverlaySnapshotter | NativeSnapshotter, store: Store) -> None:
    def apply(active: ActiveSnapshot, lower: Sequence[Path]) -> None:
        (active.path / "half").touch()
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        snapshots.import_layer(None, Digest.of(b"1"), apply)
    assert os.listdir(store.root / "snapshots") == []


def test_rebase_shows_the_changes_on_the_other_parent(snapshots: OverlaySnapshotter | NativeSnapshotter) -> None:
    one, other = commit(snapshots, None, "one", "both"), commit(snapshots, None, "other", "both")
    active = snapshots.prepare(one)
    (active.path / "copied").write_text("copied")
    copied = snapshots.commit(active).id
    moved = snapshots.rebase(copied, other)
    assert snapshots.rebase(copied, other) == moved
    assert snapshots.rebase(copied, one).id == copied
    assert moved.parent == other
    if snapshots.driver == "native":
        assert sorted(os.listdir(moved.path)) == ["both", "copied", "other"]
    else:
        assert [sorted(os.listdir(p)) for p in snapshots.view(moved.id).lower] == [["copied"], ["both", "other"]]
    with pytest.raises(StoreError, match="absent"):
        snapshots.rebase("absent", None)
    with pytest.raises(StoreError, match="absent"):
        snapshots.rebase(copied, "absent")


class TestOverlay:
    @pytest.fixture
    def snapshots(self, tmp_path: Path) -> Iterator[OverlaySnapshotter]:
        with Store.open(tmp_path / "store", driver="overlay") as store:
            assert isinstance(store.snapshots, OverlaySnapshotter)
            yield store.snapshots

    def test_mounts_are_stacked_topmost_first(self, snapshots: OverlaySnapshotter) -> None:
        base = commit(snapshots, None, "a")
        top = commit(snapshots, base, "b")
        active = snapshots.prepare(top)
        assert active.mount.type == "overlay" and not active.mount.readonly
        assert [os.listdir(p) for p in active.mount.lower] == [["b"], ["a"]]
        assert active.mount.upper == active.path
        assert active.mount.work is not None and active.mount.work.is_dir()

    def test_rebase_shares_the_bytes(self, snapshots: OverlaySnapshotter) -> None:
        one, other = commit(snapshots, None, "one"), commit(snapshots, None, "other")
        copied = commit(snapshots, None, "copied")
        on_one = snapshots.rebase(copied, one)
        on_other = snapshots.rebase(copied, other)
        assert snapshots.rebase(copied, one) == on_one
        assert snapshots.rebase(copied, None).id == copied
        source = snapshots.get(copied)
        assert source is not None and on_one.path == on_other.path == source.path
        assert [os.listdir(p) for p in snapshots.view(on_other.id).lower] == [["copied"], ["other"]]
        snapshots.remove(copied)
        snapshots.remove(on_one.id)
        assert on_other.path.is_dir(), "the last one still needs it"
        snapshots.remove(on_other.id)
        assert not on_other.path.exists()

    def test_side_by_side_layers_are_stacked_afterwards(self, snapshots: OverlaySnapshotter) -> None:
        low, high = snapshots.prepare(None), snapshots.prepare(None)
        (high.path / "high").touch()
        (low.path / "low").touch()
        below = snapshots.adopt(low, "below", None)
        above = snapshots.adopt(high, "above", below.id)
        assert [os.listdir(p) for p in snapshots.view(above.id).lower] == [["high"], ["low"]]

    def test_a_name_reused_by_another_process_is_noticed(self, snapshots: OverlaySnapshotter, tmp_path: Path) -> None:
        commit(snapshots, None, "old", id="name")
        active = snapshots.prepare("name")
        assert os.listdir(active.mount.lower[0]) == ["old"]
        snapshots.discard(active)
        with Store.open(tmp_path / "store", driver="overlay") as other:
            other.snapshots.remove("name")
            commit(other.snapshots, None, "new", id="name")
        assert os.listdir(snapshots.prepare("name").mount.lower[0]) == ["new"]


class TestNative:
    @pytest.fixture
    def snapshots(self, tmp_path: Path) -> Iterator[NativeSnapshotter]:
        with Store.open(tmp_path / "store", driver="native") as store:
            assert isinstance(store.snapshots, NativeSnapshotter)
            yield store.snapshots

    def test_children_are_copies(self, snapshots: NativeSnapshotter) -> None:
        base = commit(snapshots, None, "a")
        active = snapshots.prepare(base)
        assert active.mount.type == "bind"
        (active.path / "a").write_text("changed")
        found = snapshots.get(base)
        assert found is not None and (found.path / "a").read_text() == "a"

    def test_rebase_replays_deletions(self, snapshots: NativeSnapshotter) -> None:
        one, other = commit(snapshots, None, "a", "b"), commit(snapshots, None, "a", "c")
        active = snapshots.prepare(one)
        (active.path / "a").unlink()
        (active.path / "b").write_text("changed")
        moved = snapshots.rebase(snapshots.commit(active).id, other)
        assert sorted(os.listdir(moved.path)) == ["b", "c"]
        assert (moved.path / "b").read_text() == "changed"
