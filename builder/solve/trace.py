"""The trace of `--timeline FILE.json`: a span for the build, each step and each phase, in OTLP's JSON.

What `otelcol`'s otlpjsonfile receiver, and others that take OTLP over HTTP as JSON, read as it is. With a
`traceparent` (W3C Trace Context, as CI systems hand it on in TRACEPARENT) the build is a span of that trace.

Spec: opentelemetry-proto, trace/v1; https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from builder.solve.report import BACKGROUND, StepReport

_PARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?\Z")
_INTERNAL = 1


def trace(reports: Sequence[StepReport], version: str, *, random: Callable[[int], bytes], traceparent: str = "") -> str:
    """The document. `random` gives bytes for ids; a malformed `traceparent` counts as none, as its spec says."""
    parent = _PARENT.match(traceparent.strip())
    trace_id = parent[1] if parent else random(16).hex()
    ran = [r for r in reports if not r.cached]
    start = min((r.started_ns for r in ran), default=0)
    end = max((r.completed_ns + int(1e9 * sum(r.phases.get(n, 0) for n in BACKGROUND)) for r in ran), default=0)
    build_id = random(8).hex()

    def span(name: str, id: str, parent_id: str, begin: int, finish: int, attributes: dict[str, object]) -> object:
        document = {
            "traceId": trace_id,
            "spanId": id,
            "name": name,
            "kind": _INTERNAL,
            "startTimeUnixNano": str(begin),
            "endTimeUnixNano": str(finish),
            "attributes": [{"key": key, "value": _value(value)} for key, value in attributes.items()],
        }
        return {**document, "parentSpanId": parent_id} if parent_id else document

    counts = {"pybuild.steps.executed": len(ran), "pybuild.steps.cached": len(reports) - len(ran)}
    spans = [span("build", build_id, parent[2] if parent else "", start, end, dict(counts))]
    for report in ran:
        step_id = random(8).hex()
        attributes = {
            "pybuild.stage": report.stage,
            "pybuild.step": report.number,
            "process.cpu.user_s": report.user_s,
            "process.cpu.system_s": report.system_s,
            "process.memory.max_rss": report.max_rss_bytes,
            "process.io.read_bytes": report.read_bytes,
            "process.io.written_bytes": report.written_bytes,
            "pybuild.layer.size": report.layer_bytes,
        }
        spans.append(span(report.name, step_id, build_id, report.started_ns, report.completed_ns, attributes))
        at = report.started_ns
        for phase, seconds in report.phases.items():
            if phase in BACKGROUND:
                at = max(at, report.completed_ns)
            until = at + int(seconds * 1e9)
            spans.append(span(phase, random(8).hex(), step_id, at, until, {}))
            at = until
    resource = {"service.name": "pybuild", "service.version": version}
    scope = {"scope": {"name": "pybuild"}, "spans": spans}
    attributes_of = [{"key": key, "value": _value(value)} for key, value in resource.items()]
    return json.dumps({"resourceSpans": [{"resource": {"attributes": attributes_of}, "scopeSpans": [scope]}]})


def _value(value: object) -> dict[str, object]:
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}
