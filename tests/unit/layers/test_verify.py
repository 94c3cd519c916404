"""Layers compared with their trees: what was written passes, any difference is named."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from layers.changeset import write_layer
from layers.errors import LayerError
from layers.layerdiff import Change, diff_trees
from layers.oci import Digest
from layers.ownership import Record
from layers.verify import verify_layer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "root"
    (top / "d").mkdir(parents=True)
    (top / "d/f").write_bytes(os.urandom(3 << 20))
    (top / "d/small").write_bytes(b"small")
    os.setxattr(top / "d/small", "user.k", b"v")
    os.link(top / "d/small", top / "second")
    (top / "link").symlink_to("d/f")
    os.mkfifo(top / "pipe")
    return top


def written(root: Path, **options: object) -> tuple[io.BytesIO, Digest]:
    out = io.BytesIO()
    changes = [*diff_trees(None, root), Change("delete", b"zz/gone")]
    result = write_layer(changes, root, out, **options)  # type: ignore[arg-type]
    out.seek(0)
    return out, result.diff_id


def changes(root: Path) -> list[Change]:
    return [*diff_trees(None, root), Change("delete", b"zz/gone")]


@pytest.mark.parametrize("kind", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("options", [{}, {"clamp_mtime": 5}, {"nanoseconds": True}])
def test_what_was_written_passes(root: Path, kind: str, options: dict[str, int]) -> None:
    blob, diff_id = written(root, compression=kind, **options)
    assert verify_layer(blob, changes(root), root, diff_id=diff_id, **options) == 7  # type: ignore[arg-type]


def test_owners_that_the_disk_does_not_have(root: Path) -> None:
    device = Record(0, 6, stat.S_IFBLK, os.makedev(8, 1))
    recorded = [
        change._replace(st=device.applied(change.st)) if change.path == b"d/f" and change.st else change
        for change in changes(root)
    ]
    blob = io.BytesIO()
    diff_id = write_layer(recorded, root, blob).diff_id
    blob.seek(0)
    assert verify_layer(blob, recorded, root, diff_id=diff_id) == 7
    blob.seek(0)
    with pytest.raises(LayerError, match="'d/f' has type"):
        verify_layer(blob, changes(root), root)


DIFFERENCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "content": (lambda top: _rewrite(top / "d/f", -1), "'d/f' has other content"),
    "size": (lambda top: os.truncate(top / "d/f", 5), "'d/f' has size"),
    "mode": (lambda top: (top / "d/small").chmod(0o777), "'d/small' has mode"),
    "time": (lambda top: os.utime(top / "d/small", ns=(5, 5)), "'d/small' has mtime_ns"),
    "attribute": (lambda top: os.setxattr(top / "d/small", "user.k", b"w"), "'d/small' has xattrs"),
    "link": (lambda top: _relink(top / "link"), "'link' has linkname"),
    "missing": (lambda top: (top / "d/g").touch(), "'d/g' has name"),
    "extra": (lambda top: (top / "d/small").unlink(), "'link' has name|'second' has"),
}


def _rewrite(path: Path, at: int) -> None:
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _relink(path: Path) -> None:
    times = path.lstat()
    path.unlink()
    path.symlink_to("d/g")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_named(root: Path, name: str) -> None:
    blob, _ = written(root)
    change, match = DIFFERENCES[name]
    change(root)
    with pytest.raises(LayerError, match=match):
        verify_layer(blob, changes(root), root)


def test_entries_too_many_and_too_few(root: Path) -> None:
    blob, diff_id = written(root)
    with pytest.raises(LayerError, match="not among the changes"):
        verify_layer(blob, changes(root)[:-1], root)
    blob.seek(0)
    with pytest.raises(LayerError, match="is missing in the layer"):
        verify_layer(blob, [*changes(root), Change("delete", b"zzz")], root)
    blob.seek(0)
    with pytest.raises(LayerError, match="DiffID"):
        verify_layer(blob, changes(root), root, diff_id=Digest.of(b""))
    assert diff_id != Digest.of(b"")
