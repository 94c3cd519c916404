"""The store as other programs and other users see it."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from layers.image import load_image, unpack_image, write_image
from layers.oci import MEDIA_OCI_LAYER_GZIP, Descriptor, Digest, Platform
from layers.store import Store
from tests.support.accounts import Account
from tests.support.machine import need_root, need_tool

NAME = "registry.example:5000/team/app:1"


def put_image(store: Store) -> Descriptor:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("bin", None), ("bin/tool", b"#!/bin/sh\n"), ("etc", None), ("etc/motd", b"hello")):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.mode = 0o755
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    layer = store.put(gzip.compress(out.getvalue(), mtime=0), MEDIA_OCI_LAYER_GZIP)
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest.of(out.getvalue())]},
    }
    return write_image(store, document, [layer])


def test_skopeo_and_umoci_read_it_in_place(tmp_path: Path) -> None:
    need_tool("skopeo", "umoci")
    need_root()
    root = tmp_path / "store"
    with Store.open(root) as store:
        image = put_image(store)
        store.publish({NAME: image, "latest": image})
        store.snapshots.prepare(None)
        shown = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{root}:{NAME}"], capture_output=True, check=True)
        assert Digest.of(shown.stdout) == image.digest
        copied = tmp_path / "copy"
        subprocess.run(["skopeo", "copy", "-q", f"oci:{root}:latest", f"dir:{copied}"], check=True)
        assert json.loads((copied / "manifest.json").read_text())["layers"]
        listed = subprocess.run(["umoci", "ls", "--layout", str(root)], capture_output=True, check=True, text=True)
        assert sorted(listed.stdout.split()) == ["latest", NAME]
        bundle = tmp_path / "bundle"
        subprocess.run(["umoci", "unpack", "--image", f"{root}:latest", str(bundle)], check=True, capture_output=True)
        snapshot = unpack_image(store, load_image(store, image, Platform("linux", "amd64")))
        assert snapshot is not None
        compared = subprocess.run(
            ["diff", "-r", str(bundle / "rootfs"), str(store.snapshots.view(snapshot).lower[0])],
            capture_output=True,
            check=False,
            text=True,
        )
        assert compared.returncode == 0, compared.stdout


def test_a_layout_of_skopeo_becomes_a_store(tmp_path: Path) -> None:
    need_tool("skopeo")
    with Store.open(tmp_path / "first") as store:
        image = put_image(store)
        store.names.set("latest", image)
    layout = tmp_path / "layout"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{tmp_path / 'first'}:latest", f"oci:{layout}:copied"], check=True)
    with Store.open(layout) as store:
        descriptor = store.names.get("copied")
        assert descriptor is not None
        assert load_image(store, descriptor, Platform("linux", "amd64")).layers
        store.gc()
        assert store.closure(descriptor)


SCRIPT = """
import os, stat, sys
from pathlib import Path
from layers.store import Store
from layers.snapshotters.overlay import open_tree

with Store.open(Path(sys.argv[1]), driver=sys.argv[2]) as store:
    snapshots = store.snapshots
    print(snapshots.driver, snapshots.dialect)
    active = snapshots.prepare(None)
    for name in ("keep", "gone", "replaced/old"):
        (active.path / name).parent.mkdir(exist_ok=True)
        (active.path / name).write_text(name)
    base = snapshots.commit(active)
    active = snapshots.prepare(base.id)
    root = open_tree(active.mount)
    os.unlink("gone", dir_fd=root)
    os.unlink("replaced/old", dir_fd=root)
    os.rmdir("replaced", dir_fd=root)
    os.mkdir("replaced", dir_fd=root)
    os.mkdir("sealed", 0, dir_fd=root)
    os.close(root)
    top = snapshots.commit(active)
    root = open_tree(snapshots.view(top.id))
    listing = os.open(".", os.O_RDONLY, dir_fd=root)
    print(sorted(os.listdir(listing)))
    os.close(listing)
    inner = os.open("replaced", os.O_RDONLY, dir_fd=root)
    print(os.listdir(inner))
    os.close(inner)
    os.close(root)
    store.names.list()
    snapshots.remove(top.id)
    snapshots.remove(base.id)
    print(os.listdir(store.root / "snapshots"), os.listdir(store.root / "trash"))
"""

SEEN = ["['keep', 'replaced', 'sealed']", "[]", "[] []"]


@pytest.mark.rootless
@pytest.mark.parametrize("namespace", [True, False])
def test_an_ordinary_user(rootless_user: Account, namespace: bool) -> None:
    """Overlay with its own attributes' namespace in a user namespace; copies where nothing can be mounted."""
    root = rootless_user.home / f"store-{namespace}"
    argv = [str(rootless_user.python), "-c", SCRIPT, str(root), "auto"]
    if namespace:
        argv = ["unshare", "--user", "--map-root-user", "--mount", *argv]
    ran = rootless_user.run(argv, capture_output=True, text=True, check=False)
    if namespace and "unshare failed" in ran.stderr:
        pytest.skip(f"needs user namespaces for ordinary users ({ran.stderr.strip()})")
    assert ran.returncode == 0, ran.stderr
    first, *rest = ran.stdout.splitlines()
    assert first == ("overlay user" if namespace else "native user")
    assert rest == SEEN


@pytest.mark.rootless
def test_a_store_of_somebody_else(rootless_user: Account) -> None:
    """Clear words, and nothing of it is changed."""
    root = rootless_user.home / "roots-store"
    Store.open(root).close()
    before = sorted(os.listdir(root))
    for mode in (0o700, 0o755):
        root.chmod(mode)
        argv = [str(rootless_user.python), "-c", SCRIPT, str(root), "native"]
        ran = rootless_user.run(argv, capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert "StoreError" in ran.stderr and str(root) in ran.stderr.splitlines()[-1]
    assert sorted(os.listdir(root)) == before
