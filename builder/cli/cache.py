"""`pybuild cache ls|du|tree|prune|audit`: the step cache and the cache mounts."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from typing import TYPE_CHECKING

from builder.cli import build
from builder.cli.actions import end_actions
from builder.cli.buildrequest import make_request
from builder.cli.options import registry_options, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from builder.solve.cachelist import CachedStep, CacheMount
    from layers.store import Store

ACTIONS = ("ls", "du", "tree", "prune", "audit")
_OF_ALL = frozenset({"root", "debug", "help", "json"})
_OF_PRUNE = frozenset({"all", "mounts"})


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=ACTIONS, help="list, sum up, draw, empty, or check by running cached steps again")
    build.configure(verb, parser)
    add("--json", action="store_true", help="print JSON")
    add("--sample", type=int, default=0, metavar="N", help="audit: this many of the found steps (default: all)")
    add("--seed", type=int, default=None, metavar="N", help="audit: choose the same sample again")
    add("--all", "-a", action="store_true", help="prune: also the steps that named images are made of")
    add("--mounts", action="store_true", help="prune: also the contents of cache mounts")
    parser.description = f"{parser.description or ''} `audit` takes the context and the flags of a build."
    end_actions(parser)


def usage(verb: str) -> list[str]:
    return ["|".join(ACTIONS[:-1]), "audit [CONTEXT]"]


def _check(options: Namespace) -> None:
    """Raises: UsageError for a flag or a context that the action does not take."""
    auditing = options.action == "audit"
    if options.context and not auditing:
        raise UsageError(f"cache {options.action} takes no {options.context!r}")
    for dest, (flag, default) in options.known_flags.items():
        own = dest not in _OF_PRUNE if auditing else options.action == "prune" and dest in _OF_PRUNE
        if not own and dest not in _OF_ALL and getattr(options, dest) != default:
            raise UsageError(f"{flag} is not a flag of `cache {options.action}`", hint="see `pybuild cache --help`")


def run(verb: str, options: Namespace) -> int:
    from builder import api

    _check(options)
    root = store_root(options)
    if options.action == "audit":
        return _audit(options)
    api.prepare_namespaces()
    with api.open_store(root) as store:
        if options.action == "prune":
            return _prune(store, options)
        from builder.solve.cachelist import draw_tree, list_mounts, list_steps

        steps, mounts = list_steps(store), list_mounts(store)
        if options.json:
            print(
                json.dumps({"steps": [s._asdict() for s in steps], "mounts": [m._asdict() for m in mounts]}, indent=2)
            )
        elif options.action == "tree":
            print("\n".join(draw_tree(steps)))
        elif options.action == "ls":
            _list(steps, mounts)
        else:
            print(f"{len(steps)} steps: {sum(s.bytes for s in steps)} bytes")
            print(f"{len(mounts)} cache mounts: {sum(m.bytes for m in mounts)} bytes")
    return 0


def _list(steps: Sequence[CachedStep], mounts: Sequence[CacheMount]) -> None:
    now = time.time_ns()
    print(f"{'KEY':<12}  {'AGE':>8}  {'USED':>8}  {'BYTES':>12}  STEP")
    for step in steps:
        age, used = (_age(now - moment) for moment in (step.created_ns, step.used_ns))
        print(f"{step.keys[0][:12]}  {age:>8}  {used:>8}  {step.bytes:>12}  {step.name}")
    for mount in mounts:
        print(f"{mount.directory[:12]}  {'':>8}  {_age(now - mount.used_ns):>8}  {mount.bytes:>12}  cache mount")


def _age(ns: int) -> str:
    seconds = max(0, ns) // 10**9
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _prune(store: Store, options: Namespace) -> int:
    from builder.solve.cachelist import list_mounts
    from layers.trees import remove_tree

    report = store.prune(all=options.all)
    freed = report.bytes
    removed = 0
    if options.mounts:
        for mount in list_mounts(store):
            remove_tree(f"{store.root}/cachemounts/{mount.directory}")
            freed += mount.bytes
            removed += 1
    print(
        f"removed {report.records} records, {report.snapshots} snapshots, {removed} cache mounts: {freed} bytes freed"
    )
    return 0


def _audit(options: Namespace) -> int:
    from builder import api
    from builder.cli.progress import make_progress

    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    api.prepare_namespaces()
    with ExitStack() as stack:
        request = make_request(options, stack)
        with make_progress("quiet", sys.stderr, {}) as progress:
            results = api.audit_cache(
                request,
                root=store_root(options),
                registry=registry_options(options),
                events=progress,
                sample=options.sample,
                seed=seed,
            )
    if options.json:
        print(json.dumps({"seed": seed, "steps": [r._asdict() for r in results]}, indent=2))
    else:
        for result in results:
            print(f"{'differs' if result.differences else 'same':<8} {result.name}")
            for line in result.differences:
                print(f"         {line}")
        print(f"{len(results)} steps run again, {sum(bool(r.differences) for r in results)} differ (seed {seed})")
    return 1 if any(result.differences for result in results) else 0
