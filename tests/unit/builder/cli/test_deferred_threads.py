"""Imports that were put off, and are missed by several threads at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.machine import CHECKOUT

PROGRAM = """
import sys, threading
from builder.cli import deferred
deferred._NAMES = frozenset({"slow"})
deferred.install()
import slow
found = []
def look():
    found.append(slow.late)
threads = [threading.Thread(target=look) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found, slow.own, hasattr(slow, "missing"))
"""


def test_threads_wait_for_the_one_that_fills_a_module(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time, slow\nown = hasattr(slow, 'late')\ntime.sleep(0.3)\nlate = 1\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": f"{CHECKOUT}:{tmp_path}"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == "[1, 1, 1, 1, 1, 1, 1, 1] False False\n", done.stderr
