"""Layers that no diff would make: entries twice, in odd orders, through symlinks, with whiteouts of themselves.

Both ways of applying them must show the same tree, and that is umoci's, where umoci takes the layer.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from layers.apply import apply_layer
from layers.changeset import LayerResult
from layers.errors import LayerError
from layers.oci import MEDIA_OCI_LAYER_GZIP, Digest
from tests.integration.layers.stacks import Made, overlay, write_image
from tests.support.machine import need_root, need_tool
from tests.support.tars import Item, file, folder, hardlink, layer, symlink
from tests.support.trees import Entry, differences, record

pytestmark = pytest.mark.root

PLACES = (b"a", b"b", b"a/x", b"b/x", b"a/x/y", b"s", b"s/x", b"./a/x", b"d/e/f")
TARGETS = (b"a", b"/b", b"../a", b".", b"missing", b"d")


def _whiteout(name: bytes) -> Item:
    parent, slash, base = name.rpartition(b"/")
    return file(parent + slash + b".wh." + base)


places = st.sampled_from(PLACES)
items = st.one_of(
    st.builds(lambda n, k: file(n, b"%d" % k, mode=0o600 + k), places, st.integers(0, 7)),
    st.builds(lambda n, k: folder(n, mode=0o700 + k), places, st.integers(0, 7)),
    st.builds(symlink, places, st.sampled_from(TARGETS)),
    st.builds(hardlink, places, places),
    st.builds(_whiteout, places),
    st.builds(lambda n: file(n + b"/.wh..wh..opq"), places),
)
stacks = st.lists(st.lists(items, min_size=1, max_size=7), min_size=1, max_size=3)


def made(blob: bytes) -> Made:
    packed = gzip.compress(blob, 1, mtime=0)
    result = LayerResult(
        Digest.of(blob), Digest("sha256:" + hashlib.sha256(packed).hexdigest()), len(packed), len(blob),
        MEDIA_OCI_LAYER_GZIP, 0,
    )  # fmt: skip
    return Made(packed, result)


def flattened(top: Path, blobs: list[bytes]) -> dict[bytes, Entry] | None:
    """The tree by deletion; None if a layer is refused."""
    target = top / "flat"
    target.mkdir()
    try:
        for blob in blobs:
            apply_layer(io.BytesIO(blob), target)
    except LayerError:
        return None
    return record(target)


def stacked(top: Path, blobs: list[bytes]) -> dict[bytes, Entry] | None:
    """The tree that an overlay of the layers shows."""
    done: list[Path] = []
    try:
        for number, blob in enumerate(blobs):
            target = top / f"layer{number}"
            target.mkdir()
            apply_layer(io.BytesIO(blob), target, whiteouts="overlay", lower=done)
            done.insert(0, target)
    except LayerError:
        return None
    with overlay(top / "merged", done) as merged:
        return record(merged)


def by_umoci(top: Path, blobs: list[bytes]) -> dict[bytes, Entry] | None:
    image = write_image(top / "image", [made(blob) for blob in blobs])
    done = subprocess.run(
        ["umoci", "unpack", "--image", f"{image}:t", top / "bundle"], capture_output=True, text=True, check=False
    )
    return record(top / "bundle/rootfs") if done.returncode == 0 else None


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    need_root()
    return tmp_path


@settings(
    max_examples=int(os.environ.get("LAYER_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(stacks)
@example([[file(b"a/x")], [symlink(b"s", b"a"), hardlink(b"b", b"s/x"), file(b"s/y")]])
@example([[file(b"a/x"), file(b"a/z")], [file(b"a", b"file"), folder(b"a"), file(b"a/y")]])
@example([[file(b"a/x")], [_whiteout(b"a/x"), _whiteout(b"a")]])
@example([[file(b"a/x")], [_whiteout(b"a/x"), file(b"a/.wh..wh..opq")]])
@example([[file(b"a/x")], [_whiteout(b"a/x"), file(b"a"), folder(b"a")]])
def test_both_ways_show_the_same(scratch: Path, layers: list[list[Item]]) -> None:
    top = Path(tempfile.mkdtemp(dir=scratch))
    try:
        blobs = [layer(*items) for items in layers]
        flat, stack = flattened(top, blobs), stacked(top, blobs)
        assert (flat is None) == (stack is None), "one way refuses what the other takes"
        if flat is not None and stack is not None:
            # A link to a lower file parts that from its other names, as overlayfs's own copying up does.
            assert not differences(*({n: e._replace(first_name=b"") for n, e in t.items()} for t in (flat, stack)))
    finally:
        shutil.rmtree(top)


@settings(
    max_examples=int(os.environ.get("LAYER_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(stacks)
def test_umoci_agrees(scratch: Path, layers: list[list[Item]]) -> None:
    need_tool("umoci")
    top = Path(tempfile.mkdtemp(dir=scratch))
    try:
        blobs = [layer(*items) for items in layers]
        mine, theirs = flattened(top, blobs), by_umoci(top, blobs)
        if mine is not None and theirs is not None:
            assert not differences(theirs, mine)
    finally:
        shutil.rmtree(top)
