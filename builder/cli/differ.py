"""`pybuild diff A B`: how two images, layers or directories differ."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_registry_options, registry_options, store_root

if TYPE_CHECKING:
    from builder.difference import Difference
    from layers.compare import FileChange
    from layers.layerdiff import Change

_MAX_VALUE = 60


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("old", metavar="A", help="an image (of any transport), a layer's tar or digest, or a directory")
    add("new", metavar="B", help="the same")
    add("--json", action="store_true", help="print JSON")
    add("--name-only", action="store_true", help="paths alone")
    add("--times", action="store_true", help="modification times and times in the config count")
    add("--exit-code", action="store_true", help="exit with 1 if there are differences")
    add("-q", "--quiet", action="store_true", help="no output, but --exit-code")
    add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
    add_registry_options(parser)


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from layers.oci import Platform

    found = api.differ(
        options.old,
        options.new,
        root=store_root(options),
        registry=registry_options(options),
        platform=Platform.parse(options.platform) if options.platform else None,
        times=options.times,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    status = 1 if not found.empty and (options.exit_code or options.quiet) else 0
    if options.quiet:
        return status
    if options.json:
        print(json.dumps(difference_document(found), indent=2))
    elif options.name_only:
        for change in found.files:
            print(shown_path(change.path))
    else:
        print_difference(found)
    return status


def difference_document(found: Difference) -> dict[str, Any]:
    """A difference as JSON."""
    return {
        "layers": {"same": found.same_layers, "old": found.old_layers, "new": found.new_layers},
        "files": [
            {
                "path": os.fsdecode(change.path),
                "change": change.change,
                "old_size": change.old_size,
                "new_size": change.new_size,
                "fields": [field._asdict() for field in change.fields],
            }
            for change in found.files
        ],
        "config": [change._asdict() for change in found.config],
    }


def print_difference(found: Difference) -> None:
    """As `git diff --stat` does: a line a file, a line in the end."""
    names = [shown_path(change.path) for change in found.files]
    width = min(max(map(len, names), default=0), 60)
    for name, change in zip(names, found.files, strict=True):
        print(f" {name:<{width}} | {describe(change)}")
    for change_ in found.config:
        print(f" {change_.field} | {_value(change_.old)} → {_value(change_.new)}")
    if found.empty:
        return
    counts = {kind: sum(c.change == kind for c in found.files) for kind in ("changed", "added", "removed")}
    more = sum(max(c.new_size - c.old_size, 0) for c in found.files)
    less = sum(max(c.old_size - c.new_size, 0) for c in found.files)
    parts = [f"{n} {'file' if n == 1 else 'files'} {kind}" for kind, n in counts.items() if n]
    parts += [f"{more} bytes more"] if more else []
    parts += [f"{less} bytes less"] if less else []
    parts += [f"{len(found.config)} config values"] if found.config else []
    if found.old_layers or found.new_layers:
        parts.append(f"{found.same_layers} of {found.old_layers} and {found.new_layers} layers the same")
    print(" " + ", ".join(parts))


def describe(change: FileChange) -> str:
    """What of a file differs, in a line."""
    if change.change != "changed":
        size = change.new_size if change.change == "added" else change.old_size
        return f"{change.change}, {size} bytes" if size else change.change
    return ", ".join(
        f.field if f.field == "content" else f"{f.field} {_value(f.old)} → {_value(f.new)}" for f in change.fields
    )


def print_changes(changes: Iterable[Change]) -> None:
    """What a container has changed, a line each, as `docker diff` prints it."""
    letters = {"add": "A", "modify": "C", "delete": "D"}
    for change in sorted(changes, key=lambda change: change.path):
        print(f"{letters[change.kind]} /{shown_path(change.path)}")


def shown_path(path: bytes) -> str:
    """A path that no byte in it makes more than a word on a line."""
    text = path.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _value(value: object) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"
