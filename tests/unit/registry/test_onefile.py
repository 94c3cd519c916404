"""One file of an image: layers over each other, links, and what is hostile."""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layers.errors import DigestMismatch, ImageError, LayerError
from layers.oci import Platform
from registry.onefile import FileFinder
from registry.transport import TransportContext, parse_location
from registry.unpack import find_manifest
from tests.support.images import make_image, write_layout
from tests.support.tars import Item, file, folder, hardlink, layer, special, symlink


@contextmanager
def finder(directory: Path, *layers: list[Item]) -> Iterator[FileFinder]:
    layout = write_layout(directory / "layout", t=make_image([layer(*items) for items in layers]))
    source = parse_location(f"oci:{layout}:t").source(TransportContext(scratch_dir=directory))
    found = FileFinder(source, find_manifest(source, Platform.host()), directory)
    try:
        yield found
    finally:
        found.close()
        source.close()


def read(directory: Path, path: str, *layers: list[Item]) -> tuple[str, bytes]:
    with finder(directory, *layers) as found:
        one = found.find(path)
        data = b"".join(one.data)
        assert len(data) == one.size_bytes
        return one.path, data


BASE = [
    folder(b"etc/"),
    file(b"etc/name", b"old"),
    folder(b"usr/"),
    folder(b"usr/bin/"),
    file(b"usr/bin/sh", b"shell" * 1000),
    symlink(b"bin", b"usr/bin"),
    hardlink(b"etc/alias", b"etc/name"),
    folder(b"var/"),
    file(b"var/log", b"l"),
    symlink(b"etc/mtab", b"../proc/self/mounts"),
]


@pytest.mark.parametrize(
    ("path", "resolved", "data"),
    [
        ("/etc/name", "/etc/name", b"new"),
        ("etc//./x/../name", "/etc/name", b"new"),
        ("../../etc/name", "/etc/name", b"new"),
        ("/bin/sh", "/usr/bin/sh", b"shell" * 1000),
        ("/link", "/usr/bin/sh", b"shell" * 1000),
        ("/far", "/etc/name", b"new"),
        # A hard link is the file that its own layer has, whatever became of that name later.
        ("/etc/alias", "/etc/alias", b"old"),
        ("/etc/later", "/etc/later", b"new"),
        ("/var/run", "/var/run", b"r"),
        ("/empty", "/empty", b""),
    ],
)
def test_found(tmp_path: Path, path: str, resolved: str, data: bytes) -> None:
    upper = [
        file(b"./etc/name", b"new"),
        hardlink(b"etc/later", b"etc/name"),
        symlink(b"link", b"/bin/sh"),
        symlink(b"far", b"../../../../etc/./name"),
        folder(b"var/"),
        file(b"var/.wh..wh..opq"),
        file(b"var/run", b"r"),
        file(b"empty"),
    ]
    assert read(tmp_path, path, BASE, upper) == (resolved, data)


@pytest.mark.parametrize(
    ("path", "upper", "what"),
    [
        ("/nothing", [], "has no file"),
        ("/etc/name/x", [], "through a file"),
        ("/etc", [], "is a directory"),
        ("/", [], "has no file|is a directory"),
        ("/etc/mtab", [], "has no file"),
        ("/etc/name", [file(b"etc/.wh.name")], "has no file"),
        ("/etc/name", [file(b".wh.etc")], "has no file"),
        ("/var/log", [folder(b"var"), file(b"var/.wh..wh..opq")], "has no file"),
        # A directory that replaces a symbolic link has nothing of what that led to.
        ("/bin/sh", [folder(b"bin/"), file(b"bin/ls")], "has no file"),
        ("/usr/bin/sh", [file(b"usr", b"a file now")], "through a file"),
        ("/loop", [symlink(b"loop", b"loop")], "40 links"),
        ("/a", [symlink(b"a", b"b/x"), symlink(b"b", b"a")], "40 links"),
        ("/h", [hardlink(b"h", b"h")], "link to nothing"),
        ("/h", [hardlink(b"h", b"gone")], "has no file"),
        ("/tty", [special(b"tty", b"3")], "not a regular file"),
    ],
)
def test_not_found(tmp_path: Path, path: str, upper: list[Item], what: str) -> None:
    with pytest.raises(ImageError, match=what):
        read(tmp_path, path, BASE, upper)


def test_a_hard_link_into_the_layers_beneath(tmp_path: Path) -> None:
    assert read(tmp_path, "/copy", BASE, [hardlink(b"copy", b"usr/bin/sh")])[1] == b"shell" * 1000


def test_only_the_layers_that_it_takes_are_read(tmp_path: Path) -> None:
    with finder(tmp_path, [file(b"big", b"x" * 5_000_000)], [file(b"top", b"t")]) as found:
        assert b"".join(found.find("/top").data) == b"t"
        assert found.moved_bytes < 1000
        assert sum(map(len, found.find("/big").data)) == 5_000_000


def test_nothing_is_handed_out_of_a_damaged_layer(tmp_path: Path) -> None:
    image = make_image([layer(file(b"a", b"1" * 70000), file(b"b", b"2" * 70000))], compress=False)
    layout = write_layout(tmp_path / "layout", t=image)
    stored = layout / "blobs" / image.document()["layers"][0]["digest"].replace(":", "/")
    data = bytearray(stored.read_bytes())
    data[100_000] ^= 1
    stored.write_bytes(data)
    source = parse_location(f"oci:{layout}:t").source(TransportContext(scratch_dir=tmp_path))
    with pytest.raises(DigestMismatch):
        FileFinder(source, find_manifest(source, Platform.host()), tmp_path).find("/a")
    source.close()


def test_names_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.onefile._MAX_NAME_BYTES", 5000)
    with pytest.raises(LayerError, match="more names"):
        read(tmp_path, "/x", [file(b"%d" % n) for n in range(100)])


@pytest.mark.parametrize("link", [symlink, hardlink])
def test_a_link_to_a_path_without_end_is_refused(tmp_path: Path, link: Callable[[bytes, bytes], Item]) -> None:
    below = [file(b"x")]
    with pytest.raises(ImageError, match="more than 4096 bytes"):
        read(tmp_path, "/a", below, [link(b"a", b"b/" * 100_000 + b"c")])


def test_a_table_of_many_chunks_is_read_in_time(tmp_path: Path) -> None:
    with finder(tmp_path, [file(b"x")]) as found:
        one = found._layers[0]
        many = [{"type": "chunk", "name": "a"}] * 300_000
        started = time.process_time()
        one._take_table([{"type": "reg", "name": "a", "size": 1}, *many])
        assert len(one.entries[b"a"].chunks) == 300_001
        assert time.process_time() - started < 10


def chunk(number: int, *, offset: int, inner: int, data: bytes) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {
        "type": "chunk" if number else "reg", "name": "a", "chunkOffset": number, "chunkSize": 1, "offset": offset,
        "innerOffset": inner, "chunkDigest": digest,
    }  # fmt: skip


def test_a_piece_that_has_many_chunks_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bytes(range(256)) * 4
    packed = gzip.compress(text)
    fetched: list[int] = []

    def fetch(_layer: object, start: int) -> bytes:
        fetched.append(start)
        return packed

    monkeypatch.setattr("registry.onefile._Layer._packed", fetch)
    with finder(tmp_path, [file(b"x")]) as found:
        one = found._layers[0]
        table = [chunk(n, offset=7, inner=n, data=text[n : n + 1]) for n in range(len(text))]
        one._take_table([{**table[0], "size": len(text)}, *table[1:]])
        assert b"".join(one._chunks(b"a")) == text
        assert fetched == [7]


@pytest.mark.parametrize("places", [((5, 0), (3, 0), (5, 0)), ((5, 9), (5, 0), (5, 0))])
def test_chunks_go_forwards_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[tuple[int, int], ...]
) -> None:
    monkeypatch.setattr("registry.onefile._Layer._packed", lambda _layer, _start: gzip.compress(b"z" * 100))
    with finder(tmp_path, [file(b"x")]) as found:
        one = found._layers[0]
        table = [chunk(n, offset=offset, inner=inner, data=b"z") for n, (offset, inner) in enumerate(places)]
        one._take_table([{**table[0], "size": len(places)}, *table[1:]])
        with pytest.raises(LayerError, match="malformed table"):
            list(one._chunks(b"a"))
