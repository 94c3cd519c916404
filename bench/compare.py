#!/usr/bin/env python3
"""Compare two results of bench/run.py by their ratios to the peers: `compare.py [OLD] [NEW] [--tolerance 0.25]`.

Without names: bench/baseline.json and bench/out/latest.json. Exit status 1 if a ratio became worse
by more than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def ratios(path: Path) -> dict[str, float]:
    """pybuild's time divided by the fastest peer's, per workload that has both."""
    document: dict[str, Any] = json.loads(path.read_bytes())
    found = {}
    for name, result in document["results"].items():
        peers = [value for tool, value in result["median_s"].items() if tool not in {"pybuild", "cp"}]
        if peers and "pybuild" in result["median_s"]:
            found[name] = result["median_s"]["pybuild"] / min(peers)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", default=HERE / "baseline.json")
    parser.add_argument("new", type=Path, nargs="?", default=HERE / "out" / "latest.json")
    parser.add_argument("--tolerance", type=float, default=0.25)
    options = parser.parse_args()
    old, new = ratios(options.old), ratios(options.new)
    worse = []
    for name in old.keys() & new.keys():
        change = new[name] / old[name] - 1
        mark = ""
        if change > options.tolerance:
            mark = "  WORSE"
            worse.append(name)
        print(f"{name:16} {old[name]:6.2f} -> {new[name]:6.2f}  {change:+.0%}{mark}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
