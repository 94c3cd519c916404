#!/usr/bin/env python3
"""Measure pybuild beside buildah, skopeo and umoci in one interleaved run.

  bench/run.py [--only NAME,…] [--rounds N] [--json FILE]

Needs root, docker-registry, busybox-static, mmdebstrap and, to compare with, buildah, runc, skopeo and
umoci from Debian's packages. Prints a table of medians, each row as it is done, with each peer's time and
the ratio to the fastest; the samples go to bench/out/. Times depend on the machine, ratios in one run much less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from bench.tools import Buildah, Pybuild, Skopeo, Umoci, available  # noqa: E402
from bench.workloads import WORKLOADS, Workload  # noqa: E402
from tests.support.registries import RegistryServer  # noqa: E402

OUT = TOP / "bench" / "out"
_ENOUGH_S = 40.0
"""Unless --rounds says otherwise, no round begins so long after a workload's first one."""


class Cp:
    """The machine's own limit where a copy is what is measured."""

    name = "cp"


class Driver:
    """Runs commands and remembers the largest memory that each tool took."""

    def __init__(self, work: Path, registry: RegistryServer) -> None:
        self.work = work
        self.host = registry.host
        self.busybox = f"{registry.host}/base/busybox:1"
        self.debian = f"{registry.host}/base/debian:1"
        self.debian_layout = OUT / "bases" / "debian"
        self.peak_kib = 0
        # Byte code is cached, as it is for whoever installs pybuild.
        inherited = {k: v for k, v in os.environ.items() if k not in {"PYTHONDONTWRITEBYTECODE", "CI"}}
        own = {"PYTHONPATH": str(TOP), "PYTHONPYCACHEPREFIX": str(work / "pyc"), "TMPDIR": str(work)}
        self._environ = {**inherited, **own}

    def _run(self, argv: list[str]) -> float:
        with tempfile.TemporaryFile() as log:
            began = time.perf_counter()
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ, cwd=self.work
            )
            _, status, usage = os.wait4(process.pid, 0)
            took = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(f"$ {' '.join(argv)}\n{log.read().decode(errors='replace')[-2000:]}")
        self.peak_kib = max(self.peak_kib, usage.ru_maxrss)
        return took

    def timed(self, argv: list[str]) -> float:
        return self._run(argv)

    def quiet(self, argv: list[str]) -> None:
        self._run(argv)


def warm_up(driver: Driver, pybuild: Pybuild) -> None:
    """One run of each kind of command, so that no workload pays for compiling modules."""
    folder = driver.work / "warm"
    folder.mkdir()
    (folder / "Containerfile").write_text(f"FROM {driver.busybox}\nRUN true\nCOPY Containerfile /\n")
    driver.quiet(pybuild.version())
    driver.quiet(pybuild.build(folder, "warm:1"))
    driver.quiet(pybuild.push("warm:1", f"docker://{driver.host}/warm:1"))
    driver.quiet(pybuild.copy(f"docker://{driver.host}/warm:1", f"oci:{folder}/layout:1"))


def measure(driver: Driver, workload: Workload, tools: dict[str, Any], rounds: int | None) -> dict[str, Any]:
    """All rounds of one workload, the tools taking turns; a tool that fails is named and left out."""
    samples: dict[str, list[float]] = {name: [] for name in workload.tools if name in tools}
    peaks = dict.fromkeys(samples, 0)
    failed: dict[str, str] = {}
    began = time.monotonic()
    for turn in range(rounds or workload.rounds):
        if rounds is None and turn and time.monotonic() - began > _ENOUGH_S:
            break
        for name in samples:
            if name in failed:
                continue
            driver.peak_kib = 0
            try:
                samples[name].append(workload.run(driver, tools[name], turn))
            except RuntimeError as e:
                failed[name] = str(e)
                print(f"{workload.name}: {name} failed: {e}", file=sys.stderr)
            peaks[name] = max(peaks[name], driver.peak_kib)
    return {
        "median_s": {name: statistics.median(values) for name, values in samples.items() if values},
        "samples_s": samples,
        "peak_mib": {name: round(peak / 1024, 1) for name, peak in peaks.items() if samples[name]},
        "failed": sorted(failed),
        "target": workload.target,
    }


def show(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


HEAD = ("workload", "pybuild", "MiB", "buildah", "buildah-chroot", "skopeo", "umoci", "cp", "ratio", "target")
WIDTHS = (max(len(w.what) for w in WORKLOADS), *(max(len(name), 7) for name in HEAD[1:]))


def line(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)) + " |"


def row(workload: Workload, result: dict[str, Any]) -> str:
    """A workload's medians; the ratio is to the fastest peer."""
    median = result["median_s"]
    peers = [value for name, value in median.items() if name not in {"pybuild", "cp"}]
    ours = median.get("pybuild")
    return line(
        (
            workload.what,
            show(ours),
            str(result["peak_mib"].get("pybuild", "-")),
            *(show(median.get(name)) for name in HEAD[3:8]),
            f"{ours / min(peers):.2f}" if ours and peers else "-",
            f"{workload.target:.2f}" if workload.target else "-",
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="workloads to run, by name: " + ", ".join(w.name for w in WORKLOADS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root: buildah is measured with overlay and runc")
    wanted = set(options.only.split(",")) if options.only else {w.name for w in WORKLOADS}
    unknown = wanted - {w.name for w in WORKLOADS}
    if unknown:
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    OUT.mkdir(exist_ok=True)
    for kind in ("busybox", "debian"):
        maker = TOP / "Containerfile.examples" / "make_base.py"
        subprocess.run([sys.executable, str(maker), kind, str(OUT / "bases" / kind)], check=True, stdout=sys.stderr)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=OUT))
    tools: dict[str, Any] = {"pybuild": Pybuild(work), "cp": Cp()}
    if available("buildah"):
        tools["buildah-chroot"] = Buildah(work, "chroot")
        if available("runc"):
            tools["buildah"] = Buildah(work)
    tools.update({tool.name: tool for tool in (Skopeo(), Umoci()) if available(tool.name)})
    results: dict[str, dict[str, Any]] = {}
    machine = f"{os.cpu_count()} CPUs, {platform.release()}, Python {platform.python_version()}"
    try:
        with RegistryServer(work / "registry") as registry:
            for kind in ("busybox", "debian"):
                registry.push_layout(OUT / "bases" / kind, f"base/{kind}", "1")
            driver = Driver(work, registry)
            warm_up(driver, tools["pybuild"])
            print(f"{machine}; medians of interleaved rounds; MiB is pybuild's peak; ratio to the fastest peer\n")
            print(line(HEAD), "|" + "|".join("-" * (width + 2) for width in WIDTHS) + "|", sep="\n", flush=True)
            for workload in WORKLOADS:
                if workload.name in wanted:
                    results[workload.name] = measure(driver, workload, tools, options.rounds)
                    print(row(workload, results[workload.name]), flush=True)
    finally:
        for tool in tools.values():
            if hasattr(tool, "reset"):
                tool.reset()
        shutil.rmtree(work, ignore_errors=True)
    document = {"machine": machine, "results": results}
    for path in filter(None, (OUT / "latest.json", options.json)):
        path.write_text(json.dumps(document, indent=1) + "\n")
    return int(any("pybuild" in result["failed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
