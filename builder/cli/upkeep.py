"""`pybuild cp`, `update`, `volume` and `container`: files, limits, volumes, and what is left of containers."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from builder.cli.actions import Action, add_actions, check_action, end_actions
from builder.cli.options import boolean, key_value, store_root
from builder.errors import UsageError
from layers.errors import PybuildError

if TYPE_CHECKING:
    from builder.container.records import Record
    from builder.container.volumes import Volume

_VOLUME = {
    "create": Action("[NAME]", "make one", frozenset({"label"}), 0, 1),
    "ls": Action("", "list them", frozenset({"filter", "format", "quiet"}), 0, 0),
    "inspect": Action("NAME…", "print all that is known of them, as JSON", frozenset({"format"}), 1, None),
    "rm": Action("NAME…", "remove them", frozenset({"force"}), 1, None),
    "prune": Action("", "remove those that no container names", frozenset({"all", "filter", "force"}), 0, 0),
}
_CONTAINER = {
    "prune": Action("", "remove those that do not run", frozenset({"filter", "force"}), 0, 0),
}


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "cp":
            add("source", metavar="SRC", help="a path, CONTAINER:PATH, or - for a tar on stdin")
            add("target", metavar="DEST", help="a path, CONTAINER:PATH, or - for a tar on stdout")
            add("-a", "--archive", action="store_true",
                help="keep owners; out of a container also devices, set-id bits and attributes")  # fmt: skip
            add("-L", "--follow-link", action="store_true", help="copy what a link names, not the link")
            add("-q", "--quiet", action="store_true", help="accepted for docker's sake: nothing is said anyway")
        case "update":
            from builder.cli.sandboxflags import add_limit_options

            add("names", nargs="+", metavar="CONTAINER", help="running or not")
            add_limit_options(parser)
            add("--restart", metavar="POLICY", help="no, on-failure[:N], always, unless-stopped")
        case "volume":
            add_actions(parser, _VOLUME)
            add("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="a label")
            add("-f", "--force", action="store_true", help="a missing one is no error (rm); do not ask (prune)")
            add("-a", "--all", action="store_true", help="named ones, too")
            add("-q", "--quiet", action="store_true", help="names alone")
            add("--filter", action="append", default=[], metavar="KEY=VALUE",
                help="name, label, dangling, until")  # fmt: skip
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
            end_actions(parser, _VOLUME)
        case _:
            add_actions(parser, _CONTAINER)
            add("-f", "--force", action="store_true", help="do not ask")
            add("--filter", action="append", default=[], metavar="KEY=VALUE", help="label, until")
            end_actions(parser, _CONTAINER)


def run(verb: str, options: Namespace) -> int:
    root = store_root(options)
    match verb:
        case "cp":
            return _cp(root, options)
        case "update":
            return _update(root, options)
        case "volume":
            check_action(verb, options, _VOLUME, frozenset())
            return _volume(root, options)
        case _:
            check_action(verb, options, _CONTAINER, frozenset())
            return _prune_containers(root, options)


# cp


def _cp(root: Path, options: Namespace) -> int:
    from builder.container import copying
    from builder.container.records import find

    (source_name, source), (target_name, target) = _split(options.source), _split(options.target)
    if (source_name is None) == (target_name is None):
        raise UsageError(
            "cp: one of the two is to be CONTAINER:PATH",
            hint="between containers: pybuild cp A:PATH - | pybuild cp - B:DIR" if source_name else None,
        )
    record = find(root, source_name or target_name or "")
    inside = source if source_name else target
    if not inside:
        raise UsageError("cp: which path of the container?")
    inside = inside if inside.startswith("/") else f"/{inside}"
    flags = {"archive": options.archive, "follow": options.follow_link}
    if target == "-" and target_name is None and sys.stdout.isatty():
        raise UsageError("cp: a tar is no text for a terminal", hint="use a pipe")
    copying.enter(record)
    if source_name is None:
        if source == "-":
            copying.unpack_in(record, cast(BinaryIO, sys.stdin.buffer), inside)
        else:
            copying.copy_in(record, source, inside, **flags)
    elif target == "-":
        sys.stdout.flush()
        copying.write_tar(record, inside, sys.stdout.fileno())
    else:
        copying.copy_out(record, inside, target, **flags)
    return 0


def _split(text: str) -> tuple[str | None, str]:
    """(a container, a path in it), or (None, a path of the host's)."""
    name, separator, path = text.partition(":")
    if not separator or not name or "/" in name or text.startswith((".", "/")):
        return None, text
    return name, path


# update


def _update(root: Path, options: Namespace) -> int:
    from builder.cli import sandboxflags
    from builder.cli.main import report
    from builder.cli.run import restart_policy
    from builder.container import lifecycle
    from builder.sandbox.spec import Resources

    limits = sandboxflags.limits(options, Resources)
    restart = None if options.restart is None else restart_policy(options.restart, auto_remove=False)
    if not limits.any and restart is None:
        raise UsageError("update: nothing is to be changed", hint="such as --memory 64m or --restart always")
    status = 0
    for name in options.names:
        try:
            lifecycle.update(root, name, limits, restart)
            print(name)
        except PybuildError as e:
            status = report(e)
    return status


# volume


def _volume(root: Path, options: Namespace) -> int:
    from builder import api
    from builder.container import volumes

    match options.action:
        case "ls":
            return _list_volumes(root, options)
        case "inspect":
            return _inspect_volumes([volumes.get(root, name) for name in options.names], options.format)
    api.prepare_namespaces()
    match options.action:
        case "create":
            labels = dict(key_value(text, "--label") for text in options.label)
            name = options.names[0] if options.names else None
            print(volumes.create(root, name, labels, anonymous=False if name else None).name)
            return 0
        case "rm":
            return _remove_volumes(root, options)
    tests = _volume_tests(root, options.filter)
    if not options.force and not _confirmed("all volumes that no container names" if options.all else
                                            "all anonymous volumes that no container names"):  # fmt: skip
        return 0
    for gone in volumes.prune(root, all=options.all, matches=lambda volume: all(test(volume) for test in tests)):
        print(gone)
    return 0


def _remove_volumes(root: Path, options: Namespace) -> int:
    from builder.cli.main import report
    from builder.container import volumes

    status = 0
    for name in options.names:
        try:
            volumes.remove(root, name)
            print(name)
        except volumes.NoSuchVolume as e:
            status = status if options.force else report(e)
        except PybuildError as e:
            status = report(e)
    return status


def _list_volumes(root: Path, options: Namespace) -> int:
    from builder.container import volumes

    tests = _volume_tests(root, options.filter)
    found = [volume for volume in volumes.list_volumes(root) if all(test(volume) for test in tests)]
    if options.quiet:
        print("".join(f"{volume.name}\n" for volume in found), end="")
        return 0
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, [_volume_document(volume) for volume in found])
        return 0
    from builder.cli.images import print_table

    print_table([["DRIVER", "VOLUME NAME"], *(["local", volume.name] for volume in found)])
    return 0


def _inspect_volumes(found: list[Volume], template: str | None) -> int:
    documents = [_volume_document(volume) for volume in found]
    if template is None:
        print(json.dumps(documents, indent=4))
        return 0
    from builder.cli.template import print_formatted

    print_formatted(template, documents)
    return 0


def _volume_document(volume: Volume) -> dict[str, Any]:
    from builder.export import format_time

    return {
        "Name": volume.name,
        "Driver": "local",
        "Mountpoint": str(volume.path),
        "CreatedAt": format_time(volume.created_ns),
        "Labels": dict(volume.labels),
        "Anonymous": volume.anonymous,
        "Scope": "local",
        "Options": {},
    }


def _volume_tests(root: Path, words: list[str]) -> list[Callable[[Volume], bool]]:
    """Raises: UsageError."""
    from builder.container import volumes

    tests: list[Callable[[Volume], bool]] = []
    for text in words:
        key, value = key_value(text, "--filter")
        match key:
            case "dangling":
                used, wanted = volumes.users(root), boolean(value)
                tests.append(_is_dangling(used, wanted))
            case "name" | "label" | "until":
                tests.append(_volume_test(key, value))
            case _:
                raise UsageError(f"--filter {text!r}: not possible", hint="there are name, label, dangling and until")
    return tests


def _volume_test(key: str, value: str) -> Callable[[Volume], bool]:
    if key == "name":
        return lambda volume: value in volume.name
    if key == "label":
        return lambda volume: _has_label(volume.labels, value)
    return _made_before(value)


def _is_dangling(used: Mapping[str, list[str]], wanted: bool) -> Callable[[Volume], bool]:
    return lambda volume: (volume.name not in used) == wanted


def _has_label(labels: Any, wanted: str) -> bool:
    name, equals, value = wanted.partition("=")
    return name in labels and (not equals or labels[name] == value)


def _made_before(text: str) -> Callable[[Any], bool]:
    from builder.cli.images import parse_time

    moment = parse_time(text, "--filter until")
    return lambda thing: int(thing.created_ns) < moment


# container prune


def _prune_containers(root: Path, options: Namespace) -> int:
    from builder import api
    from builder.container import lifecycle

    tests = [_container_test(text) for text in options.filter]
    if not options.force and not _confirmed("all containers that do not run"):
        return 0
    api.prepare_namespaces()
    with api.open_store(root) as store:
        for gone in lifecycle.prune(store, lambda record: all(test(record) for test in tests)):
            print(gone)
    return 0


def _container_test(text: str) -> Callable[[Record], bool]:
    from builder.cli.images import parse_time

    key, value = key_value(text, "--filter")
    if key == "until":
        moment = parse_time(value, "--filter until")
        return lambda record: int(record.settings["created_ns"]) < moment
    if key == "label":
        return lambda record: _has_label(record.settings["config"].get("Labels") or {}, value)
    raise UsageError(f"--filter {text!r}: not possible", hint="there are label and until")


def _confirmed(what: str) -> bool:
    """Whether the user wants it. Raises: UsageError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError(f"this removes {what}, and nobody can be asked", hint="--force does not ask")
    print(f"This removes {what}. Are you sure? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
