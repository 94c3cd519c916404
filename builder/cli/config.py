"""`pybuild config`: changes of a working container's config, in the order of the flags."""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from builder.cli.byhand import opened, request_of
from builder.cli.options import boolean, store_root
from builder.cli.sandboxflags import HEALTH_TIMES
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.container.byhand import Change

_FLAGS = {
    # field: (other spellings, metavar, help)
    "annotation": (["-a"], "NAME=VALUE", "an annotation of the manifest; NAME- removes it, - all"),
    "arch": ([], "NAME", "the image's CPU"),
    "author": ([], "NAME", "who made the image"),
    "cmd": ([], "COMMAND", "the default command: words, or a JSON array"),
    "comment": ([], "TEXT", "a comment on the image, in Docker's format"),
    "created-by": ([], "TEXT", "what the history says of the topmost layer"),
    "domainname": ([], "NAME", "the domain name, in Docker's format"),
    "entrypoint": ([], "COMMAND", "a command of the shell's, or a JSON array"),
    "env": (["-e"], "NAME[=VALUE]", "a variable, may name others as $NAME; NAME- removes it, - all"),
    "history-comment": ([], "TEXT", "the comment of the topmost layer's line in the history"),
    "hostname": ([], "NAME", "the host name, for `run` here and in Docker's format"),
    "label": (["-l"], "NAME=VALUE", "a label; NAME- removes it, - all"),
    "onbuild": ([], "INSTRUCTION", "an instruction for builds on the image; - removes all"),
    "os": ([], "NAME", "the image's operating system"),
    "os-feature": ([], "NAME", "a feature that it needs of the system; NAME- removes it, - all"),
    "os-version": ([], "VERSION", "the version of the system that it needs"),
    "port": (["-p"], "PORT[/PROTOCOL]", "a port to expose; PORT- removes it, - all"),
    "shell": ([], "WORDS", "the shell of commands in shell form, such as '/bin/bash -c'"),
    "stop-signal": ([], "SIGNAL", "the signal that ends containers"),
    "unsetannotation": ([], "NAME", "remove an annotation"),
    "unsetlabel": ([], "NAME", "remove a label"),
    "user": (["-u"], "USER[:GROUP]", "who commands run as"),
    "variant": ([], "NAME", "the CPU's variant"),
    "volume": (["-v"], "DIR", "a mount point for a volume; DIR- removes it, - all"),
    "workingdir": ([], "DIR", "the working directory; made, if it is not there"),
}
_HEALTH = {**HEALTH_TIMES, "retries": "failures in a row that make it unhealthy (default: 3)"}


class _InOrder(argparse.Action):
    """Collects (field, value) of all flags in one list: their order is that of the instructions."""

    def __call__(self, parser: ArgumentParser, options: Namespace, value: Any, flag: str | None = None) -> None:
        options.changes = [*options.changes, (self.dest, value)]


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("container", metavar="CONTAINER", help="one made by `from`")
    for field, (others, metavar, text) in _FLAGS.items():
        add(f"--{field}", *others, dest=field, action=_InOrder, metavar=metavar, help=text, default=argparse.SUPPRESS)
    add("-c", "--change", dest="change", action=_InOrder, metavar="INSTRUCTION", default=argparse.SUPPRESS,
        help="a Containerfile's instruction: CMD, ENV, LABEL, USER…")  # fmt: skip
    add("--healthcheck", dest="healthcheck", action=_InOrder, metavar="COMMAND", default=argparse.SUPPRESS,
        help="NONE, 'CMD WORDS', 'CMD-SHELL TEXT', or TEXT for the shell; empty removes it")  # fmt: skip
    for name, told in _HEALTH.items():
        add(f"--healthcheck-{name}", metavar="N" if name == "retries" else "TIME", help=told)
    add("--add-history", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="a line of the history for each change, as a build writes it (default: true)")  # fmt: skip
    add("--timestamp", type=int, metavar="SECONDS", help="time of what is made (also SOURCE_DATE_EPOCH)")
    parser.set_defaults(changes=[])


def run(verb: str, options: Namespace) -> int:
    from builder.container.byhand import configure as apply

    changes = _changes(options)
    if not changes:
        raise UsageError("config: nothing to change", hint="see `pybuild config --help`")
    with opened(store_root(options), options.container) as container:
        apply(container, changes, request_of(options), history=options.add_history)
    return 0


def _changes(options: Namespace) -> list[Change]:
    from builder.container import configuration

    health = {name: value for name in _HEALTH if (value := getattr(options, f"healthcheck_{_dest(name)}")) is not None}
    found: list[Change] = []
    for field, text in _with_health(options.changes, health):
        match field:
            case "healthcheck":
                found.append(configuration.healthcheck_change(text, health))
            case "change":
                found.append(configuration.instruction_change(str(text)))
            case "env":
                found += [configuration.config_change("env", each) for each in _variable(str(text))]
            case _:
                found.append(configuration.config_change(field, str(text)))
    return found


def _dest(name: str) -> str:
    return name.replace("-", "_")


def _with_health(changes: Sequence[tuple[str, str]], health: dict[str, str]) -> list[tuple[str, str | None]]:
    """The health check is one instruction, wherever its flags stand: where --healthcheck is, else at the end."""
    if [field for field, _ in changes].count("healthcheck") > 1:
        raise UsageError("--healthcheck: an image has one")
    if not health or any(field == "healthcheck" for field, _ in changes):
        return list(changes)
    return [*changes, ("healthcheck", None)]


def _variable(text: str) -> list[str]:
    """`NAME` alone is the caller's; without one there, nothing."""
    if "=" in text or text.endswith("-"):
        return [text]
    # A dollar of a value that comes from outside is meant as it is.
    return [f"{text}=" + os.environ[text].replace("\\", "\\\\").replace("$", "\\$")] if text in os.environ else []
