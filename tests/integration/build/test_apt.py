"""Debian's package manager in a RUN, as root and as an ordinary user: users, groups, setgid, maintainer scripts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.oracles import pushed_to_bundle, runc_run
from tests.support.registries import RegistryServer

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_apt_get_install_python3(
    pybuild_each: Pybuild, debian_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    pybuild = pybuild_each
    context = write_context(
        context_dir(pybuild, tmp_path) / "c",
        f"FROM {debian_base}\nRUN apt-get update && apt-get install -y --no-install-recommends python3\n",
    )
    pybuild.build(context, "-t", "apt:1", timeout_s=600)
    who = "rootless" if pybuild.account else "root"
    target = f"{registry.host}/apt/{who}:1"
    pybuild.run("push", "apt:1", target)
    bundle = pushed_to_bundle(target, tmp_path)
    assert runc_run(bundle, "python3", "-c", "print(1)") == "1\n"
    rootfs = bundle / "rootfs"
    # What the host lends a RUN stays out of the layer, the placeholders beneath the mounts too.
    layer = registry.blob(f"apt/{who}", registry.manifest(f"apt/{who}", "1")["layers"][-1]["digest"])
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert "usr/bin/python3" in names
    assert not names & {"etc/resolv.conf", "etc/hosts", "etc/hostname", "proc", "sys", "dev", "dev/null", "dev/pts"}
    # Ownership is as in a root build: apt's own user keeps its directory, the shadow group its file.
    assert (rootfs / "var/lib/apt/lists/partial").stat().st_uid == 42
    assert (rootfs / "etc/shadow").stat().st_gid == 42
    assert (rootfs / "usr/bin/chage").stat().st_mode & 0o7777 == 0o2755
