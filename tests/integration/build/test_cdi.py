"""Devices by CDI names: of build's and run's flags, and of RUN --device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool

NAME = "vendor.example/device=null"
SYNTAX = "# syntax=docker/dockerfile:1-labs\n"


@pytest.fixture
def place(pybuild_each: Pybuild, tmp_path: Path) -> Path:
    return context_dir(pybuild_each, tmp_path)


@pytest.fixture
def specs(place: Path) -> str:
    """A directory with one description: /dev/null as another device, a variable, a file, a group."""
    folder = place / "cdi"
    folder.mkdir()
    (folder / "tool").write_text("from the vendor\n")
    folder.chmod(0o755)
    edits = {
        "env": ["VENDOR=here"],
        "deviceNodes": [{"path": "/dev/vendor/null", "hostPath": "/dev/null"}],
        "mounts": [{"hostPath": str(folder / "tool"), "containerPath": "/opt/tool", "options": ["ro", "bind"]}],
    }
    document = {"cdiVersion": "0.6.0", "kind": "vendor.example/device",
                "devices": [{"name": "null", "containerEdits": edits}]}  # fmt: skip
    (folder / "vendor.json").write_text(json.dumps(document))
    return f"--cdi-spec-dir={folder}"


CHECK = 'test -c /dev/vendor/null && echo x > /dev/vendor/null && test "$VENDOR" = here && cat /opt/tool'


@pytest.mark.parametrize("isolation", ["auto", "oci"])
def test_a_device_of_every_run(
    pybuild_each: Pybuild, busybox_base: str, specs: str, place: Path, isolation: str
) -> None:
    if isolation == "oci":
        need_tool("runc")
    context = write_context(place / "c", f"FROM {busybox_base}\nRUN {CHECK}\n")
    flags = [f"--isolation={isolation}", "--no-cache", "--progress=plain"]
    assert "from the vendor" in pybuild_each.build(context, *flags, specs, f"--device={NAME}").stderr
    assert pybuild_each.build(context, *flags, specs, check=False).status != 0
    missing = pybuild_each.build(context, *flags, specs, "--device=vendor.example/device=other", check=False)
    assert missing.status != 0 and "there is no CDI device vendor.example/device=other" in missing.stderr


def test_a_device_of_one_run(pybuild_each: Pybuild, busybox_base: str, specs: str, place: Path) -> None:
    """It has to be allowed; one that is missing matters only where it is required."""
    text = f"{SYNTAX}FROM {busybox_base}\nRUN --device={NAME} {CHECK}\n"
    text += 'RUN --device=a.example/none=x test -z "$VENDOR"\n'
    context = write_context(place / "c", text)
    refused = pybuild_each.build(context, specs, check=False)
    assert refused.status != 0 and f"allow it with --allow device={NAME}" in refused.stderr
    allowed = ["--allow", f"device={NAME}", "--allow", "device=a.example/none=x"]
    assert "from the vendor" in pybuild_each.build(context, specs, *allowed, "--progress=plain").stderr
    assert "CACHED" in pybuild_each.build(context, specs, "--allow=device", "--progress=plain").stderr
    (context / "Containerfile").write_text(text.replace("none=x", "none=x,required"))
    missing = pybuild_each.build(context, specs, "--allow=device", "--no-cache", check=False)
    assert missing.status != 0 and "there is no CDI device a.example/none=x" in missing.stderr


def test_a_device_of_a_container(pybuild_each: Pybuild, busybox_base: str, specs: str) -> None:
    flags = ["--rm", "--network=host", specs]
    assert "vendor" in pybuild_each.run("run", *flags, "--device", NAME, busybox_base, "sh", "-c", CHECK).text
    other = pybuild_each.run("run", *flags, "--device", "/dev/zero:/dev/nil:rwm", busybox_base, "sh", "-c",
                             "head -c 4 /dev/nil | wc -c")  # fmt: skip
    assert other.text.strip() == "4"
    refused = pybuild_each.run("run", *flags, "--device", "nonsense", busybox_base, "true", check=False)
    assert refused.status == 125 and "expected a path, or a CDI name" in refused.stderr
