"""The trace of a build, as OTLP's JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builder.solve.report import StepReport
from builder.solve.trace import trace

REPORTS = (
    StepReport(0, "FROM base", "", (), cached=True),
    StepReport(
        1,
        "RUN one",
        "a",
        (0,),
        False,
        1_000,
        5_000_001_000,
        {"sandbox": 4.0, "compress": 2.0, "push": 1.0},
        3.5,
        0.5,
        9,
    ),
)
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def spans(traceparent: str = "") -> list[dict[str, Any]]:
    ids = iter(range(1, 100))
    text = trace(REPORTS, "1.2", random=lambda n: next(ids).to_bytes(n, "big"), traceparent=traceparent)
    (resource,) = json.loads(text)["resourceSpans"]
    assert {"key": "service.name", "value": {"stringValue": "pybuild"}} in resource["resource"]["attributes"]
    (scope,) = resource["scopeSpans"]
    found: list[dict[str, Any]] = scope["spans"]
    return found


def test_steps_are_in_the_build_and_phases_in_steps() -> None:
    build, step, *phases = spans()
    assert [s["name"] for s in (build, step, *phases)] == ["build", "RUN one", "sandbox", "compress", "push"]
    assert "parentSpanId" not in build
    assert step["parentSpanId"] == build["spanId"]
    assert {s["parentSpanId"] for s in phases} == {step["spanId"]}
    assert len({s["spanId"] for s in (build, step, *phases)}) == 5
    assert len({s["traceId"] for s in (build, step, *phases)}) == 1
    assert phases[0]["startTimeUnixNano"] == "1000"
    assert phases[1]["startTimeUnixNano"] == step["endTimeUnixNano"], "what goes on behind later steps begins then"
    assert build["endTimeUnixNano"] == "8000001000"
    assert {"key": "process.cpu.user_s", "value": {"doubleValue": 3.5}} in step["attributes"]
    assert {"key": "pybuild.steps.cached", "value": {"intValue": "1"}} in build["attributes"]


def test_a_build_is_part_of_its_callers_trace() -> None:
    build, step, *_ = spans(PARENT)
    assert build["traceId"] == step["traceId"] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert build["parentSpanId"] == "00f067aa0ba902b7"


@pytest.mark.parametrize("parent", ["", "x", PARENT[:-3], PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32)])
def test_what_is_no_parent_counts_as_none(parent: str) -> None:
    assert "parentSpanId" not in spans(parent)[0]


def test_nothing_ran() -> None:
    document = json.loads(trace(REPORTS[:1], "1", random=lambda n: b"\1" * n))
    assert len(document["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 1
