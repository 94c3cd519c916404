"""The Python API alone, from a program with threads: build, failure, cancellation, plan and push."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.accounts import Account
from tests.support.cli import Pybuild
from tests.support.oracles import skopeo_inspect
from tests.support.registries import RegistryServer

PROGRAM = Path(__file__).with_name("library_user.py")
pytestmark = pytest.mark.registry


def test_from_a_program_with_threads(
    pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, busybox_base, tmp_path, registry.host],
        capture_output=True,
        text=True,
        env=pybuild.environ(),
        timeout=200,
        check=False,
    )
    assert done.stdout.strip().endswith("all is well"), done.stderr
    assert done.returncode == 0
    assert skopeo_inspect(f"{registry.host}/lib/user:0")["Digest"]


@pytest.mark.rootless
def test_from_an_ordinary_users_program_with_threads(
    pybuild_rootless: Pybuild, rootless_user: Account, busybox_base: str, registry: RegistryServer
) -> None:
    program = rootless_user.home / "library_user.py"
    program.write_bytes(PROGRAM.read_bytes())
    place = pybuild_rootless.root
    place.mkdir(exist_ok=True)
    os.chown(place, rootless_user.uid, rootless_user.gid)
    done = subprocess.run(
        rootless_user.command([str(rootless_user.python), str(program), busybox_base, str(place), registry.host]),
        capture_output=True,
        text=True,
        env=rootless_user.environ(),
        cwd=rootless_user.home,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip().endswith("all is well"), done.stderr
