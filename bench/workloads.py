"""What is measured: one function per workload, run once per tool and round.

A workload prepares, untimed, by `bench.quiet`, and returns the seconds of what counts, by
`bench.timed`. The order of rounds is interleaved over the tools by `bench/run.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bench.tools import Pybuild


class Bench(Protocol):
    """What a workload is given."""

    work: Path
    host: str
    busybox: str
    debian: str
    debian_layout: Path

    def timed(self, argv: list[str]) -> float: ...

    def quiet(self, argv: list[str]) -> None: ...


class Workload(NamedTuple):
    """One row. `target` is the wanted ratio to buildah (or to the peer named last), None where there is none."""

    name: str
    what: str
    tools: tuple[str, ...]
    run: Callable[[Bench, Any, int], float]
    target: float | None = None
    rounds: int = 5


BUILDERS = ("pybuild", "buildah", "buildah-chroot")


def context(bench: Bench, name: str, containerfile: str, files: dict[str, str] | None = None) -> Path:
    """A build context, made once."""
    folder = bench.work / "contexts" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        for path, text in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    (folder / "Containerfile").write_text(containerfile)
    return folder


def many_files(bench: Bench, count: int) -> Path:
    """A context with `count` files of 20 to 4,000 bytes in folders of a hundred."""
    folder = bench.work / "contexts" / f"files-{count}"
    if not folder.exists():
        for n in range(count):
            path = folder / "tree" / f"d{n // 100:04}" / f"f{n:06}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((f"file {n}\n" * (2 + n * 7919 % 300)).encode())
    return folder


def version(bench: Bench, tool: Any, turn: int) -> float:
    return bench.timed(tool.version())


def cached_rebuild(bench: Bench, tool: Any, turn: int) -> float:
    steps = "".join(f"RUN echo {n} > /f{n}\n" for n in range(5)) + "".join(f"COPY f{n} /c{n}\n" for n in range(5))
    folder = context(bench, "ten-steps", f"FROM {bench.busybox}\n{steps}", {f"f{n}": str(n) for n in range(5)})
    if turn == 0:
        bench.quiet(tool.build(folder, "cached:1"))
    return bench.timed(tool.build(folder, "cached:1"))


def run_true(bench: Bench, tool: Any, turn: int) -> float:
    steps = 20
    folder = context(bench, "run-true", f"FROM {bench.busybox}\n" + "RUN true\n" * steps)
    empty = context(bench, "run-none", f"FROM {bench.busybox}\nLABEL a=b\n")
    base = bench.timed(tool.build(empty, "none:1", cached=False))
    return max(0.0, bench.timed(tool.build(folder, "true:1", cached=False)) - base) / steps


def copies_in_a_row(bench: Bench, tool: Any, turn: int) -> float:
    steps = 120
    files = {f"f{n}": f"small file {n}\n" for n in range(steps)}
    text = f"FROM {bench.busybox}\n" + "".join(f"COPY f{n} /dir/f{n}\n" for n in range(steps))
    folder = context(bench, "copies", text, files)
    return bench.timed(tool.build(folder, "copies:1", cached=False)) / steps


def copy_many(bench: Bench, tool: Any, turn: int, count: int = 20_000) -> float:
    folder = many_files(bench, count)
    if tool.name == "cp":
        shutil.rmtree(bench.work / "copied", ignore_errors=True)
        return bench.timed(["cp", "-a", str(folder), str(bench.work / "copied")])
    (folder / "Containerfile").write_text(f"FROM {bench.debian}\nCOPY tree /tree\n")
    if turn == 0:
        bench.quiet(tool.build(context(bench, "debian", f"FROM {bench.debian}\nLABEL a=b\n"), "debian:1"))
    return bench.timed(tool.build(folder, "many:1", cached=False))


def copy_very_many(bench: Bench, tool: Any, turn: int) -> float:
    return copy_many(bench, tool, turn, 100_000)


def many_files_built(bench: Bench, tool: Any, turn: int, count: int, text: str) -> Path:
    """A context of many files that the tool has built as many:1 before its first turn."""
    folder = many_files(bench, count)
    (folder / "Containerfile").write_text(text)
    if turn == 0:
        bench.quiet(tool.build(folder, "many:1"))
    return folder


def copy_very_many_again(bench: Bench, tool: Any, turn: int) -> float:
    folder = many_files_built(bench, tool, turn, 100_000, f"FROM {bench.debian}\nCOPY tree /tree\n")
    return bench.timed(tool.build(folder, "many:1"))


def eight_layers(bench: Bench) -> str:
    """An image of eight layers, 600 MB of files in all, in the registry; half of the bytes compress."""
    name = f"{bench.host}/base/eight:1"
    folder = bench.work / "contexts" / "eight"
    if not folder.exists():
        for n in range(8):
            (folder / f"l{n}").mkdir(parents=True)
            for k in range(150):
                (folder / f"l{n}" / f"f{k}").write_bytes(os.urandom(250_000) + f"{n} {k}\n".encode() * 41_000)
        (folder / "Containerfile").write_text("FROM scratch\n" + "".join(f"COPY l{n} /l{n}\n" for n in range(8)))
        maker = Pybuild(bench.work / "maker")
        bench.quiet(maker.build(folder, name, "--push"))
    return name


def cold_eight(bench: Bench, tool: Any, turn: int) -> float:
    # No shell in it: a COPY has the files unpacked as a RUN would.
    folder = context(bench, "cold-eight", f"FROM {eight_layers(bench)}\nCOPY f /l0/f\nWORKDIR /l7/new\n", {"f": "f"})
    tool.reset()
    return bench.timed(tool.build(folder, "cold-eight:1"))


def unpack_eight(bench: Bench, tool: Any, turn: int) -> float:
    layout = bench.work / "eight"
    if not layout.exists():
        maker = Pybuild(bench.work / "maker")
        bench.quiet(maker.copy(f"docker://{eight_layers(bench)}", f"oci:{layout}:eight"))
    target = bench.work / f"rootfs-{tool.name}"
    shutil.rmtree(target, ignore_errors=True)
    return bench.timed(tool.unpack(layout, "eight", target))


def copy_many_to_layout(bench: Bench, tool: Any, turn: int) -> float:
    took = copy_many(bench, tool, turn)
    layout = bench.work / f"layout-{tool.name}"
    shutil.rmtree(layout, ignore_errors=True)
    return took + bench.timed(tool.push("many:1", f"oci:{layout}:many"))


def one_of_many_changed(bench: Bench, tool: Any, turn: int) -> float:
    folder = many_files_built(bench, tool, turn, 20_000, f"FROM {bench.debian}\nCOPY tree /tree\n")
    (folder / "tree/d0007/f000777").write_text(f"changed {turn} {tool.name} {os.getpid()}\n")
    return bench.timed(tool.build(folder, "many:2"))


def one_file_of_a_large_context(bench: Bench, tool: Any, turn: int) -> float:
    folder = many_files_built(bench, tool, turn, 20_000, f"FROM {bench.busybox}\nCOPY tree/d0001/f000123 /f\n")
    return bench.timed(tool.build(folder, "many:1"))


def copy_large(bench: Bench, tool: Any, turn: int) -> float:
    folder = context(bench, "large", f"FROM {bench.busybox}\nCOPY large /large\n")
    large = folder / "large"
    if not large.exists():
        # Half random, half repeating: compresses to a little over one half, as binaries do.
        with large.open("wb") as file:
            for n in range(256):
                file.write(os.urandom(1 << 20))
                file.write(f"line {n}\n".encode().ljust(64, b".") * (1 << 14))
    layout = bench.work / f"large-{tool.name}"
    shutil.rmtree(layout, ignore_errors=True)
    took = bench.timed(tool.build(folder, "large:1", cached=False))
    return took + bench.timed(tool.push("large:1", f"oci:{layout}:large"))


def huge_layer(bench: Bench, tool: Any, turn: int) -> float:
    """Looked at for its memory more than for its time: nothing may grow with the layer."""
    folder = context(bench, "huge", f"FROM {bench.busybox}\nCOPY huge /huge\n")
    huge = folder / "huge"
    if not huge.exists():
        block = os.urandom(1 << 20)
        with huge.open("wb") as file:
            for n in range(2048):
                file.write(block[n:] + block[:n])
    layout = bench.work / f"huge-{tool.name}"
    took = bench.timed(tool.build(folder, "huge:1", cached=False))
    took += bench.timed(tool.push("huge:1", f"oci:{layout}:huge"))
    shutil.rmtree(layout, ignore_errors=True)
    return took


def cold_base(bench: Bench, tool: Any, turn: int) -> float:
    folder = context(bench, "cold", f"FROM {bench.debian}\nRUN true\n")
    tool.reset()
    return bench.timed(tool.build(folder, "cold:1"))


def pull(bench: Bench, tool: Any, turn: int) -> float:
    tool.reset()
    return bench.timed(tool.pull(f"docker://{bench.debian}"))


def to_layout(bench: Bench, tool: Any, turn: int) -> float:
    layout = bench.work / f"copy-{tool.name}"
    shutil.rmtree(layout, ignore_errors=True)
    return bench.timed(tool.copy(f"docker://{bench.debian}", f"oci:{layout}:debian"))


def unpack(bench: Bench, tool: Any, turn: int) -> float:
    target = bench.work / f"rootfs-{tool.name}"
    shutil.rmtree(target, ignore_errors=True)
    return bench.timed(tool.unpack(bench.debian_layout, "debian", target))


def push_fresh(bench: Bench, tool: Any, turn: int) -> float:
    folder = context(bench, "fresh", f"FROM {bench.debian}\nARG N\nRUN seq 300000 > /numbers; echo $N >> /numbers\n")
    bench.quiet(tool.build(folder, "fresh:1", "--build-arg", f"N={turn}-{tool.name}"))
    return bench.timed(tool.push("fresh:1", f"docker://{bench.host}/fresh/{tool.name}-{turn}-{os.getpid()}:1"))


def push_again(bench: Bench, tool: Any, turn: int) -> float:
    if turn == 0:
        folder = context(bench, "again", f"FROM {bench.debian}\nRUN seq 1000 > /numbers\n")
        bench.quiet(tool.build(folder, "again:1"))
        bench.quiet(tool.push("again:1", f"docker://{bench.host}/again/{tool.name}:1"))
    return bench.timed(tool.push("again:1", f"docker://{bench.host}/again/{tool.name}:1"))


def registry_to_registry(bench: Bench, tool: Any, turn: int) -> float:
    target = f"docker://{bench.host}/copied/{tool.name}-{turn}-{os.getpid()}:1"
    return bench.timed(tool.copy(f"docker://{bench.debian}", target))


def registry_to_registry_again(bench: Bench, tool: Any, turn: int) -> float:
    target = f"docker://{bench.host}/copied/{tool.name}:1"
    if turn == 0:
        bench.quiet(tool.copy(f"docker://{bench.debian}", target))
    return bench.timed(tool.copy(f"docker://{bench.debian}", target))


def multi_stage(bench: Bench, tool: Any, turn: int) -> float:
    folder = bench.work / "contexts" / "site"
    if not folder.exists():
        shutil.copytree(Path(__file__).resolve().parents[1] / "Containerfile.examples" / "site", folder)
    return bench.timed(tool.build(folder, "site:1", "--build-arg", f"BASE={bench.busybox}", cached=False))


def source_line_changed(bench: Bench, tool: Any, turn: int) -> float:
    flags = ("--build-arg", f"BASE={bench.busybox}")
    folder = bench.work / "contexts" / "site"
    if turn == 0:
        bench.quiet(tool.build(folder, "site:1", *flags))
    with (folder / "pages/about.txt").open("a") as page:
        page.write(f"Changed by {tool.name} in round {turn}.\n")
    return bench.timed(tool.build(folder, "site:1", *flags))


def source_line_pushed(bench: Bench, tool: Any, turn: int) -> float:
    target = f"docker://{bench.host}/site/{tool.name}:1"
    if turn == 0:
        bench.quiet(tool.push("site:1", target))
    source_line_changed(bench, tool, turn + 1)
    return bench.timed(tool.push("site:1", target))


WORKLOADS = (
    Workload("version", "--version", ("pybuild", "buildah", "skopeo", "umoci"), version, None, 9),
    Workload("cached", "cached rebuild of ten steps", BUILDERS, cached_rebuild, 0.3, 9),
    Workload("run", "one RUN true with its commit (of 20)", BUILDERS, run_true, 0.08, 5),
    Workload("copies", "one COPY of a small file (of 120)", BUILDERS[:2], copies_in_a_row, 0.07, 3),
    Workload("copy-20k", "COPY 20,000 small files onto Debian", ("pybuild", "buildah", "cp"), copy_many, 0.36, 3),
    Workload("copy-20k-oci", "… and into an OCI layout", BUILDERS[:2], copy_many_to_layout, 0.26, 3),
    Workload("change-1-of-20k", "one of them changed, rebuilt", BUILDERS[:2], one_of_many_changed, 0.12, 3),
    Workload(
        "copy-1-of-20k", "COPY 1 file of that context, rebuilt", BUILDERS[:2], one_file_of_a_large_context, 0.8, 5
    ),
    Workload("copy-512m", "COPY 512 MiB, into an OCI layout", BUILDERS[:2], copy_large, 0.32, 3),
    Workload("cold", "empty store: FROM Debian and one RUN", BUILDERS[:2], cold_base, 0.43, 3),
    Workload("pull", "pull Debian into an empty store", BUILDERS[:2], pull, 0.7, 3),
    Workload("to-layout", "Debian, registry to OCI layout", ("pybuild", "skopeo"), to_layout, 1.05, 5),
    Workload("unpack", "Debian, OCI layout to root file system", ("pybuild", "umoci"), unpack, 0.5, 3),
    Workload("cold-eight", "empty store: FROM eight layers (600 MB)", BUILDERS[:2], cold_eight, 0.64, 2),
    Workload("unpack-eight", "the same, layout to root file system", ("pybuild", "umoci"), unpack_eight, 0.5, 2),
    Workload("push", "push a fresh build", BUILDERS[:2], push_fresh, 0.4, 3),
    Workload("push-again", "push it again", BUILDERS[:2], push_again, None, 5),
    Workload("copy", "Debian, registry to registry", ("pybuild", "skopeo"), registry_to_registry, 0.9, 5),
    Workload("copy-again", "… all there", ("pybuild", "skopeo"), registry_to_registry_again, None, 5),
    Workload("stages", "multi-stage example, nothing cached", BUILDERS, multi_stage, 0.5, 5),
    Workload("stages-change", "one source line of it changed, rebuilt", BUILDERS[:2], source_line_changed, 0.35, 5),
    Workload("stages-push", "… and pushed", BUILDERS[:2], source_line_pushed, None, 5),
    Workload("copy-100k", "COPY 100,000 small files onto Debian", BUILDERS[:2], copy_very_many, 0.25, 1),
    Workload("copy-100k-cached", "… found in the cache", BUILDERS[:2], copy_very_many_again, None, 2),
    Workload("huge", "COPY 2 GiB, into an OCI layout", BUILDERS[:1], huge_layer, None, 1),
)
