"""A store's directory that somebody else has put where all may put things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.cli.options import refuse_planted
from layers.errors import StoreError
from tests.support.machine import need_root

OTHER = 12345


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that all may write to, with another's directory and link in it."""
    need_root()
    shared = tmp_path / "shared"
    (shared / "store" / "deep").mkdir(parents=True)
    (shared / "link").symlink_to(tmp_path)
    shared.chmod(0o1777)
    for name in ("store", "link"):
        os.lchown(shared / name, OTHER, OTHER)
    return shared


@pytest.mark.parametrize("place", ["store", "store/deep", "store/new", "link", "link/new", "store/../store"])
def test_anothers_is_refused(shared: Path, place: str) -> None:
    for euid in (0, OTHER + 1):
        with pytest.raises(StoreError, match="uid 12345"):
            refuse_planted(shared / place, euid)
    # Whose it is may use it, and where not all may write, who may has put it there for a reason.
    assert refuse_planted(shared / place, OTHER) == shared / place
    shared.chmod(0o755)
    assert refuse_planted(shared / place, 0) == shared / place


def test_what_is_not_there_yet_is_ours(shared: Path) -> None:
    assert refuse_planted(shared / "new" / "store", 1) == shared / "new" / "store"
    assert refuse_planted(Path("relative"), os.geteuid()) == Path("relative")
