"""How long large Containerfiles take to read, expand, lint and plan: `python bench/fuzz/sizes.py`.

The target is a second for each: 10,000 instructions, a line of 1 MB, 100 stages in a diamond, 200 of ten
steps, and the shapes that would hurt a careless parser or planner. The keys of all RUNs count as planning.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.instructions import Containerfile, parse_containerfile
from builder.frontend.lint import lint
from builder.frontend.source import SourceFile
from builder.plan.graph import ResolvedImage, RunOp
from builder.plan.planner import plan
from builder.plan.request import BuildRequest
from builder.solve.cachekey import run_key
from layers.oci import Platform

MIXED = 'RUN echo $A && true\nENV A=$A B="$A x"\nCOPY --chown=a:b a$A b /c/\nLABEL x=y\n'
SHAPES = {
    "10,000 instructions": "FROM scratch\n" + MIXED * 2500,
    "5,000 ARGs, each with a RUN": "FROM scratch\n" + "".join(f"ARG A{i}=x{i}\nRUN echo {i}\n" for i in range(5000)),
    "5,000 ENVs, each with a RUN": "FROM scratch\n" + "".join(f"ENV A{i}=x{i}\nRUN echo {i}\n" for i in range(5000)),
    "10,000 LABELs": "FROM scratch\n" + "".join(f"LABEL l{i}=x\n" for i in range(10_000)),
    "10,000 RUN --mount": "FROM scratch\n" + "RUN --mount=type=cache,target=/x,sharing=locked echo $A\n" * 10_000,
    "RUN of 1 MB": "FROM scratch\nRUN " + "x " * 500_000,
    "JSON of 1 MB": 'FROM scratch\nRUN ["' + 'x","' * 250_000 + '"]',
    "ENV of 1 MB, one value": 'FROM scratch\nENV A="' + "$A " * 330_000 + '"',
    "ENV of 1 MB, many": "FROM scratch\nENV " + "A=b " * 250_000,
    "flags of 1 MB": "FROM scratch\nCOPY " + "--exclude=b " * 80_000 + " a b",
    "continuation of 250,000 lines": "FROM scratch\nRUN a \\\n" + "b \\\n" * 250_000 + "c",
    "heredoc of 200,000 lines": "FROM scratch\nCOPY <<EOF /x\n" + "b$A \n" * 200_000 + "EOF",
    "3,000 heredocs": "FROM scratch\nCOPY " + "<<EOF " * 3000 + "/x\n" + "EOF\n" * 3000,
    "100 stages in a chain": "".join(f"FROM {f's{i - 1}' if i else 'scratch'} AS s{i}\nCOPY a b\n" for i in range(100)),
    "100 stages in a diamond": (
        "FROM scratch AS s0\nRUN x\n"
        + "".join(f"FROM s0 AS s{i}\nRUN y{i}\n" for i in range(1, 99))
        + "FROM s0\n"
        + "".join(f"COPY --from=s{i} / /\n" for i in range(1, 99))
    ),
    "100 stages, each from each": "".join(
        f"FROM scratch AS s{i}\n" + "".join(f"COPY --from=s{j} /a /b\n" for j in range(i)) for i in range(100)
    ),
    "200 stages of 10 steps": "".join(
        f"FROM {f's{i - 1}' if i else 'scratch'} AS s{i}\n" + "".join(f"RUN x{j}\nENV E{i}_{j}=1\n" for j in range(5))
        for i in range(200)
    ),
}


class NoImages:
    """A resolver that is not asked: all begins from scratch."""

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        raise AssertionError(name)

    resolve_layout = resolve_image


def planned(file: Containerfile) -> float:
    """Seconds that the graph and the keys of its RUNs take."""
    request = BuildRequest(containerfile=file.source, context=Path("."))
    start = time.perf_counter()
    for step in plan(request, file, NoImages()).steps:
        if isinstance(step.op, RunOp):
            run_key(step.op, request.run, None, [])
    return time.perf_counter() - start


def main() -> None:
    for name, text in SHAPES.items():
        tracemalloc.start()
        parse_containerfile(SourceFile("x", text))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        start = time.perf_counter()
        file = parse_containerfile(SourceFile("x", text))
        parsed = time.perf_counter()
        for stage in file.stages:
            for instruction in stage.instructions:
                instruction.expand({"A": "xyz"}, file.escape)
        expanded = time.perf_counter()
        lint(file)
        linted = time.perf_counter()
        times = f"parse {parsed - start:5.2f}  expand {expanded - parsed:5.2f}  lint {linted - expanded:5.2f}"
        times += f"  plan {planned(file):5.2f} s"
        print(f"{name:32} {times}  peak {peak >> 20:4} MiB")
    matcher = IgnoreMatcher.parse("*.md\n**/*.py[co]\n**/*.log\n!keep.log\n.git\nnode_modules/**\ntemp?\nbuild/*")
    paths = [f"d{i % 50}/e{i % 700}/f{i}.{'log' if i % 3 else 'txt'}" for i in range(100_000)]
    start = time.perf_counter()
    ignored = sum(map(matcher.match, paths))
    print(f"{'100,000 paths, 8 patterns':32} {time.perf_counter() - start:5.2f} s ({ignored} ignored)")


if __name__ == "__main__":
    main()
