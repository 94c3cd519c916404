"""The text of a Containerfile and places within it.

What errors and findings point at. Imports the standard library only, since `builder.errors` rests on it.
"""

from __future__ import annotations

from layers.values import NamedTuple

_MAX_EXCERPT_WIDTH = 160
"""Columns of one source line that an excerpt shows; a 1 MB line must not flood a terminal."""


class SourceRange(NamedTuple):
    """Lines are counted from 1, both ends included; columns from 1, the end excluded. Column 0: the whole line."""

    start_line: int
    end_line: int
    start_col: int = 0
    end_col: int = 0


class SourceFile:
    """A named text. `name` is what the user called it: a path, `-` or a URL."""

    __slots__ = ("_lines", "name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self._lines: list[str] | None = None

    def __repr__(self) -> str:
        return f"SourceFile({self.name!r}, {len(self.text)} characters)"

    @property
    def lines(self) -> list[str]:
        """The text split at line feeds; line N of the file is `lines[N - 1]`."""
        if self._lines is None:
            self._lines = self.text.split("\n")
        return self._lines

    def locate(self, token: str, within: SourceRange) -> SourceRange:
        """The first place of `token` within a range, or that range if it is not spelled out there."""
        last = min(within.end_line, len(self.lines))
        for number in range(max(within.start_line, 1), last + 1):
            line = self.lines[number - 1]
            column = line.find(token, within.start_col - 1 if number == within.start_line and within.start_col else 0)
            if column >= 0 and token:
                return SourceRange(number, number, column + 1, column + 1 + len(token))
        return within

    def position(self, place: SourceRange) -> str:
        """`name:line:column`, or `name:line` where no column is known."""
        column = f":{place.start_col}" if place.start_col else ""
        return f"{self.name}:{place.start_line}{column}"

    def excerpt(self, place: SourceRange) -> str:
        """The first line of a range, with carets under the part that is meant."""
        if not 1 <= place.start_line <= len(self.lines):
            return ""
        line = self.lines[place.start_line - 1].rstrip("\r")
        first = max(place.start_col, 1) - 1
        if not place.start_col:
            first = len(line) - len(line.lstrip())
        last = place.end_col - 1 if place.start_col and place.end_line == place.start_line else len(line.rstrip())
        last = max(last, first + 1)
        skipped = max(0, first - _MAX_EXCERPT_WIDTH // 2)
        shown = line[skipped : skipped + _MAX_EXCERPT_WIDTH]
        prefix, suffix = "..." if skipped else "", "..." if skipped + len(shown) < len(line) else ""
        gutter = f"{place.start_line:>4} | "
        pad = "".join("\t" if c == "\t" else " " for c in prefix + shown[: first - skipped])
        carets = "^" * max(1, min(last, skipped + len(shown)) - first)
        text = "".join(c if c.isprintable() or c == "\t" else "�" for c in shown)
        return f"{gutter}{prefix}{text}{suffix}\n{' ' * (len(gutter) - 2)}| {pad}{carets}"
