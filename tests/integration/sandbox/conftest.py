"""`box`: a sandbox to run commands in, once as root and once as an ordinary user with subordinate ids."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.sandbox.launcher import Launcher
from tests.integration.sandbox.boxes import Box, RootBox, UserBox, make_image
from tests.support.accounts import Account
from tests.support.machine import need_mounts, need_tool


@pytest.fixture
def workplace() -> Iterator[Path]:
    """A directory that any user can reach."""
    path = Path(tempfile.mkdtemp(prefix="pybuild-sandbox-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def root_box(workplace: Path) -> Iterator[RootBox]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    need_mounts()
    need_tool("busybox")
    make_image(workplace / "lower")
    with Launcher.start() as launcher:
        yield RootBox(workplace, launcher)


@pytest.fixture
def user_box(workplace: Path, rootless_user: Account) -> Iterator[UserBox]:
    need_tool("busybox", "newuidmap")
    make_image(workplace / "lower")
    for path in [workplace, *workplace.rglob("*")]:
        os.chown(path, rootless_user.uid, rootless_user.gid, follow_symlinks=False)
    box = UserBox(workplace, rootless_user, "subordinate")
    yield box
    box.close()


@pytest.fixture(params=["root", "user", "kept"])
def box(request: pytest.FixtureRequest) -> Box:
    """Both tiers, one after the other; as root also with the stubs of mount points kept between runs."""
    value: Box = request.getfixturevalue("user_box" if request.param == "user" else "root_box")
    if request.param == "kept":
        value.stubs = value.directory("stubs")[0]
    return value
