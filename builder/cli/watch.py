"""`pybuild stats`, `top`, `events` and `attach`: looking at containers while they live."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import boolean, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.container.events import Event
    from builder.container.figures import Figures, Process
    from builder.container.records import Record

_CLEAR = b"\x1b[H\x1b[2J"


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "stats":
            add("names", nargs="*", metavar="CONTAINER", help="names or IDs (default: all that run)")
            add("-a", "--all", action="store_true", help="also those that do not run")
            add("--no-stream", action="store_true", help="once, and not every second")
            add("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
            add("--no-trunc", action="store_true", help="whole IDs")
            add("--no-reset", action="store_true", help="do not clear the screen between")
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
        case "top":
            add("name", metavar="CONTAINER", help="one that runs")
            add("columns", nargs="*", metavar="COLUMN", help=f"what to show (default: {' '.join(_DEFAULT)}); there are "
                + ", ".join(_COLUMNS))  # fmt: skip
        case "events":
            add("--since", metavar="TIME", help="from then on: a time, or an age such as 10m (default: now)")
            add("--until", metavar="TIME", help="up to then, and no more")
            add("-f", "--filter", action="append", default=[], metavar="KEY=VALUE",
                help="container, event, image, label, type, volume; several of one key: any of them")  # fmt: skip
            add("--format", metavar="TEMPLATE", help="a Go template, or `json`")
        case _:
            add("name", metavar="CONTAINER", help="one that runs detached")
            add("--no-stdin", action="store_true", help="look only")
            add("--sig-proxy", type=boolean, nargs="?", const=True, default=True, metavar="BOOL",
                help="hand on signals (default: true); else they end the visit")  # fmt: skip
            add(
                "--detach-keys",
                default="ctrl-p,ctrl-q",
                metavar="KEYS",
                help="leave it by these keys (default: ctrl-p,ctrl-q)",
            )


def run(verb: str, options: Namespace) -> int:
    root = store_root(options)
    try:
        match verb:
            case "stats":
                return _stats(root, options)
            case "top":
                return _top(root, options)
            case "events":
                return _events(root, options)
            case _:
                return _attach(root, options)
    except KeyboardInterrupt:
        return 130 if verb == "attach" else 0


# stats


def _stats(root: Path, options: Namespace) -> int:
    from builder.container.records import every, find

    before: dict[str, Figures] = {}
    streams = not options.no_stream
    first = True
    while True:
        if options.names:
            chosen = [find(root, name) for name in options.names]
        else:
            chosen = [record for record in every(root) if options.all or record.running]
        found = {record.id: (record, _figures(record)) for record in chosen}
        if first:
            # A share of a processor's time has two ends.
            first = False
            before = {id: figures for id, (_, figures) in found.items() if figures is not None}
            if before:
                time.sleep(min(options.interval, 0.25) if streams else 0.25)
                continue
        rows = [_stats_row(record, before.get(record.id), now, options.no_trunc) for record, now in found.values()]
        _print_stats(rows, options, clear=streams and sys.stdout.isatty() and not options.no_reset)
        if not streams:
            return 0
        before = {id: figures for id, (_, figures) in found.items() if figures is not None}
        sys.stdout.flush()
        time.sleep(options.interval)


def _figures(record: Record) -> Figures | None:
    from builder.container.figures import figures_of
    from builder.container.records import ContainerError

    if not record.running:
        return None
    try:
        return figures_of(record)
    except ContainerError:  # it has just ended
        return None


def _stats_row(record: Record, before: Figures | None, now: Figures | None, whole: bool) -> dict[str, Any]:
    """What a --format sees: docker's names, and the plain numbers under names of our own."""
    from builder.cli.images import human_size
    from builder.container.figures import cpu_percent, machine_memory_bytes

    id = record.id if whole else record.id[:12]
    row: dict[str, Any] = {"ID": id, "Container": id, "Name": record.name}
    if now is None:
        blank = ("CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs")
        return {**row, **dict.fromkeys(blank, "--")}

    def pair(one: int | None, other: int | None, separator: str = " / ") -> str:
        return separator.join("--" if value is None else human_size(value) for value in (one, other))

    limit = now.memory_limit_bytes or machine_memory_bytes()
    percent = cpu_percent(before, now) if before is not None else 0.0
    return {
        **row,
        "CPUPerc": f"{percent:.2f}%",
        "MemUsage": pair(now.memory_bytes, limit),
        "MemPerc": f"{100 * (now.memory_bytes or 0) / limit:.2f}%",
        "NetIO": pair(now.received_bytes, now.sent_bytes),
        "BlockIO": pair(now.read_bytes, now.written_bytes),
        "PIDs": "--" if now.processes is None else now.processes,
        **now._asdict(),
    }


def _print_stats(rows: list[dict[str, Any]], options: Namespace, *, clear: bool) -> None:
    if clear:
        sys.stdout.flush()
        sys.stdout.buffer.write(_CLEAR)
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, rows)
        return
    from builder.cli.images import print_table

    heads = ["CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"]
    keys = ["ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "NetIO", "BlockIO", "PIDs"]
    print_table([heads, *([str(row[key]) for key in keys] for row in rows)])


# top


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


_COLUMNS: dict[str, Callable[[Process], object]] = {
    "user": lambda p: p.uid,
    "uid": lambda p: p.uid,
    "gid": lambda p: p.gid,
    "pid": lambda p: p.pid,
    "ppid": lambda p: p.ppid,
    "hpid": lambda p: p.host_pid,
    "state": lambda p: p.state,
    "nice": lambda p: p.nice,
    "threads": lambda p: p.threads,
    "rss": lambda p: p.rss_bytes // 1024,
    "vsz": lambda p: p.vsz_bytes // 1024,
    "pcpu": lambda p: f"{100 * p.cpu_s / p.elapsed_s if p.elapsed_s else 0:.1f}",
    "time": lambda p: _clock(p.cpu_s),
    "etime": lambda p: _clock(p.elapsed_s),
    "tty": lambda p: p.tty,
    "comm": lambda p: p.name,
    "args": lambda p: p.args,
}
_DEFAULT = ("user", "pid", "ppid", "pcpu", "etime", "tty", "time", "args")


def _top(root: Path, options: Namespace) -> int:
    from builder.cli.images import print_table
    from builder.container.figures import processes_of
    from builder.container.records import find

    words = [word for text in options.columns for word in text.split(",") if word]
    for word in words:
        if word not in _COLUMNS:
            raise UsageError(f"top: there is no column {word!r}", hint=f"there are {', '.join(_COLUMNS)}")
    columns = words or list(_DEFAULT)
    found = processes_of(find(root, options.name))
    heads = [{"pcpu": "%CPU", "args": "COMMAND"}.get(column, column.upper()) for column in columns]
    print_table([heads, *([_printable(_COLUMNS[column](process)) for column in columns] for process in found)])
    return 0


def _printable(value: object) -> str:
    """A process may call itself anything, and so steer the terminal of who looks at it."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


# events


def _events(root: Path, options: Namespace) -> int:
    from builder.cli.images import parse_time
    from builder.container import events

    tests = _event_tests(options.filter)
    until = parse_time(options.until, "--until") if options.until else None
    since = parse_time(options.since, "--since") if options.since else time.time_ns()
    if options.since is None and until is not None and until <= since:
        since = 0
    for event in events.read(root, since_ns=since, until_ns=until, follow=lambda: True):
        if all(any(test(event) for test in some) for some in tests.values()):
            print(_event_line(event, options.format), flush=True)
    return 0


def _event_line(event: Event, template: str | None) -> str:
    from builder.container.events import docker_document

    document = docker_document(event)
    if template == "json" or template == "{{json .}}":
        return json.dumps(document)
    if template is not None:
        from builder.cli.template import render

        status = {"ID": event.id, "Status": event.action, "Time": document["time"], "TimeNano": event.time_ns}
        return render(template, {**document, **status})
    from builder.export import format_time

    about = ", ".join(f"{key}={_printable(value)}" for key, value in sorted(event.attributes.items()))
    return f"{format_time(event.time_ns)} {event.type} {event.action} {event.id} ({about})"


def _event_tests(words: list[str]) -> dict[str, list[Callable[[Event], bool]]]:
    """By key: the tests of which one has to hold. Raises: UsageError."""
    tests: dict[str, list[Callable[[Event], bool]]] = {}
    for text in words:
        key, separator, value = text.partition("=")
        if not separator or key not in {"container", "event", "image", "label", "type", "volume"}:
            raise UsageError(
                f"--filter {text!r}: not possible", hint="there are container, event, image, label, type and volume"
            )
        tests.setdefault(key, []).append(_event_test(key, value))
    return tests


def _event_test(key: str, value: str) -> Callable[[Event], bool]:
    match key:
        case "container" | "volume":
            return lambda e: e.type == key and (e.attributes.get("name") == value or e.id.startswith(value))
        case "event":
            return lambda e: e.action.partition(":")[0] == value or e.action == value
        case "type":
            return lambda e: e.type == value
        case "image":
            return lambda e: value in {e.attributes.get("image"), str(e.attributes.get("image")).partition(":")[0]}
        case _:
            name, equals, wanted = value.partition("=")
            return lambda e: name in e.attributes and (not equals or e.attributes[name] == wanted)


# attach


def _attach(root: Path, options: Namespace) -> int:
    from builder.container import events
    from builder.container.attach import attach
    from builder.container.front import DetachKeys, Front
    from builder.container.records import ContainerError, find

    record = find(root, options.name)
    if not record.running:
        raise ContainerError(
            f"container {record.name} is not running", hint=f"`pybuild start -a {record.name}` starts it"
        )
    tty = bool(record.settings["tty"])
    stdin = (tty or bool(record.settings["stdin"])) and not options.no_stdin
    front = Front(tty=tty, stdin=stdin)
    if tty and stdin and not front.is_terminal:
        raise UsageError("the container has a terminal, and the input is none", hint="--no-stdin looks only")
    keys = DetachKeys(options.detach_keys) if front.is_terminal else None
    events.of_container(record, "attach")
    status = attach(record, front, keys=keys, pass_signals=options.sig_proxy)
    if status is None:
        events.of_container(record, "detach")
        return 0
    return status
