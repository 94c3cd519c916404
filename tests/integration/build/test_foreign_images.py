"""Images that other tools made: pybuild pulls and unpacks them to exactly what umoci makes of them."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_root, need_tool
from tests.support.oracles import skopeo_push, skopeo_to_layout, umoci_unpack
from tests.support.registries import RegistryServer
from tests.support.trees import differences, record

CHANGES = """
RUN mkdir -p /t/a/b /t/gone /t/opaque && echo one > /t/a/one && echo two > /t/a/b/two && echo x > /t/gone/x \\
 && echo old > /t/opaque/old && ln /t/a/one /t/a/hard && ln -s a/one /t/link && mkfifo /t/fifo && chmod 4755 /t/a/one
RUN rm -r /t/gone /t/opaque && mkdir /t/opaque && echo new > /t/opaque/new && rm /t/a/b/two \\
 && chown -R 33:33 /t/a && chmod 700 /t/a/b && rm /bin/ls && ln /bin/busybox /bin/ls
ADD device.tar /t/
RUN rm /t/link && mkdir /t/link && touch -d '2001-02-03 04:05:06' /t/link/old
"""


@pytest.fixture
def buildah(tmp_path: Path) -> Iterator[list[str]]:
    """Buildah with storage of its own."""
    need_root()
    need_tool("buildah", "runc", "skopeo", "umoci")
    storage = tmp_path / "storage"
    command = ["buildah", "--root", f"{storage}/root", "--runroot", f"{storage}/run", "--storage-driver", "overlay"]
    yield command
    subprocess.run([*command, "rmi", "--all", "--force"], check=False, capture_output=True)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(storage) in (point := line.split()[4]):
            subprocess.run(["umount", "-l", point], check=False)


@pytest.mark.parametrize("form", ["oci", "docker"])
@pytest.mark.parametrize("layers", ["true", "false"])
def test_what_buildah_builds(
    buildah: list[str],
    form: str,
    layers: str,
    pybuild: Pybuild,
    busybox_layout: Path,
    registry: RegistryServer,
    tmp_path: Path,
) -> None:
    context = write_context(tmp_path / "c", f"ARG BASE\nFROM $BASE\n{CHANGES}")
    device = tarfile.TarInfo("null")
    device.type, device.devmajor, device.devminor, device.mode = tarfile.CHRTYPE, 1, 3, 0o620
    with tarfile.open(context / "device.tar", "w") as packed:
        packed.addfile(device)
    environ = {**os.environ, "BUILDAH_ISOLATION": "oci", "BUILDAH_RUNTIME": "runc"}

    def run(*argv: str) -> str:
        done = subprocess.run([*buildah, *argv], check=False, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    base = run("pull", "-q", f"oci:{busybox_layout}:busybox")
    archive = tmp_path / "image.tar"
    run(
        "bud", "-q", "--layers=" + layers, "--format", form, "--build-arg", f"BASE={base}", "-t", "made:1", str(context)
    )
    kind = f"{form}-archive"
    run("push", "-q", "made:1", f"{kind}:{archive}:made:1")
    target = f"{registry.host}/foreign/{form}-{layers}:1"
    skopeo_push(f"{kind}:{archive}", target)

    umoci = umoci_unpack(skopeo_to_layout(target, tmp_path / "layout"), tmp_path / "bundle") / "rootfs"
    pybuild.run("pull", target)
    ours = pybuild.unpack(target, tmp_path / "ours")
    assert (ours / "t/opaque/new").exists()
    assert not differences(record(umoci), record(ours))
    # The same straight from the registry, and from the archive on disk.
    again = pybuild.unpack(f"docker://{target}", tmp_path / "again")
    assert not differences(record(umoci), record(again))
    third = pybuild.unpack(f"{kind}:{archive}", tmp_path / "third")
    assert not differences(record(umoci), record(third))


@pytest.mark.slow
def test_debian_unpacks_as_umoci_does(
    pybuild: Pybuild, debian_base: str, debian_layout: Path, registry: RegistryServer, tmp_path: Path
) -> None:
    need_root()
    umoci = umoci_unpack(debian_layout, tmp_path / "bundle", "debian") / "rootfs"
    ours = pybuild.unpack(f"docker://{debian_base}", tmp_path / "ours")
    assert not differences(record(umoci), record(ours))
