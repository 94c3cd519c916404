"""A build's contexts: what of them is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import ContextError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.source import SourceFile
from builder.plan.request import BuildRequest
from builder.session import Session


def ignore_of(context: Path, store: Path) -> IgnoreMatcher | None:
    session = Session(BuildRequest(containerfile=SourceFile("Containerfile", ""), context=context), store)
    try:
        return session.context("").ignore
    finally:
        session.close()


@pytest.mark.parametrize("name", ["store", "[odd] *name", "!store", "#1", "back\\slash", "deep/er/store"])
def test_a_store_in_the_context_is_not_seen(tmp_path: Path, name: str) -> None:
    context = tmp_path / "context"
    store = context / name
    store.mkdir(parents=True)
    (context / ".dockerignore").write_text("*.log\n!**\n")
    ignore = ignore_of(context, store)
    assert ignore is not None
    assert ignore.match(name)
    assert ignore.match(f"{name}/store.db")
    assert not ignore.match("other/store.db")
    assert not ignore.match("x.log")
    assert not ignore.match(name[:-1])


def test_a_store_reached_by_a_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "context/store").mkdir(parents=True)
    (tmp_path / "link").symlink_to("context/store")
    ignore = ignore_of(tmp_path / "context", tmp_path / "link")
    assert ignore is not None
    assert ignore.match("store")


def test_a_store_elsewhere_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "store/mounts/image").mkdir(parents=True)
    assert ignore_of(tmp_path / "context", tmp_path / "store") is None
    assert ignore_of(tmp_path / "store/mounts/image", tmp_path / "store") is None


def test_the_store_is_no_context(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="is the store itself"):
        ignore_of(tmp_path, tmp_path)
