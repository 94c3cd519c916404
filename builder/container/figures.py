"""What a running container uses: processor time, memory, processes, bytes read, written, received and sent.

Told by its control groups where it has such, else summed up over its processes. To be asked in its
monitor, or elsewhere in the namespaces in which it was started: an ordinary user's other processes may
not look into it. https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from builder.container import control
from builder.container.records import Record
from builder.sandbox import cgroup
from layers.values import NamedTuple

_MAX_PROCESSES = 4096
_UNLIMITED_BYTES = 1 << 60
"""What v1 says of no limit is the largest number of pages, which depends on their size."""


class Figures(NamedTuple):
    """At one moment; what cannot be known is None. Times and counts are since the start."""

    time_ns: int
    cpu_ns: int | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    """None: the machine's memory alone."""
    processes: int | None
    read_bytes: int | None
    written_bytes: int | None
    received_bytes: int | None
    """By a network of its own."""
    sent_bytes: int | None


def measure(pid: int) -> Figures:
    """The figures of the sandbox whose first process is `pid`. Raises: OSError if it is gone."""
    found: dict[str, int | None] = dict.fromkeys(Figures._fields)
    for hierarchy, path in cgroup.of_process(pid):
        found |= _of_group(hierarchy.version, path)
    missing = [name for name in ("cpu_ns", "memory_bytes", "processes", "read_bytes") if found[name] is None]
    if missing:
        summed = _of_processes(pid)
        found |= {name: value for name, value in summed.items() if found[name] is None}
    if not _same_namespace(pid, "net"):
        found["received_bytes"], found["sent_bytes"] = _of_network(pid)
    return Figures(**{**found, "time_ns": time.time_ns()})  # type: ignore[arg-type]


def _of_group(version: int, path: str) -> dict[str, int | None]:
    """What the files of one group's directory tell; v1 and v2 name them apart."""
    found: dict[str, int | None] = {}
    if version == 2:
        if (usec := _field(f"{path}/cpu.stat", "usage_usec")) is not None:
            found["cpu_ns"] = usec * 1000
        memory, inactive, limit = "memory.current", "inactive_file", "memory.max"
        io = _text(f"{path}/io.stat")
        if io is not None:
            words = [word.partition("=") for word in io.split()]
            found["read_bytes"] = sum(int(value) for key, _, value in words if key == "rbytes")
            found["written_bytes"] = sum(int(value) for key, _, value in words if key == "wbytes")
    else:
        found |= _known(cpu_ns=_number(f"{path}/cpuacct.usage"))
        memory, inactive, limit = "memory.usage_in_bytes", "total_inactive_file", "memory.limit_in_bytes"
        io = _text(f"{path}/blkio.throttle.io_service_bytes")
        if io is not None:
            rows = [line.split() for line in io.splitlines()]
            found["read_bytes"] = sum(int(row[2]) for row in rows if len(row) == 3 and row[1] == "Read")
            found["written_bytes"] = sum(int(row[2]) for row in rows if len(row) == 3 and row[1] == "Write")
    found |= _known(processes=_number(f"{path}/pids.current"))
    used = _number(f"{path}/{memory}")
    if used is not None:
        # Cached files that nobody uses are given back when they are needed: docker leaves them out, too.
        found["memory_bytes"] = max(0, used - (_field(f"{path}/memory.stat", inactive) or 0))
        bound = _number(f"{path}/{limit}")
        found["memory_limit_bytes"] = bound if bound is not None and bound < _UNLIMITED_BYTES else None
    return found


def _known(**values: int | None) -> dict[str, int | None]:
    return {key: value for key, value in values.items() if value is not None}


def _of_processes(pid: int) -> dict[str, int | None]:
    """The same of all its processes that live; what others used, that nobody waited for, is missed."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    cpu = memory = threads = 0
    read = written = 0
    for member in members(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat_fields(member)
            cpu += sum(map(int, fields[11:15]))
            threads += int(fields[17])
            memory += int(fields[21]) * page
            read += _field(f"/proc/{member}/io", "read_bytes:") or 0
            written += _field(f"/proc/{member}/io", "write_bytes:") or 0
    return {
        "cpu_ns": cpu * 10**9 // ticks,
        "memory_bytes": memory,
        "processes": threads,
        "read_bytes": read,
        "written_bytes": written,
    }


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on: before it is a name that may hold anything. Raises: OSError."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as stream:
        return stream.read().rpartition(")")[2].split()


def _of_network(pid: int) -> tuple[int | None, int | None]:
    text = _text(f"/proc/{pid}/net/dev")
    if text is None:
        return None, None
    rows = [line.partition(":") for line in text.splitlines()[2:]]
    counts = [rest.split() for name, _, rest in rows if name.strip() != "lo"]
    return sum(int(row[0]) for row in counts), sum(int(row[8]) for row in counts)


def members(pid: int) -> Iterator[int]:
    """The processes of a sandbox, those of `exec` too: all in its PID namespace, 4,096 at most.

    Where that is another container's or the host's, all in its mount namespace.
    """
    kind = "pid" if _status(pid)["NSpid"].split()[-1] == "1" else "mnt"
    namespace = os.stat(f"/proc/{pid}/ns/{kind}")
    count = 0
    for name in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{name}/ns/{kind}"), namespace):
                yield int(name)
                count += 1
                if count == _MAX_PROCESSES:
                    return


def _same_namespace(pid: int, kind: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/{kind}"), os.stat(f"/proc/self/ns/{kind}"))
    return True


def cpu_percent(before: Figures, after: Figures) -> float:
    """Between two moments: 100 is one processor's whole time."""
    elapsed = after.time_ns - before.time_ns
    if before.cpu_ns is None or after.cpu_ns is None or elapsed <= 0:
        return 0.0
    return max(0.0, 100 * (after.cpu_ns - before.cpu_ns) / elapsed)


def machine_memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Processes, for `top`


class Process(NamedTuple):
    """A process of a container. Ids are those inside, `host_pid` is outside."""

    host_pid: int
    pid: int
    ppid: int
    uid: int
    gid: int
    state: str
    name: str
    args: str
    threads: int
    nice: int
    rss_bytes: int
    vsz_bytes: int
    cpu_s: float
    elapsed_s: float
    tty: str


def processes(host_pids: list[int]) -> list[Process]:
    """What /proc tells of them; those that have ended meanwhile are left out."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    maps = {kind: _id_map(host_pids[0], kind) for kind in ("uid", "gid")} if host_pids else {}
    inner = {}
    rows: list[tuple[int, list[str], dict[str, str], str]] = []
    for pid in host_pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = _status(pid)
            inner[pid] = int(status["NSpid"].split()[-1])
            with open(f"/proc/{pid}/cmdline", "rb") as stream:
                words = stream.read(1 << 16).rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
            rows.append((pid, stat_fields(pid), status, words))
    uptime_s = float((_text("/proc/uptime") or "0").split()[0])
    found = []
    for pid, fields, status, words in rows:
        name = status["Name"]
        found.append(
            Process(
                host_pid=pid,
                pid=inner[pid],
                ppid=inner.get(int(fields[1]), 0),
                uid=_inside(int(status["Uid"].split()[1]), maps["uid"]),
                gid=_inside(int(status["Gid"].split()[1]), maps["gid"]),
                state=fields[0],
                name=name,
                args=words or f"[{name}]",
                threads=int(fields[17]),
                nice=int(fields[16]),
                rss_bytes=int(fields[21]) * page,
                vsz_bytes=int(fields[20]),
                cpu_s=(int(fields[11]) + int(fields[12])) / ticks,
                elapsed_s=max(0.0, uptime_s - int(fields[19]) / ticks),
                tty=_tty(int(fields[4])),
            )
        )
    return found


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="surrogateescape") as stream:
        pairs = (line.partition(":") for line in stream)
        return {key: value.strip() for key, _, value in pairs}


def _id_map(pid: int, kind: str) -> list[tuple[int, int, int]]:
    """(inside, as seen from here, count) of each extent."""
    text = _text(f"/proc/{pid}/{kind}_map") or ""
    return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in text.splitlines())]


def _inside(number: int, extents: list[tuple[int, int, int]]) -> int:
    for inside, outside, count in extents:
        if outside <= number < outside + count:
            return inside + number - outside
    return number


def _tty(device: int) -> str:
    major, minor = os.major(device), os.minor(device)
    return f"pts/{minor}" if 136 <= major <= 143 else "?"


# Small files of the kernel's


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _field(path: str, name: str) -> int | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None


# Of a container, from outside


def figures_of(record: Record) -> Figures:
    """What a running container uses at this moment. Raises: ContainerError if it does not run."""
    answer = control.ask(record, do="figures")
    return Figures(**answer["figures"])


def processes_of(record: Record) -> list[Process]:
    """The processes of a running container, the first one first. Raises: ContainerError if it does not run."""
    answer = control.ask(record, do="processes")
    return processes([int(pid) for pid in answer["pids"]])
