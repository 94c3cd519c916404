"""`pybuild verify`: build twice under different conditions and say whether the same image came out."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.differ import describe, shown_path
from builder.cli.options import store_root

if TYPE_CHECKING:
    from builder.api import BuildResult
    from builder.plan.request import BuildRequest
    from builder.verify import Verdict


def configure(verb: str, parser: ArgumentParser) -> None:
    from builder.cli import build

    build.configure("build", parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.description = (
        f"{parser.description or ''} The flags are those of the build that is meant; nothing of it is named or sent."
    )


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from builder.cli.buildrequest import make_request
    from builder.cli.progress import make_progress
    from builder.verify import build_twice, judge

    root = store_root(options)
    api.prepare_namespaces()
    mode = "quiet" if options.quiet else options.progress or "plain"

    def build(request: BuildRequest) -> BuildResult:
        # A bar would be drawn by a thread, which must not be there when the second build forks.
        with make_progress("plain" if mode in {"auto", "tty"} else mode, sys.stderr, os.environ) as progress:
            return api.build(request, root=root, events=progress)

    with ExitStack() as stack:
        request = make_request(options, stack)
        before = _nameless(root)
        try:
            first, second = build_twice(request, build)
            with api.open_store(root) as store:
                verdict = judge(store, first, second, request.platforms)
        finally:
            _forget(root, before)
    if options.json:
        print(json.dumps(_document(verdict), indent=2))
    else:
        _print(verdict)
    return 0 if verdict.reproducible else 1


def _nameless(root: Path) -> set[str]:
    from builder import api

    with api.open_store(root) as store:
        return {named.name for named in store.names.list() if named.name.startswith("@")}


def _forget(root: Path, before: set[str]) -> None:
    """Take away the names of the images that were built to be compared."""
    from builder import api

    with api.open_store(root) as store:
        for named in store.names.list():
            if named.name.startswith("@") and named.name not in before:
                store.names.delete(named.name)


def _print(verdict: Verdict) -> None:
    if verdict.reproducible:
        print(f"reproducible: {verdict.first.digest}")
        return
    print(f"not reproducible: {verdict.first.digest} and {verdict.second.digest}")
    if verdict.layer:
        print(f"layer {verdict.layer}: {verdict.step}".rstrip(": "))
    if verdict.file is not None:
        change = verdict.file._replace(fields=verdict.file.fields[:1])
        print(f"{shown_path(change.path)}: {describe(change)}")
    elif verdict.config is not None:
        print(f"{verdict.config.field}: {verdict.config.old!r} became {verdict.config.new!r}")
    if verdict.words:
        print(verdict.words)


def _document(verdict: Verdict) -> dict[str, Any]:
    document: dict[str, Any] = {
        "reproducible": verdict.reproducible,
        "digests": [verdict.first.digest, verdict.second.digest],
    }
    if verdict.layer:
        document |= {"layer": verdict.layer, "step": verdict.step}
    if verdict.file is not None:
        file = verdict.file
        document["file"] = {
            "path": os.fsdecode(file.path),
            "change": file.change,
            "fields": [field._asdict() for field in file.fields],
        }
    if verdict.config is not None:
        document["config"] = verdict.config._asdict()
    return document | ({"reason": verdict.words} if verdict.words else {})
