"""Layers onto directories: flattened, and as overlayfs layers."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from layers.apply import ApplyResult, Limits, apply_layer, settle_whiteouts
from layers.errors import Cancelled, LayerError
from layers.oci import MEDIA_OCI_CONFIG, MEDIA_OCI_LAYER_GZIP
from layers.tarstream import CHARACTER_DEVICE, FIFO
from tests.support.leaks import descriptors
from tests.support.tars import Item, file, folder, hardlink, layer, special, symlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

# Whoever runs the test may set user.* attributes only; root's overlays are in tests/integration.
DIALECT: Dialect = "user"


def flatten(target: Path, *items: Item) -> ApplyResult:
    target.mkdir(exist_ok=True)
    return apply_layer(io.BytesIO(layer(*items)), target)


def stack(top: Path, *layers: Sequence[Item]) -> list[Path]:
    """Unpack each as an overlay layer over those before it; topmost first."""
    done: list[Path] = []
    for number, items in enumerate(layers):
        target = top / f"layer{number}"
        target.mkdir()
        apply_layer(io.BytesIO(layer(*items)), target, whiteouts="overlay", dialect="user", lower=done)
        done.insert(0, target)
    return done


def is_whiteout(path: Path) -> bool:
    st = path.lstat()
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def opaque(path: Path) -> bool:
    return b"user.overlay.opaque" in map(os.fsencode, os.listxattr(path))


def test_files_directories_and_links(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    result = flatten(
        tmp_path / "t",
        folder(b"d", mode=0o2750, mtime_ns=5 * 10**9),
        file(b"d/empty", mode=0o4711),
        file(b"d/large", data, mode=0o666, xattrs={"user.k": b"\0v"}),
        symlink(b"d/link", b"../d/large"),
        hardlink(b"second", b"d/large"),
        special(b"pipe", FIFO, mode=0o622),
        folder(b"d/deep/er", mode=0o700),
    )
    top = tmp_path / "t"
    assert (top / "d/large").read_bytes() == data
    assert os.getxattr(top / "d/large", "user.k") == b"\0v"
    assert (top / "d").stat().st_mode == stat.S_IFDIR | 0o2750
    assert (top / "d").stat().st_mtime == 5, "although files were made in it afterwards"
    assert (top / "d/empty").stat().st_mode == stat.S_IFREG | 0o4711
    assert (top / "d/large").stat().st_mode == stat.S_IFREG | 0o666, "whatever the umask"
    assert (top / "d/large").stat().st_mtime == 1_000_000_000
    assert (top / "d/link").readlink() == Path("../d/large")
    assert (top / "d/link").lstat().st_mtime == 1_000_000_000
    assert (top / "second").samefile(top / "d/large")
    assert (top / "pipe").lstat().st_mode == stat.S_IFIFO | 0o622
    assert (top / "d/deep").stat().st_mode & 0o777 == 0o755
    assert (result.entries, result.unpacked_bytes) == (7, len(data))


def test_the_result_is_the_digest_of_all_that_was_read(tmp_path: Path) -> None:
    plain = layer(file(b"f", b"data")) + b"behind the end" * 3000
    for number, blob in enumerate((plain, gzip.compress(plain), zstandard.ZstdCompressor().compress(plain))):
        target = tmp_path / str(number)
        target.mkdir()
        result = apply_layer(io.BytesIO(blob), target)
        assert result.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest()
        assert result.size_bytes == len(plain)
        assert (target / "f").read_bytes() == b"data"


def test_the_media_type_must_be_a_layers(tmp_path: Path) -> None:
    blob = gzip.compress(layer(file(b"f")))
    apply_layer(io.BytesIO(blob), tmp_path, media_type=MEDIA_OCI_LAYER_GZIP)
    with pytest.raises(LayerError, match="media type of a layer"):
        apply_layer(io.BytesIO(blob), tmp_path, media_type=MEDIA_OCI_CONFIG)


def test_names_as_tar_programs_write_them(tmp_path: Path) -> None:
    flatten(
        tmp_path / "t", folder(b"."), file(b"./a"), file(b"/abs"), file(b".//x/./y"), file(b".hidden"), file(b"...")
    )
    assert sorted(os.listdir(tmp_path / "t")) == ["...", ".hidden", "a", "abs", "x"]
    assert (tmp_path / "t/x/y").exists()


def test_the_root_entry_sets_the_roots_metadata(tmp_path: Path) -> None:
    flatten(tmp_path / "t", folder(b".", mode=0o1777, mtime_ns=7 * 10**9), file(b"f"))
    st = (tmp_path / "t").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime) == (0o1777, 7)
    with pytest.raises(LayerError, match="no directory"):
        flatten(tmp_path / "u", file(b"./"))


def test_a_name_of_4096_bytes_and_its_link(tmp_path: Path) -> None:
    """Longer than any single system call takes, together with the target's own path."""
    deep = b"/".join([b"n" * 250] * 16) + b"/" + b"f" * 79
    assert len(deep) == 4095
    flatten(tmp_path / "t", file(deep, b"deep"), hardlink(b"near", deep), file(deep + b"2/x", b"deeper"))
    assert (tmp_path / "t/near").read_bytes() == b"deep"
    flatten(tmp_path / "t", file(b".wh." + b"n" * 250))
    assert os.listdir(tmp_path / "t") == ["near"]


def test_a_thousand_levels_come_and_go(tmp_path: Path) -> None:
    deep = b"/".join([b"d"] * 1500)
    flatten(tmp_path / "t", file(deep + b"/f", b"x"))
    flatten(tmp_path / "t", file(b"d", b"a file now"))
    assert (tmp_path / "t/d").read_bytes() == b"a file now"


def test_more_directories_than_are_kept_open(tmp_path: Path) -> None:
    items = [folder(b"p/d%d" % n) for n in range(300)]
    items += [file(b"p/f%d" % n) for n in range(300)]
    items += [file(b"p/d%d/f" % n, b"%d" % n) for n in (*range(300), *range(100))]
    before = descriptors()
    flatten(tmp_path / "t", *items)
    assert descriptors() <= before
    assert all((tmp_path / f"t/p/d{n}/f").read_text() == str(n) for n in range(300))


# -- changes onto a flattened tree -------------------------------------------------------------------


def test_later_entries_replace_earlier_ones_of_any_kind(tmp_path: Path) -> None:
    makers = [file(b"x", b"file"), folder(b"x"), symlink(b"x", b"target"), special(b"x", FIFO)]
    for first in makers:
        for second in makers:
            top = tmp_path / f"{first.kind.decode()}{second.kind.decode()}"
            flatten(top, first, *([file(b"x/inner")] if first.kind == b"5" else []))
            flatten(top, second)
            kind = stat.S_IFMT((top / "x").lstat().st_mode)
            assert kind == {b"0": stat.S_IFREG, b"5": stat.S_IFDIR, b"2": stat.S_IFLNK, b"6": stat.S_IFIFO}[second.kind]
            if first.kind == second.kind == b"5":
                assert (top / "x/inner").exists(), "a directory onto a directory merges"
            within = tmp_path / f"{first.kind.decode()}{second.kind.decode()}-in-one"
            flatten(within, first, second)
            assert stat.S_IFMT((within / "x").lstat().st_mode) == kind


def test_a_directorys_attributes_are_those_of_its_last_entry(tmp_path: Path) -> None:
    flatten(tmp_path / "t", folder(b"d", xattrs={"user.old": b"1", "user.both": b"1"}), file(b"d/f"))
    flatten(tmp_path / "t", folder(b"d", mode=0o711, xattrs={"user.both": b"2"}))
    assert os.listxattr(tmp_path / "t/d") == ["user.both"]
    assert (tmp_path / "t/d").stat().st_mode & 0o777 == 0o711
    assert (tmp_path / "t/d/f").exists()


def test_whiteouts_remove(tmp_path: Path) -> None:
    top = tmp_path / "t"
    flatten(top, file(b"gone"), folder(b"tree"), file(b"tree/a/b/c"), file(b"kept"), symlink(b"link", b"kept"))
    flatten(top, file(b".wh.gone"), file(b".wh.tree"), file(b".wh.link"), file(b".wh.never-was"))
    assert os.listdir(top) == ["kept"]


def test_whiteouts_speak_of_lower_layers_alone(tmp_path: Path) -> None:
    """layer.md: files in the same layer as a whiteout can only be hidden by those of later layers."""
    top = tmp_path / "t"
    flatten(top, file(b"f", b"old"), folder(b"d"), file(b"d/old"), folder(b"d/sub"), file(b"d/sub/old"))
    flatten(
        top, file(b"f", b"new"), file(b".wh.f"), folder(b"d"), file(b"d/new"), folder(b"d/sub"), file(b"d/sub/new"),
        file(b".wh.d"),
    )  # fmt: skip
    assert (top / "f").read_bytes() == b"new"
    assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == ["d", "d/new", "d/sub", "d/sub/new", "f"]


@pytest.mark.parametrize("first", [True, False])
def test_opaque_directories_lose_what_was_beneath_wherever_the_mark_stands(tmp_path: Path, first: bool) -> None:
    top = tmp_path / "t"
    flatten(top, folder(b"d"), file(b"d/old"), folder(b"d/sub"), file(b"d/sub/old"), file(b"other"))
    mark, new = file(b"d/.wh..wh..opq"), [file(b"d/new"), folder(b"d/sub"), file(b"d/sub/new")]
    flatten(top, folder(b"d"), *([mark, *new] if first else [*new, mark]))
    assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == ["d", "d/new", "d/sub", "d/sub/new", "other"]


def test_an_opaque_root_empties_everything(tmp_path: Path) -> None:
    top = tmp_path / "t"
    flatten(top, file(b"a"), file(b"b/c"))
    flatten(top, file(b".wh..wh..opq"), file(b"new"))
    assert os.listdir(top) == ["new"]


def test_archives_keep_names_like_whiteouts(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    apply_layer(io.BytesIO(layer(file(b".wh.a", b"just a name"))), tmp_path, whiteouts="keep")
    assert (tmp_path / ".wh.a").read_bytes() == b"just a name"
    assert (tmp_path / "a").exists()


def test_bookkeeping_of_aufs_is_left_out(tmp_path: Path) -> None:
    flatten(tmp_path / "t", file(b".wh..wh.aufs"), folder(b".wh..wh.orph"), file(b"f"))
    assert os.listdir(tmp_path / "t") == ["f"]


def test_parents_that_are_symlinks_are_followed_within(tmp_path: Path) -> None:
    top = tmp_path / "t"
    flatten(
        top, folder(b"usr/bin"), symlink(b"bin", b"usr/bin"), symlink(b"abs", b"/usr"), symlink(b"up", b"../../../usr")
    )
    flatten(top, file(b"bin/one"), file(b"abs/bin/two"), file(b"up/bin/three"), file(b"abs/new/four"))
    assert sorted(os.listdir(top / "usr/bin")) == ["one", "three", "two"]
    assert (top / "usr/new/four").exists()
    assert (top / "bin").is_symlink()


def test_a_dangling_symlink_as_parent_is_made_good_within(tmp_path: Path) -> None:
    flatten(tmp_path / "t", symlink(b"run", b"/var/run"), file(b"run/lock/f"))
    assert (tmp_path / "t/var/run/lock/f").exists()


def test_a_followed_symlink_may_be_replaced_in_the_same_layer(tmp_path: Path) -> None:
    """The directory that it led to must not be taken for what stands there now."""
    top = tmp_path / "t"
    flatten(top, folder(b"usr/bin"), symlink(b"bin", b"usr/bin"))
    flatten(top, file(b"bin/one"), folder(b"bin"), file(b"bin/two"))
    assert os.listdir(top / "usr/bin") == ["one"]
    assert os.listdir(top / "bin") == ["two"]


def test_entries_may_come_in_any_order(tmp_path: Path) -> None:
    flatten(tmp_path / "t", file(b"d/f"), folder(b"d", mode=0o500, mtime_ns=3 * 10**9), file(b"d/g"))
    st = (tmp_path / "t/d").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime) == (0o500, 3)


def test_sparse_entries_stay_sparse(tmp_path: Path) -> None:
    source = tmp_path / "s"
    with open(source, "wb") as f:
        f.seek(8 << 20)
        f.write(b"end")
    done = subprocess.run(
        ["tar", "-C", tmp_path, "-S", "--owner", str(os.geteuid()), "--group", str(os.getegid()), "-cf", "-", "s"],
        capture_output=True, check=True,
    )  # fmt: skip
    target = tmp_path / "t"
    target.mkdir()
    apply_layer(io.BytesIO(done.stdout), target)
    assert (target / "s").read_bytes() == source.read_bytes()
    assert (target / "s").stat().st_blocks * 512 < 1 << 20


def test_default_acls_of_the_target_give_nothing_to_new_files(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    # version 2; user::rwx, user:1:rwx, group::rwx, mask::rwx, other::rwx
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, 1), (4, 7, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 7, 0xFFFFFFFF)]
    import struct

    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)
    try:
        os.setxattr(target, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("the file system has no ACLs")
    flatten(target, file(b"f", mode=0o640), folder(b"d", mode=0o750), file(b"d/g", mode=0o600), special(b"p", FIFO))
    for name, mode in (("f", 0o640), ("d", 0o750), ("d/g", 0o600), ("p", 0o644)):
        assert stat.S_IMODE((target / name).lstat().st_mode) == mode
        assert not os.listxattr(target / name), name


# -- as layers of an overlay -------------------------------------------------------------------------


def test_whiteouts_become_marks(tmp_path: Path) -> None:
    top, *_ = stack(
        tmp_path,
        [file(b"gone"), folder(b"d"), file(b"d/x"), folder(b"o"), file(b"o/y")],
        [file(b".wh.gone"), folder(b"d"), file(b"d/.wh.x"), folder(b"o"), file(b"o/.wh..wh..opq"), file(b"o/z")],
    )
    assert is_whiteout(top / "gone")
    assert is_whiteout(top / "d/x")
    assert opaque(top / "o")
    assert not opaque(top / "d")
    assert sorted(os.listdir(top / "o")) == ["z"]


def test_directories_not_mentioned_are_the_lower_ones(tmp_path: Path) -> None:
    top, _ = stack(
        tmp_path,
        [folder(b"a", mode=0o2711, mtime_ns=9 * 10**9, xattrs={"user.k": b"v"}), folder(b"a/b", mode=0o700)],
        [file(b"a/b/f"), file(b"new/g")],
    )
    st = (top / "a").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime) == (0o2711, 9)
    assert os.getxattr(top / "a", "user.k") == b"v"
    assert stat.S_IMODE((top / "a/b").stat().st_mode) == 0o700
    assert stat.S_IMODE((top / "new").stat().st_mode) == 0o755


def test_symlinks_of_lower_layers_are_followed(tmp_path: Path) -> None:
    top, _ = stack(
        tmp_path,
        [folder(b"usr/bin", mode=0o711), symlink(b"bin", b"/usr/bin"), symlink(b"usr/loop", b"loop")],
        [file(b"bin/tool")],
    )
    assert (top / "usr/bin/tool").exists()
    assert not (top / "bin").exists()
    assert stat.S_IMODE((top / "usr/bin").stat().st_mode) == 0o711


def test_whiteouts_and_opaque_marks_of_lower_layers_count(tmp_path: Path) -> None:
    top, *_ = stack(
        tmp_path,
        [
            folder(b"a", mode=0o700),
            file(b"a/link-target"),
            symlink(b"s", b"a"),
            folder(b"o", mode=0o700),
            folder(b"o/in"),
        ],
        [file(b".wh.a"), file(b".wh.s"), file(b"o/.wh..wh..opq")],
        [file(b"a/f"), file(b"s/f"), file(b"o/in/f")],
    )
    assert stat.S_IMODE((top / "a").stat().st_mode) == 0o755, "the lower one is gone"
    assert (top / "s").is_dir()
    assert stat.S_IMODE((top / "o").stat().st_mode) == 0o700, "the mark is about what it holds"
    assert stat.S_IMODE((top / "o/in").stat().st_mode) == 0o755


def test_hardlinks_to_lower_files_bring_them_up(tmp_path: Path) -> None:
    top, _ = stack(
        tmp_path,
        [folder(b"d", mode=0o711), file(b"d/f", b"data", mode=0o4755, xattrs={"user.k": b"v"}), symlink(b"l", b"d/f")],
        [hardlink(b"again", b"d/f"), hardlink(b"l2", b"l"), hardlink(b"third", b"again")],
    )
    assert (top / "again").samefile(top / "d/f")
    assert (top / "again").samefile(top / "third")
    st = (top / "again").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime, st.st_nlink) == (0o4755, 1_000_000_000, 3)
    assert (top / "again").read_bytes() == b"data"
    assert os.getxattr(top / "again", "user.k") == b"v"
    assert stat.S_IMODE((top / "d").stat().st_mode) == 0o711
    assert os.readlink(top / "l2") == "d/f"


def test_hardlinks_to_what_is_hidden_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="missing"):
        stack(tmp_path, [file(b"f")], [file(b".wh.f")], [hardlink(b"x", b"f")])


def test_hardlinks_to_what_this_layer_hides_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="missing"):
        stack(tmp_path, [file(b"d/f")], [folder(b"d"), file(b"d/.wh..wh..opq"), hardlink(b"x", b"d/f")])


def test_whiteouts_of_nothing_make_no_marks(tmp_path: Path) -> None:
    """overlayfs lists them in directories that it has nothing to merge with."""
    top, *_ = stack(
        tmp_path,
        [file(b"kept"), folder(b"there"), file(b"there/x")],
        [file(b".wh.never"), folder(b"new"), file(b"new/.wh.x"), file(b"missing/.wh.x"), file(b"gone/.wh..wh..opq"),
         file(b"there/.wh..wh..opq"), file(b"there/.wh.x"), file(b".wh.kept")],
    )  # fmt: skip
    assert sorted(os.listdir(top)) == ["kept", "new", "there"]
    assert is_whiteout(top / "kept")
    assert os.listdir(top / "new") == []


def test_whiteouts_can_be_settled_once_the_lower_layers_are_known(tmp_path: Path) -> None:
    """Layers are unpacked side by side."""
    (lower,) = stack(tmp_path, [file(b"gone"), folder(b"d"), file(b"d/gone"), folder(b"o"), file(b"o/x")])
    items = [file(b".wh.gone"), file(b".wh.never"), folder(b"d"), file(b"d/.wh.gone"), file(b"d/.wh.never"),
             folder(b"o"), file(b"o/.wh..wh..opq"), file(b"o/.wh.x"), folder(b"new"), file(b"new/.wh.x")]  # fmt: skip
    targets = [tmp_path / name for name in ("alone", "stacked")]
    for target in targets:
        target.mkdir()
    alone = apply_layer(io.BytesIO(layer(*items)), targets[0], whiteouts="overlay", dialect="user", lower=None)
    assert alone.independent
    assert set(alone.whiteouts) == {b"gone", b"never", b"d/gone", b"d/never", b"o/x", b"new/x"}
    for _ in range(2):
        settle_whiteouts(targets[0], alone.whiteouts, [lower], DIALECT)
    known = apply_layer(io.BytesIO(layer(*items)), targets[1], whiteouts="overlay", dialect="user", lower=[lower])
    assert known.whiteouts == ()
    shown = [sorted(str(p.relative_to(t)) for p in t.rglob("*")) for t in targets]
    assert shown[0] == shown[1] == ["d", "d/gone", "gone", "new", "o"]


def test_a_directory_in_place_of_a_whiteout_is_opaque(tmp_path: Path) -> None:
    top, _ = stack(
        tmp_path,
        [file(b"a/old"), file(b"b/old"), file(b"c/old")],
        [file(b".wh.a"), folder(b"a"), folder(b"b"), file(b".wh.b"), file(b".wh.c"), file(b"c/new")],
    )
    assert opaque(top / "a")
    assert opaque(top / "b")
    assert opaque(top / "c")


def test_a_file_in_place_of_a_whiteout_stays(tmp_path: Path) -> None:
    top, _ = stack(
        tmp_path, [file(b"a"), file(b"b")], [file(b".wh.a"), file(b"a", b"1"), file(b"b", b"2"), file(b".wh.b")]
    )
    assert (top / "a").read_bytes() == b"1"
    assert (top / "b").read_bytes() == b"2"


def test_an_opaque_root_hides_every_name(tmp_path: Path) -> None:
    """overlayfs ignores the mark on a root."""
    top, *_ = stack(
        tmp_path,
        [file(b"a"), file(b"b/c"), file(b"c")],
        [file(b".wh.a")],
        [file(b".wh..wh..opq"), folder(b"b"), file(b"b/new")],
    )
    assert opaque(top / "b")
    assert sorted(os.listdir(top)) == ["b", "c"]
    assert is_whiteout(top / "c")


def test_marks_of_overlayfs_in_a_layer_are_dropped(tmp_path: Path) -> None:
    """A layer that could set them would redirect into other layers."""
    marks = {f"{space}.overlay.{name}": b"/etc" for space in ("user", "trusted") for name in ("redirect", "opaque")}
    top, _ = stack(tmp_path, [file(b"f")], [folder(b"d", xattrs=marks), file(b"f", xattrs=marks | {"user.k": b"v"})])
    assert os.listxattr(top / "d") == []
    assert os.listxattr(top / "f") == ["user.k"]


def test_a_device_that_would_be_a_whiteout_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    apply_layer(
        io.BytesIO(layer(special(b"null", CHARACTER_DEVICE, device=(0, 0)))),
        tmp_path,
        whiteouts="overlay",
        dialect="user",
        warn=said.append,
    )
    assert os.listdir(tmp_path) == []
    assert "0:0" in said[0]


def test_an_overlay_layer_goes_into_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(LayerError, match="not empty"):
        apply_layer(io.BytesIO(layer()), tmp_path, whiteouts="overlay")


# -- limits and cancellation -------------------------------------------------------------------------


def test_limits(tmp_path: Path) -> None:
    blob = layer(*(file(b"f%d" % n, b"x" * 1000) for n in range(10)))
    for limits, match in ((Limits(max_entries=9), "9 entries"), (Limits(max_bytes=9999), "9999 bytes")):
        target = tmp_path / match[:4]
        target.mkdir()
        with pytest.raises(LayerError, match=match):
            apply_layer(io.BytesIO(blob), target, limits=limits)
    target = tmp_path / "fits"
    target.mkdir()
    apply_layer(io.BytesIO(blob), target, limits=Limits(max_entries=10, max_bytes=len(blob)))


def test_directories_made_on_the_way_count(tmp_path: Path) -> None:
    items = [file(b"/".join([b"d%d" % n] * 50) + b"/f") for n in range(4)]
    with pytest.raises(LayerError, match="entries"):
        apply_layer(io.BytesIO(layer(*items)), tmp_path, limits=Limits(max_entries=100))


def test_a_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    blob = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    head = layer(file(b"f"))[:512]
    with pytest.raises(LayerError, match="unpacks to more"):
        apply_layer(io.BytesIO(gzip.compress(head + bytes(64 << 20), 1)), tmp_path, limits=Limits(max_bytes=1 << 20))
    with pytest.raises(LayerError, match="unpacks to more"):
        apply_layer(io.BytesIO(blob), tmp_path, limits=Limits(max_bytes=1 << 20))


def test_a_sparse_claim_counts_as_its_size(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("s")
        member.pax_headers = {"GNU.sparse.map": "", "GNU.sparse.size": str(1 << 50)}
        tar.addfile(member)
    with pytest.raises(LayerError, match="unpacks to more"):
        apply_layer(io.BytesIO(out.getvalue()), tmp_path)


def test_cancellation_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 5

    blob = layer(*(file(b"f%d" % n, os.urandom(1 << 20)) for n in range(12)))
    with pytest.raises(Cancelled):
        apply_layer(io.BytesIO(blob), tmp_path, cancelled=cancelled)
    assert set(threading.enumerate()) <= before


def test_damage_far_into_the_stream_is_one_error(tmp_path: Path) -> None:
    blob = bytearray(gzip.compress(layer(*(file(b"f%d" % n, os.urandom(1 << 20)) for n in range(12))), 1))
    before = set(threading.enumerate())
    with pytest.raises(LayerError, match="cut short"):
        apply_layer(io.BytesIO(bytes(blob[: 9 << 20])), tmp_path)
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_owners_can_be_left_alone(tmp_path: Path) -> None:
    blob = layer(
        file(b"f", uid=12345, gid=54321), folder(b"d", uid=12345, gid=54321), symlink(b"l", b"f", uid=1, gid=1)
    )
    apply_layer(io.BytesIO(blob), tmp_path, keep_owners=False)
    for name in ("f", "d", "l"):
        st = (tmp_path / name).lstat()
        assert (st.st_uid, st.st_gid) == (os.geteuid(), os.getegid())
