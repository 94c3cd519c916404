"""`plan` names exactly what changed, and `build` then does exactly what `plan` said."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base} AS build\nARG LEVEL=1\nCOPY tree /tree\nRUN echo $LEVEL > /level\n"
        f"FROM {busybox_base}\nCOPY --from=build /level /level\nRUN cat /level\n"
    )
    files = {f"tree/{n // 100}/file{n}": f"content {n}\n" for n in range(1000)}
    return write_context(tmp_path / "context", text, files)


def plan(pybuild: Pybuild, context: Path, *flags: str) -> dict[str, Any]:
    document: dict[str, Any] = pybuild.run("plan", "--json", *flags, context).json()
    return document


def misses(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {s["name"]: s["reasons"] for s in document["steps"] if s["status"] != "hit"}


def own(reasons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in reasons if r["kind"] != "above"]


def executed(pybuild: Pybuild, context: Path, meta: Path, *flags: str) -> list[str]:
    pybuild.build(context, "--metadata-file", meta, *flags)
    return [s["name"] for s in json.loads(meta.read_text())["pybuild.steps"]["list"] if not s["cached"]]


def check_that_build_obeys(pybuild: Pybuild, context: Path, document: dict[str, Any], meta: Path, *flags: str) -> None:
    """Steps that were to run have run, those found were not, those in doubt may have gone either way."""
    status = {s["name"]: s["status"] for s in document["steps"]}
    ran = executed(pybuild, context, meta, *flags)
    assert {n for n, s in status.items() if s == "run"} <= set(ran)
    assert not set(ran) & {n for n, s in status.items() if s == "hit"}


def test_an_unchanged_build_is_all_hits(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    fresh = plan(pybuild, context)
    assert fresh["fetch_bytes"] > 0
    pybuild.build(context)
    document = plan(pybuild, context)
    assert not misses(document)
    assert document["fetch_bytes"] == 0
    assert executed(pybuild, context, tmp_path / "meta") == []


def test_one_byte_of_one_of_a_thousand_files(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context)
    (context / "tree/4/file421").write_text("content 42x\n")
    document = plan(pybuild, context)
    found = misses(document)
    (name,) = [n for n in found if "COPY tree" in n]
    (reason,) = own(found[name])
    assert (reason["kind"], reason["subject"]) == ("file", "4/file421")
    assert re.fullmatch(r"sha256:[0-9a-f]{12}", reason["old"])
    assert re.fullmatch(r"sha256:[0-9a-f]{12}", reason["new"])
    assert reason["old"] != reason["new"]
    # What only follows says so, and what depends on content alone is not promised.
    (follows,) = [n for n in found if "echo" in n]
    assert own(found[follows]) == []
    status = {s["name"]: s["status"] for s in document["steps"]}
    assert [s for n, s in status.items() if "COPY --from=build" in n] == ["content"]
    check_that_build_obeys(pybuild, context, document, tmp_path / "meta")


def test_one_mode_and_one_file_more_and_one_less(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context)
    (context / "tree/1/file101").chmod(0o600)
    (context / "tree/1/file102").unlink()
    (context / "tree/1/file999x").write_text("new")
    document = plan(pybuild, context)
    (reasons,) = [own(r) for n, r in misses(document).items() if "COPY tree" in n]
    told = {(r["kind"], r["subject"]): (r["old"], r["new"]) for r in reasons}
    assert told[("mode of", "1/file101")] == ("0644", "0600")
    assert told[("file", "1/file102")][1] is None
    assert told[("file", "1/file999x")][0] is None
    assert len(told) == 3
    check_that_build_obeys(pybuild, context, document, tmp_path / "meta")


def test_one_argument(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context)
    flags = ("--build-arg", "LEVEL=2")
    document = plan(pybuild, context, *flags)
    found = misses(document)
    (name,) = [n for n in found if "echo" in n]
    (reason,) = own(found[name])
    assert reason == {"kind": "ARG", "subject": "LEVEL", "old": "1", "new": "2"}
    assert not any("COPY tree" in n for n in found)
    check_that_build_obeys(pybuild, context, document, tmp_path / "meta", *flags)


def test_an_instructions_text(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    path = context / "Containerfile"
    path.write_text(path.read_text().replace("RUN cat /level", "RUN cat /level /level"))
    (reasons,) = misses(plan(pybuild, context)).values()
    (reason,) = reasons
    assert (reason["kind"], reason["subject"]) == ("instruction", "command")
    assert reason["new"].endswith("cat /level /level")


def test_instructions_are_known_again_wherever_they_stand(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    script = "".join(f"echo {n} {'x' * 100}\n" for n in range(5))
    head, tail = f"FROM {busybox_base}\nRUN echo one\n", f"RUN echo two\nRUN <<EOT\n{script}EOT\nCOPY a /a\n"
    context = write_context(tmp_path / "moved", head + tail, {"a": "a"})
    pybuild.build(context)

    def reasons(text: str) -> dict[str, list[str]]:
        (context / "Containerfile").write_text(text)
        lines = pybuild.run("plan", context).text.splitlines()
        steps: dict[str, list[str]] = {}
        for line in lines[:-1]:
            if line.startswith(("HIT", "MISS")):
                steps[line.partition("] ")[2]] = []
            else:
                steps[[*steps][-1]].append(line.strip())
        return {name: found for name, found in steps.items() if found}

    heredoc = f"RUN <<EOT (echo 0 {'x' * 80}"
    found = reasons(f"{head}RUN echo between\n{tail}")
    assert found.pop("RUN echo between") == ["a new instruction"]
    assert [*found.values()] == [[f"[{n}/6] is made anew"] for n in (3, 4, 5)], "what moved down did not change itself"
    assert reasons(f"{head}{tail}RUN echo end\n") == {"RUN echo end": ["a new instruction"]}
    found = reasons(head + tail.replace("echo 3 ", "echo drei "))
    (line, *_), *_ = (told for name, told in found.items() if name.startswith(heredoc[:12]))
    assert line.startswith("instruction command, line 4: echo 3 xx")
    assert "-> echo drei xx" in line
    found = reasons(head + tail.replace("RUN echo two", "RUN --mount=type=cache,target=/c echo two"))
    assert found["RUN --mount=type=cache,target=/c echo two"] == ["instruction --mount: added (type=cache,target=/c)"]
    long = "RUN true " + "y" * 300
    (context / "Containerfile").write_text(f"{head}{long}1\n")
    pybuild.build(context)
    (told,) = reasons(f"{head}{long}2\n").values()
    assert re.fullmatch(r"instruction command: …y+1 -> …y+2", told[0])


def test_a_file_of_one_stage_without_a_name(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "one", f"FROM {busybox_base}\nRUN echo one\nRUN echo two\n")
    pybuild.build(context)
    (context / "Containerfile").write_text(f"FROM {busybox_base}\nRUN echo other\nRUN echo two\nRUN echo three\n")
    first, *_ = misses(plan(pybuild, context)).values()
    assert [(r["old"], r["new"]) for r in own(first)] == [("/bin/sh -c echo one", "/bin/sh -c echo other")]


def test_the_bases_digest(
    pybuild: Pybuild, registry: RegistryServer, busybox_base: str, context: Path, tmp_path: Path
) -> None:
    name = f"{registry.host}/graph/base:1"
    pybuild.run("copy", f"docker://{busybox_base}", f"docker://{name}")
    path = context / "Containerfile"
    path.write_text(path.read_text().replace(busybox_base, name))
    pybuild.build(context)
    other = write_context(tmp_path / "other", f"FROM {busybox_base}\nRUN touch /moved\n")
    pybuild.build(other, "-t", name, "--push")
    document = plan(pybuild, context, "--pull")
    reasons = [own(r) for r in misses(document).values()]
    bases = [r for rs in reasons for r in rs if r["kind"] == "base"]
    assert {r["subject"] for r in bases} == {name}
    assert all(r["old"].startswith("sha256:") and r["new"].startswith("sha256:") for r in bases)
    assert all(r["kind"] == "base" for rs in reasons for r in rs)


def test_an_unchanged_file_of_a_changed_stage_is_found(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    """By content: what is copied from a stage counts, not how it came about."""
    pybuild.build(context)
    (context / "tree/0/file1").write_text("changed\n")
    ran = executed(pybuild, context, tmp_path / "meta")
    assert any("COPY tree" in n for n in ran)
    assert not any("--from=build" in n or "cat" in n for n in ran)


def test_explain_tells_before_running(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    (context / "tree/0/file1").write_text("changed\n")
    result = pybuild.build(context, "--explain", "-q")
    assert "file 0/file1: sha256:" in result.stderr
    assert re.search(r"^HIT ", result.stderr, re.MULTILINE)
    assert "found" in result.stderr


def test_no_cache_and_what_was_never_built(pybuild: Pybuild, context: Path) -> None:
    assert "never built here" in pybuild.run("plan", context).text
    pybuild.build(context)
    text = pybuild.run("plan", "--no-cache", context).text
    assert "MISS" in text
    assert "--no-cache" in text
    assert "--no-cache-filter build" in pybuild.run("plan", "--no-cache-filter", "build", context).text
    assert "instruction SOURCE_DATE_EPOCH: added (5)" in pybuild.run("plan", "--timestamp", "5", context).text


def test_a_result_that_is_gone(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context)
    pybuild.run("prune", "--all", "--force", check=False)
    assert plan(pybuild, context)["steps"]


def test_results_older_than_the_ttl_are_not_used(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context)
    assert executed(pybuild, context, tmp_path / "a", "--cache-ttl", "1h") == []
    assert executed(pybuild, context, tmp_path / "b", "--cache-ttl", "0s")


def test_one_stage_anew(pybuild: Pybuild, context: Path, busybox_base: str, tmp_path: Path) -> None:
    text = (
        f"FROM {busybox_base} AS one\nRUN cat /proc/sys/kernel/random/uuid > /now; echo same > /same\n"
        "FROM one AS two\nRUN cat /now > /seen\n"
        f"FROM {busybox_base}\nCOPY --from=one /same /same\nCOPY --from=two /seen /seen\nRUN cat /same /seen\n"
    )
    context = write_context(tmp_path / "stages", text)
    pybuild.build(context, "-t", "first:1")
    ran = executed(pybuild, context, tmp_path / "meta", "--no-cache-filter", "one", "-t", "second:1")
    assert [name.partition("] ")[2] for name in ran] == [
        "RUN cat /proc/sys/kernel/random/uuid > /now; echo same > /same",
        "RUN cat /now > /seen",
        "COPY --from=two /seen /seen",
        "RUN cat /same /seen",
    ], "what stands on the stage is made anew, what takes files from it by their content"
    first, second = (pybuild.unpack(f"{name}:1", tmp_path / name) / "seen" for name in ("first", "second"))
    assert first.read_bytes() != second.read_bytes()
    document = plan(pybuild, context, "--no-cache-filter", "one")
    assert [s["status"] for s in document["steps"] if "FROM" not in s["name"]] == [
        *("run", "run", "content", "content", "content")
    ]


def test_what_stands_on_a_result_that_is_too_old_is_made_anew(
    pybuild: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "aged", f"FROM {busybox_base}\nRUN echo old > /old\n")
    pybuild.build(context)
    time.sleep(2.5)
    (context / "Containerfile").write_text(f"FROM {busybox_base}\nRUN echo old > /old\nRUN cat /old > /new\n")
    pybuild.build(context)
    (reasons,) = [s["reasons"] for s in plan(pybuild, context, "--cache-ttl", "2s")["steps"] if "echo" in s["name"]]
    assert [r["subject"] for r in reasons] == ["--cache-ttl: its result is too old"]
    assert len(executed(pybuild, context, tmp_path / "meta", "--cache-ttl", "2s")) == 2


def test_what_another_cpu_would_run_is_told_before(pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "foreign", 'FROM scratch\nCOPY Containerfile /\nRUN ["/true"]\n')
    (row,) = [s for s in plan(pybuild, context, "--platform", "linux/s390x")["steps"] if "RUN" in s["name"]]
    assert "s390x" in row["emulated"]
    (row,) = [s for s in plan(pybuild, context)["steps"] if "RUN" in s["name"]]
    assert row["emulated"] == ""
    assert "s390x" in pybuild.run("plan", "--platform", "linux/s390x", context).text
