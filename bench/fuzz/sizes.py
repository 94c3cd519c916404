"""How long large Containerfiles take to read and expand: `python bench/fuzz/sizes.py`.

The target is a second for each: 10,000 instructions, a line of 1 MB, 100 stages, and the shapes that
would hurt a careless parser.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.instructions import parse_containerfile
from builder.frontend.lint import lint
from builder.frontend.source import SourceFile

MIXED = 'RUN echo $A && true\nENV A=$A B="$A x"\nCOPY --chown=a:b a$A b /c/\nLABEL x=y\n'
SHAPES = {
    "10,000 instructions": "FROM x\n" + MIXED * 2500,
    "10,000 RUN --mount": "FROM x\n" + "RUN --mount=type=cache,target=/x,sharing=locked echo $A\n" * 10_000,
    "RUN of 1 MB": "FROM x\nRUN " + "x " * 500_000,
    "JSON of 1 MB": 'FROM x\nRUN ["' + 'x","' * 250_000 + '"]',
    "ENV of 1 MB, one value": 'FROM x\nENV A="' + "$A " * 330_000 + '"',
    "ENV of 1 MB, many": "FROM x\nENV " + "A=b " * 250_000,
    "flags of 1 MB": "FROM x\nCOPY " + "--exclude=b " * 80_000 + " a b",
    "continuation of 250,000 lines": "FROM x\nRUN a \\\n" + "b \\\n" * 250_000 + "c",
    "heredoc of 200,000 lines": "FROM x\nCOPY <<EOF /x\n" + "b$A \n" * 200_000 + "EOF",
    "3,000 heredocs": "FROM x\nCOPY " + "<<EOF " * 3000 + "/x\n" + "EOF\n" * 3000,
    "100 stages": "".join(f"FROM {f's{i - 1}' if i else 'x'} AS s{i}\nCOPY a b\n" for i in range(100)),
}


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
        times = f"parse {parsed - start:5.2f}  expand {expanded - parsed:5.2f}  lint {linted - expanded:5.2f} s"
        print(f"{name:32} {times}  peak {peak >> 20:4} MiB")
    matcher = IgnoreMatcher.parse("*.md\n**/*.py[co]\n**/*.log\n!keep.log\n.git\nnode_modules/**\ntemp?\nbuild/*")
    paths = [f"d{i % 50}/e{i % 700}/f{i}.{'log' if i % 3 else 'txt'}" for i in range(100_000)]
    start = time.perf_counter()
    ignored = sum(map(matcher.match, paths))
    print(f"{'100,000 paths, 8 patterns':32} {time.perf_counter() - start:5.2f} s ({ignored} ignored)")


if __name__ == "__main__":
    main()
