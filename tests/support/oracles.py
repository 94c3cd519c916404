"""Other tools as judges: skopeo reads what was pushed, umoci unpacks it, runc runs it."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

from tests.support.machine import need_tool, which


def _run(*argv: str | Path) -> str:
    done = subprocess.run(list(map(str, argv)), check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"$ {' '.join(map(str, argv))}\n{done.stdout}{done.stderr}"
    return done.stdout


def skopeo_inspect(reference: str, *, config: bool = False) -> dict[str, Any]:
    """What skopeo says of an image in a plain-HTTP registry."""
    need_tool("skopeo")
    flags = ["--config"] if config else []
    document: dict[str, Any] = json.loads(
        _run("skopeo", "inspect", *flags, "--tls-verify=false", f"docker://{reference}")
    )
    return document


def skopeo_to_layout(reference: str, layout: Path) -> Path:
    """Copy an image to an OCI layout, tag `t`."""
    need_tool("skopeo")
    _run("skopeo", "copy", "--src-tls-verify=false", f"docker://{reference}", f"oci:{layout}:t")
    return layout


def skopeo_push(source: str, reference: str) -> None:
    need_tool("skopeo")
    _run("skopeo", "copy", "--dest-tls-verify=false", source, f"docker://{reference}")


def umoci_unpack(layout: Path, bundle: Path, tag: str = "t") -> Path:
    """A runtime bundle; its root file system is `bundle/rootfs`."""
    need_tool("umoci")
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    _run("umoci", "unpack", *rootless, "--image", f"{layout}:{tag}", bundle)
    return bundle


def runc_run(bundle: Path, *args: str) -> str:
    """Run the bundle's process, or `args` in its place; what it printed."""
    need_tool("runc")
    path = bundle / "config.json"
    config = json.loads(path.read_bytes())
    config["process"]["terminal"] = False
    if args:
        config["process"]["args"] = list(args)
    path.write_text(json.dumps(config))
    name = f"pybuild-test-{uuid.uuid4().hex[:12]}"
    return _run(which("runc") or "runc", "--root", bundle / "runc", "run", "--bundle", bundle, name)


def pushed_to_bundle(reference: str, where: Path) -> Path:
    """What is in the registry, unpacked by other tools."""
    return umoci_unpack(skopeo_to_layout(reference, where / "layout"), where / "bundle")
