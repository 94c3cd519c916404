#!/usr/bin/env python3
"""Measure one sandbox, `true` on a busybox root, in parts, beside `runc run` of the same root; then one RUN.

  bench/sandbox.py [--rounds N] [--builds N] [--network host|none] [--image full|empty] [--user]

Wall times of interleaved rounds in milliseconds, median and least. As root; with `--user`, in a user
namespace, as an ordinary user with subordinate ids. The parts are told by the sandbox's own clock
(`Launcher.run(trace=True)`): request and clone, each setup operation, exec to the reaped end.

The second table is `RUN true` with its commit, in builds of twenty, the build without them taken off,
beside buildah with runc and with chroot; its parts are those of the build's own report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from bench.tools import Buildah, Pybuild, available  # noqa: E402
from builder.sandbox import userns  # noqa: E402
from builder.sandbox.launcher import Launcher  # noqa: E402
from builder.sandbox.spec import SandboxSpec  # noqa: E402
from layers.snapshot import Mount  # noqa: E402

WARM_UP = 3
STEPS = 20


def make_image(path: Path, full: bool) -> None:
    """Busybox; `full` with all mount points, else with none."""
    (path / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", path / "bin/busybox")
    for name in ("sh", "true"):
        (path / "bin" / name).symlink_to("busybox")
    if full:
        for name in ("proc", "sys", "dev", "etc"):
            (path / name).mkdir()
        for name in ("hosts", "resolv.conf"):
            (path / "etc" / name).touch()


class Parts:
    """Samples by name, in the order of their first appearance."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def row(self, name: str) -> str:
        values = sorted(self.samples[name])
        return f"| {name:<26} | {statistics.median(values) * 1e3:7.2f} | {values[0] * 1e3:7.2f} |"


def sandbox(launcher: Launcher, base: Path, number: int, network: str, dialect: str, parts: Parts | None) -> None:
    """One sandbox on a fresh snapshot; only the run itself is timed."""
    snapshot = base / f"s{number}"
    for name in ("fs", "work"):
        (snapshot / name).mkdir(parents=True)
    root = Mount("overlay", (base / "lower",), snapshot / "fs", snapshot / "work", False, dialect)  # type: ignore[arg-type]
    spec = SandboxSpec(
        args=("true",),
        root=root,
        env={"PATH": "/bin"},
        files={"/etc/hosts": b"127.0.0.1 localhost\n", "/etc/resolv.conf": b"\n"},
        network=network,  # type: ignore[arg-type]
        stubs=base / "stubs",
    )
    null = os.open("/dev/null", os.O_RDWR)
    started = time.monotonic()
    with launcher.run(spec, stdout_fd=null, stderr_fd=null, trace=True) as running:
        cloned = time.monotonic()
        status = running.wait()
        ended = time.monotonic()
    os.close(null)
    if status.code:
        sys.exit(f"the sandbox failed: {status}")
    if parts is None:
        return
    spans: dict[str, float] = {}
    for name, seconds in running.trace:
        spans[name] = spans.get(name, 0.0) + seconds
    at = spans.pop("at")
    parts.add("pybuild: all", ended - started)
    parts.add("  request, clone", cloned - started)
    for name, seconds in spans.items():
        parts.add(f"  setup: {name}", seconds)
    parts.add("  exec, run, end, teardown", ended - at)


def make_bundle(base: Path, network: str) -> Path:
    """An OCI bundle with the same root for runc."""
    bundle = base / "bundle"
    bundle.mkdir()
    subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["true"], env=["PATH=/bin"])
    config["root"] = {"path": str(base / "runc-root"), "readonly": False}
    if network == "host":
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
    config["linux"].pop("resources", None)
    (bundle / "config.json").write_text(json.dumps(config))
    shutil.copytree(base / "lower", base / "runc-root", symlinks=True)
    return bundle


def runc(bundle: Path, number: int, parts: Parts | None) -> None:
    started = time.monotonic()
    subprocess.run(["runc", "run", "--bundle", str(bundle), f"pybuild-bench-{os.getpid()}-{number}"], check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    if parts is not None:
        parts.add("runc run", time.monotonic() - started)


def build_s(tool: Pybuild | Buildah, folder: Path, *flags: str) -> float:
    started = time.monotonic()
    argv = tool.build(folder, "bench:1", *flags, cached=False)
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, cwd=TOP)
    return time.monotonic() - started


def runs(base: Path, rounds: int) -> Parts:
    """One RUN of twenty, by each builder that is here."""
    parts = Parts()
    folders = []
    for count in (0, STEPS):
        folder = base / f"context-{count}"
        shutil.copytree(base / "lower", folder, symlinks=True)
        (folder / "Containerfile").write_text("FROM scratch\nCOPY . /\n" + 'RUN ["/bin/true"]\n' * count)
        folders.append(folder)
    tools: list[Pybuild | Buildah] = [Pybuild(base)]
    if available("buildah") and available("runc"):
        tools += [Buildah(base), Buildah(base, "chroot")]
    metadata = base / "metadata.json"
    for turn in range(rounds + 1):
        for tool in tools:
            flags = (f"--metadata-file={metadata}",) if isinstance(tool, Pybuild) else ()
            without, full = (build_s(tool, folder, *flags) for folder in folders)
            if turn == 0:
                continue
            parts.add(f"{tool.name}: one RUN", max(0.0, full - without) / STEPS)
            if isinstance(tool, Pybuild):
                for step in json.loads(metadata.read_text())["pybuild.steps"]["list"][-STEPS:]:
                    for phase, seconds in step["phases"].items():
                        parts.add(f"  {phase}", seconds)
    for tool in tools:
        tool.reset()
    return parts


def table(title: str, parts: Parts) -> None:
    print(f"{title}, in ms\n| {'':<26} |  median |   least |\n|{'-' * 28}|--------:|--------:|")
    for name in parts.samples:
        print(parts.row(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--builds", type=int, default=5, help="rounds of the second table; 0 leaves it out")
    parser.add_argument("--network", choices=["host", "none"], default="host")
    parser.add_argument("--image", choices=["full", "empty"], default="full")
    parser.add_argument("--user", action="store_true", help="rootless: run this as an ordinary user")
    options = parser.parse_args()
    if options.user == (os.geteuid() == 0):
        sys.exit("run it as root, or with --user as an ordinary user")
    identity = userns.enter()
    peer = not options.user and shutil.which("runc") is not None
    parts = Parts()
    base = Path(tempfile.mkdtemp(prefix="pybuild-bench-", dir="/var/tmp"))
    try:
        make_image(base / "lower", options.image == "full")
        with Launcher.start() as launcher:
            bundle = make_bundle(base, options.network) if peer else None
            for number in range(options.rounds + WARM_UP):
                into = parts if number >= WARM_UP else None
                sandbox(launcher, base, number, options.network, identity.dialect, into)
                if bundle is not None:
                    runc(bundle, number, into)
        table(f"{options.rounds} rounds, network {options.network}, {options.image} image, {identity.tier}", parts)
        if options.builds and not options.user:
            table(f"\n{options.builds} builds of {STEPS} RUN", runs(base, options.builds))
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
