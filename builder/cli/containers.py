"""`pybuild ps`, `logs`, `stop`, `kill`, `restart`, `pause`, `unpause`, `wait`, `rename`, `rm`, `port`: containers."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import store_root
from builder.errors import UsageError
from layers.errors import PybuildError

if TYPE_CHECKING:
    from builder.container.records import Record

_SEVERAL = {"stop", "kill", "restart", "pause", "unpause", "wait", "rm"}


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    if verb in _SEVERAL:
        add("names", nargs="*", metavar="CONTAINER", help="names or IDs")
    match verb:
        case "ps":
            add("-a", "--all", action="store_true", help="also those that do not run")
            add("-q", "--quiet", action="store_true", help="IDs alone")
            add("-l", "--latest", action="store_true", help="the last one made, running or not")
            add("-n", "--last", type=int, metavar="N", help="the last N made, running or not")
            add("--no-trunc", action="store_true", help="whole IDs and commands")
            add("-f", "--filter", action="append", default=[], metavar="KEY=VALUE",
                help="id, name, label, status, exited, ancestor, volume, health")  # fmt: skip
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
        case "logs":
            add("name", metavar="CONTAINER", help="running or not")
            add("-f", "--follow", action="store_true", help="go on until the container ends")
            add("-t", "--timestamps", action="store_true", help="with the time of each line")
            add("-n", "--tail", default="all", metavar="N", help="the last N lines (default: all)")
            add("--since", metavar="TIME", help="from then on: a time, or an age such as 10m")
            add("--until", metavar="TIME", help="up to then")
        case "stop" | "restart":
            add("-t", "--time", "--timeout", dest="time", type=float, metavar="SECONDS",
                help="how long to wait before it is killed (default: the container's, else 10)")  # fmt: skip
            add("-s", "--signal", metavar="SIGNAL", help="what to send (default: the container's, else TERM)")
        case "kill":
            add("-s", "--signal", default="KILL", metavar="SIGNAL", help="what to send (default: KILL)")
        case "rm":
            add("-f", "--force", action="store_true", help="kill it if it runs; a missing one is no error")
            add("-v", "--volumes", action="store_true", help="its anonymous volumes, too")
        case "rename":
            add("name", metavar="CONTAINER", help="its name, or its ID")
            add("new", metavar="NAME", help="the new name")
        case "port":
            add("name", metavar="CONTAINER", help="one that runs")
            add("port", nargs="?", metavar="PORT[/PROTOCOL]", help="only where this port of it is reached")
    if verb in {"stop", "kill", "restart", "rm"}:
        add(
            "-a",
            "--all",
            action="store_true",
            help="all containers" + (" that run" if verb in {"stop", "kill"} else ""),
        )


def run(verb: str, options: Namespace) -> int:
    root = store_root(options)
    match verb:
        case "ps":
            return _ps(root, options)
        case "logs":
            return _logs(root, options)
        case "port":
            return _port(root, options)
        case "rename":
            from builder.container import lifecycle

            lifecycle.rename(root, options.name, options.new)
            return 0
        case "rm":
            return _rm(root, options)
        case _:
            return _each(root, verb, options)


def _names(root: Path, options: Namespace, test: Callable[[Record], bool]) -> list[str]:
    from builder.container.records import every

    if getattr(options, "all", False):
        if options.names:
            raise UsageError("--all and names exclude each other")
        return [record.id for record in every(root) if test(record)]
    if not options.names:
        raise UsageError("which container?", hint="`pybuild ps -a` lists what there is")
    return list(options.names)


def _each(root: Path, verb: str, options: Namespace) -> int:
    """One action on several containers: an error with one does not keep it from the others."""
    from builder.cli.main import report
    from builder.container import lifecycle

    if verb == "restart":
        from builder import api

        api.prepare_namespaces()
    status = 0
    for name in _names(root, options, lambda record: record.running):
        try:
            match verb:
                case "stop":
                    number = lifecycle.signal_number(options.signal) if options.signal else None
                    lifecycle.stop(root, name, timeout_s=options.time, number=number)
                case "kill":
                    lifecycle.kill(root, name, lifecycle.signal_number(options.signal))
                case "restart":
                    from builder.container.records import find

                    number = lifecycle.signal_number(options.signal) if options.signal else None
                    lifecycle.stop(root, name, timeout_s=options.time, number=number)
                    lifecycle.start_detached(find(root, name))
                case "pause":
                    lifecycle.pause(root, name)
                case "unpause":
                    lifecycle.unpause(root, name)
                case _:
                    name = str(lifecycle.wait(root, name))
            print(name)
        except PybuildError as e:
            status = report(e)
    return status


def _rm(root: Path, options: Namespace) -> int:
    from builder import api
    from builder.cli.main import report
    from builder.container import lifecycle
    from builder.container.records import NoSuchContainer

    names = _names(root, options, lambda record: not record.running or options.force)
    if not names:
        return 0
    api.prepare_namespaces()
    status = 0
    with api.open_store(root) as store:
        for name in names:
            try:
                lifecycle.remove(store, name, force=options.force, volumes=options.volumes)
                print(name)
            except NoSuchContainer as e:
                status = 0 if options.force else report(e)
            except PybuildError as e:
                status = report(e)
    return status


# ps


def _ps(root: Path, options: Namespace) -> int:
    from builder.container.records import every

    found = list(every(root))
    tests = [_test(root, text) for text in options.filter]
    explicit = any(text.startswith(("status=", "exited=")) for text in options.filter)
    shown_all = options.all or options.latest or options.last is not None or explicit
    chosen = [r for r in found if (shown_all or r.running) and all(test(r) for test in tests)][::-1]
    if options.latest or options.last is not None:
        chosen = chosen[: 1 if options.latest else max(0, options.last)]
    if options.quiet:
        print("".join(f"{r.id if options.no_trunc else r.id[:12]}\n" for r in chosen), end="")
        return 0
    rows = [_fields(record, options.no_trunc) for record in chosen]
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, rows)
        return 0
    from builder.cli.images import print_table

    heads = ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES"]
    keys = ["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names"]
    print_table([heads, *([str(row[key]) for key in keys] for row in rows)])
    return 0


def _fields(record: Record, whole: bool) -> dict[str, Any]:
    """What a --format sees of a container: docker's names."""
    settings = record.settings
    command = " ".join(settings["sandbox"]["args"])
    if not whole and len(command) > 20:
        command = command[:19] + "…"
    created = settings["created_ns"]
    return {
        "ID": record.id if whole else record.id[:12],
        "Image": settings["image"],
        "Command": f'"{command}"',
        "CreatedAt": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(created / 1e9)),
        "RunningFor": f"{_age(created)} ago",
        "State": record.status,
        "Status": status_line(record),
        "ExitCode": record.state.get("exit_code") or 0,
        "Ports": ", ".join(f"{ip}:{host}->{port}/{kind}" for ip, host, port, kind in record.state.get("ports") or [])
        if record.running else "",
        "Names": record.name,
        "Labels": settings["config"].get("Labels") or {},
        "Mounts": ", ".join(v["name"] for v in settings["volumes"]),
        "Pid": record.state.get("pid") or 0,
        "Networks": settings["sandbox"]["network"],
    }  # fmt: skip


def status_line(record: Record) -> str:
    """As docker words it: `Up 3 minutes (healthy)`, `Exited (0) 2 hours ago`."""
    state = record.state
    status = record.status
    if status in {"running", "paused"}:
        words = f"Up {_age(state['started_ns'])}"
        health = (state.get("health") or {}).get("Status")
        if status == "paused":
            return f"{words} (Paused)"
        return f"{words} ({'health: starting' if health == 'starting' else health})" if health else words
    if status == "exited":
        finished = state.get("finished_ns")
        return f"Exited ({state.get('exit_code')})" + (f" {_age(finished)} ago" if finished else "")
    if status == "restarting":
        return f"Restarting ({state.get('exit_code')})"
    return "Created"


def _age(since_ns: int) -> str:
    seconds = max(0, int(time.time() - since_ns / 1e9))
    for unit, length in (("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length or (seconds >= length and unit == "minute"):
            count = seconds // length
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{seconds} second{'s' if seconds != 1 else ''}" if seconds else "Less than a second"


def _test(root: Path, text: str) -> Callable[[Record], bool]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--filter {text!r}: expected KEY=VALUE")
    match key:
        case "id":
            return lambda record: record.id.startswith(value)
        case "name":
            return lambda record: value in record.name
        case "label":
            name, equals, wanted = value.partition("=")

            def has_label(record: Record) -> bool:
                labels = record.settings["config"].get("Labels") or {}
                return name in labels and (not equals or labels[name] == wanted)

            return has_label
        case "status":
            return lambda record: record.status == value
        case "exited":
            return lambda record: record.status == "exited" and str(record.state.get("exit_code")) == value
        case "ancestor":
            return lambda record: (
                value in {record.settings["image"], record.settings["image"].partition(":")[0]}
                or (str(record.settings["image_id"]).partition(":")[2].startswith(value))
            )
        case "volume":
            return lambda record: any(value in {v["name"], v["target"]} for v in record.settings["volumes"])
        case "health":
            return lambda record: ((record.state.get("health") or {}).get("Status") or "none") == value
    raise UsageError(
        f"--filter {text!r}: unknown filter",
        hint="there are id=, name=, label=, status=, exited=, ancestor=, volume= and health=",
    )


# logs, port


def _logs(root: Path, options: Namespace) -> int:
    from builder.cli.images import parse_time
    from builder.container import logs
    from builder.container.records import find

    if options.tail != "all" and not options.tail.isdigit():
        raise UsageError(f"--tail {options.tail!r}: expected a number, or all")
    record = find(root, options.name)
    outputs = {1: sys.stdout.buffer, 2: sys.stderr.buffer}
    try:
        for piece in logs.read(
            record.path("log"),
            tail=None if options.tail == "all" else int(options.tail),
            since_ns=parse_time(options.since, "--since") if options.since else 0,
            until_ns=parse_time(options.until, "--until") if options.until else None,
            follow=record.locked if options.follow else None,
        ):
            head = b""
            if options.timestamps:
                from builder.export import format_time

                head = format_time(piece.time_ns).encode() + b" "
            outputs[piece.stream].write(head + piece.data)
            outputs[piece.stream].flush()
    except KeyboardInterrupt:
        return 130
    return 0


def _port(root: Path, options: Namespace) -> int:
    from builder.container.records import find

    record = find(root, options.name)
    ports = record.state.get("ports") or [] if record.running else []
    wanted = options.port if not options.port or "/" in options.port else f"{options.port}/tcp"
    lines = [
        f"{ip}:{host}" if wanted else f"{port}/{kind} -> {ip}:{host}"
        for ip, host, port, kind in ports
        if not wanted or wanted == f"{port}/{kind}"
    ]
    if wanted and not lines:
        raise UsageError(f"container {record.name} publishes no port {wanted}")
    print("".join(f"{line}\n" for line in lines), end="")
    return 0
