"""What became of each step, in numbers: when it ran, how long each phase took, what it used."""

from __future__ import annotations

from collections.abc import Mapping

from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from registry.wire import RateLimit

PHASES = ("wait", "pull", "prepare", "sandbox", "copy", "commit", "diff", "compress", "push")
"""In this order: waiting for another build that makes the same step; fetching and unpacking the base;
beginning the snapshot; the command; the files; ending the snapshot; finding what it changed; writing
its layer; sending it. The last three go on while later steps run."""


BACKGROUND = ("diff", "compress", "push")
"""Those that go on behind later steps."""


class StepReport(NamedTuple):
    """One step that was found or run. Times in nanoseconds since the epoch, phases in seconds."""

    number: int
    name: str
    stage: str
    inputs: tuple[int, ...]
    cached: bool
    started_ns: int = 0
    completed_ns: int = 0
    phases: Mapping[str, float] = {}
    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    """By the command: what was not in the page cache, and what it changed there."""
    layer_bytes: int = 0

    @property
    def wall_s(self) -> float:
        return max(0, self.completed_ns - self.started_ns) / 1e9

    def to_json(self) -> dict[str, Any]:
        doc: dict[str, Any] = {"number": self.number, "name": self.name, "stage": self.stage, "cached": self.cached}
        doc["inputs"] = list(self.inputs)
        if not self.cached:
            doc |= {
                "started_ns": self.started_ns,
                "completed_ns": self.completed_ns,
                "wall_s": round(self.wall_s, 4),
                "phases": {name: round(self.phases[name], 4) for name in PHASES if name in self.phases},
                "user_s": round(self.user_s, 4),
                "system_s": round(self.system_s, 4),
                "max_rss_bytes": self.max_rss_bytes,
                "read_bytes": self.read_bytes,
                "written_bytes": self.written_bytes,
                "layer_bytes": self.layer_bytes,
            }
        return doc


def summary(
    reports: tuple[StepReport, ...],
    wall_s: float,
    fetched_bytes: int,
    moved_bytes: int,
    pulls_left: tuple[tuple[str, RateLimit], ...] = (),
) -> list[str]:
    """The end of a build in lines for people: what was found, what ran, and where the time went."""
    ran = [r for r in reports if not r.cached]
    lines = [f"{len(reports) - len(ran)} steps from the cache, {len(ran)} run, in {wall_s:.1f} s"]
    width = max((len(_name(r)) for r in ran), default=0)
    for r in ran:
        phases = ", ".join(f"{name} {r.phases[name]:.2f}" for name in PHASES if r.phases.get(name, 0) >= 0.005)
        usage = ""
        if r.max_rss_bytes:
            usage = f"; cpu {r.user_s + r.system_s:.2f} s, {r.max_rss_bytes >> 20} MiB"
            if r.read_bytes + r.written_bytes >= 1 << 20:
                usage += f", disk {r.read_bytes >> 20} MiB read, {r.written_bytes >> 20} MiB written"
        size = f"; layer {r.layer_bytes} bytes" if r.layer_bytes else ""
        lines.append(f"  {_name(r):<{width}}  {r.wall_s:7.2f} s  ({phases or 'nothing to speak of'}{usage}{size})")
    if fetched_bytes or moved_bytes:
        lines.append(f"  {fetched_bytes} bytes fetched, {moved_bytes} bytes sent")
    lines += [f"  {host}: {limit.remaining} of {limit.limit} pulls left" for host, limit in pulls_left]
    return lines


def _name(report: StepReport) -> str:
    name = " ".join(report.name.split())
    return name if len(name) <= 60 else name[:59] + "…"
