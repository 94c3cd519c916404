"""Figures by the files of control groups of both versions, and by /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.container import figures
from builder.container.figures import Figures, _of_group


def group(directory: Path, files: dict[str, str]) -> str:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    return str(directory)


def test_a_group_of_version_2(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 1500\nuser_usec 1000\n",
        "memory.current": "1000000\n",
        "memory.max": "max\n",
        "memory.stat": "anon 5\ninactive_file 400000\n",
        "pids.current": "7\n",
        "io.stat": "8:0 rbytes=100 wbytes=20 rios=1\n254:0 rbytes=1 wbytes=2\n",
    }
    found = _of_group(2, group(tmp_path / "g", files))
    assert found == {
        "cpu_ns": 1_500_000, "memory_bytes": 600_000, "memory_limit_bytes": None, "processes": 7, "read_bytes": 101,
        "written_bytes": 22,
    }  # fmt: skip


def test_groups_of_version_1_add_up(tmp_path: Path) -> None:
    memory = {
        "memory.usage_in_bytes": "900\n",
        "memory.limit_in_bytes": "4096\n",
        "memory.stat": "total_inactive_file 1000\n",
    }
    assert _of_group(1, group(tmp_path / "m", memory)) == {"memory_bytes": 0, "memory_limit_bytes": 4096}
    assert _of_group(1, group(tmp_path / "c", {"cpuacct.usage": "12345\n"})) == {"cpu_ns": 12345}
    throttle = "8:0 Read 10\n8:0 Write 4\n8:0 Total 14\nTotal 14\n"
    found = _of_group(1, group(tmp_path / "b", {"blkio.throttle.io_service_bytes": throttle}))
    assert found == {"read_bytes": 10, "written_bytes": 4}
    (tmp_path / "m" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert _of_group(1, str(tmp_path / "m"))["memory_limit_bytes"] is None


def test_a_share_of_a_processor() -> None:
    rest = dict.fromkeys(Figures._fields[2:])
    before = Figures(time_ns=10**9, cpu_ns=0, **rest)
    assert figures.cpu_percent(before, Figures(time_ns=2 * 10**9, cpu_ns=5 * 10**8, **rest)) == 50.0
    assert figures.cpu_percent(before, before) == 0.0
    assert figures.cpu_percent(before, Figures(time_ns=2 * 10**9, cpu_ns=None, **rest)) == 0.0


def test_processes_are_described() -> None:
    (process,) = figures.processes([os.getpid(), 0x7FFFFFFF])
    assert process.host_pid == os.getpid()
    assert process.uid == os.geteuid()
    assert process.rss_bytes > 1 << 20
    assert process.elapsed_s >= 0
    assert figures.processes([]) == []
    with pytest.raises(OSError, match="No such file"):
        figures.measure(0x7FFFFFFF)
