"""The chart of a build."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from builder.solve.report import PHASES, StepReport
from builder.solve.timeline import draw

S = 1_000_000_000


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in ET.fromstring(svg).iter() if t.tag.endswith("}text")]


def test_a_bar_lies_within_the_picture_and_its_colours_are_explained() -> None:
    run = StepReport(1, "RUN <make> & more", "", (), False, S, 11 * S, {"sandbox": 6.0, "compress": 3.0})
    svg = draw([StepReport(0, "FROM x", "", (), cached=True), run])
    root = ET.fromstring(svg)
    width = float(root.attrib["viewBox"].split()[2])
    assert texts(svg)[0] == "1 step run in 13.00 s, 1 from the cache"
    # What no phase accounts for has a colour, too.
    assert {"sandbox", "other", "compress", "RUN <make> & more", "10.00 s"} <= {*texts(svg)}
    bars = [e for e in root.iter() if e.tag.endswith("}rect") and "%" not in e.attrib["width"]]
    ends = [float(b.attrib["x"]) + float(b.attrib["width"]) for b in bars]
    assert max(ends) < width - 40
    drawn = [b for b in bars if float(b.attrib["y"]) > 60]
    assert [round(float(b.attrib["width"]) / float(drawn[0].attrib["width"]), 2) for b in drawn] == [1, 0.67, 0.5]


def test_every_phase_is_drawn() -> None:
    svg = draw([StepReport(0, "x", "", (), False, S, 20 * S, dict.fromkeys(PHASES, 1.0))])
    assert {*PHASES} <= {*texts(svg)}


def test_nothing_run() -> None:
    svg = draw([StepReport(0, "FROM x", "", (), cached=True)])
    assert "every step was in the cache" in texts(svg)
