#!/usr/bin/env python3
"""Measure layers beside the tools of the trade: a directory into a blob, a blob into a directory.

  bench/layers.py [--rounds N] [--files N] [--mib N] [--dir SCRATCH] [--only write|apply] [--match NAME]

Prints medians of interleaved rounds, page cache warm, with the peak memory of each process. `tar`
with a compressor stands for the least that must be done; umoci is the peer that unpacks images. The
peers and compressors that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

WRITE = """
import sys
from pathlib import Path
from layers.changeset import diff_overlay, write_layer
root, out, kind, reproducible = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "1"
with open(out, "wb", buffering=0) as sink:
    result = write_layer(diff_overlay(root, [], "trusted"), root, sink, compression=kind, reproducible=reproducible)
print(result.diff_id, result.digest, result.size_bytes)
"""
APPLY = """
import sys
from pathlib import Path
from layers.apply import apply_layer
target = Path(sys.argv[2])
target.mkdir()
with open(sys.argv[1], "rb", buffering=0) as blob:
    print(apply_layer(blob, target, whiteouts=sys.argv[3]).diff_id)
"""


class Task(NamedTuple):
    """A measured command; `{out}` is a fresh path for what it writes."""

    name: str
    command: list[str]


def shell(name: str, script: str) -> Task:
    return Task(name, ["sh", "-ec", script])


def python(name: str, code: str, *args: str) -> Task:
    return Task(name, [sys.executable, "-c", code, *args])


def measured(task: Task, out: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of all processes, and peak MiB of the largest one."""
    command = [part.replace("{out}", str(out)) for part in task.command]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{task.name} failed: {' '.join(command)[:200]}")
    return elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def table(title: str, tasks: list[Task], rounds: int, work: Path, size_bytes: int) -> None:
    """Run every task once in each round, and print the medians."""
    times: dict[str, list[float]] = {task.name: [] for task in tasks}
    cpu: dict[str, list[float]] = {task.name: [] for task in tasks}
    memory: dict[str, float] = {}
    number = 0
    for _ in range(rounds):
        for task in tasks:
            # Nothing is removed meanwhile: ext4 is slow at giving out inodes beside freshly freed ones.
            number += 1
            elapsed, used, peak = measured(task, work / f"out{number}")
            times[task.name].append(elapsed)
            cpu[task.name].append(used)
            memory[task.name] = max(memory.get(task.name, 0.0), peak)
    for path in work.glob("out*"):
        subprocess.run(["rm", "-rf", str(path)], check=True)
    print(f"\n{title}")
    for name, samples in times.items():
        median = statistics.median(samples)
        used = statistics.median(cpu[name])
        speed = size_bytes / median / 1e6
        print(f"  {name:34} {median:7.3f} s  {used:7.3f} s CPU  {speed:6.0f} MB/s  {memory[name]:5.0f} MiB")


def words(seed: int, size: int) -> bytes:
    """Text that compresses about as programs and documents do."""
    source = random.Random(seed)
    vocabulary = [source.randbytes(source.randint(2, 9)).hex().encode() for _ in range(3000)]
    out = bytearray()
    while len(out) < size:
        out += b" ".join(source.choices(vocabulary, k=500)) + b"\n"
    return bytes(out[:size])


def small_files(top: Path, count: int) -> int:
    """`count` files of some 4 KiB, a hundred in each directory; their size in bytes."""
    text, total = words(1, 4 << 20), 0
    source = random.Random(2)
    for number in range(count):
        folder = top / f"package{number // 1000}/module{number // 100}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        at, size = source.randrange(len(text) - 9000), source.randrange(200, 8000)
        (folder / f"file{number}.py").write_bytes(text[at : at + size])
        total += size
    return total


def large_file(top: Path, mib: int) -> int:
    """One file: text and noise in turn."""
    text = words(3, 8 << 20)
    with open(top / "data.bin", "wb") as file:
        for number in range(mib // 8):
            file.write(text if number % 2 else os.urandom(8 << 20))
    return mib << 20


def in_child(work: Callable[[], int]) -> int:
    """Run it in a forked child: what this process ever held counts as the peak memory of those it starts."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        result = int(answer.read())
    os.waitpid(child, 0)
    return result


def write_tasks(root: Path) -> list[Task]:
    tasks = [
        python("pybuild gzip", WRITE, str(root), "{out}", "gzip", "0"),
        python("pybuild gzip, reproducible (zlib)", WRITE, str(root), "{out}", "gzip", "1"),
        python("pybuild zstd", WRITE, str(root), "{out}", "zstd", "0"),
        python("pybuild none", WRITE, str(root), "{out}", "none", "0"),
        shell("limit: tar to /dev/null", f"tar -C {root} -cf - . | cat >/dev/null"),
        shell("limit: tar | sha256sum", f"tar -C {root} -cf - . | sha256sum"),
        shell("tar | gzip -1", f"tar -C {root} -cf - . | gzip -1 >{{out}}"),
    ]
    if shutil.which("pigz"):
        tasks.append(shell("tar | pigz -1", f"tar -C {root} -cf - . | pigz -1 >{{out}}"))
    if shutil.which("zstd"):
        tasks.append(shell("tar | zstd -3 -T0", f"tar -C {root} -cf - . | zstd -q -3 -T0 >{{out}}"))
    tasks.append(shell("tar | igzip -1", f"tar -C {root} -cf - . | {sys.executable} -m isal.igzip -1 -c >{{out}}"))
    return tasks


def apply_tasks(gzip: Path, zstd: Path, layout: Path) -> list[Task]:
    tasks = [
        python("pybuild, gzip, flattened", APPLY, str(gzip), "{out}", "delete"),
        python("pybuild, gzip, overlay layer", APPLY, str(gzip), "{out}", "overlay"),
        python("pybuild, zstd, overlay layer", APPLY, str(zstd), "{out}", "overlay"),
        shell("tar xz", f"mkdir {{out}}; tar -C {{out}} -xzf {gzip}"),
        shell("igzip -d | tar x", f"mkdir {{out}}; {sys.executable} -m isal.igzip -d -c {gzip} | tar -C {{out}} -xf -"),
    ]
    if shutil.which("umoci"):
        tasks.append(Task("umoci unpack", ["umoci", "unpack", "--image", f"{layout}:t", "{out}"]))
    return tasks


def prepare_blobs(root: Path, work: Path) -> int:
    """The same tree as gzip and zstd layers in `work`, and an OCI layout of the first; the tar's size."""
    from layers.changeset import diff_overlay, write_layer
    from layers.oci import Descriptor, ImageConfig, Manifest

    made = []
    for kind in ("gzip", "zstd"):
        with open(work / kind, "wb", buffering=0) as sink:
            made.append(write_layer(diff_overlay(root, [], "trusted"), root, sink, compression=kind))
    layout = work / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    config = ImageConfig.build(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [str(made[0].diff_id)]}}
    )
    layer = Descriptor(media_type=made[0].media_type, digest=made[0].digest, size_bytes=made[0].size_bytes)
    manifest = Manifest.build(config=config.descriptor, layers=[layer])
    os.link(work / "gzip", blobs / made[0].digest.encoded)
    (blobs / config.descriptor.digest.encoded).write_bytes(config.raw)
    (blobs / manifest.descriptor.digest.encoded).write_bytes(manifest.raw)
    entry = manifest.descriptor.to_json() | {"annotations": {"org.opencontainers.image.ref.name": "t"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return made[0].uncompressed_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--only", choices=("write", "apply"))
    parser.add_argument("--match", default="", help="only tasks whose name holds this")
    options = parser.parse_args()
    makers: list[tuple[str, Callable[[Path], int]]] = []
    if options.files:
        makers.append((f"{options.files} small files", lambda top: small_files(top, options.files)))
    if options.mib:
        makers.append((f"one file of {options.mib} MiB", lambda top: large_file(top, options.mib)))
    for title, make in makers:
        work = Path(tempfile.mkdtemp(prefix="layers-", dir=options.dir))
        try:
            root = work / "root"
            root.mkdir()
            size = in_child(lambda make=make, root=root: make(root))  # type: ignore[misc]
            if options.only != "apply":
                tasks = [task for task in write_tasks(root) if options.match in task.name]
                table(f"{title}: into a layer", tasks, options.rounds, work, size)
            if options.only != "write":
                in_child(lambda root=root, work=work: prepare_blobs(root, work))  # type: ignore[misc]
                tasks = apply_tasks(work / "gzip", work / "zstd", work / "layout")
                tasks = [task for task in tasks if options.match in task.name]
                table(f"{title}: out of a layer", tasks, options.rounds, work, size)
        finally:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
