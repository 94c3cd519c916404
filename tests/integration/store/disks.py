"""Scenarios on disks that are full or lose power, each run in a process and mount namespace of its own.

`unshare -m python -m tests.integration.store.disks SCENARIO DIRECTORY` exits with 0, or with a
traceback; with 77 and a reason where the machine lacks something.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from layers.errors import StoreError
from layers.fsck import fsck
from layers.oci import Digest
from layers.store import Store
from tests.integration.store import worker

SKIPPED = 77


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def read_all(store: Store, names: set[str]) -> None:
    """Every name is there, and every byte that it promises."""
    known = {named.name: named.descriptor for named in store.names.list()}
    assert names <= known.keys(), names - known.keys()
    for descriptor in known.values():
        for digest in store.closure(descriptor):
            with store.open(digest) as f:
                while f.read(1 << 16):
                    pass


def full_disk(directory: Path) -> None:
    """Builds until nothing fits: clear errors, nothing lost; a prune makes room again."""
    mount("-t", "tmpfs", "-o", "size=4m", "none", str(directory))
    root = directory / "store"
    rng = random.Random(1)
    published: set[str] = set()
    failures = 0
    with Store.open(root) as store:
        for number in range(300):
            name = f"registry.example/w0:{number}"
            try:
                worker.build(store, rng, name)
                published.add(name)
            except StoreError as e:
                assert "disk" in e.message, e.message
                failures += 1
                if failures == 3:
                    break
    assert failures == 3, "the disk never filled up"
    assert published
    fill(directory / "stuffing")
    with Store.open(root) as store:
        read_all(store, published)
        assert {n.name for n in store.names.list()} == published
        # Not a byte is free; what goes first is a cache record, which SQLite must write about.
        assert store.prune(all=True).bytes > 0
        for name in sorted(published)[1:]:
            store.names.delete(name)
        store.gc()
        worker.build(store, rng, "registry.example/after:1")
        assert (root / "reserve").stat().st_size == 1 << 20
    assert fsck(root).problems == ()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as f:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while f.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def full_disk_while_copying(directory: Path) -> None:
    """A tree that does not fit leaves the store as it was."""
    mount("-t", "tmpfs", "-o", "size=4m", "none", str(directory))
    with Store.open(directory / "store", driver="native") as store:
        active = store.snapshots.prepare(None)
        (active.path / "big").write_bytes(b"x" * 1_200_000)
        base = store.snapshots.commit(active)
        middle = store.snapshots.prepare(base.id)
        try:
            store.snapshots.prepare(base.id)
        except StoreError as e:
            assert "the disk is full" in e.message, e.message
            assert e.hint is not None
        else:
            raise AssertionError("it fitted")
        store.snapshots.discard(middle)
        assert store.snapshots.prepare(base.id).path.is_dir()


class PowerCutDisk:
    """A loop device whose backing file can be copied at any moment: what had reached the disk by then."""

    def __init__(self, directory: Path) -> None:
        self._image = directory / "disk.img"
        self._crashed = directory / "crashed.img"
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        with self._image.open("wb") as f:
            f.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self._image)], check=True, capture_output=True)
        self._mount()

    def _mount(self) -> None:
        # Long commit intervals: nothing gets to the disk by itself while the test runs.
        mount("-t", "ext4", "-o", "loop,commit=300", str(self._image), str(self.mountpoint))

    def cut(self) -> None:
        """Go on with what the disk had at this moment."""
        shutil.copyfile(self._image, self._crashed)
        subprocess.run(["umount", str(self.mountpoint)], check=True)
        self._crashed.replace(self._image)
        self._mount()


def power_cut(directory: Path) -> None:
    """What no barrier covered may be lost or torn; nothing that was promised is."""
    try:
        disk = PowerCutDisk(directory)
    except subprocess.CalledProcessError as e:
        sys.stderr.write(f"needs loop devices ({e})")
        sys.exit(SKIPPED)
    root = disk.mountpoint / "store"
    rng = random.Random(3)
    names: set[str] = set()
    loose: list[Digest] = []
    torn = 0
    for boot in range(4):
        data = [rng.randbytes(30_000) for _ in range(20)]
        pid = os.fork()
        if pid == 0:  # its death lets go of the disk, without the tidying of a proper end
            work_and_die(root, boot, data)
        assert os.waitpid(pid, 0)[1] == 0
        names |= {f"registry.example/boot{boot}:{number}" for number in range(3)}
        loose += [Digest.of(each) for each in data]
        disk.cut()
        with Store.open(root, boot=f"boot-{boot + 1}") as again:
            read_all(again, names)
            assert again.cache.list("late:") == [], "no barrier covered these"
            for digest in loose:
                if again.stat(digest) is None:
                    torn += 1
                else:
                    again.read(digest, 1 << 20)
            for record in again.cache.list():
                for part in again.snapshots.chain(record.snapshot_id or ""):
                    sizes = [file.stat().st_size for file in part.path.iterdir()]
                    assert sizes and record.record
            worker.build(again, rng, f"registry.example/after{boot}:0")
            names.add(f"registry.example/after{boot}:0")
    assert torn, "the disk lost nothing: this scenario proves nothing"
    subprocess.run(["umount", str(disk.mountpoint)], check=True)


def work_and_die(root: Path, boot: int, data: list[bytes]) -> None:
    """Builds that are published, then work that no barrier covers, then nothing."""
    status = 1
    try:
        rng = random.Random(boot)
        store = Store.open(root, boot=f"boot-{boot}")
        for number in range(3):
            worker.build(store, rng, f"registry.example/boot{boot}:{number}")
        for each in data:
            store.put(each, "application/octet-stream")
            active = store.snapshots.prepare(None)
            (active.path / "f").write_bytes(each[:5000])
            store.cache.put(f"late:{rng.random()}", store.snapshots.commit(active).id, b"")
        status = 0
    except Exception:  # noqa: BLE001 - a forked child must not run the parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
