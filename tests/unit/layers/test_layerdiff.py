"""What changed: upper directories made by hand, in every form that overlayfs knows, and pairs of trees."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from layers.errors import LayerError
from layers.layerdiff import Change, diff_overlay, diff_trees
from layers.lowerview import at
from tests.support.leaks import descriptors

OLD_NS = 1_000_000_000 * 10**9


def tree(top: Path, *names: str) -> Path:
    """Files (or directories, with a slash at the end) with old times."""
    top.mkdir(exist_ok=True)
    for name in names:
        path = top / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            os.utime(path, ns=(OLD_NS, OLD_NS))
    return top


def whiteout(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, 0)


def mark(path: Path, name: str, value: bytes = b"y", dialect: str = "user") -> None:
    os.setxattr(path, f"{dialect}.overlay.{name}", value)


def overlay(upper: Path, *lower: Path, **options: object) -> list[str]:
    return [shown(c) for c in diff_overlay(upper, list(lower), "user", **options)]  # type: ignore[arg-type]


def trees(old: Path | None, new: Path, **options: object) -> list[str]:
    return [shown(c) for c in diff_trees(old, new, **options)]  # type: ignore[arg-type]


def shown(change: Change) -> str:
    sign = {"add": "+", "modify": "*", "delete": "-"}[change.kind]
    return sign + os.fsdecode(change.path) + (f" = {os.fsdecode(change.link)}" if change.link else "")


def test_everything_in_a_first_layer_is_new_and_ordered(tmp_path: Path) -> None:
    upper = tree(tmp_path / "u", "b", "a/z", "a/b/c", "a.b", "a-b", "B")
    os.makedirs(os.fsencode(upper) + b"/\xff\xfe")
    expected = ["+B", "+a", "+a/b", "+a/b/c", "+a/z", "+a-b", "+a.b", "+b", "+\udcff\udcfe"]
    assert overlay(upper) == expected
    assert trees(None, upper) == expected


def test_parents_of_a_change_are_mentioned_and_others_are_not(tmp_path: Path) -> None:
    lower = tree(tmp_path / "l", "a/b/c/f", "x/y/f", "m/f")
    upper = tree(tmp_path / "u", "a/b/c/new", "x/y/", "m/")
    (upper / "m").chmod(0o700)
    assert overlay(upper, lower) == ["*a", "*a/b", "*a/b/c", "+a/b/c/new", "*m"]


def test_a_parent_is_mentioned_once(tmp_path: Path) -> None:
    lower = tree(tmp_path / "l", "a/b/f", "a/c/f")
    upper = tree(tmp_path / "u", "a/b/g", "a/b/h", "a/c/g", "a/d/e/")
    assert overlay(upper, lower) == ["*a", "*a/b", "+a/b/g", "+a/b/h", "*a/c", "+a/c/g", "+a/d", "+a/d/e"]


def test_directories_differ_by_mode_and_attributes_but_not_by_time(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l", "t/", "m/", "x/", "y/"), tree(tmp_path / "u", "t/", "m/", "x/", "y/")
    os.utime(upper / "t", ns=(5, 5))
    (upper / "m").chmod(0o1777)
    os.setxattr(upper / "x", "user.k", b"v")
    mark(upper / "y", "impure")
    mark(upper / "y", "origin")
    assert overlay(upper, lower) == ["*m", "*x"]


def test_whiteouts_of_what_is_there_alone(tmp_path: Path) -> None:
    lower = tree(tmp_path / "l", "f", "d/x", "d/y")
    upper = tree(tmp_path / "u")
    for name in ("f", "d/x", "never", "d/never"):
        whiteout(upper / name)
    assert overlay(upper, lower) == ["*d", "-d/x", "-f"]


def test_whiteouts_as_attributes_count_in_marked_directories(tmp_path: Path) -> None:
    """Linux 6.7: for layers on file systems without devices."""
    lower = tree(tmp_path / "l", "d/a", "d/b", "e/a")
    upper = tree(tmp_path / "u", "d/a", "d/b", "e/a")
    for name in ("d/a", "e/a"):
        (upper / name).write_bytes(b"")
        mark(upper / name, "whiteout")
    mark(upper / "d", "opaque", b"x")
    assert overlay(upper, lower) == ["*d", "-d/a", "*e", "*e/a"]


def test_the_other_dialects_marks_are_just_stripped(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l", "d/gone"), tree(tmp_path / "u", "d/new")
    mark(upper / "d", "opaque", dialect="user")
    changes = list(diff_overlay(upper, [lower], "trusted"))
    assert [shown(c) for c in changes] == ["*d", "+d/new"]
    assert not changes[0].xattrs


def test_opaque_directories_are_compared_name_by_name(tmp_path: Path) -> None:
    lower = tree(tmp_path / "l", "o/gone", "o/kept", "o/changed", "o/sub/gone", "o/sub/kept", "o/tree/f")
    upper = tree(tmp_path / "u", "o/kept", "o/changed", "o/new", "o/sub/kept")
    (upper / "o/kept").write_text((lower / "o/kept").read_text())
    (upper / "o/changed").write_text("other")
    for name in ("o/kept", "o/changed"):
        os.utime(upper / name, ns=(OLD_NS, OLD_NS))
    mark(upper / "o", "opaque")
    mark(upper / "o/sub", "opaque")
    assert overlay(upper, lower) == ["*o", "*o/changed", "-o/gone", "+o/new", "*o/sub", "-o/sub/gone", "-o/tree"]


def test_an_opaque_directory_over_nothing_is_new(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l", "f"), tree(tmp_path / "u", "o/new")
    mark(upper / "o", "opaque")
    whiteout(upper / "o/never")
    assert overlay(upper, lower) == ["+o", "+o/new"]


def test_lower_layers_are_merged_with_their_whiteouts_and_opaque_marks(tmp_path: Path) -> None:
    bottom = tree(tmp_path / "0", "a/x", "a/y", "b/x", "c")
    middle = tree(tmp_path / "1", "a/z", "b/new")
    whiteout(middle / "a/x")
    whiteout(middle / "c")
    mark(middle / "b", "opaque")
    upper = tree(tmp_path / "2", "a/", "b/", "c")
    for name in ("a/x", "a/y", "b/x", "b/new"):
        whiteout(upper / name)
    assert overlay(upper, middle, bottom) == ["*a", "-a/y", "*b", "-b/new", "+c"]


def test_types_that_change(tmp_path: Path) -> None:
    lower = tree(tmp_path / "l", "file", "dir/inner", "gone/inner")
    (lower / "link").symlink_to("dir")
    upper = tree(tmp_path / "u", "file/inner", "dir", "link/inner")
    (upper / "gone").symlink_to("dir")
    assert overlay(upper, lower) == ["*dir", "*file", "+file/inner", "*gone", "*link", "+link/inner"]


def test_a_file_in_a_middle_layer_hides_the_directory_beneath(tmp_path: Path) -> None:
    bottom, middle = tree(tmp_path / "0", "d/old"), tree(tmp_path / "1", "d")
    upper = tree(tmp_path / "2", "d/new")
    assert overlay(upper, middle, bottom) == ["*d", "+d/new"]


def test_files_copied_up_but_unchanged_are_not_mentioned(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l", "d/same", "d/content"), tree(tmp_path / "u", "d/same", "d/content")
    (upper / "d/content").write_text("c/dontent")
    for top in (lower, upper):
        (top / "d/link").symlink_to("target")
        os.utime(top / "d/link", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
        os.mkfifo(top / "d/fifo")
        os.utime(top / "d/fifo", ns=(OLD_NS, OLD_NS))
        os.utime(top / "d/content", ns=(OLD_NS, OLD_NS))
    assert overlay(upper, lower) == ["*d", "*d/content"]
    (upper / "d/link").unlink()
    (upper / "d/link").symlink_to("elsewhe")
    os.utime(upper / "d/link", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    os.setxattr(upper / "d/same", "user.k", b"v")
    assert overlay(upper, lower) == ["*d", "*d/content", "*d/link", "*d/same"]


def test_hardlinks_refer_to_the_first_name(tmp_path: Path) -> None:
    upper = tree(tmp_path / "u", "b/f", "z")
    os.link(upper / "b/f", upper / "a")
    os.link(upper / "b/f", upper / "c")
    assert overlay(upper) == ["+a", "+b", "+b/f = a", "+c = a", "+z"]


def test_a_new_name_of_a_lower_file_mentions_the_old_one(tmp_path: Path) -> None:
    """Otherwise the two would be two files afterwards."""
    lower, upper = tree(tmp_path / "l", "f"), tree(tmp_path / "u", "f")
    os.link(upper / "f", upper / "g")
    assert overlay(upper, lower) == ["*f", "+g = f"]


def test_sockets_are_left_out_but_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = tree(tmp_path / "l", "s"), tree(tmp_path / "u")
    monkeypatch.chdir(upper)
    for name in ("s", "t"):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(name)
    said: list[str] = []
    assert overlay(upper, lower, warn=said.append) == ["-s"]
    assert len(said) == 2


def test_names_like_whiteouts_cannot_be_kept(tmp_path: Path) -> None:
    for name in (".wh.f", "d/.wh.f", ".wh.d/"):
        upper = tree(tmp_path / name.replace("/", "_"), name)
        with pytest.raises(LayerError, match=r"prefix \.wh\.") as caught:
            overlay(upper)
        assert caught.value.hint


def test_renamed_directories_are_refused(tmp_path: Path) -> None:
    upper = tree(tmp_path / "u", "d/f")
    mark(upper / "d", "redirect", b"/old")
    with pytest.raises(LayerError, match="redirect_dir"):
        overlay(upper)


def test_frozen_files_are_mentioned_to_the_user(tmp_path: Path) -> None:
    upper = tree(tmp_path / "u", "d/f")
    mark(upper / "d", "protattr", b"i")
    said: list[str] = []
    assert overlay(upper, warn=said.append) == ["+d", "+d/f"]
    assert "immutable" in said[0]


def test_excluded_paths_do_not_exist(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l", "etc/x"), tree(tmp_path / "u", "etc/resolv.conf", "run/secrets/s", "kept")
    exclude = frozenset({b"etc/resolv.conf", b"run/secrets"})
    assert overlay(upper, lower, exclude=exclude) == ["+kept", "+run"]


def test_a_path_deeper_than_any_system_call_takes(tmp_path: Path) -> None:
    lower, upper = tree(tmp_path / "l"), tree(tmp_path / "u")
    deep = b"/".join([b"n" * 200] * 30)
    for top in (lower, upper):
        path = os.fsencode(top)
        for component in deep.split(b"/"):
            path += b"/" + component
            at(os.mkdir, path)
    at(lambda p: os.close(os.open(p, os.O_CREAT)), os.fsencode(upper) + b"/" + deep + b"/new")
    at(lambda p: os.close(os.open(p, os.O_CREAT)), os.fsencode(lower) + b"/" + deep + b"/old")
    at(lambda p: os.mknod(p, stat.S_IFCHR, 0), os.fsencode(upper) + b"/" + deep + b"/old")
    found = [c for c in diff_overlay(upper, [lower], "user") if c.kind != "modify"]
    assert [(c.kind, c.path[-4:]) for c in found] == [("add", b"/new"), ("delete", b"/old")]


def test_a_deep_tree_keeps_few_descriptors(tmp_path: Path) -> None:
    path = tree(tmp_path / "u")
    fd = os.open(path, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("f", os.O_CREAT, dir_fd=fd))
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    before = descriptors()
    most, names = 0, []
    for change in diff_trees(None, path):
        names.append(change.path)
        most = max(most, len(descriptors() - before))
    assert len(names) == 800
    assert most < 80
    assert descriptors() <= before


# -- pairs of trees ----------------------------------------------------------------------------------


def test_trees_tell_additions_changes_and_deletions(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "o", "a/b/f", "a/c/f", "gone/x", "t"), tree(tmp_path / "n", "a/b/f", "a/c/g", "t/x")
    (new / "a/b/f").write_text("changed")
    assert trees(old, new) == ["*a", "*a/b", "*a/b/f", "*a/c", "-a/c/f", "+a/c/g", "-gone", "*t", "+t/x"]


def test_trees_with_whole_seconds_are_compared_by_content(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "o", "f", "g"), tree(tmp_path / "n", "f", "g")
    (new / "f").write_text("F")
    for top in (old, new):
        os.utime(top / "f", ns=(OLD_NS, OLD_NS))
    assert trees(old, new) == ["*f"]


def test_trees_copied_at_a_known_time_are_compared_where_they_were_touched(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "o", "f", "g"), tree(tmp_path / "n", "f", "g")
    fraction = OLD_NS + 5
    for top in (old, new):
        for name in ("f", "g"):
            os.utime(top / name, ns=(fraction, fraction))
    (new / "f").write_text("F")
    os.utime(new / "f", ns=(fraction, fraction))
    assert trees(old, new) == [], "equal metadata, and times as fine as the file system has them"
    assert trees(old, new, unchanged_before_ns=0) == ["*f"], "all were touched since"
    assert trees(old, new, unchanged_before_ns=(new / "f").stat().st_ctime_ns + 1) == [], "none was"


def test_trees_and_their_hardlinks(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "o", "a", "d/x"), tree(tmp_path / "n", "a", "d/x")
    for top in (old, new):
        os.link(top / "a", top / "b")
        os.link(top / "a", top / "c")
    assert trees(old, new) == []
    (new / "b").unlink()
    assert trees(old, new) == ["-b"], "the others need no mention"
    os.link(new / "a", new / "d/y")
    assert trees(old, new) == ["*a", "-b", "*c = a", "*d", "+d/y = a"], "all names of what has a new one"


def test_trees_keep_devices_and_directories_without_meaning(tmp_path: Path) -> None:
    new = tree(tmp_path / "n", "d/")
    whiteout(new / "w")
    mark(new / "d", "opaque")
    changes = list(diff_trees(None, new))
    assert [shown(c) for c in changes] == ["+d", "+w"], "in a plain tree it is a device"
    assert not changes[0].xattrs


def test_an_interrupted_walk_closes_what_it_opened(tmp_path: Path) -> None:
    new = tree(tmp_path / "n", "a/b/c/d", "e")
    before = descriptors()
    walk = diff_trees(None, new)
    next(walk)
    next(walk)
    walk.close()  # type: ignore[attr-defined]
    assert descriptors() <= before


def test_many_names_over_many_layers_give_the_same_changes(tmp_path: Path) -> None:
    """Beyond some size each layer is listed once instead of being asked for each name."""
    lowers = [tree(tmp_path / f"l{n}", *(f"d/f{i}" for i in range(n, 400, 7))) for n in range(6)]
    whiteout(lowers[2] / "d/f5")
    upper = tree(tmp_path / "u", *(f"d/f{i}" for i in range(0, 400, 3)))
    for i in range(1, 400, 3):
        whiteout(upper / f"d/f{i}")
    visible = {name for layer in lowers for name in os.listdir(layer / "d")} - {"f5"}
    wanted = ["*d"]
    for name in sorted(os.listdir(upper / "d")):
        if int(name[1:]) % 3:
            wanted += [f"-d/{name}"] if name in visible else []
        elif name not in visible:
            wanted.append(f"+d/{name}")
    assert overlay(upper, *lowers) == wanted


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"cannot read '.*missing'"):
        overlay(tmp_path / "missing")
