"""Trees in memory: what applying a stack of layers gives, against layers.apply's directories; fold and squash."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layers.apply import apply_layer
from layers.changeset import write_layer
from layers.compare import Node, Tree, compare, read_directory, read_tar
from layers.errors import LayerError
from layers.fold import fold_groups
from layers.layerdiff import diff_trees

NAMES = st.sampled_from(["a", "b", "d", "d/a", "d/e", "d/e/f", "x/y/z", "l/q"])
KINDS = st.sampled_from(["file", "dir", "link", "wh", "opq", "hard"])
ENTRIES = st.lists(st.tuples(NAMES, KINDS, st.integers(0, 3)), max_size=12)


def make_tar(entries: list[tuple[str, str, int]]) -> bytes:
    out = io.BytesIO()
    files: list[str] = []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, number in entries:
            member = tarfile.TarInfo(name)
            member.mtime = 1000 + number
            data = b""
            if kind == "file":
                data = b"x" * number
                files.append(name)
            elif kind == "dir":
                member.type, member.mode = tarfile.DIRTYPE, 0o700 + number
            elif kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "../" * number + "a"
            elif kind == "hard":
                if not files:
                    continue
                member.type, member.linkname = tarfile.LNKTYPE, files[-1]
            elif kind == "wh":
                parent, _, last = name.rpartition("/")
                member.name = f"{parent}/.wh.{last}".lstrip("/")
            else:
                member.name = f"{name}/.wh..wh..opq"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_a_stack_comes_to_what_applying_it_gives(tmp_path_factory: pytest.TempPathFactory, stack: object) -> None:
    root = tmp_path_factory.mktemp("root")
    tree = Tree()
    assert isinstance(stack, list)
    for entries in stack:
        data = make_tar(entries)
        refused = False
        try:
            apply_layer(io.BytesIO(data), root, keep_owners=False)
        except LayerError:
            refused = True
        if refused:
            return  # half applied: nothing to compare with
        tree.apply(io.BytesIO(data))
    mine = {p: (n.kind, n.size, n.target) for p, n in tree.flat().items()}
    real = {p: (n.kind, n.size, n.target) for p, n in read_directory(root).items()}
    assert mine == real


def test_a_directory_is_its_own_layer(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/file").write_bytes(b"data")
    os.link(root / "d/file", root / "hard")
    (root / "link").symlink_to("d/file")
    os.setxattr(root / "d", "user.a", b"1")
    out = io.BytesIO()
    write_layer(diff_trees(None, root), root, out, compression="none")
    there = read_tar(io.BytesIO(out.getvalue()))
    assert list(compare(read_directory(root), there, times=True)) == []
    (root / "d/file").write_bytes(b"DATA")
    changes = {c.path: [f.field for f in c.fields] for c in compare(read_directory(root), there)}
    assert changes == {b"d/file": ["content"], b"hard": ["content"]}


def test_broken_links_and_loops_are_seen() -> None:
    one = Node("file", 0o644, 0, 0, 0, 0, 1)
    changed = list(compare({b"a": one, b"b": one}, {b"a": one, b"b": one._replace(inode=2)}))
    assert [c.path for c in changed] == [b"a", b"b"]
    assert {f.field for c in changed for f in c.fields} == {"hard link"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, target in (("x", "y"), ("y", "x")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("x/inside"))
    with pytest.raises(LayerError, match="in circles"):
        read_tar(io.BytesIO(out.getvalue()))
    with pytest.raises(LayerError):
        read_tar(io.BytesIO(b"x" * 2000))


def test_fold_groups_neighbours(tmp_path: Path) -> None:
    for number, files in enumerate([{"a": "same"}, {"z": "1"}, {"a": "same"}, {"q": "2"}, {"z": "2"}]):
        (tmp_path / str(number)).mkdir()
        for name, text in files.items():
            (tmp_path / str(number) / name).write_text(text)
    trees = [str(tmp_path / str(n)) for n in range(5)]
    folding = fold_groups([(list(diff_trees(None, Path(t))), t) for t in trees])
    assert folding.groups == ((0, 1, 2), (3,), (4,))
    assert folding.saved_bytes == 4
