"""What the steps of a build come to, and the cache records that say so for the next build."""

from __future__ import annotations

import json
from collections.abc import Mapping

from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.errors import StepError
    from builder.plan.graph import Step
    from layers.records import LayerRecord


class StepResult(NamedTuple):
    """What a step came to. `snapshot` is None for an image whose layers nobody needed yet.

    `key` is the content key, on which its users build theirs.
    """

    key: str
    snapshot: str | None
    created_ns: int
    cached: bool
    layer: LayerRecord | None = None
    """Of a result that a remote cache has and whose files nobody needed yet."""


class FailedStep(NamedTuple):
    """A RUN that failed, and the snapshot of what it left; it has no cache record."""

    step: Step
    snapshot: str
    error: StepError


def to_record(key: str, created_ns: int) -> bytes:
    """The cache record of a result with that content key."""
    return json.dumps({"key": key, "created_ns": created_ns}).encode()


def from_record(record: bytes | Mapping[str, object], snapshot: str | None) -> StepResult | None:
    """A cache record as a result; None if it is of another kind or version."""
    if snapshot is None:
        return None
    try:
        doc = json.loads(record) if isinstance(record, (bytes, str)) else record
        return StepResult(str(doc["key"]), snapshot, int(str(doc["created_ns"])), True)
    except (ValueError, KeyError, TypeError):
        return None
