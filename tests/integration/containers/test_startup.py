"""What `run` loads before its command runs: each module on the list took a part of the 60 ms that it has."""

from __future__ import annotations

import pytest

from tests.integration.containers.boxes import IMAGE, root_box
from tests.integration.graph.test_startup import loaded
from tests.support.cli import Pybuild

__all__ = ["root_box"]

HEAVY = [
    "typing",
    "threading",
    "socket",
    "selectors",
    "encodings.ascii",
    "dataclasses",
    "inspect",
    "hashlib",
    "logging",
    "random",
    "shutil",
    "subprocess",
    "tempfile",
    "concurrent.futures",
    "requests",
    "builder.api",
    "builder.cli.progress",
    "builder.container.reach",
    "builder.plan.planner",
    "builder.solve.solver",
    "layers.apply",
    "layers.tarreader",
    "registry.client",
    "registry.hosts",
    "registry.transport",
]


@pytest.mark.root
@pytest.mark.parametrize("network", ["host", "default"])
def test_run_loads_little(root_box: Pybuild, network: str) -> None:
    choice = () if network == "default" else ("--network", network)
    root_box.run("run", "--rm", *choice, IMAGE, "true")  # the first one unpacks the image
    modules = loaded(root_box.root, "run", "--rm", *choice, IMAGE, "true")
    assert not modules & set(HEAVY), sorted(modules & set(HEAVY))
    assert len([m for m in modules if m.split(".")[0] in {"builder", "layers", "registry"}]) < 75
