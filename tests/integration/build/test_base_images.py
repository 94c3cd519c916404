"""The ground that the other tests stand on: base images, the registry, the ordinary user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.accounts import Account
from tests.support.bases import MAKER
from tests.support.leaks import children, leaked, living, reap_orphans
from tests.support.machine import need_tool
from tests.support.registries import RegistryServer


def test_busybox_base_is_an_image_that_others_read(busybox_base: str, registry: RegistryServer, tmp_path: Path) -> None:
    need_tool("skopeo", "umoci")
    copy = ["skopeo", "copy", "--src-tls-verify=false", f"docker://{busybox_base}", f"oci:{tmp_path}/copy:busybox"]
    subprocess.run(copy, check=True, capture_output=True)
    unpack = ["umoci", "raw", "unpack", "--rootless", "--image", f"{tmp_path}/copy:busybox", f"{tmp_path}/rootfs"]
    subprocess.run(unpack, check=True, capture_output=True)
    assert (tmp_path / "rootfs/bin/sh").is_symlink()
    assert (tmp_path / "rootfs/tmp").stat().st_mode & 0o7777 == 0o1777
    assert registry.config("base/busybox", "1")["config"]["Cmd"] == ["/bin/sh"]


def test_base_maker_leaves_an_existing_layout_alone(busybox_layout: Path, tmp_path: Path) -> None:
    layout = tmp_path / "base"
    first = subprocess.run([sys.executable, MAKER, "busybox", layout], check=True, capture_output=True, text=True)
    made = (layout / "index.json").stat()
    subprocess.run([sys.executable, MAKER, "busybox", layout], check=True, capture_output=True)
    assert first.stdout.strip() == str(layout)
    assert (layout / "index.json").stat().st_mtime_ns == made.st_mtime_ns
    assert sorted(tmp_path.iterdir()) == [layout]
    # Nothing in the image depends on the moment it was made.
    assert json.loads((layout / "index.json").read_bytes()) == json.loads((busybox_layout / "index.json").read_bytes())


def test_base_maker_refuses_unknown_kinds(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, MAKER, "fedora", tmp_path / "x"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "make_base.py busybox DIR" in done.stderr


@pytest.mark.rootless
def test_rootless_user_can_import_the_packages(rootless_user: Account) -> None:
    script = "import os, layers.oci, registry.reference, requests, zstandard, tqdm; print(os.getuid())"
    done = rootless_user.run([str(rootless_user.python), "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) == rootless_user.uid != 0
    table = Path("/etc/subuid").read_text()
    assert any(line.startswith(f"{rootless_user.name}:") for line in table.splitlines())


def test_the_leak_check_sees_an_orphan() -> None:
    before = living()
    # The sleeper must not hold the pipe that is read to its end.
    script = "sleep 60 >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], check=True, capture_output=True).stdout)
    try:
        assert pid in children()
        assert any(str(pid) in line for line in leaked(before, grace_s=0.1))
    finally:
        reap_orphans(before)
    assert not os.path.exists(f"/proc/{pid}")
