"""`pybuild lock`: a Containerfile's external inputs, pinned in a file beside it; `build --locked` uses that."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path

from builder.cli import build
from builder.cli.buildrequest import lock_file, make_request
from builder.cli.options import registry_options, store_root
from builder.errors import UsageError


def configure(verb: str, parser: ArgumentParser) -> None:
    build.configure(verb, parser)
    add = parser.add_argument
    add("--update", action="append", default=[], metavar="NAME", help="pin this image, URL or repository anew")
    add("--update-all", action="store_true", help="pin everything anew")
    add("--dry-run", action="store_true", help="write nothing; exit status 1 if something would change")
    parser.description = (
        f"{parser.description or ''} The flags are those of the build that is meant; outputs are left aside."
    )


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from builder.cli.progress import make_progress
    from builder.plan.sourcepolicy import read_policy

    if options.locked:
        raise UsageError("--locked is for builds")
    root = store_root(options)
    api.prepare_namespaces()
    mode = "quiet" if options.quiet else options.progress or os.environ.get("BUILDKIT_PROGRESS") or "quiet"
    with ExitStack() as stack:
        request = make_request(options, stack)
        path = lock_file(options, request.containerfile)
        old = read_policy(path) if path.exists() else ()
        with make_progress(mode, sys.stderr, os.environ) as progress:
            lock = api.lock(
                request,
                root=root,
                old=old,
                update=None if options.update_all else options.update,
                registry=registry_options(options),
                events=progress,
                warn=lambda words: print(f"warning: {words}", file=sys.stderr),
            )
    for sign, names in (("+", lock.added), ("~", lock.changed), ("-", lock.removed)):
        for name in names:
            print(f"{sign} {name}")
    if lock.rules == old and path.exists():
        return 0
    if options.dry_run:
        return 1
    _replace(path, lock.document)
    return 0


def _replace(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(data)
        new.replace(path)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {e.strerror}") from e
