"""zstd:chunked: built, copied, and pulled in parts by podman, which checks the DiffID it puts together."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.integration.images.stock import stock_base
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_mounts, need_root, need_tool
from tests.support.registries import RegistryServer

CHECKSUM = "io.github.containers.zstd-chunked.manifest-checksum"
STORAGE = """
[storage]
driver = "overlay"
runroot = "{0}/run"
graphroot = "{0}/graph"
[storage.options]
pull_options = {{enable_partial_images = "true", use_hard_links = "false", ostree_repos = ""}}
"""


def test_podman_pulls_the_layers_in_parts(
    pybuild: Pybuild, busybox_layout: Path, registry: RegistryServer, tmp_path: Path
) -> None:
    need_root()
    need_mounts()
    need_tool("podman")
    stock_base(pybuild, busybox_layout)
    files = {"data/a": os.urandom(9 << 20), "data/b": b"b"}
    context = write_context(tmp_path / "context", "FROM base:1\nCOPY data /data\nRUN rm /data/b\n", files)
    pybuild.build(context, "-t", "lazy:1", "--compression", "zstd:chunked", "--force-compression", "--verify-layers")
    layers = pybuild.run("inspect", "lazy:1").json()["Layers"]
    assert all(CHECKSUM in d["annotations"] for d in layers)
    target = f"{registry.host}/chunked"
    pybuild.run("push", "--tls-verify=false", "lazy:1", f"{target}:1")
    # Debian's podman knows the annotations under their first names.
    text = pybuild.run("manifest", "get", f"docker://{target}:1").text
    (tmp_path / "manifest").write_text(text.replace("io.github.containers.", "io.containers."))
    pybuild.run("manifest", "put", f"docker://{target}:2", tmp_path / "manifest")
    (tmp_path / "storage.conf").write_text(STORAGE.format(tmp_path))
    environ = os.environ | {"CONTAINERS_STORAGE_CONF": str(tmp_path / "storage.conf")}

    def podman(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["podman", *words], env=environ, text=True, capture_output=True, check=True)

    try:
        for tag in ("1", "2"):
            pulled = podman("--log-level=debug", "pull", "-q", "--tls-verify=false", f"{target}:{tag}")
            parts = pulled.stderr.count("Retrieved partial blob")
            assert parts in ({0, len(layers)} if tag == "1" else {len(layers)}), pulled.stderr
            mounted = Path(podman("image", "mount", f"{target}:{tag}").stdout.strip())
            assert (mounted / "data/a").read_bytes() == files["data/a"]
            assert os.listdir(mounted / "data") == ["a"]
            assert (mounted / "bin/busybox").read_bytes() == Path("/bin/busybox").read_bytes()
            podman("image", "unmount", f"{target}:{tag}")
            podman("rmi", "--all", "--force")
    finally:
        subprocess.run(["podman", "image", "unmount", "--all"], env=environ, check=False, capture_output=True)
        subprocess.run(["podman", "rmi", "--all", "--force"], env=environ, check=False, capture_output=True)
        subprocess.run(["umount", "-l", tmp_path / "graph/overlay"], check=False, capture_output=True)


def test_copies_make_both_formats(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    plain = pybuild.unpack("base:1", tmp_path / "plain")
    for name, extra in (("zstd:chunked", set()), ("estargz", {"stargz.index.json", ".no.prefetch.landmark"})):
        layout = f"oci:{tmp_path}/{name.replace(':', '-')}:1"
        pybuild.run("copy", "--compression", name, "base:1", layout)
        pybuild.run("validate", layout)
        tree = pybuild.unpack(layout, tmp_path / "trees" / name)
        found = pybuild.run("diff", plain, tree, "--json").json()["files"]
        assert {f["path"] for f in found if f["path"]} == extra
