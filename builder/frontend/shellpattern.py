"""The patterns of `${v#p}`, `${v%p}` and `${v/p/r}`: `*` any run, `?` any one character, neither a line feed.

There are no bracket expressions. A backslash makes `*`, `?` and itself literal, and may stand before
`}` and `/`. Matching runs a bit-parallel automaton, linear in the text whatever the pattern: a
backtracking regular expression would let one line of a Containerfile take hours.
"""

from __future__ import annotations

from builder.frontend.words import WordError
from layers.values import NamedTuple

_STAR, _ANY = "*", "?"


class _Token(NamedTuple):
    char: str
    wild: bool


class _Automaton:
    """Bit i of a state set: the first i tokens have been matched."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.accept = 1 << len(tokens)
        self.stars = 0
        self.any = 0
        self.literal: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if token.wild and token.char == _STAR:
                self.stars |= 1 << i
            elif token.wild:
                self.any |= 1 << i
            else:
                self.literal[token.char] = self.literal.get(token.char, 0) | 1 << i
        self.start = self.close(1)

    def close(self, states: int) -> int:
        """Add what is reached without consuming: a star may match nothing. Stars are never adjacent."""
        return states | (states & self.stars) << 1

    def step(self, states: int, char: str) -> int:
        eats = self.literal.get(char, 0)
        stays = 0
        if char != "\n":
            eats |= self.any
            stays = states & self.stars
        return self.close((states & eats) << 1 | stays)

    def end(self, text: str, start: int, *, longest: bool) -> int | None:
        """Where the match that begins at `start` ends."""
        states, found = self.start, None
        for i in range(start, len(text) + 1):
            if states & self.accept:
                found = i
                if not longest:
                    break
            if not states or i == len(text):
                break
            states = self.step(states, text[i])
        return found


def remove_prefix(value: str, pattern: str, *, longest: bool) -> str:
    """Cut the shortest or longest prefix that the pattern matches. Raises: WordError for a bad escape."""
    end = _Automaton(_tokens(pattern)).end(value, 0, longest=longest)
    return value if end is None else value[end:]


def remove_suffix(value: str, pattern: str, *, longest: bool) -> str:
    """Cut the shortest or longest suffix that the pattern matches. Raises: WordError for a bad escape."""
    return remove_prefix(value[::-1], _reversed(pattern), longest=longest)[::-1]


def replace(value: str, pattern: str, replacement: str, *, everywhere: bool, limit: int) -> str:
    """Replace the first match, or all, each as long as it can be.

    In a replacement of all, `$0` is the match and `$name` nothing, an effect of how BuildKit calls
    Go's regexp. Raises: WordError for a bad escape, or for a result of more than `limit` characters.
    """
    tokens = _tokens(pattern)
    forward = _Automaton(tokens)
    begins = _match_starts(value, tokens)
    result: list[str] = []
    size = copied = at = 0
    while at <= len(value):
        start = begins.find(1, at)
        end = forward.end(value, start, longest=True) if start >= 0 else None
        if end is None:
            break
        new = value[copied:start]
        if end > copied or start == 0:  # no empty match right after a match
            new += _template(replacement, value[start:end]) if everywhere else replacement
        result.append(new)
        size += len(new)
        if size > limit:
            raise WordError(f"the expansion is longer than {limit} characters")
        copied = end
        at = max(end, at + 1) if end > start else start + 1
        if not everywhere:
            break
    return "".join(result) + value[copied:]


def _match_starts(value: str, tokens: list[_Token]) -> bytearray:
    """For each index, whether a match can begin there: the reversed pattern run over the reversed text."""
    backward = _Automaton(tokens[::-1])
    begins = bytearray(len(value) + 1)
    states = 0
    for i in range(len(value), -1, -1):
        states |= backward.start
        begins[i] = 1 if states & backward.accept else 0
        if i:
            states = backward.step(states, value[i - 1])
    return begins


def _tokens(pattern: str) -> list[_Token]:
    tokens: list[_Token] = []
    i = 0
    while i < len(pattern):
        char = pattern[i]
        i += 1
        if char in (_STAR, _ANY):
            if char == _ANY or not tokens or tokens[-1] != (_STAR, True):
                tokens.append(_Token(char, True))
            continue
        if char == "\\":
            if pattern[i : i + 1] in ("}", "/"):
                continue
            char = pattern[i : i + 1]
            i += 1
            if char not in ("*", "?", "\\"):
                raise WordError(f"invalid pattern ({pattern}) in substitution: invalid escape '\\{char}'")
        tokens.append(_Token(char, False))
    return tokens


def _reversed(pattern: str) -> str:
    """The pattern back to front, its escapes still before what they escape."""
    pieces: list[str] = []
    i = 0
    while i < len(pattern):
        width = 2 if pattern[i] == "\\" and i + 1 < len(pattern) else 1
        pieces.append(pattern[i : i + width])
        i += width
    return "".join(reversed(pieces))


def _template(replacement: str, match: str) -> str:
    """Go's `Regexp.Expand` for a pattern without groups."""
    if "$" not in replacement:
        return replacement
    result: list[str] = []
    rest = replacement
    while True:
        before, dollar, rest = rest.partition("$")
        result.append(before)
        if not dollar:
            return "".join(result)
        if rest.startswith("$"):
            result.append("$")
            rest = rest[1:]
            continue
        braced = rest.startswith("{")
        body = rest[1:] if braced else rest
        length = 0
        while length < len(body) and (body[length] == "_" or body[length].isalnum()):
            length += 1
        name = body[:length]
        if not name or (braced and body[length : length + 1] != "}"):
            result.append("$")
            continue
        rest = body[length + (1 if braced else 0) :]
        if name == "0":
            result.append(match)
