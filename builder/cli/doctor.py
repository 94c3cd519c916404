"""`pybuild doctor`: which kinds of sandbox work here, and what would grant the others."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import store_root

if TYPE_CHECKING:
    from builder.sandbox.probe import Report


def configure(verb: str, parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(verb: str, options: Namespace) -> int:
    """Status 0 where a build can run, else 1."""
    from builder.sandbox.probe import probe

    report = probe(_existing(store_root(options)))
    print(json.dumps(_document(report), indent=2) if options.json else "\n".join(_lines(report)))
    return 0 if report.chosen else 1


def _existing(path: Path) -> Path:
    """The store, or where it would be made: its file system is what counts."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.is_dir())


def _document(report: Report) -> dict[str, object]:
    return {
        "chosen": report.chosen.tier if report.chosen else None,
        "tiers": [tier._asdict() for tier in report.tiers],
        "facts": [fact._asdict() for fact in report.facts],
    }


def _lines(report: Report) -> list[str]:
    lines = ["isolation of RUN, best first:"]
    for tier in report.tiers:
        mark = "chosen" if tier == report.chosen else "works" if tier.works else "no"
        lines.append(f"  {mark:<7} {tier.title}")
        if not tier.works and tier.missing:
            lines.append(f"          {tier.missing}")
        if not tier.works and tier.grant:
            lines.append(f"          to get it: {tier.grant}")
    lines.append("this machine:")
    for fact in report.facts:
        lines.append(f"  {'yes' if fact.works else 'no':<7} {fact.name}: {fact.detail}")
        if not fact.works and fact.grant:
            lines.append(f"          to get it: {fact.grant}")
    if report.chosen is None:
        lines.append("no build with RUN is possible here")
    return lines
