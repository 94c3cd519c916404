"""Go's `filepath.Match`: the wildcards of COPY and ADD.

Pure. `match` is asked for one path component at a time, since no wildcard crosses a slash.
Reference: https://pkg.go.dev/path/filepath#Match
"""

from __future__ import annotations

import re
from functools import lru_cache

from builder.errors import ContextError


def has_wildcards(text: str) -> bool:
    """Whether an unescaped `*`, `?` or `[` is in `text`."""
    position = 0
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] in "*?[":
            return True
        position += 1
    return False


def _syntax_error(pattern: str) -> ContextError:
    return ContextError(f'"{pattern}": syntax error in pattern', hint="close every [ with a ], or escape it with \\")


def _class(pattern: str, position: int) -> tuple[str, int]:
    """The regular expression of the character class that opens before `position`, and where it ends."""
    negated = pattern[position : position + 1] == "^"
    position += negated
    ranges: list[str] = []

    def character() -> str:
        nonlocal position
        if position >= len(pattern) or pattern[position] in "-]":
            raise _syntax_error(pattern)
        if pattern[position] == "\\":
            position += 1
            if position >= len(pattern):
                raise _syntax_error(pattern)
        found = pattern[position]
        position += 1
        if position >= len(pattern):
            raise _syntax_error(pattern)
        return found

    while not (ranges and pattern[position : position + 1] == "]"):
        low = high = character()
        if pattern[position] == "-":
            position += 1
            high = character()
        if low <= high:
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            ranges.append("")
    body = "".join(ranges)
    if not body:  # only empty ranges: nothing is in it, everything is outside
        return ("[\\s\\S]" if negated else "(?!)"), position + 1
    return f"[{'^' if negated else ''}{body}]", position + 1


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    parts: list[str] = []
    position = 0
    while position < len(pattern):
        char = pattern[position]
        position += 1
        if char == "*":
            if not parts or parts[-1] != "[^/]*":  # ** is *, and would backtrack without end
                parts.append("[^/]*")
        elif char == "?":
            parts.append("[^/]")
        elif char == "[":
            text, position = _class(pattern, position)
            parts.append(text)
        elif char == "\\":
            if position >= len(pattern):
                raise _syntax_error(pattern)
            parts.append(re.escape(pattern[position]))
            position += 1
        else:
            parts.append(re.escape(char))
    return re.compile("".join(parts), re.DOTALL)


def match(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the whole of `name`. Raises: ContextError for a malformed pattern."""
    return _compile(pattern).fullmatch(name) is not None


def split(path: str) -> tuple[str, list[str]]:
    """Part a cleaned `path` into its literal head and the components from the first wildcard on."""
    parts = path.split("/")
    for index, part in enumerate(parts):
        if has_wildcards(part):
            return "/".join(parts[:index]), parts[index:]
    return path, []
