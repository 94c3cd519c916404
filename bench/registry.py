#!/usr/bin/env python3
"""Measure copies between registries and places on the disk, beside skopeo (and umoci for unpacking).

  bench/registry.py [--rounds N] [--layers N] [--layer-mib N] [--only ROW,…] [--dir SCRATCH]

Two docker-registry processes on the loopback, an image of random layers and one of 50 small ones; the
tools take turns, page cache warm. Prints medians of the whole process's wall time, its peak memory, and
the ratio to skopeo in the same run. Needs docker-registry, skopeo and umoci from Debian's packages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from tests.support.images import make_image, random_layer, write_layout  # noqa: E402
from tests.support.registries import RegistryServer  # noqa: E402

PYBUILD = [sys.executable, "-m", "builder"]


class Sample(NamedTuple):
    seconds: float
    peak_mib: float


def timed(command: list[str], environment: dict[str, str]) -> Sample:
    """Run once; a small wrapper reads the peak, because a child of this process would inherit ours."""
    reader = (
        "import os,sys,resource,subprocess,time\n"
        "begun=time.perf_counter()\n"
        "done=subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL,stderr=subprocess.PIPE)\n"
        "took=time.perf_counter()-begun\n"
        "sys.stderr.buffer.write(done.stderr) if done.returncode else None\n"
        "print(took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", reader, *command], env=environment, cwd=TOP, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    seconds, peak = map(float, done.stdout.split())
    return Sample(seconds, peak)


class Ground:
    """Two registries, two images, and fresh names."""

    def __init__(self, scratch: Path, layers: int, layer_mib: int) -> None:
        self.scratch = scratch
        self.environment = {**os.environ, "PYBUILD_ROOT": str(scratch / "store"), "PYTHONPATH": str(TOP)}
        self.first = RegistryServer(scratch / "one").start()
        self.second = RegistryServer(scratch / "two").start()
        self.images = {
            "large": make_image([random_layer(str(i), layer_mib << 20) for i in range(layers)]),
            "many": make_image([random_layer(str(i), 20_000) for i in range(50)]),
        }
        self._count = 0
        for name, image in self.images.items():
            write_layout(scratch / name, t=image)
            self.first.push_layout(scratch / name, name, "1")
        self.images.clear()

    def close(self) -> None:
        self.first.stop()
        self.second.stop()

    def fresh(self) -> str:
        self._count += 1
        return f"x{self._count}"

    def empty_second(self) -> None:
        shutil.rmtree(self.second.storage / "docker", ignore_errors=True)

    def pybuild(self, *arguments: str) -> Sample:
        return timed([*PYBUILD, *arguments], self.environment)

    def skopeo(self, source: str, destination: str) -> Sample:
        flags = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        return timed(["skopeo", "copy", "--quiet", *flags, source, destination], self.environment)

    def copy(self, tool: str, source: str, destination: str) -> Sample:
        if tool == "skopeo":
            return self.skopeo(source, destination)
        return self.pybuild("copy", "--quiet", "--tls-verify=false", source, destination)


Row = Callable[[Ground, str, str], Sample]


def to_layout(ground: Ground, tool: str, image: str) -> Sample:
    return ground.copy(tool, f"docker://{ground.first.host}/{image}:1", f"oci:{ground.scratch}/{ground.fresh()}:t")


def from_layout(ground: Ground, tool: str, image: str) -> Sample:
    ground.empty_second()
    return ground.copy(tool, f"oci:{ground.scratch}/{image}:t", f"docker://{ground.second.host}/{ground.fresh()}:1")


def between(ground: Ground, tool: str, image: str) -> Sample:
    ground.empty_second()
    source = f"docker://{ground.first.host}/{image}:1"
    return ground.copy(tool, source, f"docker://{ground.second.host}/{ground.fresh()}:1")


def again(ground: Ground, tool: str, image: str) -> Sample:
    source, destination = f"docker://{ground.first.host}/{image}:1", f"docker://{ground.second.host}/again-{image}:1"
    ground.copy(tool, source, destination)
    return ground.copy(tool, source, destination)


def mounted(ground: Ground, tool: str, image: str) -> Sample:
    source = f"docker://{ground.first.host}/{image}:1"
    return ground.copy(tool, source, f"docker://{ground.first.host}/mounted/{ground.fresh()}:1")


def pushed_again(ground: Ground, tool: str, image: str) -> Sample:
    """All there: from where each tool keeps images at no cost, the store and a layout."""
    destination = f"docker://{ground.second.host}/pushed-{image}:1"
    if tool == "skopeo":
        source = f"oci:{ground.scratch}/{image}:t"
        ground.skopeo(source, destination)
        return ground.skopeo(source, destination)
    name = f"{ground.first.host}/{image}:1"
    ground.pybuild("pull", "--quiet", "--tls-verify=false", name)
    push = ("push", "--quiet", "--tls-verify=false", name, destination)
    ground.pybuild(*push)
    return ground.pybuild(*push)


def asked(ground: Ground, tool: str, image: str) -> Sample:
    name = f"{ground.first.host}/{image}:1"
    if tool == "skopeo":
        command = ["skopeo", "inspect", "--no-tags", "--tls-verify=false", "--format", "{{.Digest}}"]
        return timed([*command, f"docker://{name}"], ground.environment)
    return ground.pybuild("digest", "--tls-verify=false", name)


def listed(ground: Ground, tool: str, image: str) -> Sample:
    name = f"{ground.first.host}/{image}"
    if tool == "skopeo":
        return timed(["skopeo", "list-tags", "--tls-verify=false", f"docker://{name}"], ground.environment)
    return ground.pybuild("tags", "ls", "--tls-verify=false", name)


def to_store(ground: Ground, tool: str, image: str) -> Sample:
    if tool == "skopeo":
        graph = ground.scratch / ground.fresh()
        name = f"containers-storage:[vfs@{graph}+{graph}.run]localhost/{image}:1"
        return ground.skopeo(f"docker://{ground.first.host}/{image}:1", name)
    shutil.rmtree(ground.scratch / "store", ignore_errors=True)
    return ground.pybuild("pull", "--quiet", "--tls-verify=false", f"{ground.first.host}/{image}:1")


def unpacked(ground: Ground, tool: str, image: str) -> Sample:
    target = ground.scratch / ground.fresh()
    if tool == "umoci":
        return timed(
            ["umoci", "unpack", "--rootless", "--image", f"{ground.scratch}/{image}:t", str(target)], ground.environment
        )
    return ground.pybuild("unpack", "--quiet", f"oci:{ground.scratch}/{image}:t", str(target))


ROWS: dict[str, tuple[str, Row, str]] = {
    "to-layout": ("registry to OCI layout", to_layout, "skopeo"),
    "from-layout": ("OCI layout to empty registry", from_layout, "skopeo"),
    "between": ("registry to empty registry", between, "skopeo"),
    "again": ("registry to registry, all there", again, "skopeo"),
    "push-again": ("store or layout to registry, all there", pushed_again, "skopeo"),
    "digest": ("an image's digest", asked, "skopeo"),
    "tags": ("a repository's tags", listed, "skopeo"),
    "mounted": ("within a registry (mounts)", mounted, "skopeo"),
    "to-store": ("registry to local store", to_store, "skopeo"),
    "unpack": ("OCI layout to root file system", unpacked, "umoci"),
}


@contextmanager
def ground_at(directory: Path | None, layers: int, layer_mib: int) -> Iterator[Ground]:
    scratch = Path(tempfile.mkdtemp(prefix="pybuild-bench-", dir=directory))
    try:
        ground = Ground(scratch, layers, layer_mib)
        try:
            yield ground
        finally:
            ground.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def measure(ground: Ground, row: Row, peer: str, image: str, rounds: int) -> str:
    samples: dict[str, list[Sample]] = {"pybuild": [], peer: []}
    for turn in range(rounds):
        order = list(samples) if turn % 2 == 0 else list(samples)[::-1]
        for tool in order:
            samples[tool].append(row(ground, tool, image))
    median = {tool: statistics.median(s.seconds for s in found) for tool, found in samples.items()}
    peak = max(s.peak_mib for s in samples["pybuild"])
    ratio = median["pybuild"] / median[peer]
    return f"{median['pybuild']:.3f} s | {peer} {median[peer]:.3f} s | {ratio:.2f} | {peak:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--layer-mib", type=int, default=37)
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    begun = time.monotonic()
    print("| what | image | pybuild | peer | ratio | peak memory |\n|---|---|---|---|---|---|")
    with ground_at(options.dir, options.layers, options.layer_mib) as ground:
        for key in options.only.split(","):
            title, row, peer = ROWS[key]
            for image in ("large", "many"):
                result = measure(ground, row, peer, image, options.rounds)
                print(f"| {title} | {image} | {result} |", flush=True)
    print(f"\n{options.rounds} rounds, {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
