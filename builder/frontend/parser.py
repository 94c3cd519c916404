"""Containerfile text to a syntax tree: lines, directives, comments, continuations, heredocs.

Says which words an instruction has, not what they mean; an unknown instruction or flag is still a
node here. `instructions` gives the tree its meaning. The rules are BuildKit's, its odd ones included;
its limit of 64 KiB a line is not.
"""

from __future__ import annotations

import re

from builder.errors import ParseError
from builder.frontend.heredoc import Heredoc, heredocs_of_line
from builder.frontend.lineforms import arguments_of, split_command
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.words import GO_SPACE
from layers.values import NamedTuple

MAX_TEXT_CHARS = 32 << 20
MAX_INSTRUCTIONS = 100_000
MAX_ONBUILD_NESTING = 8

_DIRECTIVE = re.compile(r"#[\t\n\f\r ]*([a-zA-Z][a-zA-Z0-9]*)[\t\n\f\r ]*=[\t\n\f\r ]*(.+?)[\t\n\f\r ]*")
_KNOWN_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_HEREDOC_KEYWORDS = frozenset({"add", "copy", "run"})


class Directive(NamedTuple):
    """`# name=value` at the top of the file."""

    name: str
    value: str
    range: SourceRange


class ParserWarning(NamedTuple):
    """What will be an error one day; today, empty lines within a continued instruction."""

    message: str
    range: SourceRange


class Node(NamedTuple):
    """One instruction, unexpanded.

    `instruction` is lower-case, `keyword` as written. `original` is the line with its continuations
    joined, without heredoc bodies. ENV's and LABEL's `args` come in threes: name, value, and `=` or
    nothing. ONBUILD's one argument is the `child`. `comments` stand directly above.
    """

    instruction: str
    keyword: str
    original: str
    flags: tuple[str, ...]
    args: tuple[str, ...]
    heredocs: tuple[Heredoc, ...]
    json: bool
    range: SourceRange
    comments: tuple[str, ...]
    child: Node | None = None


class SyntaxTree(NamedTuple):
    """What `parse_syntax` gives."""

    source: SourceFile
    directives: tuple[Directive, ...]
    nodes: tuple[Node, ...]
    warnings: tuple[ParserWarning, ...]
    escape: str


def parse_syntax(source: SourceFile) -> SyntaxTree:
    """Parse a Containerfile's text. Raises: ParseError, with a place."""
    if len(source.text) > MAX_TEXT_CHARS:
        raise ParseError(f"the file is larger than {MAX_TEXT_CHARS >> 20} MiB", source=source)
    return _Parser(source).run()


class _Parser:
    """One pass over the lines. `at` is the index of the next one, so also the number of the last one read."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source
        lines = list(source.lines)
        lines[0] = lines[0].removeprefix("\ufeff")
        self.lines = lines[:-1] if lines[-1] == "" else lines
        self.at = 0
        self.escape = "\\"
        self.directives: list[Directive] = []
        self.directives_done = False
        self.nodes: list[Node] = []
        self.warnings: list[ParserWarning] = []
        self.comments: list[str] = []

    def run(self) -> SyntaxTree:
        while self.at < len(self.lines):
            raw = self.lines[self.at]
            self.at += 1
            line = raw.rstrip("\r").lstrip(GO_SPACE)
            is_directive = self._directive(line)
            if line.startswith("#"):
                self._comment(raw, is_directive)
                continue
            if line:
                self._instruction(line)
            else:
                self.comments.clear()
        if not self.nodes:
            raise ParseError(
                "file with no instructions",
                source=self.source,
                range=SourceRange(max(len(self.lines), 1), max(len(self.lines), 1)),
                hint="a Containerfile begins with FROM",
            )
        self._shebang_directives()
        return SyntaxTree(self.source, tuple(self.directives), tuple(self.nodes), tuple(self.warnings), self.escape)

    def _comment(self, raw: str, is_directive: bool) -> None:
        if is_directive:
            return
        text = raw[1:].strip(GO_SPACE)
        if text:
            self.comments.append(text)
        else:
            self.comments.clear()

    def _directive(self, line: str) -> bool:
        """Whether the line is a directive; the first that is none ends them."""
        if self.directives_done:
            return False
        place = SourceRange(self.at, self.at)
        directive = _match_directive(line, place)
        if directive is None:
            self.directives_done = True
            return False
        if any(d.name == directive.name for d in self.directives):
            raise ParseError(f"only one {directive.name} parser directive can be used", source=self.source, range=place)
        if directive.name == "escape":
            if directive.value not in ("\\", "`"):
                raise ParseError(
                    f"invalid escape token '{directive.value}' does not match ` or \\",
                    source=self.source,
                    range=self.source.locate(directive.value, place),
                )
            self.escape = directive.value
        self.directives.append(directive)
        return True

    def _shebang_directives(self) -> None:
        """After a `#!` line, `syntax` and `check` are still read (so that a Containerfile can be run)."""
        if self.directives or not self.lines or not self.lines[0].startswith("#!"):
            return
        seen: set[str] = set()
        for number, line in enumerate(self.lines[1:], 2):
            directive = _match_directive(line.rstrip("\r"), SourceRange(number, number))
            if directive is None or directive.name in seen:
                break
            seen.add(directive.name)
            if directive.name != "escape":
                self.directives.append(directive)

    def _instruction(self, first: str) -> None:
        start = self.at
        line, ended = self._cut_continuation(first)
        if not ended:
            line = self._continue(line)
        column = len(self.lines[start - 1]) - len(self.lines[start - 1].lstrip(GO_SPACE)) + 1
        if start == 1 and self.source.text.startswith("\ufeff"):
            column += 1
        place = SourceRange(start, self.at, column, len(self.lines[self.at - 1].rstrip()) + 1)
        if len(self.nodes) >= MAX_INSTRUCTIONS:
            raise ParseError(f"more than {MAX_INSTRUCTIONS} instructions", source=self.source, range=place)
        try:
            node = self._node(line, place, 0)
            if "<<" in line and _may_have_heredocs(node):
                bodies = tuple(self._heredoc(h, place) for h in heredocs_of_line(line))
                node = node._replace(heredocs=bodies, range=place._replace(end_line=self.at, end_col=0))
                if bodies:
                    node = node._replace(range=_ending(place, self.at, self.lines[self.at - 1]))
        except ParseError as e:
            if e.source is not None:
                raise
            raise type(e)(e.message, source=self.source, range=place, hint=e.hint) from None
        self.nodes.append(node)
        self.comments.clear()

    def _continue(self, line: str) -> str:
        """Join the lines that follow a continuation character; comments and blank lines between them vanish."""
        parts = [line]
        empty = False
        ended = False
        while not ended and self.at < len(self.lines):
            raw = self.lines[self.at].rstrip("\r")
            self.at += 1
            visible = raw.lstrip(GO_SPACE)
            if visible.startswith("#"):
                continue
            if not visible:
                empty = True
                continue
            part, ended = self._cut_continuation(raw)
            parts.append(part)
        joined = "".join(parts)
        if empty:
            shown = joined if len(joined) <= 200 else joined[:200] + "..."
            message = f"Empty continuation line found in: {shown}"
            self.warnings.append(ParserWarning(message, SourceRange(self.at, self.at)))
        return joined

    def _cut_continuation(self, line: str) -> tuple[str, bool]:
        """The line without a closing escape character, and whether the instruction ends here.

        Two escape characters do not continue a line: the first escapes the second.
        """
        body = line.rstrip(" \t")
        if body.endswith(self.escape) and body[-2:-1] != self.escape:
            return body[:-1], False
        return line, True

    def _node(self, line: str, place: SourceRange, depth: int) -> Node:
        keyword, flags, rest = split_command(line)
        instruction = keyword.lower()
        comments = () if depth else tuple(self.comments)
        child = None
        args: tuple[str, ...] = ()
        as_json = False
        if instruction == "onbuild":
            if depth >= MAX_ONBUILD_NESTING:
                raise ParseError("ONBUILD is nested too deeply")
            child = self._node(rest, place, depth + 1) if rest else None
        else:
            args, as_json = arguments_of(instruction, rest, self.escape)
        return Node(instruction, keyword, line, flags, args, (), as_json, place, comments, child)

    def _heredoc(self, heredoc: Heredoc, place: SourceRange) -> Heredoc:
        start = self.at
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            end = line.rstrip("\r")
            if (end.lstrip("\t") if heredoc.chomp else end) == heredoc.name:
                body = self.lines[start : self.at - 1]
                return heredoc._replace(content="".join([part + "\n" for part in body]))
        raise ParseError(
            "unterminated heredoc",
            source=self.source,
            range=self.source.locate("<<", place),
            hint=f"no line consists of {heredoc.name!r} alone",
        )


def _may_have_heredocs(node: Node) -> bool:
    inner = node.child if node.instruction == "onbuild" and node.child else node
    return inner.instruction in _HEREDOC_KEYWORDS and not inner.json


def _ending(place: SourceRange, line_number: int, line: str) -> SourceRange:
    return SourceRange(place.start_line, line_number, place.start_col, len(line.rstrip()) + 1)


def _match_directive(line: str, place: SourceRange) -> Directive | None:
    match = _DIRECTIVE.fullmatch(line) if line.startswith("#") else None
    if match is None or (name := match[1].lower()) not in _KNOWN_DIRECTIVES:
        return None
    return Directive(name, match[2], place)
