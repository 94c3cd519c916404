"""What `pybuild VERB --help` prints: usage in one line, then what the words mean, the flags in groups.

Loaded when help is asked for alone. A description or an epilog of several lines is kept as it is written;
of a line of the form `NAME  WORDS`, with two spaces between, both parts have their columns.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterable

_MAX_WIDTH = 100
_NAME_COLUMNS = 30


def show_well(parser: argparse.ArgumentParser, usage: Iterable[str] = ()) -> None:
    """Give the parser this module's form; `usage` are the lines of a command that has actions."""
    parser.formatter_class = HelpFormatter
    parser._positionals.title = "arguments"
    parser._optionals.title = "flags"
    words = [_positional(a) for a in parser._get_positional_actions()]
    lines = list(usage) or [" ".join(words)]
    parser.usage = "\n       ".join(f"{parser.prog} [FLAG…] {line}".rstrip() for line in lines)
    common = parser.add_argument_group("with every command")
    for action in [a for a in parser._optionals._group_actions if a.dest in {"help", "root", "debug"}]:
        parser._optionals._group_actions.remove(action)
        common._group_actions.append(action)


def _positional(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices and not action.metavar:
        name = "|".join(map(str, action.choices))
    match action.nargs:
        case "?":
            return f"[{name}]"
        case "*" | argparse.REMAINDER:
            return f"[{name}…]"
        case "+":
            return f"{name}…"
        case _:
            return name


class HelpFormatter(argparse.HelpFormatter):
    """One value after all spellings of a flag, texts of several lines as they are, no wider than is read well."""

    def __init__(self, prog: str) -> None:
        width = min(_MAX_WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=_NAME_COLUMNS, width=max(width, 40))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return _positional(action)
        names = ", ".join(sorted(action.option_strings, key=lambda name: name.startswith("--")))
        if action.nargs == 0:
            return names
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if action.choices and not action.metavar:
            value = "|".join(map(str, action.choices))
        return f"{names}[={value}]" if action.nargs == "?" else f"{names} {value}"

    def _format_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None,
    ) -> str:
        return f"usage: {usage}\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        lines: list[str] = []
        for line in text.splitlines():
            name, gap, words = line.strip().partition("  ")
            if gap:
                lines += self._entry(name, words.strip(), width)
            else:
                lines += textwrap.wrap(line, width) or [""]
        return "\n".join(lines)

    def _entry(self, name: str, words: str, width: int) -> list[str]:
        shown = textwrap.wrap(words, max(width - _NAME_COLUMNS, 20))
        head = f"  {name}"
        if len(head) > _NAME_COLUMNS - 2:
            return [head, *(" " * _NAME_COLUMNS + line for line in shown)]
        first, *rest = shown or [""]
        return [f"{head:<{_NAME_COLUMNS}}{first}", *(" " * _NAME_COLUMNS + line for line in rest)]
