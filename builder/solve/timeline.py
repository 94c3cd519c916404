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
    "commit": "#edc948", "other": "#bab0ac", "diff": "#e15759", "compress": "#f28e2b", "push": "#b07aa1",
}  # fmt: skip
_ROW = 26
_LEFT = 420
_WIDTH = 900
_TOP = 64


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
            f"<style>body{{margin:16px;background:#fff}}</style></head><body>\n{text}\n</body></html>\n"
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
    scale = _WIDTH / total_s
    height = _TOP + _ROW * max(1, len(ran)) + 40
    title = f"{len(ran)} steps run in {total_s:.2f} s, {cached} from the cache"
    size = f'width="{_LEFT + _WIDTH + 90}" height="{height}"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="15" font-weight="bold">{title}</text>',
        _legend(ran),
        *_axis(total_s, scale, height),
    ]
    for row, report in enumerate(sorted(ran, key=lambda r: (r.started_ns, r.number))):
        out += _bar(report, _TOP + row * _ROW, start, scale)
    if not ran:
        out.append(f'<text x="10" y="{_TOP + 18}">every step was in the cache</text>')
    return "\n".join([*out, "</svg>"])


def _background(report: StepReport) -> float:
    return sum(report.phases.get(name, 0.0) for name in _BACKGROUND)


def _legend(ran: Sequence[StepReport]) -> str:
    used = [name for name in _COLOURS if any(report.phases.get(name, 0) > 0 for report in ran)]
    parts = []
    for at, name in enumerate(used):
        x = 10 + at * 92
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{_COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 17}" y="42">{name}</text>')
    return "".join(parts)


def _axis(total_s: float, scale: float, height: int) -> list[str]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 1e9) if total_s / s <= 12)
    lines = []
    for number in range(int(total_s / step) + 1):
        x = _LEFT + number * step * scale
        lines.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - 30}" stroke="#e4e4e4"/>'
            f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle" fill="#666">{number * step:g} s</text>'
        )
    return lines


def _bar(report: StepReport, y: int, start: int, scale: float) -> list[str]:
    name = " ".join(report.name.split())
    shown = name if len(name) <= 62 else name[:61] + "…"
    told = ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in report.phases.items())
    title = f"{name}\n{report.wall_s:.3f} s: {told}"
    out = [
        f'<g><title>{escape(title)}</title><text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(shown)}</text>'
    ]
    x = _LEFT + (report.started_ns - start) / 1e9 * scale
    front = {n: s for n, s in report.phases.items() if n not in _BACKGROUND}
    front["other"] = max(0.0, report.wall_s - sum(front.values()))
    begin = x
    for phase, seconds in front.items():
        out.append(_rect(x, y + 4, seconds * scale, 14, _COLOURS.get(phase, "#bab0ac")))
        x += seconds * scale
    # What goes on behind the next steps: thinner, from the step's end.
    after = x
    for phase in _BACKGROUND:
        seconds = report.phases.get(phase, 0.0)
        out.append(_rect(after, y + 8, seconds * scale, 6, _COLOURS[phase]))
        after += seconds * scale
    out.append(f'<text x="{max(after, begin + 1) + 5:.1f}" y="{y + 16}" fill="#444">{report.wall_s:.2f} s</text></g>')
    return out


def _rect(x: float, y: int, width: float, height: int, colour: str) -> str:
    if width <= 0:
        return ""
    return f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.6):.1f}" height="{height}" fill="{colour}"/>'
