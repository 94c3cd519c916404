"""Random trees and random edits through a real overlay: what the overlay shows is what every reader gets back."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layers.apply import apply_layer
from layers.changeset import diff_overlay, diff_trees
from tests.integration.layers.edits import PATHS, VERBS, Edit, apply_edits
from tests.integration.layers.stacks import Made, make_layer, overlay, write_image
from tests.support.machine import need_root, need_tool, which
from tests.support.oracles import umoci_unpack
from tests.support.trees import Entry, differences, record

pytestmark = pytest.mark.root

PLACES = st.sampled_from(PATHS)
EDITS = st.lists(st.builds(Edit, st.sampled_from(VERBS), PLACES, PLACES, st.integers(0, 6)), min_size=3, max_size=25)
UMOCI = which("umoci") is not None


class History:
    """A stack of edits on a real overlay: what each step left to see, and its layer."""

    def __init__(self, top: Path, steps: Sequence[Sequence[Edit]]) -> None:
        self.seen: list[dict[bytes, Entry]] = []
        self.layers: list[Made] = []
        lowers: list[Path] = []
        for number, edits in enumerate(steps):
            upper = top / f"upper{number}"
            upper.mkdir()
            if not lowers:
                apply_edits(os.fsencode(upper), edits, time_s=1_000_000)
                self.seen.append(record(upper))
                made = make_layer(diff_overlay(upper, [], "trusted"), upper)
                assert make_layer(diff_trees(None, upper), upper) == made
            else:
                with overlay(top / "merged", lowers, upper) as merged, overlay(top / "before", lowers) as before:
                    apply_edits(os.fsencode(merged), edits, time_s=2_000_000 * number)
                    self.seen.append(record(merged))
                    trees = make_layer(diff_trees(before, merged), merged)
                made = make_layer(diff_overlay(upper, lowers, "trusted"), upper)
                assert trees.result.diff_id == made.result.diff_id, "the two kinds of diff disagree"
            self.layers.append(made)
            lowers.insert(0, upper)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    need_root()
    return tmp_path


@settings(
    max_examples=int(os.environ.get("LAYER_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(EDITS, min_size=2, max_size=4))
def test_what_the_overlay_shows_comes_back(scratch: Path, steps: list[list[Edit]]) -> None:
    top = Path(tempfile.mkdtemp(dir=scratch))
    try:
        history = History(top, steps)
        flat = top / "flat"
        flat.mkdir()
        stack: list[Path] = []
        for number, (made, seen) in enumerate(zip(history.layers, history.seen, strict=True)):
            applied = apply_layer(io.BytesIO(made.blob), flat)
            assert applied.diff_id == made.result.diff_id
            assert not differences(seen, record(flat)), f"flattened after step {number}"
            layer = top / f"layer{number}"
            layer.mkdir()
            apply_layer(io.BytesIO(made.blob), layer, whiteouts="overlay", lower=stack)
            stack.insert(0, layer)
            with overlay(top / "stacked", stack) as stacked:
                assert not differences(seen, record(stacked)), f"stacked after step {number}"
        if UMOCI:
            bundle = umoci_unpack(write_image(top / "image", history.layers), top / "bundle")
            assert not differences(history.seen[-1], record(bundle / "rootfs")), "umoci"
    finally:
        shutil.rmtree(top)


def test_umoci_is_the_judge() -> None:
    """The property test skips umoci where it is missing; this says so."""
    need_tool("umoci")
