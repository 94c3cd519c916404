"""The chart of `--timeline`: one bar a step over time, coloured by phase, as SVG alone or in an HTML page; or a trace.

No script, no font and no file from elsewhere: it opens in any browser, and in a CI's artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from builder.errors import ContextError
from builder.solve.report import BACKGROUND as _BACKGROUND
from builder.solve.report import StepReport

_COLOURS = {
    "wait": "#b8b8b8", "pull": "#4e79a7", "prepare": "#9c755f", "sandbox": "#59a14f", "copy": "#76b7b2",
    "pack": "#ff9da7", "commit": "#edc948", "other": "#bab0ac", "diff": "#e15759", "compress": "#f28e2b",
    "push": "#b07aa1",
}  # fmt: skip
_ROW = 26
_TOP = 64
_LEFT = 420
"""Names end here at most: where all are shorter, the bars begin earlier."""
_CHAR = 6.6
"""What a character of a name takes, a little more than it mostly does."""
_ALL = 1180
_RIGHT = 70
"""Of the whole width, which a laptop's window shows, room for the last bar's seconds."""


def write_timeline(reports: Sequence[StepReport], path: Path, *, version: str = "", traceparent: str = "") -> None:
    """Draw the steps to `path`, an .svg or .html file, or write them as an OTLP trace (.json). Raises: ContextError."""
    if path.suffix.lower() == ".json":
        from builder.solve.trace import trace

        text = trace(reports, version, random=os.urandom, traceparent=traceparent) + "\n"
    else:
        text = draw(reports)
    if path.suffix.lower() in {".html", ".htm"}:
        text = (
            "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>build timeline</title>"
            f"<style>body{{margin:8px;background:#fff}}</style></head><body>\n{text}\n</body></html>\n"
        )
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as e:
        raise ContextError(f"cannot write {path}: {e.strerror}") from e


def draw(reports: Sequence[StepReport]) -> str:
    """The chart as an SVG document."""
    ran = [r for r in reports if not r.cached]
    cached = len(reports) - len(ran)
    start = min((r.started_ns for r in ran), default=0)
    end = max((r.completed_ns + int(_background(r) * 1e9) for r in ran), default=0)
    total_s = max((end - start) / 1e9, 1e-3)
    left = min(_LEFT, 24 + int(_CHAR * max((len(_name(r)) for r in ran), default=0)))
    scale = (_ALL - left - _RIGHT) / total_s
    height = _TOP + _ROW * max(1, len(ran)) + 40
    title = f"{len(ran)} step{'s' * (len(ran) != 1)} run in {total_s:.2f} s, {cached} from the cache"
    # In a narrower window it shrinks as a whole; in a wider one letters keep their size.
    size = f'viewBox="0 0 {_ALL} {height}" style="width:100%;max-width:{_ALL}px;height:auto"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="15" font-weight="bold">{title}</text>',
        _legend(ran),
        *_axis(total_s, left, scale, height),
    ]
    for row, report in enumerate(sorted(ran, key=lambda r: (r.started_ns, r.number))):
        out += _bar(report, left, _TOP + row * _ROW, start, scale)
    if not ran:
        out.append(f'<text x="10" y="{_TOP + 18}">every step was in the cache</text>')
    return "\n".join([*out, "</svg>"])


def _background(report: StepReport) -> float:
    return sum(report.phases.get(name, 0.0) for name in _BACKGROUND)


def _legend(ran: Sequence[StepReport]) -> str:
    used = [name for name in _COLOURS if any(_drawn(report).get(name, 0) > 0.001 for report in ran)]
    parts = []
    for at, name in enumerate(used):
        x = 10 + at * 92
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{_COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 17}" y="42">{name}</text>')
    if any(name in _BACKGROUND for name in used):
        told = "thin: goes on behind later steps"
        parts.append(f'<text x="{_ALL - 10}" y="42" text-anchor="end" fill="#666">{told}</text>')
    return "".join(parts)


def _drawn(report: StepReport) -> dict[str, float]:
    """The seconds of each phase in the order of the bar, what no phase accounts for among them."""
    front = {n: s for n, s in report.phases.items() if n not in _BACKGROUND}
    front["other"] = max(0.0, report.wall_s - sum(front.values()))
    return front | {n: report.phases[n] for n in _BACKGROUND if n in report.phases}


def _name(report: StepReport) -> str:
    name = " ".join(report.name.split())
    return name if len(name) <= 62 else name[:61] + "…"


def _axis(total_s: float, left: int, scale: float, height: int) -> list[str]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 1e9) if total_s / s <= 12)
    lines = []
    for number in range(int(total_s / step) + 1):
        x = left + number * step * scale
        lines.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - 30}" stroke="#e4e4e4"/>'
            f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle" fill="#666">{number * step:g} s</text>'
        )
    return lines


def _bar(report: StepReport, left: int, y: int, start: int, scale: float) -> list[str]:
    name = " ".join(report.name.split())
    shown = _name(report)
    told = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in report.phases.items())
    title = f"{name}\n{report.wall_s:.3f} s: {told}"
    out = [
        f'<g><title>{escape(title)}</title><text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(shown)}</text>'
    ]
    x = left + (report.started_ns - start) / 1e9 * scale
    begin = x
    for phase, seconds in _drawn(report).items():
        # What goes on behind the next steps is thinner, from the step's end.
        top, height = (y + 8, 6) if phase in _BACKGROUND else (y + 4, 14)
        out.append(_rect(x, top, seconds * scale, height, _COLOURS[phase]))
        x += seconds * scale
    out.append(f'<text x="{max(x, begin + 1) + 5:.1f}" y="{y + 16}" fill="#444">{report.wall_s:.2f} s</text></g>')
    return out


def _rect(x: float, y: int, width: float, height: int, colour: str) -> str:
    if width <= 0:
        return ""
    return f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.6):.1f}" height="{height}" fill="{colour}"/>'
