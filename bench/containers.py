#!/usr/bin/env python3
"""Measure containers beside runc and podman: one run, fifty started, listed and removed, two hundred execs into one.

  sudo bench/containers.py [--rounds N] [--many N] [--execs N] [--only run,many,exec] [--pybuild PROGRAM]

Wall times in milliseconds, median and least of interleaved rounds, of `busybox true` on a busybox root.
runc gets a bundle that lies ready, podman (with runc) an image of its own store: neither pulls nor
unpacks. What is not installed, or fails, is left out with a word. --pybuild measures an installed program, as
users have it: `python -m builder`, which is measured else, and editable installations take some ms more to start.
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
from collections.abc import Callable, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
IMAGE = "bench:1"
CONTAINERFILE = 'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\nCMD ["sh"]\n'

Command = list[str]


class Pybuild:
    """A program, or this checkout by the interpreter that runs the benchmark."""

    name = "pybuild"

    def __init__(self, work: Path, program: str | None) -> None:
        start = [program] if program else [sys.executable, "-m", "builder"]
        self._argv = [*start, "--root", str(work / "pybuild")]
        context = work / "context"
        context.mkdir()
        shutil.copy(shutil.which("busybox") or "/bin/busybox", context / "busybox")
        (context / "Containerfile").write_text(CONTAINERFILE)
        _check([*self._argv, "build", "-q", "-t", IMAGE, str(context)])
        _check([*self._argv, "bundle", "--network", "host", IMAGE, str(work / "bundle"), "true"])

    def run(self, network: str) -> Command:
        return [*self._argv, "run", "--rm", "--network", network, IMAGE, "true"]

    def start(self, name: str) -> Command:
        return [*self._argv, "run", "-d", "--name", name, "--network", "host", IMAGE, "sleep", "1000"]

    def list(self) -> Command:
        return [*self._argv, "ps", "-a"]

    def execute(self, name: str) -> Command:
        return [*self._argv, "exec", name, "true"]

    def remove(self) -> Command:
        return [*self._argv, "rm", "-f", "-a"]


class Podman:
    """Debian's podman with runc. Limits of processes are named, as it would raise them where it may not."""

    name = "podman"

    def __init__(self, work: Path) -> None:
        store = work / "podman"
        self._argv = ["podman", "--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "overlay",
                      "--runtime", "runc", "--cgroup-manager", "cgroupfs"]  # fmt: skip
        self._limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"]
        tar = subprocess.Popen(["tar", "c", "-C", str(work / "bundle/rootfs"), "."], stdout=subprocess.PIPE)
        subprocess.run([*self._argv, "import", "-q", "-", IMAGE], stdin=tar.stdout, check=True, capture_output=True)
        tar.wait()

    def run(self, network: str) -> Command:
        network = "bridge" if network == "private" else network
        return [*self._argv, "run", "--rm", *self._limits, "--network", network, IMAGE, "true"]

    def start(self, name: str) -> Command:
        return [*self._argv, "run", "-d", "--name", name, *self._limits, "--network", "host", IMAGE, "sleep", "1000"]

    def list(self) -> Command:
        return [*self._argv, "ps", "-a"]

    def execute(self, name: str) -> Command:
        return [*self._argv, "exec", name, "true"]

    def remove(self) -> Command:
        return [*self._argv, "rm", "-f", "-t", "0", "-a"]


def _check(argv: Command) -> float:
    """Run to the end; the seconds that it took. Raises: CalledProcessError."""
    began = time.monotonic()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.monotonic() - began


class Table:
    """Samples by row and tool."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[float]] = {}
        self.failures: dict[tuple[str, str], str] = {}

    def time(self, row: str, tool: str, act: Callable[[], float | Command]) -> None:
        """Take one sample; a tool that failed once is not asked again."""
        if (row, tool) in self.failures:
            return
        try:
            found = act()
            seconds = found if isinstance(found, float) else _check(found)
        except (subprocess.CalledProcessError, OSError) as e:
            said = e.stderr.decode(errors="replace") if isinstance(e, subprocess.CalledProcessError) else str(e)
            self.failures[row, tool] = " ".join(said.split())[-100:]
            return
        self.samples.setdefault((row, tool), []).append(seconds * 1e3)

    def show(self) -> None:
        print("| | tool | median ms | least ms |\n|---|---|---:|---:|")
        for (row, tool), values in sorted(self.samples.items(), key=lambda item: list(self.samples).index(item[0])):
            print(f"| {row} | {tool} | {statistics.median(values):.1f} | {min(values):.1f} |")
        for (row, tool), words in self.failures.items():
            print(f"{tool}, {row}: {words}")


def measure_run(table: Table, tools: Sequence[Pybuild | Podman], work: Path, rounds: int) -> None:
    bundle = str(work / "bundle")
    for number in range(rounds):
        table.time("bare interpreter", "python", lambda: [sys.executable, "-c", "pass"])
        for network in ("host", "none", "private"):
            for tool in tools:
                table.time(f"run --rm true, network {network}", tool.name, lambda t=tool, n=network: t.run(n))  # type: ignore[misc]
        if shutil.which("runc"):
            name = f"bench-{os.getpid()}-{number}"
            table.time("run --rm true, network host", "runc run", lambda n=name: ["runc", "run", "--bundle", bundle, n])  # type: ignore[misc]


def measure_many(table: Table, tools: Sequence[Pybuild | Podman], many: int) -> None:
    for tool in tools:
        names = [f"c{number}" for number in range(many)]
        table.time(f"{many} started", tool.name, lambda t=tool, n=names: sum(_check(t.start(name)) for name in n))  # type: ignore[misc]
        table.time(f"{many} listed", tool.name, tool.list)
        table.time(f"{many} removed", tool.name, tool.remove)


def measure_execs(table: Table, tools: Sequence[Pybuild | Podman], work: Path, execs: int) -> None:
    bare = f"bench-{os.getpid()}-exec"
    peer = shutil.which("runc") is not None
    if peer:
        _hold(work)
        # Not by `_check`: the container keeps the descriptors that it is started with.
        subprocess.run(["runc", "run", "--detach", "--bundle", str(work / "bundle"), bare], check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for tool in tools:
            table.time("one started", tool.name, lambda t=tool: t.start("host"))  # type: ignore[misc]
        for _ in range(execs):
            for tool in tools:
                table.time("exec true", tool.name, lambda t=tool: t.execute("host"))  # type: ignore[misc]
            if peer:
                table.time("exec true", "runc exec", lambda: ["runc", "exec", bare, "true"])
    finally:
        if peer:
            subprocess.run(["runc", "delete", "--force", bare], check=False, capture_output=True)
        for tool in tools:
            subprocess.run(tool.remove(), check=False, capture_output=True)


def _hold(work: Path) -> None:
    """Make the bundle's command one that stays."""
    config = work / "bundle/config.json"
    config.write_text(config.read_text().replace('"true"\n', '"sleep",\n      "1000"\n', 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--many", type=int, default=50)
    parser.add_argument("--execs", type=int, default=200)
    parser.add_argument("--only", default="run,many,exec")
    parser.add_argument("--pybuild", metavar="PROGRAM")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("run it as root")
    if options.pybuild is None:
        os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH") or str(TOP)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    work = Path(tempfile.mkdtemp(prefix="pybuild-bench-", dir="/var/tmp"))
    table = Table()
    tools: list[Pybuild | Podman] = []
    try:
        tools.append(Pybuild(work, options.pybuild))
        if shutil.which("podman") and shutil.which("runc"):
            tools.append(Podman(work))
        chosen = options.only.split(",")
        if "run" in chosen:
            measure_run(table, tools, work, options.rounds)
        if "many" in chosen:
            measure_many(table, tools, options.many)
        if "exec" in chosen:
            measure_execs(table, tools, work, options.execs)
    finally:
        for tool in tools:
            subprocess.run(tool.remove(), check=False, capture_output=True)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(work) in (point := line.split()[4]):
                subprocess.run(["umount", "-l", point], check=False)
        shutil.rmtree(work, ignore_errors=True)
    table.show()


if __name__ == "__main__":
    main()
