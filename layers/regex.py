"""Regular expressions in time linear in the text: for patterns, or texts, that somebody else has written.

Python's own engine tries one way after the other, and a few characters may give it more of them than
anybody can wait for. This one goes all ways at once (a Pike machine), a character at a time; what it cannot
do so, back-references and looking around, is refused, as Go's does, whose syntax the file formats mean that
use it: bake's functions, sync files, source policies. Of several matches the leftmost counts, and of these
the one that Python finds. The syntax is parsed by Python's own parser. https://swtch.com/~rsc/regexp/regexp2.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

from layers.values import NamedTuple

MAX_STEPS = 2_000_000
"""What one search, or one replacement, may take: a second or two."""
_MAX_PROGRAM = 5000
_MAX_COUNT = 1000

Accepts = Callable[[str], bool]
_WORD: Accepts = lambda c: c.isalnum() or c == "_"  # noqa: E731
_CATEGORIES: dict[str, Accepts] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _WORD}


class Found(NamedTuple):
    """A match: where it is, and what its groups are, the whole of it being the first."""

    start: int
    end: int
    groups: tuple[str | None, ...]
    names: Mapping[str, int]


class _Step(NamedTuple):
    """An instruction: what it does, where it goes on (a split: in this order), what a character or place must be."""

    kind: str
    to: tuple[int, ...] = ()
    accepts: Any = None
    slot: int = 0


class Pattern:
    """A compiled pattern: see `compile_pattern`. Immutable."""

    __slots__ = ("_names", "_program", "_slots", "text")

    def __init__(self, text: str, program: tuple[_Step, ...], groups: int, names: Mapping[str, int]) -> None:
        self.text = text
        self._program = program
        self._slots = 2 * groups
        self._names = names

    def search(self, text: str) -> Found | None:
        """The first match in a text. Raises: ValueError if that takes too long."""
        return self._search(text, 0, [MAX_STEPS])

    def sub(self, by: Callable[[Found], str], text: str) -> str:
        """A text with every match replaced; as in Go, nothing right after one does not count. Raises: ValueError."""
        budget = [MAX_STEPS]
        parts: list[str] = []
        position, last = 0, -1
        while (found := self._search(text, position, budget)) is not None:
            parts.append(text[position : found.start])
            if found.end > found.start or found.start != last:
                parts.append(by(found))
            position = last = found.end
            if found.end == found.start:
                if position == len(text):
                    break
                parts.append(text[position])
                position += 1
        return "".join(parts) + text[position:]

    def _search(self, text: str, start: int, budget: list[int]) -> Found | None:
        program = self._program
        nothing = (-1,) * self._slots
        matched: tuple[int, ...] | None = None
        here: list[tuple[int, tuple[int, ...]]] = []
        seen: set[int] = set()
        for position in range(start, len(text) + 1):
            if matched is None:
                self._follow(0, nothing, text, position, here, seen, budget)
            elif not here:
                break
            following: list[tuple[int, tuple[int, ...]]] = []
            reached: set[int] = set()
            for number, slots in here:
                step = program[number]
                if step.kind == "match":
                    matched = slots
                    break  # what comes later counts for less
                if position < len(text) and step.accepts(text[position]):
                    self._follow(step.to[0], slots, text, position + 1, following, reached, budget)
            here, seen = following, reached
        if matched is None:
            return None
        spans = [(matched[at], matched[at + 1]) for at in range(0, self._slots, 2)]
        groups = tuple(text[a:b] if b >= 0 else None for a, b in spans)
        return Found(*spans[0], groups, self._names)

    def _follow(
        self,
        number: int,
        slots: tuple[int, ...],
        text: str,
        position: int,
        found: list[tuple[int, tuple[int, ...]]],
        seen: set[int],
        budget: list[int],
    ) -> None:
        """Add the steps that want a character and are reached from `number` without one, the preferred first."""
        todo = [(number, slots)]
        while todo:
            number, slots = todo.pop()
            if number in seen:
                continue
            seen.add(number)
            budget[0] -= 1
            if budget[0] < 0:
                raise ValueError("the regular expression takes too long on this text")
            step = self._program[number]
            match step.kind:
                case "split":
                    todo.extend((to, slots) for to in reversed(step.to))
                case "save":
                    todo.append((step.to[0], (*slots[: step.slot], position, *slots[step.slot + 1 :])))
                case "place":
                    if step.accepts(text, position):
                        todo.append((step.to[0], slots))
                case _:
                    found.append((number, slots))


def compile_pattern(text: str) -> Pattern:
    """A pattern in Python's syntax. Raises: ValueError for one that is malformed, refused, or too large."""
    try:
        parsed = sre_parser.parse(text)
        maker = _Maker()
        end = maker.add(_Step("match"))
        begin = maker.group(0, parsed.data, parsed.state.flags, end)
    except (re.error, OverflowError) as e:
        raise ValueError(str(e)) from e
    except RecursionError:
        raise ValueError("a regular expression that is nested too deeply") from None
    program = [_Step("split", (begin + 1,)), *(step._replace(to=tuple(n + 1 for n in step.to)) for step in maker.steps)]
    return Pattern(text, tuple(program), parsed.state.groups, dict(parsed.state.groupdict))


class _Maker:
    """Makes the program, backwards: each piece is told what follows it."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def add(self, step: _Step) -> int:
        if len(self.steps) >= _MAX_PROGRAM:
            raise ValueError("a regular expression that is too large")
        self.steps.append(step)
        return len(self.steps) - 1

    def group(self, number: int | None, items: Iterable[Any], flags: int, to: int) -> int:
        if number is None:
            return self.sequence(items, flags, to)
        end = self.add(_Step("save", (to,), slot=2 * number + 1))
        return self.add(_Step("save", (self.sequence(items, flags, end),), slot=2 * number))

    def sequence(self, items: Iterable[Any], flags: int, to: int) -> int:
        for kind, value in reversed(list(items)):
            to = self.item(kind, value, flags, to)
        return to

    def item(self, kind: Any, value: Any, flags: int, to: int) -> int:
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            return self.add(_Step("character", (to,), _accepts(kind, value, flags)))
        if kind is sre.SUBPATTERN:
            number, more, fewer, items = value
            return self.group(number, items, (flags | more) & ~fewer, to)
        if kind is sre.BRANCH:
            return self.add(_Step("split", tuple(self.sequence(branch, flags, to) for branch in value[1])))
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, items = value
            return self.repeat(least, most, items, flags, to, greedy=kind is sre.MAX_REPEAT)
        if kind is sre.AT:
            return self.add(_Step("place", (to,), _place(value, flags)))
        raise ValueError(f"{str(kind).lower()} is not possible in this regular expression")

    def repeat(self, least: int, most: Any, items: Any, flags: int, to: int, *, greedy: bool) -> int:
        endless = most is sre.MAXREPEAT
        if least > _MAX_COUNT or (not endless and most > _MAX_COUNT):
            raise ValueError(f"a regular expression that repeats more than {_MAX_COUNT} times")

        def either(again: int, out: int) -> tuple[int, int]:
            return (again, out) if greedy else (out, again)

        out = to
        if endless:
            to = self.add(_Step("split"))  # where it goes is known when what it repeats is made
            again = self.sequence(items, flags, to)
            self.steps[to] = _Step("split", either(again, out))
        else:
            for _ in range(most - least):
                to = self.add(_Step("split", either(self.sequence(items, flags, to), out)))
        for _ in range(least):
            to = self.sequence(items, flags, to)
        return to


def _accepts(kind: Any, value: Any, flags: int) -> Accepts:
    """What tells whether a character is one of those that are meant."""
    if kind is sre.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if kind is sre.IN:
        negated = value[0][0] is sre.NEGATE
        tests = [_member(part, flags) for part in value[negated:]]
    else:
        negated = kind is sre.NOT_LITERAL
        tests = [_member((sre.LITERAL, value), flags)]
    if flags & re.IGNORECASE:
        return lambda c: any(test(form) for form in {c, c.lower(), c.upper()} for test in tests) != negated
    return lambda c: any(test(c) for test in tests) != negated


def _member(part: tuple[Any, Any], flags: int) -> Accepts:
    kind, value = part
    if kind is sre.LITERAL:
        return lambda c: c == chr(value)
    if kind is sre.RANGE:
        low, high = map(chr, value)
        return lambda c: len(c) == 1 and low <= c <= high
    name = str(value).removeprefix("CATEGORY_")
    test = _CATEGORIES[name.removeprefix("NOT_")]
    if flags & re.ASCII:
        wide = test
        test = lambda c: c.isascii() and wide(c)  # noqa: E731
    return (lambda c: not test(c)) if name.startswith("NOT_") else test


def _place(kind: Any, flags: int) -> Callable[[str, int], bool]:
    """What tells whether a position is the one that is meant."""
    many = flags & re.MULTILINE

    def at_boundary(text: str, at: int) -> bool:
        before, after = text[at - 1 : at] if at else "", text[at : at + 1]
        return bool(before and _WORD(before)) != bool(after and _WORD(after))

    match str(kind).removeprefix("AT_"):
        case "BEGINNING":
            return lambda text, at: at == 0 or bool(many and text[at - 1] == "\n")
        case "BEGINNING_STRING":
            return lambda text, at: at == 0
        case "END":
            return lambda text, at: at == len(text) or (text[at] == "\n" and bool(many or at == len(text) - 1))
        case "END_STRING":
            return lambda text, at: at == len(text)
        case "BOUNDARY":
            return at_boundary
        case "NON_BOUNDARY":
            return lambda text, at: not at_boundary(text, at)
    raise ValueError(f"{kind} is not possible in this regular expression")
