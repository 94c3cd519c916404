"""What COPY does: which name goes where, what is merged, replaced or refused, whose metadata wins."""

from __future__ import annotations

import os
import socket
import stat
from functools import partial
from pathlib import Path

import pytest

from builder.errors import ContextError
from builder.solve.fileops import CopyOptions, copy, copy_data, make_directory, make_file, resolve_sources
from layers.errors import Cancelled
from tests.unit.builder.solve.conftest import Trees, plant


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize(
    ("source", "dest", "existing", "wanted"),
    [
        ("a", "/x", {}, {"x": "1"}),
        ("a", "/x/", {}, {"x": None, "x/a": "1"}),
        ("/a", "/x/y", {}, {"x": None, "x/y": "1"}),
        ("a", "/x/y/", {"x": None}, {"x": None, "x/y": None, "x/y/a": "1"}),
        ("a", "/x", {"x": None}, {"x": None, "x/a": "1"}),
        ("a", "/x", {"x": "old"}, {"x": "1"}),
        ("a", "/", {}, {"a": "1"}),
        ("a", "/.", {}, {"a": "1"}),
        ("a", "/x/.", {}, {"x": None, "x/a": "1"}),
        ("a", "/x", {"x": "-> y", "y": None}, {"x": "-> y", "y": None, "y/a": "1"}),
        ("a", "/x", {"x": "-> y", "y": "old"}, {"x": "-> y", "y": "1"}),
        ("a", "/x", {"x": "-> y"}, {"x": "-> y", "y": "1"}),
        ("a", "/x/z", {"x": "-> deep/er"}, {"x": "-> deep/er", "deep": None, "deep/er": None, "deep/er/z": "1"}),
        ("a", "/x/", {"x": None, "x/a": "-> b", "x/b": "b"}, {"x": None, "x/a": "1", "x/b": "b"}),
        ("d", "/x", {}, {"x": None, "x/f": "2", "x/s": None, "x/s/g": "3"}),
        ("d/", "/x/", {}, {"x": None, "x/f": "2", "x/s": None, "x/s/g": "3"}),
        ("d", "/", {"f": "old", "keep": "k"}, {"f": "2", "keep": "k", "s": None, "s/g": "3"}),
        ("d/s/..", "/x", {}, {"x": None, "x/f": "2", "x/s": None, "x/s/g": "3"}),
        ("link", "/x", {}, {"x": "1"}),
        ("dirlink", "/x", {}, {"x": None, "x/f": "2", "x/s": None, "x/s/g": "3"}),
        ("dirlink/f", "/x", {}, {"x": "2"}),
        ("abslink", "/x", {}, {"x": "2"}),
        ("inner", "/x", {}, {"x": None, "x/l": "-> ../a"}),
    ],
)
def test_where_it_goes(
    trees: Trees, source: str, dest: str, existing: dict[str, str | None], wanted: dict[str, str | None]
) -> None:
    trees.given(
        {
            "a": "1",
            "d/f": "2",
            "d/s/g": "3",
            "link": "-> a",
            "dirlink": "-> d",
            "abslink": "-> /d/f",
            "inner/l": "-> ../a",
        },
        existing,
    )
    trees.copy(source, dest)
    assert trees.result == wanted


def test_without_contents_the_directory_itself_is_copied(trees: Trees) -> None:
    trees.given({"d/f": "1"}, {"x": None})
    (trees.source / "d").chmod(0o2751)
    trees.copy("d", "/x", copy_dir_contents=False)
    trees.copy("d", "/new", copy_dir_contents=False)
    assert trees.result == {"x": None, "x/d": None, "x/d/f": "1", "new": None, "new/f": "1"}
    assert mode(trees.dest / "x/d") == mode(trees.dest / "new") == 0o2751


@pytest.mark.parametrize(
    ("source", "dest", "existing", "complaint"),
    [
        ("none", "/x", {}, '"/none": not found'),
        ("d/none/x", "/x", {}, '"/d/none/x": not found'),
        ("a/b", "/x", {}, "not a directory"),
        ("dangling", "/x", {}, "not found"),
        ("loop", "/x", {}, "too many links"),
        ("d", "/x", {"x/f": None}, "cannot replace to directory /x/f with file"),
        ("d", "/", {"s": "a file"}, "cannot copy to non-directory: /s"),
        ("d", "/", {"s": "-> t", "t": None}, "cannot copy to non-directory: /s"),
        ("d", "/x", {"x": "a file"}, "cannot copy to non-directory: /x"),
        ("a", "/x/y", {"x": "a file"}, "not a directory"),
        ("a", "/x", {"x": "-> x"}, "too many links"),
        ("no/*", "/x", {}, '"/no": not found'),
        ("[", "/x", {}, "syntax error in pattern"),
    ],
)
def test_refused(trees: Trees, source: str, dest: str, existing: dict[str, str | None], complaint: str) -> None:
    trees.given({"a": "1", "d/f": "2", "d/s/g": "3", "dangling": "-> gone", "loop": "-> loop"}, existing)
    with pytest.raises(ContextError) as error:
        trees.copy(source, dest)
    assert complaint in error.value.message


def test_link_replaces_whatever_is_there(trees: Trees) -> None:
    trees.given({"d/f": "2", "d/s/g": "3"}, {"f/was": "a directory", "s": "a file"})
    trees.copy("d", "/", replace_existing=True)
    assert trees.result == {"f": "2", "s": None, "s/g": "3"}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*", ["a.go", "b.txt", "d", "e", "weird[x]"]),
        ("*.go", ["a.go"]),
        ("d/*.go", ["d/c.go"]),
        ("*/*.go", ["d/c.go", "e/c.go"]),
        ("?.txt", ["b.txt"]),
        ("[a-b].*", ["a.go", "b.txt"]),
        ("[^a].*", ["b.txt"]),
        ("weird\\[x]", ["weird[x]"]),
        ("nothing*", []),
        ("link/*.go", ["d/c.go"]),
        ("d/../*.txt", ["b.txt"]),
    ],
)
def test_wildcards(trees: Trees, pattern: str, wanted: list[str]) -> None:
    trees.given({"a.go": "", "b.txt": "", "d/c.go": "", "d/s/z.go": "", "e/c.go": "", "weird[x]": ""})
    if pattern.startswith("link"):
        plant(trees.source, {"link": "-> d"})
    assert resolve_sources(trees.source_fd, pattern, CopyOptions()) == wanted


def test_a_name_with_a_backslash_goes_before_what_it_escapes(trees: Trees) -> None:
    trees.given({"a\\*": "", "a*": "", "ab": ""})
    assert resolve_sources(trees.source_fd, "a\\*", CopyOptions()) == ["a\\*"]
    with pytest.raises(ContextError, match="not found"):
        resolve_sources(trees.source_fd, "b\\*", CopyOptions())


def test_wildcard_matches_go_into_the_directory_one_by_one(trees: Trees) -> None:
    trees.given({"a.txt": "1", "b.txt": "-> a.txt", "d/inner": "2"})
    trees.copy("*", "/x/")
    assert trees.result == {"x": None, "x/a.txt": "1", "x/b.txt": "1", "x/inner": "2"}


def test_no_match_copies_nothing_unless_it_must(trees: Trees) -> None:
    trees.given({"a": "1"})
    assert trees.copy("*.none", "/x/") == (0, 0)
    assert trees.result == {}
    with pytest.raises(ContextError, match="not found"):
        trees.copy("*.none", "/x/", allow_empty_wildcard=False)


def test_a_name_is_literal_where_wildcards_are_off(trees: Trees) -> None:
    trees.given({"*": "star", "b": "1"})
    trees.copy("*", "/x/", allow_wildcard=False)
    assert trees.result == {"x": None, "x/*": "star"}


def test_required_paths(trees: Trees) -> None:
    trees.given({"x/a": "1"})
    trees.copy("/", "/", include=("x/a",), required=("x/a",))
    assert trees.result == {"x": None, "x/a": "1"}
    with pytest.raises(ContextError, match='"/x/b": not found'):
        trees.copy("/", "/", include=("x/b",), required=("/x/b",))


# Symlinks stay inside


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../etc/passwd", "/outside", "../outside"])
def test_symlinks_of_the_source_do_not_lead_outside(trees: Trees, target: str) -> None:
    (trees.outside / "secret").write_text("secret")
    trees.given({"l": f"-> {target}"})
    with pytest.raises(ContextError, match="not found"):
        trees.copy("l", "/x")
    assert trees.result == {}


def test_symlinks_of_the_source_resolve_as_in_a_chroot(trees: Trees) -> None:
    trees.given({"l": "-> /../../etc/passwd", "etc/passwd": "inner", "up": "-> ../../.."})
    trees.copy("l", "/x")
    trees.copy("up/etc", "/y")
    assert trees.result == {"x": "inner", "y": None, "y/passwd": "inner"}


@pytest.mark.parametrize("target", ["/../outside", "../outside", "../../../../../../../../outside"])
def test_symlinks_of_the_destination_do_not_lead_outside(trees: Trees, target: str) -> None:
    trees.given({"a": "1"}, {"l": f"-> {target}"})
    trees.copy("a", "/l/b")
    assert list(trees.outside.iterdir()) == []
    assert trees.result == {"l": f"-> {target}", "outside": None, "outside/b": "1"}


# Metadata


@pytest.mark.root
def test_modes_are_kept_below_and_made_up_above(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2"})
    for path, bits in (("d", 0o700), ("d/f", 0o4711), ("d/s", 0o1777), ("d/s/g", 0o000)):
        (trees.source / path).chmod(bits)
    trees.copy("d", "/p/q/")
    seen = {path: mode(trees.dest / path) for path in ("p", "p/q", "p/q/f", "p/q/s", "p/q/s/g")}
    assert seen == {"p": 0o755, "p/q": 0o755, "p/q/f": 0o4711, "p/q/s": 0o1777, "p/q/s/g": 0o000}


def test_an_existing_directory_keeps_its_mode_at_the_top_and_loses_it_below(trees: Trees) -> None:
    trees.given({"d/s/g": "2"}, {"d/s": None})
    (trees.source / "d").chmod(0o711)
    (trees.source / "d/s").chmod(0o711)
    (trees.dest / "d").chmod(0o750)
    (trees.dest / "d/s").chmod(0o750)
    trees.copy("d", "/d")
    assert (mode(trees.dest / "d"), mode(trees.dest / "d/s")) == (0o750, 0o711)


@pytest.mark.root
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_umask_has_no_say(trees: Trees, umask: int) -> None:
    trees.given({"d/f": "1", "d/s/g": "2"})
    (trees.source / "d/f").chmod(0o666)
    (trees.source / "d/s").chmod(0o777)
    old = os.umask(umask)
    try:
        trees.copy("d", "/x")
        copy_data(trees.dest_fd, "EOF", b"data", "/doc", CopyOptions())
        make_directory(trees.dest_fd, "/made")
    finally:
        os.umask(old)
    assert [mode(trees.dest / p) for p in ("x", "x/f", "x/s", "doc", "made")] == [0o755, 0o666, 0o777, 0o644, 0o755]


def test_octal_chmod_reaches_the_directories_made_for_the_target_too(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2", "d/l": "-> f"}, {"old": None})
    (trees.dest / "old").chmod(0o711)
    trees.copy("d", "/p/x", mode=0o4750)
    trees.copy("d/f", "/old/q/", mode="0700")
    seen = {p: mode(trees.dest / p) for p in ("p", "p/x", "p/x/f", "p/x/s", "p/x/s/g", "old", "old/q", "old/q/f")}
    deep = dict.fromkeys(("p/x/f", "p/x/s", "p/x/s/g"), 0o4750)
    assert seen == {"p": 0o750, "p/x": 0o750, **deep, "old": 0o711, "old/q": 0o700, "old/q/f": 0o700}


def test_symbolic_chmod(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/run": "2", "d/s/g": "2"})
    (trees.source / "d/f").chmod(0o600)
    (trees.source / "d/run").chmod(0o700)
    (trees.source / "d/s").chmod(0o700)
    trees.copy("d", "/x", mode="u=rwX,go=u-w")
    assert [mode(trees.dest / p) for p in ("x", "x/f", "x/run", "x/s")] == [0o755, 0o644, 0o755, 0o755]
    with pytest.raises(ContextError, match="invalid chmod parameter"):
        trees.copy("d", "/x", mode="u?x")


def test_times(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2", "d/l": "-> f"})
    for path in ("d/f", "d/s/g", "d/l", "d/s", "d"):
        os.utime(trees.source / path, ns=(1_500_000_001, 1_600_000_000_123_456_789), follow_symlinks=False)
    trees.copy("d", "/x")
    for path in ("x/f", "x/s/g", "x/l", "x/s", "x"):
        assert (trees.dest / path).lstat().st_mtime_ns == 1_600_000_000_123_456_789, path


@pytest.mark.root
def test_source_date_epoch(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2", "d/l": "-> f"})
    trees.copy("d", "/p/q/x", mtime_ns=10**18)
    copy_data(trees.dest_fd, "EOF", b"data", "/docs/", CopyOptions(mtime_ns=10**18))
    make_directory(trees.dest_fd, "/a/b", mtime_ns=10**18)
    make_file(trees.dest_fd, "/a/b/f", b"", mtime_ns=10**18)
    os.utime(trees.dest / "a/b", ns=(10**18, 10**18))
    for path in trees.result:
        assert (trees.dest / path).lstat().st_mtime_ns == 10**18, path


def test_extended_attributes(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2"})
    try:
        os.setxattr(trees.source / "d/f", "user.note", b"kept")
        os.setxattr(trees.source / "d/s", "user.note", b"dir")
        os.setxattr(trees.source / "d/f", "user.overlay.origin", b"x")
    except OSError as e:
        pytest.skip(f"this file system has no user attributes: {e.strerror}")
    trees.copy("d", "/x")
    assert os.listxattr(trees.dest / "x/f") == ["user.note"]
    assert os.getxattr(trees.dest / "x/s", "user.note") == b"dir"


def test_hard_links_within_a_source(trees: Trees) -> None:
    trees.given({"d/a": "1", "d/s/b": "= d/a", "d/c": "= d/a", "d/other": "1"}, {"x/s/b": "old"})
    stats = trees.copy("d", "/x")
    inode = (trees.dest / "x/a").stat()
    assert inode.st_nlink == 3
    assert {(trees.dest / p).stat().st_ino for p in ("x/s/b", "x/c")} == {inode.st_ino}
    assert (trees.dest / "x/other").stat().st_nlink == 1
    assert stats.size_bytes == 2


def test_hard_links_of_a_whole_root(trees: Trees) -> None:
    trees.given({"d/a": "1", "b": "= d/a"})
    trees.copy("/", "/")
    assert (trees.dest / "d/a").stat().st_ino == (trees.dest / "b").stat().st_ino


def test_an_overwritten_file_is_a_new_file(trees: Trees) -> None:
    """Writing into it would change what else links to it."""
    trees.given({"a": "new"}, {"x": "old", "y": "= x"})
    trees.copy("a", "/x")
    assert trees.result == {"x": "new", "y": "old"}


def test_special_files(trees: Trees) -> None:
    trees.given({"d": None})
    os.mkfifo(trees.source / "d/fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(trees.source)
        try:
            unix.bind("d/socket")
        finally:
            os.chdir(here)
        trees.copy("d", "/stage")
        trees.copy("d", "/context", reset_owner=os.geteuid() == 0)
    assert stat.S_ISFIFO((trees.dest / "stage/fifo").stat().st_mode)
    assert mode(trees.dest / "stage/fifo") == 0o640
    assert stat.S_ISSOCK((trees.dest / "stage/socket").stat().st_mode)
    if os.geteuid() == 0:
        assert stat.S_ISREG((trees.dest / "context/socket").stat().st_mode)
        assert mode(trees.dest / "context/socket") == mode(trees.source / "d/socket")


@pytest.mark.parametrize("size", [0, 1, 131_071, 131_072, 1_000_003, 3_000_000])
def test_contents_of_all_sizes(trees: Trees, size: int) -> None:
    data = os.urandom(size)
    (trees.source / "f").write_bytes(data)
    assert trees.copy("f", "/x") == (1, size)
    assert (trees.dest / "x").read_bytes() == data


def test_holes_stay_holes(trees: Trees) -> None:
    with (trees.source / "f").open("wb") as file:
        file.seek(5_000_000)
        file.write(b"middle")
        file.truncate(64 << 20)
    trees.copy("f", "/x")
    assert (trees.dest / "x").stat().st_size == 64 << 20
    assert (trees.dest / "x").stat().st_blocks * 512 < 1 << 20
    with (trees.dest / "x").open("rb") as file:
        file.seek(5_000_000)
        assert file.read(6) == b"middle"


def test_names_that_are_not_text(trees: Trees) -> None:
    name = b"\xff\xfe new\nline"
    (trees.source / "d").mkdir()
    with open(os.fsencode(trees.source) + b"/d/" + name, "wb") as file:
        file.write(b"1")
    trees.copy("d", "/x")
    assert os.listdir(os.fsencode(trees.dest) + b"/x") == [name]


# Owners, for which one has to be root


@pytest.mark.root
def test_owners(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/l": "-> f", "d/s/g": "2"}, {"old": None})
    for path in ("d/f", "d/l", "d/s"):
        os.chown(trees.source / path, 1234, 5678, follow_symlinks=False)

    def owner(path: str) -> tuple[int, int]:
        status = (trees.dest / path).lstat()
        return status.st_uid, status.st_gid

    trees.copy("d", "/stage")
    assert [owner(f"stage/{p}") for p in ("f", "l", "s", "s/g")] == [(1234, 5678)] * 3 + [(0, 0)]
    trees.copy("d", "/context", reset_owner=True)
    assert {owner(f"context/{p}") for p in ("f", "l", "s", "s/g")} == {(0, 0)}
    trees.copy("d", "/a/b", owner=(7, 8), reset_owner=True)
    assert {owner(p) for p in ("a", "a/b", "a/b/f", "a/b/l", "a/b/s", "a/b/s/g")} == {(7, 8)}
    trees.copy("d/f", "/old/", owner=(7, 8))
    assert (owner("old"), owner("old/f")) == ((0, 0), (7, 8))
    make_directory(trees.dest_fd, "/old/w/d", owner=(9, 9))
    assert (owner("old"), owner("old/w"), owner("old/w/d")) == ((0, 0), (9, 9), (9, 9))
    copy_data(trees.dest_fd, "EOF", b"data", "/n/doc", CopyOptions(owner=(7, 8)))
    assert (owner("n"), owner("n/doc")) == ((7, 8), (7, 8))


@pytest.mark.root
def test_a_set_group_id_directory_does_not_hand_on_its_group(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2"}, {"x": None})
    os.chown(trees.dest / "x", 0, 4321)
    (trees.dest / "x").chmod(0o2775)
    trees.copy("d", "/x", reset_owner=True)
    status = (trees.dest / "x/f").stat()
    inner = (trees.dest / "x/s").stat()
    assert (status.st_gid, inner.st_gid) == (0, 0)
    assert stat.S_IMODE(inner.st_mode) == mode(trees.source / "d/s")


@pytest.mark.root
def test_set_id_bits_and_capabilities_survive_a_change_of_owner(trees: Trees) -> None:
    trees.given({"d/f": "1"})
    (trees.source / "d/f").chmod(0o6755)
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(trees.source / "d/f", "security.capability", capability)
    trees.copy("d", "/x", owner=(1, 2))
    assert mode(trees.dest / "x/f") == 0o6755
    assert os.getxattr(trees.dest / "x/f", "security.capability") == capability


@pytest.mark.root
def test_devices(trees: Trees) -> None:
    trees.given({"d": None})
    try:
        os.mknod(trees.source / "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this root may not make devices")
    trees.copy("d", "/x")
    status = (trees.dest / "x/null").stat()
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == os.makedev(1, 3)


# The rest of the interface


@pytest.mark.root
def test_inline_documents(trees: Trees) -> None:
    trees.given({}, {"dir": None, "file": "old", "in/the/way": None})
    for dest in ("/dir", "/file", "/new", "/newdir/"):
        copy_data(trees.dest_fd, "EOF", b"text", dest, CopyOptions(mode=0o600))
    assert trees.result == {
        "dir": None,
        "dir/EOF": "text",
        "file": "text",
        "new": "text",
        "newdir": None,
        "newdir/EOF": "text",
        "in": None,
        "in/the": None,
        "in/the/way": None,
    }
    assert mode(trees.dest / "file") == 0o600
    with pytest.raises(ContextError, match="cannot replace to directory"):
        copy_data(trees.dest_fd, "way", b"", "/in/the/", CopyOptions())


def test_workdir(trees: Trees) -> None:
    trees.given({}, {"l": "-> deep", "f": "file"})
    assert make_directory(trees.dest_fd, "/l/x/../y")
    assert not make_directory(trees.dest_fd, "/l/y")
    assert trees.result == {"l": "-> deep", "deep": None, "deep/y": None, "f": "file"}
    with pytest.raises(ContextError, match='"/f": not a directory'):
        make_directory(trees.dest_fd, "/f/x")


def test_make_file(trees: Trees) -> None:
    trees.given({}, {"d": None, "l": "-> d/f"})
    make_file(trees.dest_fd, "/l", b"1", 0o640)
    assert trees.result == {"d": None, "l": "-> d/f", "d/f": "1"}
    assert mode(trees.dest / "d/f") == 0o640
    for path in ("/d", "/none/f"):
        with pytest.raises(ContextError, match="cannot write"):
            make_file(trees.dest_fd, path, b"")


def test_the_destination_has_to_exist_where_it_is_not_to_be_made(trees: Trees) -> None:
    trees.given({"a": "1"})
    with pytest.raises(ContextError, match="does not exist"):
        trees.copy("a", "/x/y", create_dest=False)
    trees.copy("a", "/y", create_dest=False)
    assert trees.result == {"y": "1"}


def test_cancelled(trees: Trees) -> None:
    trees.given({"d/f": "1", "d/s/g": "2"})
    for after in range(2):
        answers = [False] * after
        with pytest.raises(Cancelled):
            copy(
                trees.source_fd,
                "d",
                trees.dest_fd,
                "/x",
                CopyOptions(),
                cancelled=partial(lambda left: left.pop() if left else True, answers),
            )


def test_deep_trees_end_in_an_error_not_in_exhaustion(trees: Trees) -> None:
    here = Path.cwd()
    try:
        os.chdir(trees.source)
        for _ in range(450):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    with pytest.raises(ContextError, match="directories deep"):
        trees.copy("d", "/x")


def test_a_file_that_grows_while_it_is_read(trees: Trees) -> None:
    """A size taken before the reading must not cut the contents short."""
    from builder.solve.filedata import DataCopier

    (trees.source / "f").write_bytes(b"12345")
    stale = (trees.source / "f").stat()
    (trees.source / "f").write_bytes(b"1" * 200_000)
    with (trees.source / "f").open("rb") as source, (trees.dest / "x").open("wb") as target:
        assert DataCopier().copy(source.fileno(), target.fileno(), stale) == 200_000
    assert (trees.dest / "x").stat().st_size == 200_000
