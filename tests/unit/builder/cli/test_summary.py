"""The end of a build in lines: aligned, and within the terminal."""

from __future__ import annotations

import pytest

from builder.building import BuildResult
from builder.cli.progress_tty import text_width
from builder.cli.summary import plan_lines, summary
from builder.solve.explain import BuildPlan, Reason, StepPlan
from builder.solve.report import StepReport
from layers.oci import MEDIA_OCI_MANIFEST, Descriptor

S = 1_000_000_000


def step(number: int, name: str, seconds: float, **more: float) -> StepReport:
    layer = int(more.pop("layer", 0))
    rss = int(more.pop("rss", 0))
    return StepReport(
        number, name, "", (), False, 0, int(seconds * S), more, 0.25, 0.25, rss, layer_bytes=layer
    )  # fmt: skip


STEPS = (
    StepReport(0, "[1/4] FROM base", "", (), cached=True),
    step(1, "[2/4] RUN make everything there is, with many words and 漢字 \x1b[2J" + "x" * 100, 12.5, sandbox=12.0,
         compress=0.4, commit=0.001, rss=13_000_000, layer=123_456),
    step(2, "[3/4] COPY a b", 0.04, copy=0.03),
)  # fmt: skip


def result(steps: tuple[StepReport, ...] = STEPS, fetched: int = 0) -> BuildResult:
    image = Descriptor.of(b"{}", MEDIA_OCI_MANIFEST)
    return BuildResult(image, image.digest, (), 2, 1, steps, wall_s=13.24, fetched_bytes=fetched)


def test_the_lines() -> None:
    head, make, copy, moved = summary(result(fetched=1_500_000))
    assert head == "2 steps run, 1 from the cache, in 13.2 s"
    assert make.startswith("    12.50s  [2/4] RUN make everything there is")
    assert make.partition("…")[2].strip() == "sandbox 12.00, compress 0.40; cpu 0.50, memory 13.0MB; layer 123.5kB"
    assert "\x1b" not in make
    assert copy.split() == ["0.04s", "[3/4]", "COPY", "a", "b", "copy", "0.03"]
    assert moved == "  1.5MB fetched, 0B sent"
    # What each step did begins in one column.
    assert text_width(make[: make.index("sandbox")]) == copy.index("copy")
    assert summary(result(STEPS[1:2]))[0].startswith("1 step run, 0 from")


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    lines = summary(result(), columns)
    assert len(lines) == 3
    assert max(map(text_width, lines)) < columns
    assert "[2/4]" in lines[1] or columns == 20


def test_the_plan() -> None:
    many = tuple(Reason("file", f"f{n}", None, "sha256:0") for n in range(10))
    steps = (
        StepPlan(0, "FROM base", "hit", fetch_bytes=1_500_000),
        StepPlan(1, "COPY \x1b[2J. /", "run", many),
        StepPlan(2, "RUN make", "content", (Reason("ARG", "V", "1", "2"),), emulated="by qemu"),
    )
    first, copy, *files, more, run, why, last = plan_lines(BuildPlan(steps, 1_500_000))
    assert (first, copy) == ("HIT  FROM base  (1.5MB to fetch)", "MISS COPY . /")
    assert (len(files), more.strip()) == (8, "and 2 more")
    assert (run, why.strip()) == ("MAY  RUN make  (by qemu)", "ARG V: 1 -> 2")
    assert last == "1 found, 1 to run, 1 as their contents decide; 1.5MB to fetch"
    assert plan_lines(BuildPlan((), 0)) == ["0 found, 0 to run; nothing to fetch"]
