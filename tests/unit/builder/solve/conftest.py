"""Two trees side by side, made of short words, for what `builder.solve` does to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from builder.frontend.ignorefile import IgnoreMatcher
from builder.solve.contenthash import ContentKey, content_key
from builder.solve.fileops import CopyOptions, CopyStats, copy
from tests.support.leaks import descriptors
from tests.support.machine import need_root

Spec = Mapping[str, "str | bytes | None"]


def plant(root: Path, spec: Spec) -> None:
    """Make a tree: None is a directory, "-> x" a symlink to x, "= x" a hard link to x, else a file's content."""
    for path, what in spec.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if what is None:
            place.mkdir(exist_ok=True)
        elif isinstance(what, str) and what.startswith("-> "):
            place.symlink_to(what[3:])
        elif isinstance(what, str) and what.startswith("= "):
            os.link(root / what[2:], place)
        else:
            place.write_bytes(what.encode() if isinstance(what, str) else what)


def harvest(root: Path) -> dict[str, str | None]:
    """The tree in the same words, hard links as the files that they are."""
    found: dict[str, str | None] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = f"-> {path.readlink()}"
            else:
                found[key] = None if path.is_dir() else path.read_text(errors="surrogateescape")
    return found


class Trees:
    """`source` and `dest`, with descriptors of their roots."""

    def __init__(self, top: Path) -> None:
        self.source = top / "source"
        self.dest = top / "dest"
        self.outside = top / "outside"
        for directory in (self.source, self.dest, self.outside):
            directory.mkdir()
        self.source_fd = os.open(self.source, os.O_PATH | os.O_DIRECTORY)
        self.dest_fd = os.open(self.dest, os.O_PATH | os.O_DIRECTORY)

    def given(self, source: Spec, dest: Spec | None = None) -> None:
        plant(self.source, source)
        plant(self.dest, dest or {})

    def copy(self, source: str, dest: str, *, ignore: str | None = None, **options: Any) -> CopyStats:
        return copy(self.source_fd, source, self.dest_fd, dest, self.options(ignore, options))

    def key(self, *sources: str, ignore: str | None = None, **options: Any) -> ContentKey:
        return content_key(self.source_fd, sources, self.options(ignore, options))

    @staticmethod
    def options(ignore: str | None, options: dict[str, Any]) -> CopyOptions:
        return CopyOptions(ignore=None if ignore is None else IgnoreMatcher.parse(ignore), **options)

    @property
    def result(self) -> dict[str, str | None]:
        return harvest(self.dest)


@pytest.fixture(autouse=True)
def _as_root(request: pytest.FixtureRequest) -> None:
    """Tests marked `root` give files to other owners."""
    if request.node.get_closest_marker("root"):
        need_root()


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    made = Trees(tmp_path)
    before = descriptors()
    yield made
    assert descriptors() <= before, "a descriptor was left open"
    os.close(made.source_fd)
    os.close(made.dest_fd)
