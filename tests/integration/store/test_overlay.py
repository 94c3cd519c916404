"""Snapshots as the kernel shows them: overlay mounts made from what the snapshotter describes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.snapshot import ActiveSnapshot, Mount
from layers.snapshotters.catalog import Catalog
from layers.snapshotters.overlay import OverlaySnapshotter, open_tree
from layers.store import Store
from layers.trees import remove_tree
from tests.support.machine import need_mounts, need_root

pytestmark = pytest.mark.root


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    need_root()
    need_mounts()
    with Store.open(tmp_path / "store") as opened:
        if opened.snapshots.driver != "overlay":
            pytest.skip("needs a file system that overlayfs takes for its upper directory")
        yield opened


@pytest.fixture
def snapshots(store: Store) -> OverlaySnapshotter:
    assert isinstance(store.snapshots, OverlaySnapshotter)
    return store.snapshots


class Tree:
    """A mount, looked at by descriptor."""

    def __init__(self, mount: Mount) -> None:
        self.root = open_tree(mount)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.root)

    def names(self, path: str = ".") -> list[str]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.root)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def write(self, path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=self.root)
        os.write(fd, text.encode())
        os.close(fd)

    def read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY, dir_fd=self.root)
        try:
            return os.read(fd, 1 << 16).decode()
        finally:
            os.close(fd)

    def remove(self, path: str) -> None:
        os.unlink(path, dir_fd=self.root)


def build(snapshots: OverlaySnapshotter, parent: str | None, *files: str, gone: tuple[str, ...] = ()) -> str:
    active = snapshots.prepare(parent)
    with Tree(active.mount) as tree:
        for name in files:
            tree.write(name, name)
        for name in gone:
            tree.remove(name)
    return snapshots.commit(active).id


def test_changes_show_and_do_not_leak_into_the_parent(snapshots: OverlaySnapshotter) -> None:
    base = build(snapshots, None, "a", "b")
    top = build(snapshots, base, "c", gone=("a",))
    with Tree(snapshots.view(top)) as tree:
        assert tree.names() == ["b", "c"]
    with Tree(snapshots.view(base)) as tree:
        assert tree.names() == ["a", "b"]
    found = snapshots.get(top)
    assert found is not None
    assert stat.S_ISCHR((found.path / "a").lstat().st_mode), "the whiteout lies in the layer"
    assert os.listdir(found.path.parent) == ["fs"], "the kernel's work directory has gone"


def test_views_are_read_only(snapshots: OverlaySnapshotter) -> None:
    top = build(snapshots, build(snapshots, None, "a"), "b")
    with Tree(snapshots.view(top)) as tree, pytest.raises(OSError, match="Read-only"):
        tree.write("x", "x")


def test_a_kept_snapshot_can_be_mounted_again(snapshots: OverlaySnapshotter) -> None:
    base = build(snapshots, None, "a")
    snapshots.prepare(base, keep="container")
    for number in range(2):
        active = snapshots.kept("container")
        assert active is not None
        snapshots.reset_work(active)
        with Tree(active.mount) as tree:
            tree.write(f"f{number}", "x")
    active = snapshots.kept("container")
    assert active is not None
    snapshots.reset_work(active)
    with Tree(active.mount) as tree:
        assert tree.names() == ["a", "f0", "f1"]


def test_a_rebased_layer_hides_what_it_hid(snapshots: OverlaySnapshotter) -> None:
    changes = build(snapshots, build(snapshots, None, "a", "b"), "c", gone=("a",))
    other = build(snapshots, None, "a", "d")
    with Tree(snapshots.view(snapshots.rebase(changes, other).id)) as tree:
        assert tree.names() == ["c", "d"]


def test_chains_longer_than_the_kernel_stacks(store: Store) -> None:
    """With the limit made small; the real one takes the next test's time."""
    catalog = Catalog(store.root, store.snapshots.label, store.database, store.lock, store.leases, lambda: 0)
    snapshots = OverlaySnapshotter(catalog, store.dialect, max_lower=4)
    top: str | None = None
    for number in range(11):
        gone = (f"f{number - 3}",) if number >= 3 else ()
        top = build(snapshots, top, f"f{number}", f"same{number % 2}", gone=gone)
    assert top is not None
    view = snapshots.view(top)
    assert len(view.lower) <= 4
    with Tree(view) as tree:
        assert tree.names() == ["f10", "f8", "f9", "same0", "same1"]
    before = store.database.row("SELECT count(*) FROM snapshots")
    assert OverlaySnapshotter(catalog, store.dialect, max_lower=4).view(top) == view, "merged once"
    assert store.database.row("SELECT count(*) FROM snapshots") == before


@pytest.mark.slow
def test_a_chain_of_six_hundred(snapshots: OverlaySnapshotter) -> None:
    top: str | None = None
    for number in range(600):
        active = snapshots.prepare(top)
        (active.path / f"f{number}").touch()
        top = snapshots.commit(active).id
    assert top is not None
    with Tree(snapshots.view(top)) as tree:
        assert len(tree.names()) == 600


def test_hostile_upper_directories_are_removed(snapshots: OverlaySnapshotter, store: Store) -> None:
    active = snapshots.prepare(build(snapshots, None, "a"))
    (active.path / "sealed").mkdir(mode=0)
    (active.path / "etc").symlink_to("/etc")
    snapshots.discard(active)
    assert not active.path.parent.exists()
    assert Path("/etc/passwd").exists()
    assert os.listdir(store.root / "trash") == []


def test_a_tree_with_a_mount_in_it_waits_in_the_trash(snapshots: OverlaySnapshotter, tmp_path: Path) -> None:
    """A sandbox that is still dying may hold one; nothing behind it may be deleted."""
    from layers import linux

    active: ActiveSnapshot = snapshots.prepare(None)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (active.path / "mnt").mkdir()
    linux.mount(str(victim), str(active.path / "mnt"), None, linux.MS_BIND)
    target = str(active.path / "mnt")
    try:
        with pytest.raises(OSError, match="mounted"):
            remove_tree(str(active.path))
        assert (victim / "precious").exists()
    finally:
        linux.umount2(target)
