"""An image that has a module of its own wherever the host's Python looks for one: none is ever loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.integration.containers.boxes import IMAGE, box, start
from tests.integration.containers.terminals import Terminal
from tests.support.cli import Pybuild
from tests.support.machine import CHECKOUT

__all__ = ["box"]

MARK = "/evil"
FAILING: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "/nosuch"),
    ((), "/etc/passwd"),
    (("-w", "/nosuch"), "true"),
    (("-u", "99:99", "-e", "A=\udcff"), "true"),
    (("-d", "--privileged"), "/nosuch"),
)
EVIL = f"open({MARK!r}, 'w')\n"


def hostile_image(box: Pybuild, home: Path) -> str:
    """Its name."""
    tree = home / f"hostile-{os.getpid()}"
    places = {Path(place) for place in sys.path if place.startswith("/")} | {CHECKOUT}
    pieces = [p for package in ("builder", "layers") for p in (CHECKOUT / package).rglob("*.py")]
    for place in places:
        there = tree / "root" / str(place).lstrip("/")
        there.mkdir(parents=True, exist_ok=True)
        for name in sys.stdlib_module_names:
            (there / f"{name}.py").write_text(EVIL)
        (there / "encodings").mkdir(exist_ok=True)
        for name in ("__init__", "ascii", "utf_8", "idna", "latin_1"):
            (there / "encodings" / f"{name}.py").write_text(EVIL)
    for piece in pieces:
        there = tree / "root" / str(piece).lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(EVIL)
    (tree / "Containerfile").write_text(f"FROM {IMAGE}\nCOPY root /\nRUN chmod 777 / && test ! -e {MARK}\n")
    box.build(tree, "-t", "hostile:1")
    return "hostile:1"


def test_no_module_of_an_image_is_loaded(box: Pybuild, tmp_path: Path) -> None:
    image = hostile_image(box, box.account.home if box.account else tmp_path)
    look = ("sh", "-c", f"test ! -e {MARK}")
    for flags in ((), ("-u", "web", "-w", "/new/place"), ("--init", "--read-only")):
        box.run("run", "--rm", "--network", "none", *flags, image, *look)
    name = start(box, image, "sleep", "1000")
    for options, command in FAILING:
        box.run("exec", *options, name, command, check=False)
    with Terminal(box, "exec", "-it", name, "true") as terminal:
        assert terminal.ended() == 0
    box.run("exec", name, *look)
    box.run("cp", f"{name}:/etc/passwd", "-")
    assert f"A {MARK}" not in box.run("diff", name).text.splitlines()
    box.run("rm", "-f", name)
