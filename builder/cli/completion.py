"""`pybuild completion bash|zsh|fish`: a script that completes commands, flags and their values.

Made of the commands' own parsers, so that it knows all of them; static, so that a key press starts no
Python but for names of images and containers.
"""

from __future__ import annotations

import argparse
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib import import_module
from typing import Literal

from builder.cli.main import VERBS
from layers.values import NamedTuple

Kind = Literal["none", "files", "dirs", "images", "containers"]
_GLOBAL = "--root"
_IMAGES = "pybuild images --format '{{.Repository}}:{{.Tag}}' 2>/dev/null"
_CONTAINERS = "pybuild ps --all --format '{{.Names}}' 2>/dev/null"


class Flag(NamedTuple):
    """A flag's spellings; `choices` and `kind` say what its value may be, None that it takes none."""

    names: tuple[str, ...]
    help: str
    kind: Kind | None
    choices: tuple[str, ...] = ()


class Command(NamedTuple):
    """A verb, its flags, and what its first argument that is no flag may be."""

    verb: str
    help: str
    flags: tuple[Flag, ...]
    kind: Kind
    choices: tuple[str, ...] = ()


def configure(verb: str, parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(_RENDERERS), help="the shell that is to complete")


def run(verb: str, options: Namespace) -> int:
    print("\n".join(_RENDERERS[options.shell](commands())))
    return 0


def commands() -> list[Command]:
    """All commands, as their parsers know them."""
    found: list[Command] = []
    for verb, entry in VERBS.items():
        parser = ArgumentParser(prog=f"pybuild {verb}", add_help=False)
        parser.add_argument("-h", "--help", action="help", help="show this help")
        parser.add_argument("--root", metavar="DIR", help="the local store")
        parser.add_argument("--debug", action="store_true", help="show tracebacks and debugging lines")
        import_module(f"builder.cli.{entry.module}").configure(verb, parser)
        flags = tuple(_flag(a) for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS)
        first = next((a for a in parser._actions if not a.option_strings), None)
        choices = tuple(map(str, first.choices)) if first is not None and first.choices else ()
        found.append(Command(verb, entry.help, flags, "none" if choices else _kind(first), choices))
    return found


def _flag(action: argparse.Action) -> Flag:
    words = " ".join((action.help or "").split()).partition(" (")[0]
    kind = None if action.nargs == 0 else _kind(action)
    return Flag(tuple(action.option_strings), words, kind, tuple(map(str, action.choices or ())))


def _kind(action: argparse.Action | None) -> Kind:
    """What a value is, by what the help calls it."""
    name = str(action.metavar or action.dest).upper() if action is not None else ""
    if name.startswith(("DIR", "CONTEXT")):
        return "dirs"
    if name == "CONTAINER":
        return "containers"
    if name in {"IMAGE", "CAPSULE|IMAGE"} or (name == "NAME" and action is not None and not action.option_strings):
        return "images"
    return "files" if any(word in name for word in ("FILE", "PATH", "TAR", "SRC", "DST")) or len(name) == 1 else "none"


# bash


def _bash(table: list[Command]) -> Iterator[str]:
    yield from (
        '# bash completion for pybuild: eval "$(pybuild completion bash)"',
        '_pybuild_names() { local n; while IFS= read -r n; do [[ $n == "$1"* ]] && COMPREPLY+=("$n"); done; }',
        "_pybuild() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
        '    local verb="" first="" i kind="" words="" flags=""',
        '    [[ $cur == "=" ]] && cur=""',
        '    [[ $prev == "=" ]] && prev=${COMP_WORDS[COMP_CWORD-2]}',
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        "            --root) ((i += 1)) ;;",
        "            -*) [[ -z $verb ]] && verb=build ;;",
        "            *) if [[ -z $verb ]]; then verb=${COMP_WORDS[i]}; elif [[ -z $first ]]; then first=$i; fi ;;",
        "        esac",
        "    done",
        "    [[ -z $verb && $cur == -* ]] && verb=build",
        "    case $verb:$prev in",
    )
    for command in table:
        for flag in command.flags:
            if flag.kind is not None:
                pattern = "|".join(f"{command.verb}:{name}" for name in flag.names)
                yield f"        {pattern}) kind={flag.kind} words={shlex.quote(' '.join(flag.choices))} ;;"
    yield "    esac"
    yield "    if [[ -z $kind ]]; then case $verb in"
    verbs = shlex.quote(" ".join(command.verb for command in table))
    yield f'        "") words={verbs} kind=none ;;'
    for command in table:
        flags = shlex.quote(" ".join(name for flag in command.flags for name in flag.names))
        rest = f"[[ -z $first ]] && words={shlex.quote(' '.join(command.choices))};" if command.choices else ""
        yield f"        {command.verb}) flags={flags} kind={command.kind}; {rest} ;;"
    yield from (
        "    esac; fi",
        '    [[ $cur == -* && -n $flags ]] && { COMPREPLY=($(compgen -W "$flags" -- "$cur")); return; }',
        "    case $kind in",
        '        files) COMPREPLY=($(compgen -f -- "$cur")) ;;',
        '        dirs) COMPREPLY=($(compgen -d -- "$cur")) ;;',
        # What the store says is compared, never expanded, as compgen -W does with its words.
        f'        images) COMPREPLY=($(compgen -f -- "$cur")); _pybuild_names "$cur" < <({_IMAGES}) ;;',
        f'        containers) _pybuild_names "$cur" < <({_CONTAINERS}) ;;',
        "    esac",
        '    [[ -n $words ]] && COMPREPLY+=($(compgen -W "$words" -- "$cur"))',
        "}",
        "complete -o filenames -F _pybuild pybuild pybuild-oci",
    )


# zsh


def _zsh(table: list[Command]) -> Iterator[str]:
    yield from (
        "#compdef pybuild pybuild-oci",
        '# zsh completion for pybuild: pybuild completion zsh > "${fpath[1]}/_pybuild"',
        '_pybuild_images() { local -a names; names=(${(f)"$(' + _IMAGES + ')"}); compadd -a names; _files }',
        '_pybuild_containers() { local -a names; names=(${(f)"$(' + _CONTAINERS + ')"}); compadd -a names }',
        "_pybuild() {",
        "    local verb=${words[2]}",
        "    if (( CURRENT == 2 )) && [[ $verb != -* ]]; then",
        "        local -a verbs; verbs=(",
    )
    for command in table:
        yield f"            {shlex.quote(f'{command.verb}:{command.help}')}"
    yield from (
        "        )",
        "        _describe command verbs",
        "        return",
        "    fi",
        "    if [[ $verb == -* ]]; then verb=build; else shift words; (( CURRENT-- )); fi",
        "    case $verb in",
    )
    for command in table:
        yield f"        {command.verb}) _arguments -s \\"
        for flag in command.flags:
            text = flag.help.replace("[", "(").replace("]", ")").replace(":", " ")
            for name in flag.names:
                sign = "=" if flag.kind is not None and name.startswith("--") else ""
                value = "" if flag.kind is None else f":value:{_zsh_value(flag.kind, flag.choices)}"
                yield f"            {shlex.quote(f'*{name}{sign}[{text}]{value}')} \\"
        if command.choices:
            first = f"1:action:({' '.join(command.choices)})"
            yield f"            {shlex.quote(first)} \\"
        rest = f"*:argument:{_zsh_value('files' if command.choices else command.kind, ())}"
        yield f"            {shlex.quote(rest)} ;;"
    yield from ("    esac", "}", '_pybuild "$@"')


def _zsh_value(kind: Kind, choices: tuple[str, ...]) -> str:
    if choices:
        return f"({' '.join(choices)})"
    return {
        "none": " ",
        "files": "_files",
        "dirs": "_files -/",
        "images": "_pybuild_images",
        "containers": "_pybuild_containers",
    }[kind]


# fish


def _fish(table: list[Command]) -> Iterator[str]:
    yield "# fish completion for pybuild: pybuild completion fish | source"
    verbs = " ".join(command.verb for command in table)
    yield "complete -c pybuild -f"
    yield f"function __pybuild_builds; not __fish_seen_subcommand_from {verbs.removeprefix('build ')}; end"
    for command in table:
        yield f"complete -c pybuild -n __fish_use_subcommand -a {command.verb} -d {_fish_quoted(command.help)}"
    for command in table:
        condition = f"'__fish_seen_subcommand_from {command.verb}'"
        if command.verb == "build":
            condition = "__pybuild_builds"
        for flag in command.flags:
            spelled = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in flag.names)
            value = "" if flag.kind is None else " " + _fish_value(flag.kind, flag.choices, required=True)
            yield f"complete -c pybuild -n {condition} {spelled}{value} -d {_fish_quoted(flag.help)}"
        if command.verb != "build":
            yield f"complete -c pybuild -n {condition} {_fish_value(command.kind, command.choices, required=False)}"
    yield "complete -c pybuild -n '__fish_seen_subcommand_from build' -a '(__fish_complete_directories)'"


def _fish_value(kind: Kind, choices: tuple[str, ...], *, required: bool) -> str:
    if choices:
        words = _fish_quoted(" ".join(choices))
    else:
        words = {
            "none": "",
            "files": "",
            "dirs": "'(__fish_complete_directories)'",
            "images": f'"({_IMAGES})"',
            "containers": f'"({_CONTAINERS})"',
        }[kind]
    exclusive = "-F" if kind in {"files", "images"} and not choices else "-f"
    return " ".join(filter(None, ["-r" if required else "", exclusive, f"-a {words}" if words else ""]))


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_RENDERERS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
