"""What a cached build loads: each module on the list below cost milliseconds of every build once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.cli import Pybuild, write_context
from tests.support.machine import CHECKOUT

HEAVY = [
    "layers.trees",
    "layers.snapshotters.native",
    "layers.apply",
    "layers.linux",
    "ctypes",
    "builder.solve.fetch",
    "builder.solve.gitfetch",
    "builder.solve.remotecontext",
    "builder.solve.accounts",
    "builder.solve.explain",
    "builder.solve.remotecache",
    "builder.output",
    "builder.inchild",
    "builder.sandbox.userns",
    "builder.sandbox.launcher",
    "registry.transport",
    "registry.hosts",
    "registry.credentials",
    "registry.http",
    "registry.client",
    "requests",
    "urllib3",
    "concurrent.futures",
    "logging",
    "tempfile",
    "shutil",
    "random",
    "inspect",
    "dataclasses",
    "hashlib",
    "subprocess",
    "socket",
    "signal",
]

SCRIPT = """
import sys
from builder.cli.main import main
status = main(sys.argv[1:])
print("\\n".join(sys.modules))
raise SystemExit(status)
"""


def loaded(root: Path, *arguments: str | Path) -> set[str]:
    """The modules that a command leaves loaded."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--root", str(root), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT), "HOME": str(root)},
    )
    return set(done.stdout.split())


def test_a_cached_build_loads_little(pybuild: Pybuild, tmp_path: Path) -> None:
    text = "FROM scratch\nARG A=1\nCOPY file dir /\nWORKDIR /w\nENV A=$A\nLABEL l=$A\n"
    context = write_context(tmp_path / "context", text, {"file": "1", "dir/a": "2", ".containerignore": "x\n"})
    pybuild.build(context, "-t", "app:1")
    modules = loaded(pybuild.root, "build", "-q", "-t", "app:1", context)
    assert not modules & set(HEAVY), sorted(modules & set(HEAVY))
    assert len([m for m in modules if m.split(".")[0] in {"builder", "layers", "registry"}]) < 80


def test_version_loads_next_to_nothing(tmp_path: Path) -> None:
    modules = {m for m in loaded(tmp_path, "--version") if m.split(".")[0] in {"builder", "layers", "registry"}}
    # `--root DIR --version` takes the long way round to the same line.
    assert modules <= {"builder", "builder.cli", "builder.cli.main", "builder.version"}
    assert "typing" not in loaded(tmp_path, "--version")
