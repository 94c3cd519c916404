"""`pybuild modify OLD NEW [-- COMMAND…]`: an image changed by a command, or by hand in a shell."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from builder.cli import byhand, working
from builder.cli import run as containers
from builder.cli.options import store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from layers.oci import Platform

_SHELL = ("/bin/sh",)


def configure(verb: str, parser: ArgumentParser) -> None:
    containers.configure("run", parser)
    add = parser.add_argument
    add(
        "--change",
        action="append",
        default=[],
        metavar="INSTRUCTION",
        help="an instruction for its config: CMD, ENV, LABEL, USER…",
    )
    add("--timestamp", type=int, metavar="SECONDS", help="the time of the image (also SOURCE_DATE_EPOCH)")
    parser.description = (
        "Make the image NEW of OLD by a command, or in a shell on a terminal. The flags are those of `run` for working"
        " containers. What a shell on a terminal changed is kept whatever its status; of a failing command, nothing."
    )


def usage(verb: str) -> list[str]:
    return ["OLD NEW [-- COMMAND…]"]


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from builder.container import working as records

    new, command = _words(options)
    root = store_root(options)
    if not command:
        command = _SHELL
        options.interactive = True
        options.tty = options.tty or os.isatty(0)
    environment = containers.environment(options)
    api.prepare_namespaces(options.isolation)
    with api.open_store(root) as store:
        image, shown = byhand.base_image(store, root, working.with_registry_flags(options), _platform(options))
        record = records.create_working(store, image, shown)
    try:
        options.image = record.id
        status = working.run(options, environment, command)
        if status and not options.tty:
            return status
        working.commit(_commit_options(options, record.id, new))
        return 0
    finally:
        with api.open_store(root) as store:
            records.remove(store, record, force=True)


def _words(options: Namespace) -> tuple[str, tuple[str, ...]]:
    """(the new image's name, the command). Raises: UsageError."""
    if not options.command or options.command[0].startswith("-"):
        raise UsageError("modify: which new image?", hint="pybuild modify [FLAGS] OLD NEW [-- COMMAND…]")
    new, *words = options.command
    return new, tuple(words[1:] if words[:1] == ["--"] else words)


def _platform(options: Namespace) -> Platform | None:
    from layers.oci import Platform

    platform = Platform.parse(options.platform) if options.platform else None
    options.platform = None  # it is not of the run, which would refuse it
    return platform


def _commit_options(options: Namespace, container: str, new: str) -> Namespace:
    return Namespace(
        root=options.root, name=container, image=new, change=options.change, author="", message="", squash=False,
        omit_history=False, timestamp=options.timestamp, format="oci", compression="gzip", iidfile=None, rm=False,
        quiet=False,
    )  # fmt: skip
