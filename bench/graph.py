#!/usr/bin/env python3
"""Measure the build graph by itself: how long planning takes, and how its cost grows.

  bench/graph.py [--stages N] [--steps N]

A Containerfile of N stages, some built on each other and copying from each other, is parsed, planned,
keyed and looked up in an empty store, and its steps are scheduled without running them. Needs nothing:
no root, no registry.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from builder.frontend.instructions import parse_containerfile  # noqa: E402
from builder.frontend.source import SourceFile  # noqa: E402
from builder.plan.graph import CopyOp, RunOp  # noqa: E402
from builder.plan.planner import plan  # noqa: E402
from builder.plan.request import BuildRequest  # noqa: E402
from builder.solve import cachekey  # noqa: E402
from builder.solve.scheduler import Stop, run_graph  # noqa: E402
from layers.store import Store  # noqa: E402


class _NoImages:
    """The Containerfile has no base but `scratch`."""

    def resolve_image(self, name: str, platform: object) -> object:
        raise AssertionError(name)

    resolve_layout = resolve_image


def containerfile(stages: int, steps: int) -> str:
    lines: list[str] = []
    for stage in range(stages):
        lines.append(f"FROM {'scratch' if stage % 10 == 0 else f's{stage - 1}'} AS s{stage}")
        for step in range(steps):
            copied = step == 0 and stage > 20
            lines.append(f"COPY --from=s{stage - 13} /f0 /g" if copied else f"RUN echo {stage} {step} > /f{step}")
    lines.append("FROM scratch")
    lines += [f"COPY --from=s{stage} /f1 /x{stage}" for stage in range(stages)]
    return "\n".join(lines) + "\n"


def measure(stages: int, steps: int) -> dict[str, float]:
    """Seconds of each phase."""
    source = SourceFile("Containerfile", containerfile(stages, steps))
    request = BuildRequest(containerfile=source, context=None)
    times: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        times[name] = now - began
        began = now

    parsed = parse_containerfile(source)
    lap("parse")
    graph = plan(request, parsed, _NoImages())  # type: ignore[arg-type]
    lap("plan")
    keys: list[str] = []
    for step in graph.steps:
        parent = None if step.parent is None else keys[step.parent]
        inputs = [keys[i] for i in step.inputs]
        if isinstance(step.op, RunOp):
            keys.append(cachekey.run_key(step.op, request.run, parent, inputs))
        else:
            assert isinstance(step.op, CopyOp)
            keys.append(cachekey.copy_key(step.op, parent, inputs, None))
    lap("keys")
    with tempfile.TemporaryDirectory() as place, Store.open(Path(place)) as store:
        began = time.perf_counter()
        store.cache.get_many(keys)
        lap("look up")
    waits = {s.number: [i for i in (s.parent, *s.inputs) if i is not None] for s in graph.steps}
    stop = Stop(lambda: False)
    run_graph(waits, lambda _: None, jobs=2, stop=stop)
    stop.close()
    lap("schedule")
    return {"steps": len(graph.steps), **times, "in all": sum(times.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10, help="of each stage")
    options = parser.parse_args()
    for stages in (options.stages // 4, options.stages // 2, options.stages):
        result = measure(stages, options.steps)
        phases = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in result.items() if name != "steps")
        print(f"{stages} stages, {result['steps']:.0f} steps: {phases}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
