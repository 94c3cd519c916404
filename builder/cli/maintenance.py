"""`pybuild prune`, `du` and `fsck`: what the local store takes up, and whether it is sound."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.images import human_size, print_table
from builder.cli.options import duration, size, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from layers.prune import UsageReport
    from layers.store import Store


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "prune":
            add("-a", "--all", action="store_true", help="also the cached steps that named images are made of")
            add("-f", "--force", action="store_true", help="do not ask")
            add("--filter", action="append", default=[], metavar="until=TIME|label=KEY[=VALUE]",
                help="only what was last used (images: made) before TIME: a duration, a date, seconds since the epoch;"
                " labels choose images without a name")  # fmt: skip
            add("--keep-storage", "--max-used-space", type=size, metavar="SIZE",
                help="forget the least recently used steps, until the store takes no more than that")  # fmt: skip
            add("--min-free-space", type=size, metavar="SIZE", help="the same, until the disk has that much free")
            add("--keep-duration", type=duration, metavar="DURATION", help="keep what was used since then")
            add("--json", action="store_true", help="print JSON")
        case "du":
            add("-v", "--verbose", action="store_true", help="each blob and snapshot")
            add("--json", action="store_true", help="print JSON")
        case "fsck":
            add("--repair", action="store_true", help="remove what cannot be trusted, derive what can be derived")
            add("--snapshots", action="store_true", help="also compare unpacked trees with their layers, file by file")
            add("--json", action="store_true", help="print JSON")
            add("-q", "--quiet", action="store_true", help="the exit status alone")


def run(verb: str, options: Namespace) -> int:
    from builder import api

    root = store_root(options)
    api.prepare_namespaces()  # an ordinary user's snapshots belong to subordinate ids
    if verb == "fsck":
        return _fsck(options)
    with api.open_store(root) as store:
        return _prune(store, options) if verb == "prune" else _du(store, options)


def make_room(root: Path) -> None:
    """Automatic gc before something is written: PYBUILD_GC_KEEP is what the store may take, PYBUILD_GC_MIN_FREE
    what the disk shall have free. Nothing is done, nor loaded, where neither is set. Raises: UsageError.
    """
    limits = {name: os.environ.get(name) for name in ("PYBUILD_GC_KEEP", "PYBUILD_GC_MIN_FREE")}
    if not any(limits.values()):
        return
    sizes: dict[str, int | None] = {}
    for name, text in limits.items():
        try:
            sizes[name] = size(text) if text else None
        except ArgumentTypeError as e:
            raise UsageError(f"{name}: {e}") from e
    from builder import api

    quota = sizes["PYBUILD_GC_KEEP"]
    with api.open_store(root) as store:
        store.make_room(min_free_bytes=sizes["PYBUILD_GC_MIN_FREE"] or 0, max_bytes=quota)


def _prune(store: Store, options: Namespace) -> int:
    from builder.images import prune_images

    until_ns, labels = _filters(options)
    if not options.force and not _agreed(options):
        return 1
    images = [] if labels is None else prune_images(store, until_ns=until_ns, matches=labels)
    keep = options.keep_storage
    if options.min_free_space:
        status = os.statvfs(store.root)
        lacking = max(0, options.min_free_space - status.f_bavail * status.f_frsize)
        limit = max(0, store.usage().total_bytes - lacking)
        keep = limit if keep is None else min(keep, limit)
    report = store.prune(all=options.all, until_ns=until_ns, keep_bytes=keep)
    if options.json:
        document = {"images": images, "records": report.records, "blobs": report.blobs, "downloads": report.downloads}
        print(json.dumps({**document, "snapshots": report.snapshots, "bytes": report.bytes}))
        return 0
    for name in images:
        print(f"untagged image {name.lstrip('@')}")
    print(
        f"removed {report.records} cached steps, {report.snapshots} snapshots, {report.blobs} blobs, "
        f"{report.downloads} downloads: "
        f"{human_size(report.bytes)} freed"
    )
    return 0


def _agreed(options: Namespace) -> bool:
    """Whether the user says so; without a terminal to ask on, docker's way is to refuse."""
    if not sys.stdin.isatty():
        raise UsageError("prune asks before it removes anything, and there is no terminal", hint="add --force")
    what = "all cached steps" if options.all else "cached steps that are in no named image"
    print(f"This removes {what} and images without a name. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _filters(options: Namespace) -> tuple[int | None, Callable[[dict[str, str]], bool] | None]:
    """`until` in nanoseconds and what the labels of images must be; None for "no image". Raises: UsageError."""
    from builder.cli.images import parse_time

    until: int | None = None
    wanted: list[tuple[str, bool]] = []
    for text in options.filter:
        key, separator, value = text.partition("=")
        if not separator or not value:
            raise UsageError(f"--filter {text!r}: expected KEY=VALUE")
        match key:
            case "until" | "unused-for":
                moment = parse_time(value, f"--filter {text}")
                until = moment if until is None else min(until, moment)
            case "label" | "label!":
                wanted.append((value, key == "label"))
            case _:
                raise UsageError(f"--filter {text!r}: unknown filter", hint="there are until=, label= and label!=")
    if options.keep_duration is not None:
        moment = time.time_ns() - int(options.keep_duration * 10**9)
        until = moment if until is None else min(until, moment)

    def matches(labels: dict[str, str]) -> bool:
        return all(_has(labels, text) is must for text, must in wanted)

    return until, matches


def _has(labels: dict[str, str], text: str) -> bool:
    key, separator, value = text.partition("=")
    return key in labels and (not separator or labels[key] == value)


def _du(store: Store, options: Namespace) -> int:
    from builder.images import image_usage

    report = store.usage()
    images = image_usage(store, report)
    if options.json:
        print(json.dumps(_du_document(report, [image._asdict() for image in images]), indent=2))
        return 0
    if options.verbose:
        rows = [["KIND", "ID", "SIZE", "KEPT BY", "LAST USED"]]
        for item in sorted(report.items, key=lambda i: -i.bytes):
            used = "" if item.used_ns is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used_ns / 1e9))
            rows.append([item.kind, item.id, human_size(item.bytes), item.state, used])
        print_table(rows)
        print()
    if images:
        print_table(
            [["IMAGE", "SIZE", "SHARED", "UNIQUE"]]
            + [[i.name, *map(human_size, (i.bytes, i.shared_bytes, i.unique_bytes))] for i in images]
        )
        print()
    table = [["WHAT", "COUNT", "SIZE", "RECLAIMABLE"]]
    for kind in ("blob", "snapshot"):
        items = [item for item in report.items if item.kind == kind]
        free = sum(item.bytes for item in items if item.state != "named")
        table.append([f"{kind}s", str(len(items)), human_size(sum(i.bytes for i in items)), human_size(free)])
    table.append(["other", "", human_size(report.other_bytes), ""])
    table.append(["total", "", human_size(report.total_bytes), human_size(report.reclaimable_bytes)])
    print_table(table)
    return 0


def _du_document(report: UsageReport, images: list[dict[str, object]]) -> dict[str, object]:
    return {
        "total": report.total_bytes,
        "reclaimable": report.reclaimable_bytes,
        "other": report.other_bytes,
        "images": images,
        "items": [item._asdict() for item in report.items],
    }


def _fsck(options: Namespace) -> int:
    from layers.fsck import fsck

    report = fsck(store_root(options), repair=options.repair, snapshots=options.snapshots)
    if options.json:
        document = {**report._asdict(), "problems": [p._asdict() for p in report.problems], "clean": report.clean}
        print(json.dumps(document, indent=2))
    elif not options.quiet:
        for problem in report.problems:
            done = " (repaired)" if problem.repaired else ""
            print(f"{problem.kind} {problem.subject}: {problem.what}{done}")
        print(
            f"{report.blobs} blobs of {human_size(report.bytes)}, {report.snapshots} snapshots, {report.names} names: "
            + ("sound" if report.clean else f"{sum(not p.repaired for p in report.problems)} problems")
        )
        if not report.clean:
            print("hint: `pybuild fsck --repair` removes what cannot be trusted", file=sys.stderr)
    return 0 if report.clean else 1
