"""Two dialects of path patterns: Go's `filepath.Match`, and the one with `**` that ignore files use.

Both become regular expressions of Python, written so that matching is linear or nearly so: a star
that is followed by another one commits to the first place where what stands between them fits
(an atomic group), as no later place could match more. Patterns come from other people's
repositories, and plain backtracking lets one line of an ignore file cost hours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from builder.errors import ContextError

_NOT_SLASH = "[^/]"
_MAX_LOOSE = 2
"""Wildcards of one pattern that cannot commit; each one multiplies the cost by the path's length."""


class BadPattern(ContextError):
    """A path pattern is malformed."""

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(f"syntax error in pattern {pattern!r}: {reason}")
        self.pattern = pattern


def go_match(pattern: str, name: str) -> bool:
    """Whether a name matches, by the rules of Go's filepath.Match: `*`, `?`, `[a-z]`, `[^a-z]`, backslash.

    A star never crosses `/`. The whole name must match.

    Raises: BadPattern, whether or not the name could have matched.
    """
    return _go_compile(pattern)(name)


def check_go_pattern(pattern: str) -> None:
    """Raises: BadPattern."""
    _go_compile(pattern)


def has_wildcard(pattern: str) -> bool:
    """Whether a pattern can match anything but itself (an escape counts)."""
    return any(c in pattern for c in "*?[\\")


@lru_cache(maxsize=1024)
def _go_compile(pattern: str) -> Callable[[str], bool]:
    if not has_wildcard(pattern):
        return pattern.__eq__
    pieces: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            if not pieces or pieces[-1] != "*":
                pieces.append("*")
        elif char == "?":
            pieces.append(_NOT_SLASH)
        elif char == "[":
            piece, at = _go_class(pattern, at)
            pieces.append(piece)
        elif char == "\\":
            if at == len(pattern):
                raise BadPattern(pattern, "nothing follows the last backslash")
            pieces.append(re.escape(pattern[at]))
            at += 1
        else:
            pieces.append(re.escape(char))
    matches = re.compile(_committing(pieces), re.DOTALL).fullmatch
    return lambda name: matches(name) is not None


def _committing(pieces: list[str]) -> str:
    """Join pieces, `*` standing for a star: each star but the last takes the first fit of what follows it."""
    runs: list[list[str]] = [[]]
    for piece in pieces:
        if piece == "*":
            runs.append([])
        else:
            runs[-1].append(piece)
    first, *rest = ("".join(run) for run in runs)
    if not rest:
        return first
    return first + "".join(f"(?>{_NOT_SLASH}*?{run})" for run in rest[:-1]) + _NOT_SLASH + "*" + rest[-1]


def _go_class(pattern: str, at: int) -> tuple[str, int]:
    """The class that a bracket opened before `at`, and where it ends. Go's `getEsc` says what may stand in it."""
    negated = pattern.startswith("^", at)
    at += negated
    ranges: list[tuple[str, str]] = []
    while not (ranges and pattern.startswith("]", at)):
        low, at = _go_class_char(pattern, at)
        high = low
        if pattern.startswith("-", at):
            high, at = _go_class_char(pattern, at + 1)
        ranges.append((low, high))
    return _class(ranges, negated), at + 1


def _go_class_char(pattern: str, at: int) -> tuple[str, int]:
    char = pattern[at : at + 1]
    if char in ("-", "]"):
        raise BadPattern(pattern, f"a backslash must stand before {char!r} within brackets")
    if char == "\\":
        at += 1
        char = pattern[at : at + 1]
    if not char or at + 1 == len(pattern):
        raise BadPattern(pattern, "a bracket is not closed")
    return char, at + 1


def _class(ranges: list[tuple[str, str]], negated: bool) -> str:
    """A character class of Python's for ranges; one that runs backwards holds nothing."""
    body = "".join(f"{re.escape(a)}-{re.escape(b)}" for a, b in ranges if a <= b)
    if not body:
        return r"[\s\S]" if negated else "(?!)"
    return f"[{'^' if negated else ''}{body}]"


class IgnorePattern:
    """One compiled pattern of an ignore file, without its `!`.

    `kind` says how it is tested: `exact`, `prefix` and `suffix` compare with `text`, `regex` searches
    with `regex`. The kinds and their oddities are moby/patternmatcher's: `**x` is any path that ends
    in x, `x**` any that begins with it, whatever directory that is in.
    """

    __slots__ = ("kind", "regex", "text")

    def __init__(self, pattern: str) -> None:
        check_go_pattern(pattern)
        self.kind, source = _ignore_source(pattern)
        self.text = {"suffix": pattern[2:], "prefix": pattern[:-2]}.get(self.kind, pattern)
        self.regex = _ignore_regex(pattern, source) if self.kind == "regex" else ""

    def tester(self) -> Callable[[str], bool]:
        """A function from a path to whether it matches."""
        text = self.text
        if self.kind == "regex":
            matches = re.compile(self.regex, re.ASCII).match
            return lambda path: matches(path) is not None
        if self.kind == "prefix":
            return lambda path: path.startswith(text)
        if self.kind == "suffix":
            return lambda path: path.endswith(text) or (text[0] == "/" and path == text[1:])
        return text.__eq__


_ANY_DIRS, _ANYTHING, _STAR = "(?:.*/)?", ".*", "*"


def _ignore_source(pattern: str) -> tuple[str, str]:
    """The kind of a pattern, and the Go regular expression that moby makes of it.

    moby builds it character by character, blind to brackets: `[*]` becomes a class that holds a
    bracket, a caret and a slash. So do we, and then read the result as Go would.
    """
    kind = "exact"
    source: list[str] = []
    at = 0
    while at < len(pattern):
        char, first = pattern[at], at == 0
        at += 1
        if char == "*" and pattern.startswith("*", at):
            at += 1
            at += pattern.startswith("/", at)
            if at < len(pattern):
                source.append("(.*/)?")
                kind = "regex"
            elif kind == "exact":
                kind = "prefix"
            else:
                source.append(".*")
                kind = "regex"
            if first:
                kind = "suffix"
        elif char in "*?":
            source.append("[^/]*" if char == "*" else _NOT_SLASH)
            kind = "regex"
        elif char == "\\":
            source.append("\\" + pattern[at : at + 1])
            at += 1
            kind = "regex"
        else:
            if char in "[]":
                kind = "regex"
            source.append("\\" + char if char in ".+()|{}$" else char)
    return kind, "".join(source)


_WILDCARDS = (("(.*/)?", _ANY_DIRS), ("[^/]*", _STAR), (_NOT_SLASH, _NOT_SLASH), (".*", _ANYTHING))


def _ignore_regex(pattern: str, source: str) -> str:
    """Python's form of a Go regular expression that `_ignore_source` made. Raises: BadPattern."""
    pieces: list[str] = []
    wide = False
    at = 0
    while at < len(source):
        wildcard = next((w for w in _WILDCARDS if source.startswith(w[0], at)), None)
        char = source[at]
        if wildcard:
            at += len(wildcard[0])
            pieces.append(wildcard[1])
        elif char == "[":
            piece, at, crosses = _regex_class(pattern, source, at + 1)
            wide = wide or crosses
            pieces.append(piece)
        elif char == "\\":
            pieces.append(_regex_escape(pattern, source[at + 1 : at + 2]))
            at += 2
        elif char == "*":  # left over where brackets swallowed its `[^/]`: it repeats them
            pieces[-1] += "*"
            at += 1
        else:
            pieces.append("^" if char == "^" else re.escape(char))
            at += 1
    return _assemble(pattern, pieces, wide) + r"\Z"


_POSIX = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": "\x00-\x7f", "blank": "\t ", "cntrl": "\x00-\x1f\x7f",
    "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~", "punct": "!-/:-@\\[-`{-~",
    "space": "\t\n\x0b\x0c\r ", "upper": "A-Z", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f",
}  # fmt: skip


def _regex_class(pattern: str, source: str, at: int) -> tuple[str, int, bool]:
    """The class that a bracket opened before `at`, where it ends, and whether it can match `/`."""
    negated = source.startswith("^", at)
    at += negated
    body: list[str] = []
    while not (body and source.startswith("]", at)):
        if source.startswith("[:", at) and (end := source.find(":]", at, at + 12)) > 0:
            name = source[at + 2 : end]
            if name not in _POSIX:
                raise BadPattern(pattern, f"unknown class [:{name}:]")
            body.append(_POSIX[name])
            at = end + 2
            continue
        low, at = _regex_class_char(pattern, source, at)
        high = low
        if source.startswith("-", at) and source[at + 1 : at + 2] not in ("]", ""):
            high, at = _regex_class_char(pattern, source, at + 1)
        if high < low:
            raise BadPattern(pattern, f"the range {low}-{high} runs backwards")
        body.append(f"{re.escape(low)}-{re.escape(high)}")
    text = f"[{'^' if negated else ''}{''.join(body)}]"
    return text, at + 1, re.match(text, "/") is not None


def _regex_class_char(pattern: str, source: str, at: int) -> tuple[str, int]:
    char = source[at : at + 1]
    if char == "\\":
        at += 1
        char = source[at : at + 1]
        if char.isalnum():
            raise BadPattern(pattern, f"\\{char} has no meaning within brackets")
    if not char:
        raise BadPattern(pattern, "a bracket is not closed")
    return char, at + 1


def _regex_escape(pattern: str, char: str) -> str:
    """A backslash before a letter or digit means to Go's regexp what it means there: `\\d`, `\\n`."""
    if not char:
        raise BadPattern(pattern, "nothing follows the last backslash")
    if not (char.isascii() and char.isalnum()):
        return re.escape(char)
    if char in "dDsSwWbBAafnrtv":
        return "\\" + char
    if char == "z":
        return r"\Z"
    raise BadPattern(pattern, f"\\{char} has no meaning")


def _assemble(pattern: str, pieces: list[str], wide: bool) -> str:
    """Join the pieces so that what can commit does.

    Between two stars of one path component, and between two `**/` that begin after a slash, the first
    fit is as good as any. That fails where a bracket may match a slash itself.
    """
    sections: list[list[str]] = [[]]
    for piece in pieces:
        if piece == _ANY_DIRS:
            sections.append([])
        else:
            sections[-1].append(piece)
    loose = pieces.count(_STAR) if wide else 0
    result: list[str] = []
    for i, section in enumerate(sections):
        text = _section(section, wide)
        if i == 0:
            result.append(text)
        elif i < len(sections) - 1 and not wide and (not section or section[-1] == "/"):
            result.append(f"(?>(?:.*?/)??{text})")
        else:
            loose += 1
            result.append(_ANY_DIRS + text)
    if loose > _MAX_LOOSE:
        raise BadPattern(pattern, "too many wildcards that can match a slash")
    return "".join(result)


def _section(pieces: list[str], wide: bool) -> str:
    """What stands between two `**/`, its stars committing within each component."""
    if wide:
        return "".join(_NOT_SLASH + "*" if piece == _STAR else piece for piece in pieces)
    components: list[list[str]] = [[]]
    for piece in pieces:
        if piece in ("/", _ANYTHING):
            components.append([])
            components.append([piece])
            components.append([])
        else:
            components[-1].append(piece)
    return "".join(map(_committing, components))
