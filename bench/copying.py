#!/usr/bin/env python3
"""Measure COPY's engine, its content key and its layer beside `cp -a` and a bare read of all files.

  bench/copying.py [--rounds N] [--files N] [--bytes MEAN] [--big-mib N] [--dir SCRATCH] [--overlay]

Prints medians of interleaved rounds, page cache warm. The layer (gzip, written nowhere) is made of the
copy, and packed from the source alone, as of a COPY that ends an image. `--overlay` copies onto an overlay mount, as a
build does (as root); `cp` then does too. What a round wrote stays until the end: ext4 makes files
slowly for some seconds after many were deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from builder.solve.contenthash import content_key  # noqa: E402
from builder.solve.fileops import CopyOptions, copy  # noqa: E402
from builder.solve.treepack import LeftOut  # noqa: E402
from layers import linux  # noqa: E402
from layers.changeset import diff_trees, write_layer  # noqa: E402
from layers.records import FileStat  # noqa: E402

FILES_PER_DIRECTORY = 100


class Remembering:
    """A cache of digests in memory: what a warm key costs without the database."""

    def __init__(self) -> None:
        self._known: dict[FileStat, bytes] = {}

    def get_many(self, stats: Sequence[FileStat]) -> list[bytes | None]:
        return [self._known.get(s) for s in stats]

    def put_many(self, items: Iterable[tuple[FileStat, bytes]], *, observed_ns: int) -> None:
        self._known.update(items)


def make_tree(root: Path, files: int, mean_bytes: int) -> None:
    rng = random.Random(1)
    for number in range(files):
        directory = root / f"d{number // FILES_PER_DIRECTORY}"
        if number % FILES_PER_DIRECTORY == 0:
            directory.mkdir(parents=True)
        (directory / f"file{number}").write_bytes(rng.randbytes(rng.randrange(2 * mean_bytes)))


def make_big(root: Path, mib: int) -> None:
    root.mkdir()
    with (root / "big").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))


@contextlib.contextmanager
def target(scratch: Path, overlay: bool) -> Iterator[tuple[Path, int, int | None]]:
    """A fresh directory to copy into: its path, and descriptors as the solver has them."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    if not overlay:
        fd = os.open(place, os.O_PATH | os.O_DIRECTORY)
        yield place, fd, None
        os.close(fd)
        return
    lower, upper, work = (place / name for name in ("lower", "upper", "work"))
    for directory in (lower, upper, work):
        directory.mkdir()
    fd = linux.fsmount_overlay([str(lower)], upper=str(upper), work=str(work))
    upper_fd = os.open(upper, os.O_PATH | os.O_DIRECTORY)
    yield Path(f"/proc/self/fd/{fd}"), fd, upper_fd
    os.close(upper_fd)
    os.close(fd)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class Nowhere:
    """Takes a blob."""

    def write(self, data: bytes | memoryview) -> int:
        return len(data)


def copied_layer(source_fd: int, scratch: Path, overlay: bool, options: CopyOptions) -> None:
    """The copy's layer by way of its files."""
    with target(scratch, overlay) as (path, fd, upper):
        copy(source_fd, "/", fd, "/out/", options, upper_fd=upper)
        root = str(path) if upper is None else f"/proc/self/fd/{upper}/."
        write_layer(diff_trees(None, root), root, Nowhere())


def packed_layer(source_fd: int, scratch: Path, overlay: bool, options: CopyOptions) -> None:
    """The same layer from the source."""
    left_out = LeftOut()
    try:
        with target(scratch, overlay) as (path, fd, upper):
            copy(source_fd, "/", fd, "/out/", options, upper_fd=upper, left_out=left_out)
            root = str(path) if upper is None else f"/proc/self/fd/{upper}/."
            write_layer(left_out.changes(diff_trees(None, root)), root, Nowhere())
    finally:
        left_out.close()


def round_of(source: Path, scratch: Path, overlay: bool, warm: Remembering) -> dict[str, float]:
    """One turn of every contestant."""
    options = CopyOptions(reset_owner=True)
    found: dict[str, float] = {}
    source_fd = os.open(source, os.O_PATH | os.O_DIRECTORY)
    try:
        found["key, cold"] = timed(lambda: content_key(source_fd, ["/"], options))
        found["key, warm"] = timed(lambda: content_key(source_fd, ["/"], options, stats_cache=warm))
        with target(scratch, overlay) as (_, fd, upper):
            found["copy"] = timed(lambda: copy(source_fd, "/", fd, "/out/", options, upper_fd=upper))
        found["copy, layer"] = timed(lambda: copied_layer(source_fd, scratch, overlay, options))
        found["layer alone"] = timed(lambda: packed_layer(source_fd, scratch, overlay, options))
        with target(scratch, overlay) as (path, fd, _):
            command = ["cp", "-a", str(source), str(path / "out")]
            found["cp -a"] = timed(lambda: subprocess.run(command, check=True, pass_fds=[fd]))
        found["find | cat"] = timed(
            lambda: subprocess.run(
                "find . -type f -print0 | xargs -0 cat > /dev/null", shell=True, cwd=source, check=True
            )
        )
    finally:
        os.close(source_fd)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=2048, dest="mean_bytes")
    parser.add_argument("--big-mib", type=int, default=512)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--overlay", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-copy-", dir=arguments.dir))
    try:
        make_tree(scratch / "small", arguments.files, arguments.mean_bytes)
        make_big(scratch / "big", arguments.big_mib)
        columns = ("key, cold", "key, warm", "copy", "copy, layer", "layer alone", "cp -a", "find | cat")
        print(f"{'':24}" + "".join(f"{c:>12}" for c in columns))
        for name, label in (("small", f"{arguments.files} small files"), ("big", f"{arguments.big_mib} MiB")):
            warm = Remembering()
            round_of(scratch / name, scratch, arguments.overlay, warm)
            samples = [round_of(scratch / name, scratch, arguments.overlay, warm) for _ in range(arguments.rounds)]
            medians = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
            print(f"{label:24}" + "".join(f"{value:11.3f}s" for value in medians.values()), flush=True)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
