"""The record of what a step's key was made of: it comes back as it was kept, and many files take little memory."""

from __future__ import annotations

import tracemalloc

import pytest

from builder.frontend.source import SourceFile
from builder.plan.graph import BuildGraph, CopyItem, CopyOp, Step
from builder.plan.request import BuildRequest
from builder.solve.contenthash import ContentEntry
from builder.solve.explain import decode, describe, encode
from layers.oci import Platform

STEP = Step(0, CopyOp((CopyItem("path", "tree"),), "/tree"), None, (), "COPY tree /tree", "", Platform.host())
GRAPH = BuildGraph((STEP,), ())
REQUEST = BuildRequest(containerfile=SourceFile("Containerfile", ""), context=None)


def entries(count: int) -> list[ContentEntry]:
    return [ContentEntry(f"d{n // 100}/f{n:06}", "file", 0o644, 0, n % 7, f"{n:064x}") for n in range(count)]


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2000, 2345])
def test_the_files_come_back_whatever_their_number(count: int) -> None:
    files = entries(count)
    kept = decode(encode(describe(STEP, GRAPH, REQUEST, files)))
    assert kept is not None
    assert kept["files"] == {e.path: list(e[1:]) for e in files}
    assert kept["fields"]["destination"] == "/tree"


def test_names_that_are_no_text_come_back() -> None:
    odd = [ContentEntry('a"\\\n\udcff', "symlink", 0o777, 0, 0, "\udc80 é"), ContentEntry("", "directory", 0, 0, 0, "")]
    kept = decode(encode(describe(STEP, GRAPH, REQUEST, odd)))
    assert kept is not None
    assert kept["files"] == {e.path: list(e[1:]) for e in odd}


def test_unknown_files_are_not_none_at_all() -> None:
    kept = decode(encode(describe(STEP, GRAPH, REQUEST, None)))
    assert kept is not None
    assert "files" not in kept


def test_too_many_files_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.solve.explain._MAX_FILES", 10)
    kept = decode(encode(describe(STEP, GRAPH, REQUEST, entries(11))))
    assert kept is not None
    assert "files" not in kept
    assert kept["step"] == "COPY tree /tree"


def test_keeping_many_files_takes_little_beyond_them() -> None:
    count = 30_000
    files = entries(count)
    tracemalloc.start()
    try:
        encode(describe(STEP, GRAPH, REQUEST, files))
        assert tracemalloc.get_traced_memory()[1] < 150 * count
    finally:
        tracemalloc.stop()
