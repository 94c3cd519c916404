"""Ignore files: which paths of a build context a build does not see.

The rules are those of moby's ignorefile and patternmatcher as BuildKit applies them while it walks a
context. Patterns are anchored at the context's root, the last one that matches a path or one of its
parents decides, and `!` makes it visible again. They are not git's rules.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable

from builder.errors import ContextError
from builder.frontend.pathpattern import BadPattern, IgnorePattern, go_match, has_wildcard
from builder.frontend.words import GO_SPACE
from layers.values import NamedTuple

__all__ = ["BadPattern", "Deciding", "IgnoreMatcher", "go_match"]

_MAX_PATTERNS = 100_000


class Deciding(NamedTuple):
    """The line that decided: `pattern` as the file spells it."""

    file: str
    line: int
    pattern: str


class _Rule(NamedTuple):
    pattern: IgnorePattern
    excludes: bool
    """The line begins with `!`: what matches is seen after all."""
    origin: Deciding
    literal: str
    """The leading path components that hold no wildcard."""
    is_literal: bool


class IgnoreMatcher:
    """The compiled patterns of one ignore file. Safe to share between threads; paths are relative, with `/`."""

    def __init__(self, rules: Iterable[_Rule]) -> None:
        self._rules = tuple(rules)
        self._blocks = _blocks(self._rules)
        self._states: dict[str, int] = {"": 0}
        self._testers: list[Callable[[str], bool]] = []
        self._traces: dict[str, int] = {"": 0}

    @classmethod
    def parse(cls, text: str, source_name: str = ".dockerignore") -> IgnoreMatcher:
        """Compile an ignore file. Raises: ContextError naming file and line."""
        rules: list[_Rule] = []
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.startswith("#"):
                continue
            written = line.strip(GO_SPACE)
            if written:
                rules.append(_rule(written, Deciding(source_name, number, written)))
            if len(rules) > _MAX_PATTERNS:
                raise ContextError(f"{source_name}: more than {_MAX_PATTERNS} patterns")
        return cls(rules)

    @classmethod
    def from_patterns(cls, patterns: Iterable[str], source_name: str) -> IgnoreMatcher:
        """Compile patterns that come from elsewhere, such as `COPY --exclude`. Raises: ContextError."""
        stripped = [pattern.strip(GO_SPACE) for pattern in patterns]
        return cls(_rule(p, Deciding(source_name, i, p)) for i, p in enumerate(stripped, 1) if p)

    def hiding(self, path: str, why: str) -> IgnoreMatcher:
        """One that ignores `path` and what is in it, too, whatever the lines say."""
        literal = "".join(f"\\{c}" if c in "\\*?[]^!#" else c for c in clean_path(path))
        return IgnoreMatcher((*self._rules, _rule(literal, Deciding(why, 0, path))))

    def __bool__(self) -> bool:
        return bool(self._rules)

    def may_bring_back(self, path: str) -> bool:
        """Whether a `!` could match `path` or something beneath it."""
        path = _relative(path)
        return any(
            not path or rule.literal == path or _reaches(rule, path + "/") for rule in self._rules if rule.excludes
        )

    def hides_everything(self) -> Deciding | None:
        """The line that ignores whatever lies in the context's root, if there is one."""
        whole = {"*", "**", "**/*"}
        return next((r.origin for r in self._rules if not r.excludes and clean_path(r.origin.pattern) in whole), None)

    def match(self, path: str) -> bool:
        """Whether a path is ignored. The context's root, `.`, never is."""
        path = _relative(path)
        if not self._blocks or not path:
            return False
        return self._evaluate(path, self._state(posixpath.dirname(path)))[0]

    def decide(self, path: str) -> tuple[bool, Deciding | None]:
        """Whether a path is ignored, and the line that decided; None if no line concerns it."""
        path = _relative(path)
        if not path:
            return False, None
        if not self._testers:
            self._testers = [rule.pattern.tester() for rule in self._rules]
        above = _inherited(self._traces, posixpath.dirname(path), lambda part, state: self._trace(part, state)[0])
        _, ignored, deciding = self._trace(path, above)
        return ignored, deciding.origin if deciding else None

    def can_prune(self, directory: str) -> bool:
        """Whether a walk may skip a directory: it is ignored, and no `!` could bring back what is in it."""
        directory = _relative(directory)
        if not self.match(directory):
            return False
        inside = directory + "/"
        return not any(_reaches(rule, inside) for rule in self._rules if rule.excludes)

    def _state(self, directory: str) -> int:
        """The blocks that match a directory or one of its parents, as bits."""
        state = self._states.get(directory)
        if state is None:
            state = _inherited(self._states, directory, lambda part, above: self._evaluate(part, above)[1])
        return state

    def _evaluate(self, path: str, above: int) -> tuple[bool, int]:
        """Whether the path is ignored, and its own bits. A block that cannot change the outcome is not asked."""
        ignored = False
        state = 0
        for bit, block in self._blocks:
            if above & bit or (block.excludes == ignored and block.match(path)):
                state |= bit
                ignored = not block.excludes
        return ignored, state

    def _trace(self, path: str, above: int) -> tuple[int, bool, _Rule | None]:
        """As `_evaluate`, rule by rule, remembering the one that had the last word."""
        ignored, deciding, state = False, None, 0
        for i, rule in enumerate(self._rules):
            if above >> i & 1 or (rule.excludes == ignored and self._testers[i](path)):
                state |= 1 << i
                if ignored == rule.excludes or deciding is None:
                    deciding = rule
                ignored = not rule.excludes
        return state, ignored, deciding


class _Block:
    """Neighbouring rules of one polarity, tested together."""

    __slots__ = ("_exact", "_prefixes", "_regex", "_suffixes", "excludes")

    def __init__(self, rules: list[_Rule]) -> None:
        self.excludes = rules[0].excludes
        patterns = [rule.pattern for rule in rules]
        suffixes = [p.text for p in patterns if p.kind == "suffix"]
        self._exact = frozenset(
            [p.text for p in patterns if p.kind == "exact"] + [s[1:] for s in suffixes if s[:1] == "/"]
        )
        self._prefixes = tuple(p.text for p in patterns if p.kind == "prefix")
        self._suffixes = tuple(suffixes)
        regexes = [p.regex for p in patterns if p.kind == "regex"]
        self._regex = None
        if regexes:
            import re

            self._regex = re.compile("|".join(f"(?:{regex})" for regex in regexes), re.ASCII).match

    def match(self, path: str) -> bool:
        return (
            path in self._exact
            or path.startswith(self._prefixes)
            or path.endswith(self._suffixes)
            or (self._regex is not None and self._regex(path) is not None)
        )


def _blocks(rules: tuple[_Rule, ...]) -> tuple[tuple[int, _Block], ...]:
    groups: list[list[_Rule]] = []
    for rule in rules:
        if groups and groups[-1][0].excludes == rule.excludes:
            groups[-1].append(rule)
        else:
            groups.append([rule])
    return tuple((1 << i, _Block(group)) for i, group in enumerate(groups))


def _inherited(states: dict[str, int], directory: str, evaluate: Callable[[str, int], int]) -> int:
    """The state of a directory, worked out from the nearest parent whose state is known."""
    missing: list[str] = []
    while directory not in states:
        missing.append(directory)
        directory = posixpath.dirname(directory)
    state = states[directory]
    for part in reversed(missing):
        state = states[part] = evaluate(part, state)
    return state


def _reaches(exception: _Rule, inside: str) -> bool:
    """Whether a `!` rule might match something within a directory (given with a slash at its end)."""
    literal = exception.literal
    if exception.is_literal:
        return literal.startswith(inside)
    return not literal or (literal + "/").startswith(inside) or inside.startswith(literal + "/")


def _rule(written: str, origin: Deciding) -> _Rule:
    excludes = written.startswith("!")
    body = (written[1:] if excludes else written).strip(GO_SPACE)
    cleaned = clean_path(body) if body else ""
    if len(cleaned) > 1:
        cleaned = cleaned.removeprefix("/")
    if not excludes and cleaned.startswith("!"):  # such as `./!x`: cleaned first, read afterwards
        excludes, cleaned = True, cleaned[1:]
    place = f"{origin.file}:{origin.line}"
    if not cleaned:
        raise ContextError(f'{place}: illegal exclusion pattern: "!"', hint="a pattern must follow the !")
    try:
        pattern = IgnorePattern(cleaned)
    except BadPattern as e:
        raise ContextError(f"{place}: {e.message}") from None
    parts = cleaned.split("/")
    literal = next((i for i, part in enumerate(parts) if has_wildcard(part)), len(parts))
    return _Rule(pattern, excludes, origin, "/".join(parts[:literal]), literal == len(parts))


def clean_path(path: str) -> str:
    """Go's filepath.Clean: no `.`, no `..` but at the start, no doubled or trailing slash; never empty."""
    cleaned = posixpath.normpath(path)
    return cleaned[1:] if cleaned.startswith("//") else cleaned


def _relative(path: str) -> str:
    path = path.strip("/")
    return "" if path == "." else path
