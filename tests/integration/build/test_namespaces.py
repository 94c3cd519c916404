"""--pid, --ipc, --uts, --cgroupns of build: RUN in namespaces of the host's; and --cgroup-parent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.sandbox import cgroup
from tests.integration.build.test_failures import _running
from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool

KINDS = ("pid", "ipc", "uts", "cgroup")
READ_ALL = "cd /proc/self/ns; for i in " + " ".join(KINDS) + "; do echo is $(readlink $i); done"


@pytest.mark.parametrize("isolation", ["auto", "oci"])
def test_namespaces_of_the_host(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path, isolation: str) -> None:
    """They count in the cache's key: the result may depend on them, as on the network. What RUN leaves is ended."""
    if isolation == "oci":
        need_tool("runc")
    folder = context_dir(pybuild_each, tmp_path) / "c"
    marker = f"34{os.getpid()}"
    context = write_context(folder, f"FROM {busybox_base}\nRUN {READ_ALL}; setsid sleep {marker} & true\n")
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS]
    flags = [f"--isolation={isolation}", "--progress=plain"]
    private = pybuild_each.build(context, *flags).stderr
    assert private.count("is ") >= 4 and not any(f"is {name}" in private for name in ours)
    shared = ["--pid=host", "--ipc=host", "--uts=host", "--cgroupns=host", "--userns=host"]
    log = pybuild_each.build(context, *flags, *shared).stderr
    assert all(f"is {name}" in log for name in ours)
    assert "is pid" not in pybuild_each.build(context, *flags, *shared).stderr
    assert _running(marker.encode()) == []


def test_another_container_is_refused(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\n")
    refused = pybuild.build(context, "--pid=container:x", check=False)
    assert refused.status != 0 and "a build joins no container" in refused.stderr


def groups_named(name: str) -> list[Path]:
    return [path for h in cgroup.detect() for path in Path(h.mount_point).glob(f"**/{name}")]


@pytest.mark.parametrize("prefix", ["/", ""])
def test_a_parent_of_groups(pybuild: Pybuild, busybox_base: str, tmp_path: Path, prefix: str) -> None:
    """It is made, with what leads to it, and removed; one that was there stays."""
    name = f"parent{os.getpid()}"
    command = "cat /proc/self/cgroup; cat /proc/1/cgroup"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN {command}\n")
    flags = [
        "--no-cache",
        "--progress=plain",
        "--cgroupns=host",
        "--pids-limit=50",
        f"--cgroup-parent={prefix}{name}/in",
    ]
    log = pybuild.build(context, *flags).stderr
    assert f"/{name}/in/pybuild-" in log
    assert groups_named(name) == []


def test_a_parent_that_is_no_group(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\n")
    for text, told in (("../up", "expected the path"), ("/", "expected the path"), ("x.slice", "systemd's to make")):
        refused = pybuild.build(context, f"--cgroup-parent={text}", check=False)
        assert refused.status != 0 and told in refused.stderr
