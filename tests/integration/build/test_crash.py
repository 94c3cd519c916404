"""SIGKILL in the middle of a RUN, of a commit, of a pull: nothing is left, and the same command then succeeds."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.integration.build.test_failures import _running
from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer
from tests.support.waiting import until


def verify(pybuild: Pybuild) -> None:
    """The store is as it should be, by its own account."""
    pybuild.run("fsck")


def kill_when_it_says(pybuild: Pybuild, words: bytes, *arguments: str | Path) -> None:
    """Start a command and kill it as soon as `words` stand on its stderr."""
    process = pybuild.start(*arguments)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if words in line and b"RUN" not in line:
                break
        else:
            pytest.fail("the command ended before it could be killed")
    finally:
        process.kill()
        process.communicate()


def test_killed_in_the_middle_of_a_run(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    pybuild = pybuild_each
    gate = f"87{os.getpid()}"
    text = f"FROM {busybox_base}\nRUN echo begun > /begun; (sleep {gate} &) ; echo here; sleep {gate}\n"
    context = write_context(context_dir(pybuild, tmp_path) / "c", text)
    kill_when_it_says(pybuild, b" here", "build", "-t", "killed:1", context)
    until(lambda: not _running(gate.encode()), lambda: "what the step started outlives pybuild")
    verify(pybuild)
    (context / "Containerfile").write_text(text.replace(f"sleep {gate}", "true"))
    pybuild.build(context, "-t", "killed:1")
    verify(pybuild)
    assert "killed" in pybuild.run("images").text


@pytest.mark.slow
def test_killed_anywhere_in_a_build(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """Kills spread over a build that commits several layers of some megabytes."""
    chance = random.Random(7)  # the moments are random, and the same in every run
    steps = "".join(
        f"RUN dd if=/dev/urandom of=/data{n} bs=64k count=64 2>/dev/null && mkdir /d{n}"
        f" && for i in $(seq 200); do echo $i > /d{n}/$i; done\n"
        for n in range(4)
    )
    context = write_context(
        tmp_path / "c", f"FROM {busybox_base}\n{steps}COPY big /big\n", {"big": os.urandom(5_000_000)}
    )
    began = time.monotonic()
    pybuild.build(context, "-t", "whole:1")
    whole_s = time.monotonic() - began
    for _ in range(12):
        process = pybuild.start("build", "--no-cache", "-t", "whole:2", str(context))
        time.sleep(chance.uniform(0.05, whole_s))
        process.kill()
        process.communicate()
        if pybuild.run("inspect", "whole:2", check=False).status == 0:
            # The name was published: then everything under it is there.
            pybuild.unpack("whole:2", tmp_path / "x")
            shutil.rmtree(tmp_path / "x")
    verify(pybuild)
    pybuild.build(context, "-t", "whole:3", "--no-cache")
    root = pybuild.unpack("whole:3", tmp_path / "root")
    assert len(os.listdir(root / "d3")) == 200
    assert (root / "big").read_bytes() == (context / "big").read_bytes()


@pytest.mark.slow
def test_killed_anywhere_in_a_pull(
    pybuild: Pybuild, debian_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    chance = random.Random(11)
    for _ in range(8):
        process = pybuild.start("pull", debian_base)
        time.sleep(chance.uniform(0.1, 1.2))
        process.kill()
        process.communicate()
        verify(pybuild)
    pybuild.run("pull", debian_base)
    verify(pybuild)
    digest = registry.manifest("base/debian", "1")["layers"][0]["digest"]
    blob = pybuild.root / "blobs" / digest.replace(":", "/")
    assert blob.read_bytes() == registry.blob("base/debian", digest)
