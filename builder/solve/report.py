"""What became of each step, in numbers: when it ran, how long each phase took, what it used."""

from __future__ import annotations

from collections.abc import Mapping

from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PHASES = ("wait", "pull", "prepare", "sandbox", "copy", "pack", "commit", "diff", "compress", "push")
"""In this order: waiting for another build that makes the same step; fetching and unpacking the base;
beginning the snapshot; the command; the files; files that go straight into the layer; ending the snapshot;
finding what it changed; writing its layer; sending it. The last three go on while later steps run."""


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
