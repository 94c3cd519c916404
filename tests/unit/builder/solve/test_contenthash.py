"""The content key of a COPY: it changes with what the copy would make, and with nothing else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from builder.errors import ContextError
from builder.solve.contenthash import content_key, file_stat
from builder.solve.fileops import CopyOptions
from layers.errors import Cancelled
from layers.records import FileStat
from tests.unit.builder.solve.conftest import Trees, plant

TREE = {"a": "1", "d/f": "2", "d/s/g": "3", "d/l": "-> f", "e": None}


class Cache:
    """Remembers everything, and what it was asked."""

    def __init__(self) -> None:
        self.known: dict[FileStat, bytes] = {}
        self.asked = 0

    def get_many(self, stats: Sequence[FileStat]) -> list[bytes | None]:
        self.asked += len(stats)
        return [self.known.get(s) for s in stats]

    def put_many(self, items: Iterable[tuple[FileStat, bytes]], *, observed_ns: int) -> None:
        assert observed_ns > 10**18
        self.known.update(items)


@pytest.fixture
def tree(trees: Trees) -> Trees:
    trees.given(TREE)
    return trees


def rewrite(path: Path, text: str) -> None:
    status = path.stat()
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda top: rewrite(top / "d/f", "X"),
        lambda top: rewrite(top / "d/s/g", "33"),
        lambda top: (top / "d/f").chmod(0o600),
        lambda top: (top / "d/s").chmod(0o711),
        lambda top: (top / "d/f").rename(top / "d/f2"),
        lambda top: (top / "d/new").touch(),
        lambda top: (top / "d/newdir").mkdir(),
        lambda top: (top / "d/f").unlink(),
        lambda top: ((top / "d/l").unlink(), (top / "d/l").symlink_to("s")),
        lambda top: ((top / "d/l").unlink(), (top / "d/l").write_text("f")),
        lambda top: ((top / "d/f").unlink(), (top / "d/f").mkdir()),
        lambda top: ((top / "d/f").unlink(), (top / "d/f").hardlink_to(top / "d/s/g")),
        lambda top: [(top / "d/f").unlink(), os.mkfifo(top / "d/f")],  # type: ignore[func-returns-value]
        lambda top: os.setxattr(top / "d/f", "user.note", b"1"),
        lambda top: os.setxattr(top / "d/s", "user.note", b"1"),
    ],
)
def test_what_changes_the_key(tree: Trees, change: Callable[[Path], object]) -> None:
    before = tree.key("d").digest
    assert tree.key("d").digest == before
    change(tree.source)
    assert tree.key("d").digest != before


@pytest.mark.parametrize(
    "change",
    [
        lambda top: os.utime(top / "d/f", (1, 1)),
        lambda top: os.utime(top / "d", (1, 1)),
        lambda top: (top / "a").write_text("other"),
        lambda top: (top / "d").chmod(0o700),
        lambda top: ((top / "d/copy").write_text("2"), (top / "d/copy").replace(top / "d/f")),
        lambda top: os.setxattr(top / "d/f", "user.overlay.origin", b"1"),
    ],
)
def test_what_does_not(tree: Trees, change: Callable[[Path], object]) -> None:
    before = tree.key("d").digest
    change(tree.source)
    assert tree.key("d").digest == before


def test_the_directory_itself_counts_where_it_is_copied(tree: Trees) -> None:
    contents, whole = tree.key("d").digest, tree.key("d", copy_dir_contents=False).digest
    (tree.source / "d").chmod(0o700)
    assert tree.key("d").digest == contents
    assert tree.key("d", copy_dir_contents=False).digest != whole


def test_names_of_files_and_the_division_into_sources_count(tree: Trees) -> None:
    plant(tree.source, {"same": "1"})
    keys = {tree.key(*sources).digest for sources in (["a"], ["same"], ["a", "same"], ["same", "a"], ["[a]", "same"])}
    assert len(keys) == 4
    assert tree.key("[a]").digest == tree.key("a").digest


def test_a_followed_symlink_is_what_it_leads_to(tree: Trees) -> None:
    plant(tree.source, {"x/a": "-> ../a"})
    assert tree.key("x/a").digest == tree.key("a").digest
    assert tree.key("x/a", follow_symlinks=False).digest != tree.key("a").digest


def test_the_copys_options_stand_in_for_what_they_replace(tree: Trees) -> None:
    before = tree.key("d", mode=0o644).digest
    (tree.source / "d/f").chmod(0o600)
    assert tree.key("d", mode=0o644).digest == before
    symbolic = tree.key("d", mode="u+x").digest
    (tree.source / "d/f").chmod(0o700)
    assert tree.key("d", mode="u+x").digest == symbolic


@pytest.mark.root
def test_owners(tree: Trees) -> None:
    before = [tree.key("d").digest, tree.key("d", reset_owner=True).digest, tree.key("d", owner=(1, 1)).digest]
    for path in ("d/f", "d/s"):
        os.chown(tree.source / path, 5, 5)
    after = [tree.key("d").digest, tree.key("d", reset_owner=True).digest, tree.key("d", owner=(1, 1)).digest]
    assert (before[0] != after[0], before[1:]) == (True, after[1:])


def test_ignored_and_excluded_paths_do_not_count(tree: Trees) -> None:
    keys = [
        tree.key("/", ignore="d/s\na").digest,
        tree.key("/", exclude=("d/s", "a")).digest,
        tree.key("/", include=("d/f", "d/l")).digest,
    ]
    rewrite(tree.source / "d/s/g", "X")
    rewrite(tree.source / "a", "X")
    assert keys == [
        tree.key("/", ignore="d/s\na").digest,
        tree.key("/", exclude=("d/s", "a")).digest,
        tree.key("/", include=("d/f", "d/l")).digest,
    ]
    assert keys[0] == keys[1]


def test_explanation(tree: Trees) -> None:
    (tree.source / "a").chmod(0o640)
    uid, gid = os.geteuid(), os.getegid()
    key = tree.key("a", "d")
    entries = list(key.entries() or ())
    shown = [(e.path, e.kind, e.value[:6]) for e in entries]
    assert shown == [
        ("a", "file", "6b86b2"),
        ("f", "file", "d4735e"),
        ("l", "symlink", "f"),
        ("s", "directory", ""),
        ("s/g", "file", "4e0740"),
    ]
    assert (entries[0].mode, entries[0].uid, entries[0].gid) == (0o640, uid, gid)
    assert (key.files, key.read_bytes, key.size_bytes) == (3, 3, 3)


def test_explanation_of_odd_entries(trees: Trees) -> None:
    """Names with line ends and of any bytes, targets like lines, links, attributes, every kind of file."""
    names = ["new\nline", "\udcff", "d /0 1 2", "f"]
    trees.given({f"x/{name}": name.encode("utf-8", "surrogateescape") for name in names})
    top = trees.source / "x"
    (top / "link").symlink_to("a\nfq 644 0 0\n")
    os.link(top / "f", top / "hard")
    os.mkfifo(top / "pipe")
    (top / "sub").mkdir()
    os.setxattr(top / "sub", "user.k", b"v")
    os.setxattr(top / "d /0 1 2", "user.k", b"v")
    entries = {e.path: e for e in trees.key("x", mode=0o600).entries() or ()}
    assert entries.keys() == {*(n for n in names if "/" not in n), "d ", "d /0 1 2", "link", "hard", "pipe", "sub"}
    assert entries["link"].value == "a\nfq 644 0 0\n"
    assert entries["hard"].value == entries["f"].value == hashlib.sha256(b"f").hexdigest()
    assert (entries["pipe"].kind, entries["sub"].kind, entries["new\nline"].mode) == ("fifo", "directory", 0o600)


def test_very_many_files_are_not_told_one_by_one(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.given({f"d/f{n}": "" for n in range(20)})
    whole = trees.key("d")
    monkeypatch.setattr("builder.solve.contenthash._KEPT_FILES", 10)
    assert trees.key("d") == whole._replace(lines=None)
    assert trees.key("d").entries() is None


def test_nothing_is_read_twice(tree: Trees) -> None:
    cache = Cache()
    first = content_key(tree.source_fd, ["/"], CopyOptions(), stats_cache=cache)
    again = content_key(tree.source_fd, ["/"], CopyOptions(), stats_cache=cache)
    assert (first.read_bytes, again.read_bytes, again.digest) == (3, 0, first.digest)
    rewrite(tree.source / "d/f", "X")
    changed = content_key(tree.source_fd, ["/"], CopyOptions(), stats_cache=cache)
    assert changed.read_bytes == 1
    assert changed.digest == tree.key("/").digest


def test_files_with_attributes_are_read_each_time(tree: Trees) -> None:
    """A hit in the cache stands for a file that has none."""
    os.setxattr(tree.source / "a", "user.note", b"1")
    cache = Cache()
    first = content_key(tree.source_fd, ["a"], CopyOptions(), stats_cache=cache)
    assert cache.known == {}
    os.setxattr(tree.source / "a", "user.note", b"2")
    assert content_key(tree.source_fd, ["a"], CopyOptions(), stats_cache=cache).digest != first.digest


def test_one_file_of_many_is_all_that_is_touched(trees: Trees) -> None:
    trees.given({f"d/f{n}": "" for n in range(100)})
    cache = Cache()
    key = content_key(trees.source_fd, ["d/f7"], CopyOptions(), stats_cache=cache)
    assert (key.files, cache.asked) == (1, 1)


def test_more_files_than_a_batch_and_more_bytes_than_one_thread_takes(trees: Trees) -> None:
    """The digest does not depend on how the work was divided."""
    for n in range(2500):
        (trees.source / f"{n:04}").write_bytes(b"%d" % n * 1000)
    cache = Cache()
    threaded = content_key(trees.source_fd, ["/"], CopyOptions(), stats_cache=cache)
    assert threaded.read_bytes == sum(len(b"%d" % n) * 1000 for n in range(2500))
    entries = list(threaded.entries() or ())
    assert [entry.path for entry in entries] == [f"{n:04}" for n in range(2500)]
    status = (trees.source / "0042").stat()
    assert cache.known[file_stat(status)].hex() == entries[42].value
    assert content_key(trees.source_fd, ["/"], CopyOptions(), stats_cache=cache).digest == threaded.digest


def test_lines_cannot_be_forged_by_names(trees: Trees) -> None:
    """A name that spells out a line of the digest is not that line."""
    trees.given({"one/a b": "", "two/a%20b": "", "three/a": "", "three/b": ""})
    plain = trees.key("three").digest
    (trees.source / "four").mkdir()
    (trees.source / "four" / "a 644 0 0 x\nf b").write_text("")
    assert len({trees.key("one").digest, trees.key("two").digest, trees.key("four").digest, plain}) == 4


@pytest.mark.parametrize(
    ("source", "complaint"), [("none", '"/none": not found'), ("a/b", "not a directory"), ("[", "syntax error")]
)
def test_refused_as_the_copy_would_refuse(tree: Trees, source: str, complaint: str) -> None:
    with pytest.raises(ContextError, match=complaint):
        tree.key(source)


def test_no_match_is_a_key_of_its_own(tree: Trees) -> None:
    assert tree.key("*.none").digest == tree.key("*.other").digest != tree.key("a").digest


def test_cancelled(tree: Trees) -> None:
    with pytest.raises(Cancelled):
        content_key(tree.source_fd, ["/"], CopyOptions(), cancelled=lambda: True)
