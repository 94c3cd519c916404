"""Cache mounts: of RUNs that make a directory at once, the first one's serves all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.solve.mounts import place_unless_there


@pytest.mark.parametrize("files", [[], ["kept"]])
def test_a_directory_that_is_there_stays(tmp_path: Path, files: list[str]) -> None:
    """Even an empty one, whose place rename(2) would give away: a RUN may have it mounted already."""
    there, fresh = tmp_path / "there", tmp_path / "fresh"
    for path in (there, fresh):
        path.mkdir()
    for name in files:
        (there / name).touch()
    before = os.stat(there)
    place_unless_there(fresh, there)
    assert os.path.samestat(os.stat(there), before)
    assert os.listdir(there) == files
    assert not fresh.exists()


def test_the_first_takes_the_place(tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    before = os.stat(tmp_path / "fresh")
    place_unless_there(tmp_path / "fresh", tmp_path / "there")
    assert os.path.samestat(os.stat(tmp_path / "there"), before)
    assert os.listdir(tmp_path) == ["there"]
