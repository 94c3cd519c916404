"""`pybuild cache`: what is in it, what it takes up, emptying it, and whether it tells the truth."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base}\nCOPY file /file\nRUN --mount=type=cache,target=/c touch /c/x && cp /file /copy\n"
        "RUN cat /proc/sys/kernel/random/uuid > /random\n"
    )
    return write_context(tmp_path / "context", text, {"file": "1\n"})


def test_list_sum_and_tree(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    listed = pybuild.run("cache", "ls").text
    assert "COPY file /file" in listed
    assert "cache mount" in listed
    document = pybuild.run("cache", "ls", "--json").json()
    assert len(document["steps"]) == 3
    assert all(step["bytes"] > 0 for step in document["steps"])
    assert pybuild.run("cache", "du").text.startswith("3 steps: ")
    tree = pybuild.run("cache", "tree").text.splitlines()
    assert [line.index("[") for line in tree[1:]] == [2, 4, 6]


def test_prune_forgets_steps_and_mounts(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    pybuild.run("cache", "prune", "--all", "--mounts")
    document = pybuild.run("cache", "ls", "--json").json()
    assert document["mounts"] == []
    pybuild.build(context)


def test_audit_finds_the_step_that_is_not_hermetic(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    result = pybuild.run("cache", "audit", "--json", context, check=False)
    assert result.status == 1
    told = {step["name"]: step["differences"] for step in result.json()["steps"]}
    assert [name for name, differences in told.items() if differences] == [n for n in told if "random" in n]
    assert ["/random: content differ"] in told.values()
    # Nothing of it stays: the next build finds what was there.
    assert len(pybuild.run("cache", "ls", "--json").json()["steps"]) == 3


@pytest.mark.parametrize(
    "words", [("ls", "--squash"), ("ls", "."), ("du", "--all"), ("prune", "--sample", "3"), ("audit", "--mounts")]
)
def test_what_an_action_has_no_use_for_is_refused(pybuild: Pybuild, words: tuple[str, ...]) -> None:
    result = pybuild.run("cache", *words, check=False)
    assert result.status == 2
    assert words[1] in result.stderr


def test_a_sample_is_the_same_for_the_same_seed(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    runs = [
        [s["name"] for s in pybuild.run("cache", "audit", "--json", "--sample", "1", "--seed", "5", context,
                                        check=False).json()["steps"]]
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(runs[0]) == 1


def test_a_hit_counts_as_a_use(pybuild: Pybuild, context: Path) -> None:
    """What is pruned first is what was not used for longest, not what was made first."""
    pybuild.build(context)
    with closing(sqlite3.connect(pybuild.root / "store.db")) as database, database:
        database.execute("UPDATE cache SET used_ns = used_ns - 3600000000000")
    before = {s["name"]: s["used_ns"] for s in pybuild.run("cache", "ls", "--json").json()["steps"]}
    pybuild.build(context)
    after = {s["name"]: s["used_ns"] for s in pybuild.run("cache", "ls", "--json").json()["steps"]}
    assert all(after[name] - before[name] > 3_000_000_000_000 for name in before)
