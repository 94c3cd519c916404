"""The entry point: finds the command, maps errors to words and exit codes.

This module alone knows of exit codes; it imports nothing that `--version` does not need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TYPE_CHECKING = False  # `typing` takes a fifth of the time of `--version`
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from typing import NoReturn, Protocol

    class Command(Protocol):
        """A module of this package that holds commands."""

        def configure(self, verb: str, parser: ArgumentParser) -> None: ...

        def run(self, verb: str, options: Namespace) -> int: ...


class Verb:
    """A command: the module that has it and its line in the help."""

    __slots__ = ("help", "module")

    def __init__(self, module: str, help: str) -> None:
        self.module = module
        self.help = help


VERBS: dict[str, Verb] = {
    "build": Verb("build", "build an image from a Containerfile (also without the verb)"),
    "plan": Verb("plan", "tell what a build would do, and why, before anything runs"),
    "executor": Verb("executor", "build with kaniko's flags, and tell what they mean here"),
    "bake": Verb("bake", "do all the builds of a bake or compose file"),
    "lock": Verb("lock", "pin every external input of a Containerfile to a digest or commit"),
    "builds": Verb("builds", "list earlier builds, what they printed and how they ended"),
    "cache": Verb("cache", "list, sum up, draw, empty or audit the step cache"),
    "push": Verb("transfer", "copy an image from the local store to a registry or elsewhere"),
    "pull": Verb("transfer", "copy an image from a registry or elsewhere to the local store"),
    "copy": Verb("transfer", "copy an image from anywhere to anywhere"),
    "unpack": Verb("transfer", "write an image's flattened root file system to a directory"),
    "images": Verb("images", "list the images of the local store"),
    "tag": Verb("images", "give an image another name"),
    "untag": Verb("images", "take a name from an image"),
    "rmi": Verb("images", "remove images from the local store"),
    "inspect": Verb("images", "print an image's manifest and config"),
    "history": Verb("images", "print how an image came about"),
    "parse": Verb("language", "print a Containerfile's syntax tree, or expand words"),
    "check": Verb("language", "lint a Containerfile"),
    "outline": Verb("language", "list a Containerfile's ARGs and secrets"),
    "targets": Verb("language", "list a Containerfile's stages"),
    "context": Verb("contextlist", "list what of a build context is sent, and why"),
    "manifest": Verb("manifest", "read, write, make and change manifests and indexes"),
    "tags": Verb("remote", "list or remove the tags of a registry's repository"),
    "catalog": Verb("remote", "list a registry's repositories"),
    "digest": Verb("remote", "print an image's digest, by HEAD alone"),
    "delete": Verb("remote", "delete manifests or tags from a registry"),
    "blob": Verb("remote", "get, put, look up or delete a blob of a registry"),
    "ratelimit": Verb("remote", "tell how many pulls a registry still allows"),
    "validate": Verb("remote", "check an image: every digest, size and DiffID"),
    "cat": Verb("cat", "write files of an image to stdout, without pulling or unpacking it"),
    "sync": Verb("sync", "mirror repositories as a YAML file says"),
    "artifact": Verb("artifact", "push, pull, attach and list artifacts"),
    "registry": Verb("explain", "explain where a name leads, and what answers there"),
    "serve": Verb("serve", "be a small registry over the local store"),
    "mutate": Verb("edit", "change an image's config or annotations where it is"),
    "append": Verb("edit", "put layers on an image where it is"),
    "rebase": Verb("edit", "give an image another base where it is, or check its base"),
    "flatten": Verb("edit", "make an image's layers one"),
    "login": Verb("login", "keep credentials for a registry"),
    "logout": Verb("login", "forget credentials for a registry"),
    "save": Verb("archives", "write images of the local store to an archive"),
    "load": Verb("archives", "take in the images of an archive"),
    "import": Verb("archives", "make an image of a root file system's tar"),
    "export": Verb("archives", "write an image's root file system as a tar"),
    "image": Verb("archives", "mount an image's root file system read-only, or undo it"),
    "unshare": Verb("archives", "run a command in the user namespace that builds use"),
    "shell": Verb("shell", "look into the capsule of a failed step, or into an image"),
    "verify": Verb("verify", "build twice under different conditions and compare the images"),
    "diff": Verb("differ", "tell how two images, layers or directories differ"),
    "run": Verb("run", "run a command in a new container"),
    "create": Verb("run", "make a container without starting it"),
    "start": Verb("run", "start containers that do not run"),
    "exec": Verb("run", "run a command in a container that runs"),
    "ps": Verb("containers", "list containers"),
    "logs": Verb("containers", "print what a container said"),
    "stop": Verb("containers", "stop containers"),
    "kill": Verb("containers", "send a signal to containers"),
    "restart": Verb("containers", "stop containers and start them again"),
    "pause": Verb("containers", "freeze containers"),
    "unpause": Verb("containers", "let paused containers go on"),
    "wait": Verb("containers", "wait for containers to end, and print their statuses"),
    "rename": Verb("containers", "give a container another name"),
    "rm": Verb("containers", "remove containers"),
    "commit": Verb("commit", "make an image of a container"),
    "from": Verb("byhand", "make a working container, to build an image by hand"),
    "add": Verb("byhand", "add files, archives, downloads to a working container (see also copy)"),
    "config": Verb("config", "change the config of a working container"),
    "mount": Verb("byhand", "mount a working container's files, or list what is mounted"),
    "unmount": Verb("byhand", "undo mount"),
    "umount": Verb("byhand", "undo mount"),
    "containers": Verb("byhand", "list working containers"),
    "modify": Verb("modify", "make an image of another by a command, or in a shell"),
    "stats": Verb("watch", "show what containers use: processor, memory, I/O"),
    "top": Verb("watch", "list a container's processes"),
    "events": Verb("watch", "tell what happens to containers and volumes"),
    "attach": Verb("watch", "see what a container says, and type into it"),
    "cp": Verb("upkeep", "copy files between the host and a container"),
    "update": Verb("upkeep", "change containers' limits"),
    "volume": Verb("upkeep", "make, list, inspect and remove volumes"),
    "container": Verb("upkeep", "remove containers that do not run: `container prune`"),
    "bundle": Verb("bundle", "write an image as a bundle for OCI runtimes"),
    "port": Verb("containers", "list a container's published ports"),
    "prune": Verb("maintenance", "remove what nothing needs from the local store"),
    "du": Verb("maintenance", "tell what the local store takes up"),
    "fsck": Verb("maintenance", "check the local store"),
    "completion": Verb("completion", "print a script by which a shell completes commands and flags"),
    "doctor": Verb("doctor", "tell which kinds of sandbox work here, and what others lack"),
}

_OWN_FAILURE = {"run": 125, "create": 125, "exec": 125, "modify": 125}
"""Commands whose status is that of what they run: what their own failures give instead, as docker has it."""
_OF_IMAGES = {
    *("build", "diff", "history", "import", "inspect", "load", "prune", "pull", "push", "save", "tag", "untag"),
}
"""Commands that others spell with `image` before them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    _take_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(version_line())
        return 0
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("pybuild: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`pybuild images | head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:  # the process boundary: nobody sees a traceback uncalled
        if debug:
            raise
        return report(e)


def _take_standard_streams() -> None:
    """Open what of descriptors 0 to 2 is closed (`2>&-`): else a file of the store would be one, and take messages."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _dispatch(arguments: list[str]) -> int:
    import argparse
    from importlib import import_module

    verb, rest = _split_verb(arguments)
    if verb is None:
        from builder.cli.overview import overview

        print(overview())
        return 0
    parser = argparse.ArgumentParser(
        prog=f"pybuild {verb}",
        description=VERBS[verb].help[0].upper() + VERBS[verb].help[1:] + ".",
        allow_abbrev=False,
        add_help=False,
    )
    from builder.cli.options import take_booleans

    # argparse makes a formatter for each flag, to check its text; the usual one asks for the terminal's width.
    plain = argparse.HelpFormatter(parser.prog, width=80)
    parser._get_formatter = lambda: plain  # type: ignore[method-assign]
    parser.add_argument("-h", "--help", action="help", help="show this help")
    parser.add_argument("--root", metavar="DIR", help="the local store (also PYBUILD_ROOT)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debugging lines")
    module = VERBS[verb].module
    if verb in {"inspect", "diff", "export"} and _names_container(rest):
        module = "commit"
    elif verb == "copy" and _names_container(rest):
        from builder.cli.byhand import takes

        module = "byhand" if takes(verb, rest) else module
    command: Command = import_module(f"builder.cli.{module}")
    command.configure(verb, parser)
    if {"-h", "--help"} & {*rest}:
        from builder.cli.helptext import show_well

        del parser._get_formatter
        show_well(parser, getattr(command, "usage", lambda verb: ())(verb))
    else:
        parser.usage = parser.prog  # never shown, and never put together from eighty flags

    def refuse(message: str) -> NoReturn:
        # argparse would print some thirty lines of usage before the one that matters.
        from builder.cli.foreign import instead
        from builder.errors import UsageError

        refused = message.partition("unrecognized arguments: ")[2].split()
        # Go's flags, whose users know it so, take a value that may be left out after `=` alone.
        words = refused and not any(word.startswith("-") for word in refused)
        apart = next((flag for flag in _flags_alone(parser) if flag in rest[:-1]), None) if words else None
        asked = f"a value of {apart} goes after `=`: {apart}=VALUE" if apart else f"see `pybuild {verb} --help`"
        raise UsageError(message, hint=instead(verb, refused) or asked)

    parser.error = refuse  # type: ignore[method-assign]
    take_booleans(parser)
    if verb not in _OWN_FAILURE:
        return _run(verb, command, parser, rest)
    from layers.errors import PybuildError

    try:
        return _run(verb, command, parser, rest)
    except PybuildError as e:
        report(e)
        return _OWN_FAILURE[verb]


def _run(verb: str, command: Command, parser: ArgumentParser, rest: list[str]) -> int:
    import argparse

    words = _with_values(parser, [*_defaults(verb, parser), *rest])
    # A command's own words may look like flags: `pybuild unshare ls -l`.
    whole = any(action.nargs == argparse.REMAINDER for action in parser._actions)
    options = parser.parse_args(words) if whole else parser.parse_intermixed_args(words)
    if options.debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("urllib3").setLevel(logging.INFO)  # it tells whole URLs: some are signed, and so secrets
    return command.run(verb, options)


def _defaults(verb: str, parser: ArgumentParser) -> list[str]:
    """The flags that the user's configuration file gives; nothing is loaded where there is none."""
    name = os.environ.get("PYBUILD_CONFIG")
    if name is None:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.environ.get("HOME", ""), ".config")
        name = os.path.join(home, "pybuild", "config.toml")
        if not os.path.isabs(name) or not os.path.exists(name):
            return []
    if not name:
        return []
    from pathlib import Path

    from builder.cli.defaults import default_words

    return default_words(Path(name), verb, parser)


def _names_container(words: Sequence[str]) -> bool:
    """Whether one of the words is a container of the store: `inspect` is for images and for those."""
    root = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--root"), None)
    root = root or next((word[7:] for word in words if word.startswith("--root=")), None)
    from pathlib import Path

    from layers.root import default_root

    place = Path(root) if root else default_root(os.environ, os.geteuid())
    if not (place / "containers" / "names").is_dir():
        return False
    from builder.container.records import is_container

    return any(is_container(place, word) for word in words if not word.startswith("-"))


def _with_values(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Write out the value of flags that need none: `--pull .` must not take the context for a policy.

    Go's flags, which users know, take such a value after `=` alone.
    """
    alone = _flags_alone(parser)
    end = words.index("--") if "--" in words else len(words)
    return [f"{word}={alone[word]}" if word in alone else word for word in words[:end]] + words[end:]


def _flags_alone(parser: ArgumentParser) -> dict[str, str]:
    """The flags that need no value, with what they mean alone."""
    return {
        name: "true" if action.const is True else str(action.const)
        for action in parser._actions
        if action.nargs == "?"
        for name in action.option_strings
    }


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb and everything else. Global options may come before it; flags without a verb mean `build`."""
    before: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest[0]
        verb = _after_noun(word, rest[1]) if len(rest) > 1 else None
        if verb is not None:
            return verb, before + rest[2:]
        if word in VERBS:
            return word, before + rest[1:]
        if word in {"-h", "--help", "help"} and not before:
            if len(rest) > 1 and rest[1] in VERBS:
                return rest[1], ["--help"]
            return None, []
        if word == "--debug" or word.startswith("--root="):
            before.append(rest.pop(0))
        elif word == "--root" and len(rest) > 1:
            before += [rest.pop(0), rest.pop(0)]
        elif word == "--version":
            print(version_line())
            raise SystemExit(0)
        else:
            break
    if not rest and not before:
        return None, []
    if rest and not rest[0].startswith("-") and not os.path.isdir(rest[0]) and "/" not in rest[0]:
        from builder.cli.foreign import COMMANDS
        from builder.errors import UsageError
        from builder.frontend.spelling import did_you_mean

        hint = COMMANDS.get(rest[0])
        guess = "" if hint else did_you_mean(rest[0], VERBS)
        raise UsageError(f"unknown command {rest[0]!r}{guess}", hint=hint or "see `pybuild --help`")
    return "build", before + rest


def _after_noun(noun: str, word: str) -> str | None:
    """The command that others spell with a noun before it: `image ls`, `container rm`."""
    if noun == "image":
        also = {"ls": "images", "list": "images", "rm": "rmi", "remove": "rmi"}
        return also.get(word) or (word if word in _OF_IMAGES else None)
    if noun != "container":
        return None
    if word in {"ls", "list"}:
        return "ps"
    of_containers = word in VERBS and VERBS[word].module in {"run", "containers", "watch", "commit"}
    return word if of_containers or word in {"inspect", "cp", "update", "diff", "export"} else None


def version_line() -> str:
    """`pybuild X.Y.Z`."""
    from builder.version import VERSION

    return f"pybuild {VERSION}"


def report(error: BaseException) -> int:
    """Print one clear message for an error; the exit status that it means."""
    from layers.errors import PybuildError

    if isinstance(error, PybuildError):
        _print_error(error)
        return int(error.exit_code)
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        _say(f"error: {where}{error.strerror or error}")
        return 1
    if isinstance(error, RecursionError):
        print("error: the input is nested too deeply", file=sys.stderr)
        return 1
    _say(f"error: internal error: {type(error).__name__}: {error}\nhint: run it again with --debug, and report this")
    return 1


def _print_error(error: BaseException) -> None:
    from builder.errors import ParseError, StepError

    hint = getattr(error, "hint", None)
    place, excerpt = [*getattr(error, "__notes__", ()), "", ""][:2]
    if isinstance(error, ParseError):
        _say(f"error: {error.render()}")
        return
    if isinstance(error, StepError) and error.source is not None and error.range is not None:
        excerpt = error.source.excerpt(error.range)
    _say(f"error: {place}{': ' if place else ''}{error}")
    if excerpt:
        _say(excerpt)
    if hint:
        _say(f"hint: {hint}")


def _say(text: str) -> None:
    """On stderr. Errors quote registries, images and Containerfiles, and none of these may work the terminal."""
    from builder.cli.progress import sanitise

    print("\n".join(map(sanitise, text.split("\n"))), file=sys.stderr)
