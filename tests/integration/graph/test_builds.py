"""`pybuild builds`: the records of earlier builds, of those that failed or were killed, too."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from builder.cli.recorder import KEPT
from tests.support.cli import Pybuild, write_context
from tests.support.waiting import until

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    return write_context(tmp_path / "context", f"FROM {busybox_base}\nARG S=0\nRUN echo said so; exit $S\n")


def listed(pybuild: Pybuild) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pybuild.run("builds", "ls", "--json").json()
    return rows


def test_what_was_built_and_what_it_said(pybuild: Pybuild, context: Path) -> None:
    image = pybuild.build(context, "-q", "-t", "app:1").text.strip()
    pybuild.build(context, "-q", "-t", "app:1")
    pybuild.build(context, "-q", "--build-arg", "S=3", check=False)
    good, again, bad = listed(pybuild)
    assert (good["status"], good["image"], good["executed"], good["tags"]) == (0, image, 1, ["app:1"])
    assert (again["executed"], again["cached"]) == (0, 2)
    assert (bad["status"], bad["context"]) == (3, str(context))
    assert "exit code: 3" in bad["error"]
    said = pybuild.run("builds", "logs", good["id"]).text
    assert "said so" in said
    assert "RUN echo said so" in said
    assert "exit code: 3" in pybuild.run("builds", "logs").text, "without an id the last is meant"
    steps = pybuild.run("builds", "show", bad["id"]).json()["steps"]
    assert any("error" in step for step in steps)
    assert len(pybuild.run("builds").text.splitlines()) == 4


def test_records_are_removed_by_name_by_age_and_together(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context, "-q")
    (record,) = (pybuild.root / "builds").iterdir()
    assert record.stat().st_mode & 0o077 == 0
    for number in range(KEPT):
        (record.parent / f"0{number:015x}-1.jsonl").write_text("half a li")
    pybuild.build(context, "-q")
    assert len(list(record.parent.iterdir())) == KEPT
    assert record.exists(), "the oldest are forgotten first"
    assert len(listed(pybuild)) == KEPT
    pybuild.run("builds", "rm", record.stem)
    assert not record.exists()
    assert pybuild.run("builds", "rm", check=False).status == 2
    pybuild.run("builds", "rm", "--all")
    assert listed(pybuild) == []
    assert pybuild.run("builds", "logs", "none", check=False).status == 1


def test_a_build_that_was_killed_has_a_record(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "slow", f"FROM {busybox_base}\nRUN echo begun; sleep 100\n")
    building = pybuild.start("build", context)
    until(lambda: "begun" in pybuild.run("builds", "logs", check=False).text)
    building.send_signal(signal.SIGKILL)
    building.communicate()
    (row,) = listed(pybuild)
    assert "status" not in row
    assert "begun" in pybuild.run("builds", "logs").text


def test_a_record_that_cannot_be_written_fails_no_build(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context, "-q")
    for record in (pybuild.root / "builds").iterdir():
        record.unlink()
    (pybuild.root / "builds").rmdir()
    (pybuild.root / "builds").write_text("in the way")
    pybuild.build(context, "-q")
