#!/usr/bin/env python3
"""Make a base image on this machine, without any registry: an OCI image layout in a folder.

  make_base.py busybox DIR     about 1 MB, from the package busybox-static
  make_base.py debian DIR      about 165 MB unpacked, by mmdebstrap from the machine's own apt sources

An existing DIR is left as it is, so that it serves as a cache. The layout's only tag is the kind
(`oci:DIR:busybox`). Only the standard library is needed; a single path on stdout says where it is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MADE = "2024-01-01T00:00:00Z"
MTIME_S = 1704067200
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "ppc64le": "ppc64le"}

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """root:x:0:
daemon:x:1:
www-data:x:33:
users:x:100:
nobody:x:65534:
"""


def busybox_entries(binary: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The small root file system: one static binary, a symlink for each applet, a few folders."""
    applets = subprocess.run([binary, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
    folders = {"bin", "dev", "etc", "home", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var", "var/www"}
    folders.update(parent.as_posix() for applet in applets for parent in Path(applet).parents)
    modes = {"root": 0o700, "tmp": 0o1777}
    for folder in sorted(folders - {"."}):
        yield member(folder, tarfile.DIRTYPE, modes.get(folder, 0o755)), None
    yield member("bin/busybox", tarfile.REGTYPE, 0o755), binary.read_bytes()
    yield member("etc/passwd", tarfile.REGTYPE, 0o644), PASSWD.encode()
    yield member("etc/group", tarfile.REGTYPE, 0o644), GROUP.encode()
    yield member("etc/hostname", tarfile.REGTYPE, 0o644), b"busybox\n"
    for applet in sorted(set(applets) - {"bin/busybox"}):
        link = member(applet, tarfile.SYMTYPE, 0o777)
        link.linkname = "/bin/busybox"
        yield link, None


def member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, mode, MTIME_S
    return info


def make_busybox(tar: Path) -> None:
    found = shutil.which("busybox")
    if found is None:
        sys.exit("make_base: no busybox here: install the package busybox-static")
    binary = Path(found).resolve()
    if b"ld-linux" in binary.read_bytes()[:65536]:
        sys.exit(f"make_base: {binary} is not static: install the package busybox-static in its place")
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as out:
        for info, data in busybox_entries(binary):
            if data is not None:
                info.size = len(data)
            out.addfile(info, None if data is None else io.BytesIO(data))


def make_debian(tar: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        sys.exit("make_base: no mmdebstrap here: install the package mmdebstrap")
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    suite = release.get("VERSION_CODENAME", "stable").strip('"')
    # The machine's own sources: where it gets its packages, the image gets them, too.
    named = [Path(f"/etc/apt/sources.list.d/{name}.sources") for name in ("debian", "ubuntu")]
    sources = [path for path in (*named, Path("/etc/apt/sources.list")) if path.exists() and path.stat().st_size]
    print(f"make_base: making a {suite} base with mmdebstrap (once, about half a minute)", file=sys.stderr, flush=True)
    command = ["mmdebstrap", "--quiet", "--variant=minbase", suite, os.fspath(tar), *map(os.fspath, sources[:1])]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit("make_base: mmdebstrap failed")


def write_layout(tar: Path, layout: Path, *, tag: str, cmd: list[str]) -> None:
    """Write `tar` as the only layer of the only image of an OCI layout."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    diff_id, layer = hashlib.sha256(), layout / "layer.part"
    with tar.open("rb") as source, layer.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
        while chunk := source.read(1 << 20):
            diff_id.update(chunk)
            packed.write(chunk)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = layer.stat().st_size
    layer.rename(blobs / digest)
    machine = os.uname().machine
    config = {
        "created": MADE,
        "architecture": ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {"Env": [DEFAULT_PATH], "Cmd": cmd},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id.hexdigest()}"]},
        "history": [{"created": MADE, "created_by": f"make_base.py {tag}"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blob(json.dumps(config).encode(), CONFIG),
        "layers": [{"mediaType": LAYER, "digest": f"sha256:{digest}", "size": size}],
    }
    entry = blob(json.dumps(manifest).encode(), MANIFEST)
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] not in {"busybox", "debian"}:
        sys.exit(__doc__)
    kind, target = arguments[0], Path(arguments[1]).absolute()
    if not (target / "index.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            tar, layout = Path(work) / "root.tar", Path(work) / "layout"
            if kind == "busybox":
                make_busybox(tar)
            else:
                make_debian(tar)
            write_layout(tar, layout, tag=kind, cmd=["/bin/sh" if kind == "busybox" else "/bin/bash"])
            try:
                layout.rename(target)
            except OSError:
                # Another run has made it meanwhile; anything else in the way is an error.
                if not (target / "index.json").exists():
                    raise
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
