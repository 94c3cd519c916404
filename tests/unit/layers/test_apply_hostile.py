"""Layers that try to leave their target: refused or confined, in both modes, and nothing outside is touched."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layers.apply import Limits, apply_layer
from layers.errors import LayerError
from layers.tarstream import BLOCK_DEVICE, CHARACTER_DEVICE, FIFO
from tests.support.tars import Item, file, folder, hardlink, layer, special, symlink

UP = b"../" * 30


class Arena:
    """A target beside things that must not change, and one that leads there by symlink."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.target = top / "store/target"
        self.target.mkdir(parents=True)
        self.outside = top / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("secret")
        (self.outside / "secret").chmod(0o600)
        (self.outside / "dir").mkdir()
        self.before = self.state()

    def state(self) -> list[tuple[str, int, int, int, bytes]]:
        """All but the target, times included."""
        found = []
        for path in sorted([self.top, self.target.parent, self.outside, *self.outside.rglob("*")]):
            info = path.lstat()
            data = path.read_bytes() if path.is_file() else b""
            found.append((str(path), info.st_mode, info.st_nlink, info.st_mtime_ns, data))
        return found

    def names_beside(self) -> list[str]:
        return sorted(os.listdir(self.target.parent)) + sorted(os.listdir(self.top))


@pytest.fixture(params=["delete", "overlay", "keep"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena(tmp_path)
    names = arena.names_beside()
    yield arena
    assert arena.state() == arena.before, "something outside the target changed"
    assert arena.names_beside() == names


def unpack(arena: Arena, mode: str, *items: Item) -> None:
    apply_layer(io.BytesIO(layer(*items)), arena.target, whiteouts=mode, dialect="user", limits=Limits(10_000, 1 << 24))  # type: ignore[arg-type]


def out(arena: Arena) -> bytes:
    return os.fsencode(arena.outside)


REFUSED = {
    "a name that leaves": [file(b"../escaped", b"x")],
    "a name that leaves further in": [file(b"a/../../escaped", b"x")],
    "a directory that leaves": [folder(b"a/../..")],
    "a symlink that leaves by its name": [symlink(b"../l", b"x")],
    "a device that leaves": [special(b"../null", CHARACTER_DEVICE, device=(1, 3))],
    "only dots": [file(b"..", b"x")],
    "a hard link that leaves": [hardlink(b"h", b"../../outside/secret")],
    "a hard link to a directory": [folder(b"d"), hardlink(b"h", b"d")],
    "a hard link to the root": [hardlink(b"h", b".")],
    "a hard link to nothing": [hardlink(b"h", b"missing")],
    "a hard link to nothing, further in": [hardlink(b"h", b"missing/too")],
    "a hard link to a later file": [hardlink(b"h", b"f"), file(b"f")],
    "a symlink without a target": [symlink(b"l", b"")],
    "a file as a directory": [file(b"f"), file(b"f/inner")],
    "a fifo as a directory": [special(b"f", FIFO), file(b"f/inner")],
    "a loop of symlinks": [symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x")],
    "a chain of symlinks that doubles": [*(symlink(b"l%d" % n, b"l%d/l%d" % (n - 1, n - 1)) for n in range(1, 30)),
                                         symlink(b"l0", b"."), file(b"l29/x")],
    "the root as a file": [file(b".", b"x")],
    "the root as a symlink": [symlink(b"/", b"/etc")],
    "an unknown type": [special(b"x", b"Z")],
    "a name without end": [file(b"n/" * 5000 + b"f")],
    "a component that is too long": [file(b"n" * 256)],
    "a symlink target that is too long": [symlink(b"l", b"t" * 5000)],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, arena: Arena, mode: str) -> None:
    with pytest.raises(LayerError):
        unpack(arena, mode, *REFUSED[name])


@pytest.mark.parametrize("name", [b".wh...", b".wh..", b".wh.", b"d/.wh...", b"d/.wh."])
def test_whiteouts_of_no_name_are_refused(name: bytes, arena: Arena, mode: str) -> None:
    if mode == "keep":
        pytest.skip("names mean nothing there")
    with pytest.raises(LayerError, match="whiteout"):
        unpack(arena, mode, folder(b"d"), file(name))


@pytest.mark.parametrize("relative", [True, False])
def test_a_symlink_as_parent_leads_nowhere_outside(arena: Arena, mode: str, relative: bool) -> None:
    target = (UP if relative else b"") + out(arena)
    unpack(
        arena,
        mode,
        symlink(b"link", target),
        file(b"link/dir/planted", b"x"),
        folder(b"link/dir/d"),
        file(b"link/secret", b"x"),
    )
    inside = arena.target / str(arena.outside).lstrip("/")
    assert (inside / "dir/planted").read_bytes() == b"x", "the link is followed with the target as its root"


def test_a_symlink_in_the_middle_leads_nowhere_outside(arena: Arena, mode: str) -> None:
    unpack(
        arena, mode, folder(b"a"), symlink(b"a/up", b".."), symlink(b"a/up2", b"up/../../.."), file(b"a/up2/f", b"x")
    )
    assert (arena.target / "f").exists()


def test_a_file_over_a_symlink_replaces_it(arena: Arena, mode: str) -> None:
    secret = out(arena) + b"/secret"
    unpack(
        arena,
        mode,
        symlink(b"f", secret),
        file(b"f", b"overwritten?"),
        symlink(b"d", out(arena)),
        folder(b"d", mode=0o777),
    )
    assert (arena.target / "f").read_bytes() == b"overwritten?"
    assert not (arena.target / "f").is_symlink()
    assert (arena.target / "d").is_dir()
    assert not (arena.target / "d").is_symlink()


def test_metadata_does_not_follow_symlinks(arena: Arena, mode: str) -> None:
    unpack(
        arena, mode, symlink(b"l", out(arena) + b"/secret", mode=0o777, mtime_ns=5, xattrs={"user.k": b"v"}),
        special(b"p", FIFO), symlink(b"p", out(arena) + b"/secret"),
    )  # fmt: skip


def test_a_hard_link_does_not_follow_its_targets_symlink(arena: Arena, mode: str) -> None:
    unpack(arena, mode, symlink(b"l", out(arena) + b"/secret"), hardlink(b"h", b"l"))
    assert (arena.target / "h").is_symlink()


def test_a_hard_link_through_a_symlink_stays_inside(arena: Arena, mode: str) -> None:
    with pytest.raises(LayerError, match="missing"):
        unpack(arena, mode, symlink(b"l", out(arena)), hardlink(b"h", b"l/secret"))


def test_writing_through_a_hard_link_replaces_the_name(arena: Arena, mode: str) -> None:
    unpack(arena, mode, file(b"a", b"one"), hardlink(b"b", b"a"), file(b"b", b"two"))
    assert (arena.target / "a").read_bytes() == b"one"
    assert (arena.target / "b").read_bytes() == b"two"


def test_a_hard_link_to_itself_is_no_loss(arena: Arena, mode: str) -> None:
    unpack(arena, mode, file(b"a", b"one"), hardlink(b"a", b"a"), hardlink(b"./a", b"/a"))
    assert (arena.target / "a").read_bytes() == b"one"


def test_whiteouts_do_not_follow_symlinks(arena: Arena) -> None:
    unpack(arena, "delete", symlink(b"d", out(arena)), symlink(b"f", out(arena) + b"/secret"))
    unpack(arena, "delete", file(b"d/.wh.secret"), file(b".wh.f"), file(b"d/.wh..wh..opq"), file(b"d/.wh.dir"))
    unpack(arena, "delete", file(b".wh.d"))
    assert not (arena.target / "d").is_symlink()


def test_removing_a_tree_does_not_follow_symlinks(arena: Arena) -> None:
    unpack(arena, "delete", folder(b"d"), symlink(b"d/l", out(arena)), symlink(b"d/up", b"../../.."))
    unpack(arena, "delete", file(b"d", b"a file"))
    unpack(arena, "delete", folder(b"d"), symlink(b"d/l", out(arena)))
    unpack(arena, "delete", file(b".wh.d"))
    assert os.listdir(arena.target) == []


def test_a_directory_swapped_for_a_symlink_midway(arena: Arena, mode: str) -> None:
    """The cached descriptor of `d` must not be taken for what `d` is by then, and the other way round."""
    unpack(
        arena, mode, folder(b"d"), file(b"d/one"), symlink(b"d", out(arena)), file(b"d/two", b"2"), folder(b"d"),
        file(b"d/three"),
    )  # fmt: skip
    assert sorted(os.listdir(arena.target / "d")) == ["three"]


def test_a_symlink_left_in_an_earlier_layer(arena: Arena) -> None:
    """Image layers are applied one by one: the first plants the link, the second writes through it."""
    unpack(arena, "delete", symlink(b"etc", out(arena)))
    unpack(arena, "delete", file(b"etc/secret", b"x"), hardlink(b"h", b"etc/secret"), file(b"etc/.wh.dir"))


def test_a_symlink_left_in_a_lower_layer(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> None:
    unpack(arena, "overlay", symlink(b"etc", out(arena)), symlink(b"f", out(arena) + b"/secret"))
    upper = tmp_path_factory.mktemp("upper")
    blob = layer(file(b"etc/secret", b"x"), hardlink(b"h", b"etc/secret"), hardlink(b"g", b"f"), file(b"etc/.wh.dir"))
    apply_layer(io.BytesIO(blob), upper, whiteouts="overlay", dialect="user", lower=[arena.target])
    assert (upper / str(arena.outside).lstrip("/") / "secret").read_bytes() == b"x"
    assert (upper / "g").is_symlink()


def test_devices_without_root_are_left_out_with_a_word(arena: Arena) -> None:
    said: list[str] = []
    blob = layer(
        special(b"null", CHARACTER_DEVICE, device=(1, 3)), special(b"disk", BLOCK_DEVICE, device=(8, 0)), file(b"f")
    )
    apply_layer(io.BytesIO(blob), arena.target, warn=said.append)
    if os.geteuid() == 0 and not said:
        assert stat.S_ISBLK((arena.target / "disk").lstat().st_mode)
    else:
        assert len(said) == 2
        assert os.listdir(arena.target) == ["f"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give files away")
def test_owners_that_cannot_be_given_are_one_error_with_a_hint(arena: Arena) -> None:
    with pytest.raises(LayerError, match="cannot unpack 'f'") as caught:
        unpack(arena, "delete", file(b"f", uid=1))
    assert caught.value.hint is not None
    assert "subordinate" in caught.value.hint


def test_a_link_bomb_is_bounded(arena: Arena, mode: str) -> None:
    with pytest.raises(LayerError, match="entries"):
        unpack(arena, mode, file(b"f"), *(hardlink(b"l%d" % n, b"f") for n in range(10_001)))


PLACES = (b"a", b"b", b"a/x", b"b/x", b"a/b/c", b"l", b"l/x", b".", b"../e", b"/abs")
LINKS = (b"..", b"../..", b"/", b"a", b"l", b"b", b"../../outside", b"a/../..", b".")
hostile_items = st.lists(
    st.one_of(
        st.builds(lambda n: file(n, b"x"), st.sampled_from(PLACES)),
        st.builds(folder, st.sampled_from(PLACES)),
        st.builds(symlink, st.sampled_from(PLACES), st.sampled_from(LINKS)),
        st.builds(hardlink, st.sampled_from(PLACES), st.sampled_from(PLACES + LINKS)),
        st.builds(lambda n: file(n.rpartition(b"/")[0] + b"/.wh." + n.rpartition(b"/")[2]), st.sampled_from(PLACES)),
        st.builds(lambda n: file(n + b"/.wh..wh..opq"), st.sampled_from(PLACES)),
    ),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(hostile_items, min_size=1, max_size=3))
def test_no_sequence_of_layers_leaves_the_target(tmp_path: Path, layers: list[list[Item]]) -> None:
    import shutil
    import tempfile

    top = Path(tempfile.mkdtemp(dir=tmp_path))
    arena = Arena(top)
    names = arena.names_beside()
    lower: list[Path] = []
    overlays = top.with_name(top.name + "-layers")
    overlays.mkdir()
    for number, items in enumerate(layers):
        try:
            unpack(arena, "delete", *items)
        except LayerError:
            pass
        fresh = overlays / str(number)
        fresh.mkdir()
        try:
            apply_layer(io.BytesIO(layer(*items)), fresh, whiteouts="overlay", dialect="user", lower=lower)
        except LayerError:
            pass
        lower.insert(0, fresh)
    assert arena.state() == arena.before
    assert arena.names_beside() == names
    assert sorted(os.listdir(overlays)) == [str(n) for n in range(len(layers))]
    shutil.rmtree(top)
    shutil.rmtree(overlays)
