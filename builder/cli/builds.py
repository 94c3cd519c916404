"""`pybuild builds [ls|logs|show|rm]`: what earlier builds of this store did, from their records."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builder.cli.options import store_root
from builder.errors import UsageError
from layers.errors import NameNotFound
from layers.events import Event, Vertex, VertexLog, VertexWarning

_TIME_CHARS = 19


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("action", nargs="?", default="ls", choices=["ls", "logs", "show", "rm"],
        help="list; what the steps printed; the record's figures; remove")  # fmt: skip
    add("ids", nargs="*", metavar="ID", help="builds, by the beginning of their ids (logs, show: the last if none)")
    add("-a", "--all", action="store_true", help="rm: all records")
    add("--json", action="store_true", help="ls: print JSON")


def run(verb: str, options: Namespace) -> int:
    from builder import api

    root = store_root(options)
    api.prepare_namespaces()  # an ordinary user's records belong to root of the user namespace
    paths = sorted((root / "builds").glob("*.jsonl"))
    if options.action == "ls":
        _list([_summary(path) for path in paths], as_json=options.json)
        return 0
    if options.action == "rm" and not options.ids and not options.all:
        raise UsageError("which records? name them, or say --all")
    chosen = paths if options.action == "rm" and options.all else [_find(paths, id) for id in options.ids]
    if options.action == "rm":
        for path in chosen:
            path.unlink(missing_ok=True)
        return 0
    if not chosen:
        chosen = [_find(paths[-1:], "")]
    for path in chosen:
        if options.action == "logs":
            _replay(path)
        else:
            print(json.dumps({**_summary(path), "steps": _steps(path)}, indent=2))
    return 0


def _find(paths: list[Path], beginning: str) -> Path:
    found = [path for path in paths if path.stem.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} builds begin with {beginning!r}" if found else f"there is no record of a build {beginning!r}"
    raise NameNotFound(what, hint="`pybuild builds` lists them")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The record's documents; what a killed process left half written is passed over."""
    with path.open(encoding="utf-8", errors="surrogateescape") as stream:
        for line in stream:
            try:
                document = json.loads(line)
            except ValueError:
                continue
            if isinstance(document, dict):
                yield document


def _summary(path: Path) -> dict[str, Any]:
    header: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for document in _lines(path):
        header = document.get("build", header)
        result = document.get("result", result)
    return {"id": path.stem, **header, **result}


def _list(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'ID':<24} {'STARTED':<19} {'TIME':>8} {'STATUS':>7} {'STEPS':>16}  WHAT")
    for row in rows:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.get("started_ns", 0) // 10**9))
        ended = row.get("ended_ns")
        took = f"{(ended - row['started_ns']) / 1e9:.1f}s" if ended else ""
        status = str(row.get("status", "-"))
        steps = f"{row['executed']} run, {row['cached']} found" if "executed" in row else ""
        what = ", ".join(row.get("tags") or [str(row.get("file", ""))])
        print(f"{row['id']:<24} {started:<19} {took:>8} {status:>7} {steps:>16}  {what}")


def _replay(path: Path) -> None:
    """Print the events as the build would have with `--progress=plain`."""
    from builder.cli.progress import make_progress

    with make_progress("plain", sys.stdout, {}) as progress:
        for document in _lines(path):
            for event in _events(document):
                progress.emit(event)
    error = _summary(path).get("error")
    if error:
        print(f"error: {error}")


def _events(document: dict[str, Any]) -> Iterator[Event]:
    for v in document.get("vertexes", ()):
        yield Vertex(
            v["digest"],
            v["name"],
            tuple(v.get("inputs", ())),
            _ns(v.get("started")),
            _ns(v.get("completed")),
            bool(v.get("cached")),
            v.get("error"),
        )
    for log in document.get("logs", ()):
        yield VertexLog(log["vertex"], log["stream"], b64decode(log["data"]), _ns(log["timestamp"]) or 0)
    for w in document.get("warnings", ()):
        yield VertexWarning(w["vertex"], b64decode(w["short"]).decode("utf-8", "replace"))


def _ns(text: str | None) -> int | None:
    """Nanoseconds since the epoch of a time as rawjson has it."""
    if text is None:
        return None
    import calendar

    whole = calendar.timegm(time.strptime(text[:_TIME_CHARS], "%Y-%m-%dT%H:%M:%S"))
    return whole * 10**9 + int(text[_TIME_CHARS + 1 : -1])


def _steps(path: Path) -> list[dict[str, Any]]:
    """The last state of each vertex."""
    last: dict[str, dict[str, Any]] = {}
    for document in _lines(path):
        for vertex in document.get("vertexes", ()):
            last[vertex["digest"]] = vertex
    return list(last.values())
