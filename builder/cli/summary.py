"""What people are told of a build in lines: before it the plan (`plan`, `--explain`), at its end the `--summary`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.cli.progress import format_bytes, sanitise, short_name
from builder.cli.progress_tty import fit, text_width
from builder.solve.report import PHASES, StepReport

if TYPE_CHECKING:
    from builder.building import BuildResult
    from builder.solve.explain import BuildPlan

_REASONS = 8
"""So many are told of a step; a directory that was exchanged would have thousands."""
_MAX_NAME = 60
_NAME_SHARE = 0.4
"""Of a terminal's width: what a name has at least, however much there is to tell of its step."""
_TOLD_S = 0.005
"""A phase that took less is left out."""


def plan_lines(plan: BuildPlan) -> list[str]:
    """Every step with its status, each miss with what changed, and what there is to fetch."""
    words = {"hit": "HIT ", "run": "MISS", "content": "MAY "}
    lines: list[str] = []
    for step in plan.steps:
        notes = [f"{format_bytes(step.fetch_bytes)} to fetch"] if step.fetch_bytes else []
        notes += [step.emulated] if step.emulated else []
        lines.append(f"{words[step.status]} {step.name}" + "".join(f"  ({note})" for note in notes))
        lines += [f"       {reason}" for reason in step.reasons[:_REASONS]]
        if len(step.reasons) > _REASONS:
            lines.append(f"       and {len(step.reasons) - _REASONS} more")
    may = plan.count("content")
    decided = f", {may} as their contents decide" if may else ""
    fetched = f"{format_bytes(plan.fetch_bytes)} to fetch" if plan.fetch_bytes else "nothing to fetch"
    lines = [sanitise(line) for line in lines]
    return [*lines, f"{plan.count('hit')} found, {plan.count('run')} to run{decided}; {fetched}"]


def summary(result: BuildResult, columns: int | None = None) -> list[str]:
    """The lines, none longer than `columns` if that is given (a terminal's width)."""
    ran = [r for r in result.steps if not r.cached]
    found = len(result.steps) - len(ran)
    lines = [f"{len(ran)} step{'s' * (len(ran) != 1)} run, {found} from the cache, in {result.wall_s:.1f} s"]
    names = [short_name(r.name) for r in ran]
    details = [_details(r) for r in ran]
    width = min(_MAX_NAME, max(map(text_width, names), default=0))
    if columns is not None:
        room = columns - 1 - len(f"{0:9.2f}s    ") - max(map(len, details), default=0)
        width = max(min(width, room), min(width, int(columns * _NAME_SHARE)))
    for report, name, told in zip(ran, names, details, strict=True):
        shown = fit(name, width, "…")
        padding = " " * (width - text_width(shown))
        lines.append(f"{report.wall_s:9.2f}s  {shown}{padding}  {told}".rstrip())
    if result.fetched_bytes or result.sent_bytes:
        lines.append(f"  {format_bytes(result.fetched_bytes)} fetched, {format_bytes(result.sent_bytes)} sent")
    lines += [f"  {host}: {limit.remaining} of {limit.limit} pulls left" for host, limit in result.pulls_left]
    return lines if columns is None else [fit(line, columns - 1, "…") for line in lines]


def _details(report: StepReport) -> str:
    parts = [", ".join(f"{p} {report.phases[p]:.2f}" for p in PHASES if report.phases.get(p, 0) >= _TOLD_S)]
    if report.max_rss_bytes:
        used = f"cpu {report.user_s + report.system_s:.2f}, memory {format_bytes(report.max_rss_bytes)}"
        if report.read_bytes + report.written_bytes >= 1_000_000:
            used += f", disk {format_bytes(report.read_bytes)} read, {format_bytes(report.written_bytes)} written"
        parts.append(used)
    if report.layer_bytes:
        parts.append(f"layer {format_bytes(report.layer_bytes)}")
    return "; ".join(filter(None, parts))
