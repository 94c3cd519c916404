"""The graph at work: branches run side by side, a failure stops them all, one step is made by one build."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer

pytestmark = pytest.mark.registry


def test_a_diamond_takes_the_time_of_its_longest_path(
    pybuild: Pybuild, registry: RegistryServer, busybox_base: str, tmp_path: Path
) -> None:
    # Each waits for the other, and cannot end before both began.
    wait = "touch /c/{0}; until test -e /c/{1}; do sleep 0.02; done; sleep 0.5; touch /{0}"
    wait = f"RUN --mount=type=cache,target=/c {wait}"
    text = (
        f"FROM {busybox_base} AS left\n{wait.format('l', 'r')}\n"
        f"FROM {busybox_base} AS right\n{wait.format('r', 'l')}\n"
        f"FROM {busybox_base}\nCOPY --from=left /l /\nCOPY --from=right /r /\n"
    )
    context = write_context(tmp_path / "context", text)
    meta = tmp_path / "meta.json"
    pybuild.build(context, "--jobs", "2", "--metadata-file", meta)
    steps = {s["name"]: s for s in json.loads(meta.read_text())["pybuild.steps"]["list"] if not s["cached"]}
    left = next(s for name, s in steps.items() if name.endswith("touch /l"))
    right = next(s for name, s in steps.items() if name.endswith("touch /r"))
    assert left["started_ns"] < right["completed_ns"]
    assert right["started_ns"] < left["completed_ns"]
    assert left["phases"]["sandbox"] >= 0.5


def test_one_job_runs_one_step_at_a_time(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = (
        f"FROM {busybox_base} AS left\nRUN sleep 0.3 && touch /l\n"
        f"FROM {busybox_base} AS right\nRUN sleep 0.3 && touch /r\n"
        "FROM scratch\nCOPY --from=left /l /\nCOPY --from=right /r /\n"
    )
    meta = tmp_path / "meta.json"
    pybuild.build(write_context(tmp_path / "context", text), "--jobs", "1", "--metadata-file", meta)
    ran = [s for s in json.loads(meta.read_text())["pybuild.steps"]["list"] if not s["cached"]]
    ran.sort(key=lambda s: s["started_ns"])
    assert all(a["completed_ns"] <= b["started_ns"] for a, b in pairwise(ran))


def test_a_failing_branch_stops_the_other_at_once(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = (
        f"FROM {busybox_base} AS slow\nRUN while true; do echo noise; sleep 0.01; done\n"
        f"FROM {busybox_base} AS bad\nRUN sleep 1; exit 7\n"
        "FROM scratch\nCOPY --from=slow / /\nCOPY --from=bad / /\n"
    )
    context = write_context(tmp_path / "context", text)
    result = pybuild.build(context, "--jobs", "2", check=False)
    assert result.status == 7
    assert "exit code: 7" in result.stderr


def test_two_builds_at_once_run_each_step_once(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = f"FROM {busybox_base}\nRUN sleep 1; cat /proc/sys/kernel/random/uuid > /id\nRUN cp /id /copy\n"
    context = write_context(tmp_path / "context", text)
    pybuild.build(write_context(tmp_path / "warm", f"FROM {busybox_base}\nRUN true\n"))
    ids: list[str] = []

    def build() -> None:
        ids.append(pybuild.build(context, "-q").text)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 3
    assert len(set(ids)) == 1, "a random number that came out once was made once"


def test_a_prune_in_the_middle_breaks_no_build(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    first = f"FROM {busybox_base}\nRUN echo 1 > /1\nRUN echo 2 > /2\n"
    context = write_context(tmp_path / "context", first)
    pybuild.build(context)
    (context / "Containerfile").write_text(first + "RUN sleep 2; cat /1 /2 > /3\n")
    failures: list[str] = []

    def prune() -> None:
        for _ in range(6):
            result = pybuild.run("prune", "--all", "--force", check=False)
            if result.status:
                failures.append(result.stderr)
            time.sleep(0.2)

    thread = threading.Thread(target=prune)
    thread.start()
    pybuild.build(context, "-t", "kept:1")
    thread.join()
    assert not failures, failures[0]
    root = pybuild.unpack("kept:1", tmp_path / "root")
    assert (root / "3").read_text() == "1\n2\n"


def test_what_a_step_stands_on_is_told_before_it(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "ordered", f"FROM {busybox_base}\nRUN true\n")
    told = pybuild.build(context, "--progress=plain").stderr
    assert told.index("[1/2] FROM") < told.index("[2/2] RUN true")
