"""Every example of Containerfile.examples, and what its comments promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.build.test_main_job import EXAMPLES, example
from tests.support.cli import Pybuild
from tests.support.oracles import pushed_to_bundle, runc_run
from tests.support.registries import RegistryServer


def built(pybuild: Pybuild, name: str, base: str, where: Path, *arguments: str) -> Path:
    """Build an example; its root file system."""
    folder = example(name, where)
    pybuild.build(folder, "-t", f"{name}:1", "--build-arg", f"BASE={base}", *arguments)
    return pybuild.unpack(f"{name}:1", where / f"{name}-rootfs")


def test_every_example_is_tested() -> None:
    tested = {"site", "python-web", "args", "heredoc", "mounts", "ignore"}
    tested.add("by-hand")  # in tests/integration/containers/test_by_hand.py
    assert {path.parent.name for path in EXAMPLES.glob("*/Containerfile")} == tested


def test_args(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    root = built(pybuild, "args", busybox_base, tmp_path)
    assert (root / "message").read_text() == "Hello, world!\n"
    root = built(pybuild, "args", busybox_base, tmp_path / "other", "--build-arg", "GREETING=Hi", "--target", "shout")
    assert (root / "message").read_text() == "HI, WORLD!\n"


def test_heredoc(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    root = built(pybuild, "heredoc", busybox_base, tmp_path)
    tool = root / "opt/tool"
    assert (tool / "list").read_text() == "line 1\nline 2\nline 3\n"
    assert (tool / "tool.conf").read_text() == "version = 7\n"
    assert (tool / "literal.conf").read_text() == "version = ${VERSION}\n"
    assert (tool / "run").stat().st_mode & 0o777 == 0o755
    assert (tool / "count").read_text().strip() == "5"


def test_mounts(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    token = tmp_path / "token.txt"
    token.write_text("hush-hush")
    root = built(pybuild, "mounts", busybox_base, tmp_path, "--secret", f"id=token,src={token}")
    assert (root / "sorted").read_text() == "apple\nfig\npear\n"
    assert (root / "scratch-size").read_text().strip() == "65536"
    assert (root / "token-size").read_text().strip() == "9"
    for gone in ("src", "scratch", "var/cache", "run/secrets"):
        assert not (root / gone).exists(), f"the mount point /{gone} was left in a layer"
    found = subprocess.run(
        ["grep", "-rl", "hush-hush", root, pybuild.root], capture_output=True, text=True, check=False
    )
    assert not found.stdout, "the secret was written somewhere"
    again = example("mounts", tmp_path / "m")
    missing = pybuild.build(again, "--no-cache", "--build-arg", f"BASE={busybox_base}", check=False)
    assert missing.status != 0
    assert "token" in missing.stderr


def test_ignore(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    root = built(pybuild, "ignore", busybox_base, tmp_path)
    sent = [f"/context/{name}" for name in (".containerignore", "Containerfile", "data.txt", "docs/keep.md")]
    assert (root / "sent").read_text().split() == sent


@pytest.mark.network
@pytest.mark.slow
def test_python_web(pybuild: Pybuild, debian_base: str, registry: RegistryServer, tmp_path: Path) -> None:
    folder = example("python-web", tmp_path)
    subprocess.run([sys.executable, folder / "make_wheels.py"], check=True, capture_output=True)
    pybuild.build(folder, "-t", "web:1", "--build-arg", f"BASE={debian_base}", timeout_s=600)
    target = f"{registry.host}/examples/python-web:1"
    pybuild.run("push", "web:1", target)
    bundle = pushed_to_bundle(target, tmp_path)
    # runc's new network namespace has its loopback down: call the application itself.
    script = (
        "from greeting import application; out = []; "
        "print(b''.join(application({'QUERY_STRING': 'name=tester'}, lambda *a: out.append(a))).decode(), out[0][0])"
    )
    output = runc_run(bundle, "/app/venv/bin/python", "-c", script)
    assert "Hello, tester" in output
    assert "200 OK" in output
    rootfs = bundle / "rootfs"
    assert (rootfs / "app/venv/lib").is_dir()
    assert not (rootfs / "wheels").exists(), "a build stage's files are in the result"
