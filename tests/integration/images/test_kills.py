"""Commands killed at any moment: names keep pointing at whole images, and the next command needs no repair.

A few kills run everywhere; PYBUILD_TEST_KILLS sets another number for a campaign.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import IO, cast

from tests.integration.images.stock import stock_base
from tests.support.cli import Pybuild, write_context

KILLS = int(os.environ.get("PYBUILD_TEST_KILLS", "18"))


def digests(archive: Path) -> dict[str, str]:
    """The files of a tar that is whole, by their digests."""
    with tarfile.open(archive) as tar:
        return {
            m.name: hashlib.sha256(cast(IO[bytes], tar.extractfile(m)).read()).hexdigest() for m in tar if m.isreg()
        }


def check_archive(archive: Path) -> None:
    """Both images, byte for byte, of whichever build."""
    found = digests(archive)
    for name, digest in found.items():
        assert len(name) < 60 or name.partition(".")[0] == digest
    with tarfile.open(archive) as tar:
        listed = json.load(cast(IO[bytes], tar.extractfile("manifest.json")))
    assert [image["RepoTags"] for image in listed] == [["app:1"], ["base:1"]]
    assert {name for image in listed for name in (image["Config"], *image["Layers"])} <= found.keys()


def test_killed_commands_leave_a_sound_store(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    files = {f"d/{i}": os.urandom(2000) for i in range(300)} | {"big": os.urandom(8 << 20)}
    context = write_context(tmp_path / "context", "FROM base:1\nCOPY . /c\nRUN chmod -R 700 /c/d\n", files)
    pybuild.build(context, "-t", "app:1")
    archive, rootfs = tmp_path / "app.tar", tmp_path / "rootfs.tar"
    pybuild.run("save", "-o", archive, "app:1", "base:1")
    pybuild.run("export", "-o", rootfs, "app:1")
    exported = digests(rootfs)
    commands: list[list[str]] = [
        ["build", "--no-cache", "-t", "app:1", str(context)],
        ["build", "-t", "squashed:1", "--squash", str(context)],
        ["load", "-q", "-i", str(archive)],
        ["import", str(rootfs), "imported:1"],
        ["rmi", "-f", "imported:1", "squashed:1"],
        ["prune", "--all", "--force"],
        ["save", "-q", "-o", str(archive), "app:1", "base:1"],
        ["export", "-o", str(rootfs), "app:1"],
        ["tag", "app:1", "other:1", "third:1"],
    ]
    chance = random.Random(int(os.environ.get("PYBUILD_TEST_SEED", "1")))
    killed = 0
    longest = dict.fromkeys(range(len(commands)), 0.25)
    for number in range(KILLS):
        which = number % len(commands)
        command = commands[which]
        process = pybuild.start(*command)
        begun = time.monotonic()
        try:
            process.wait(timeout=chance.uniform(0.02, longest[which]))
            longest[which] = time.monotonic() - begun  # a command that was quicker is killed sooner next time
        except subprocess.TimeoutExpired:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # An archive is whole, or as it was.
        check_archive(archive)
        assert digests(rootfs) == exported, command
        names = {f"{i['name']}:{i['tag']}" for i in pybuild.run("images", "--json").json()}
        assert {"app:1", "base:1"} <= names, command
        if number % 6 == 5:
            report = pybuild.run("fsck", "--json", check=False).json()
            serious = [p for p in report["problems"] if p["kind"] != "debris"]
            assert serious == [], (command, serious)
    assert killed >= KILLS // 6
    pybuild.run("rmi", "-f", "imported:1", "squashed:1", "other:1", "third:1")
    pybuild.build(context, "-t", "app:1")
    pybuild.unpack("app:1", tmp_path / "tree")
    assert (tmp_path / "tree/c/big").read_bytes() == files["big"]
    pybuild.run("prune", "--all", "--force")
    assert pybuild.run("fsck", "--json").json()["problems"] == []
    left = subprocess.run(["find", pybuild.root, "-name", "*.part*"], capture_output=True, text=True, check=True)
    assert left.stdout == ""
