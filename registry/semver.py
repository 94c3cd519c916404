"""Versions in tags, and ranges of them, as skopeo's `images-by-semver` understands them. Pure.

    1.2.3, v1.2, 2-rc.1          a version; what is missing is 0
    >=1.2 <2, 1.2.x || ^3        comparisons, all of them (space or comma) or any of them (||)
    1.2 - 1.4.5                  from, to
    ~1.2.3, ^1.2.3               the same minor, the same major
    1.*, 1.x, 1                  a part left open

A pre-release fits only where the comparison names one, too.

Spec: https://semver.org/spec/v2.0.0.html, with the ranges of Masterminds/semver
"""

from __future__ import annotations

import re

from layers.values import NamedTuple
from registry.errors import ConfigError, printable

_MAX_CHARS = 500
_NUMBER = r"[0-9]{1,18}"
_SUFFIX = r"(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
_VERSION = re.compile(rf"v?({_NUMBER})(?:\.({_NUMBER}))?(?:\.({_NUMBER}))?{_SUFFIX}")
_OPEN = rf"(?:{_NUMBER}|[xX*])"
_BOUND = rf"v?({_OPEN})(?:\.({_OPEN}))?(?:\.({_OPEN}))?{_SUFFIX}"
_COMPARISON = re.compile(rf"\s*(!=|>=|=>|<=|=<|~>|[=<>~^]|)\s*{_BOUND}(?:\s*,\s*|\s+|$)")
_FROM_TO = re.compile(r"(\S+)\s+-\s+(\S+)")
_SAME = {"=>": ">=", "=<": "<=", "~>": "~", "": "="}


class Version(NamedTuple):
    """A version; build metadata, which has no order, is dropped."""

    major: int
    minor: int = 0
    patch: int = 0
    prerelease: str = ""

    @classmethod
    def parse(cls, text: str) -> Version | None:
        """The version that a tag is; None for any other tag."""
        match = _VERSION.fullmatch(text)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2] or 0), int(match[3] or 0), match[4] or "")

    @property
    def order(self) -> tuple[object, ...]:
        """What versions are compared by: a release comes after its pre-releases, numbers come before words."""
        words = [(0, int(w), "") if w.isdigit() else (1, 0, w) for w in self.prerelease.split(".") if w]
        return self.major, self.minor, self.patch, not words, words


class _Comparison(NamedTuple):
    """One condition; `given` is how many parts its version names."""

    operator: str
    version: Version
    given: int

    def fits(self, found: Version) -> bool:
        if found.prerelease and not self.version.prerelease and not (self.operator == "!=" and self.given == 3):
            return False
        if self.given == 0:
            return self.operator != "!="
        wanted = self.version
        # What is left open is equal: 1.2 is all of 1.2.x.
        here, there = found[: self.given], wanted[: self.given]
        whole = self.given == 3
        match self.operator:
            case "=":
                return found.order == wanted.order if whole else here == there and found.order >= wanted.order
            case "!=":
                return found.order != wanted.order if whole else here != there
            case ">":
                return found.order > wanted.order if whole else here > there
            case "<=":
                return found.order <= wanted.order if whole else here <= there
            case ">=":
                return found.order >= wanted.order
            case "<":
                return found.order < wanted.order
            case "~":
                parts = min(self.given, 2)
            case _:
                parts = self._caret_parts()
        return found.order >= wanted.order and found[:parts] == wanted[:parts]

    def _caret_parts(self) -> int:
        """How many parts must be the same: up to the first that is not 0, or the last that is given."""
        leading = next((n for n, part in enumerate(self.version[:3], 1) if part), 3)
        return min(leading, self.given)


class VersionRange(NamedTuple):
    """Alternatives, each of conditions that must all hold."""

    text: str
    alternatives: tuple[tuple[_Comparison, ...], ...]

    @classmethod
    def parse(cls, text: str) -> VersionRange:
        """Raises: ConfigError."""
        if len(text) > _MAX_CHARS:
            raise ConfigError(f"a range of versions is longer than {_MAX_CHARS} characters")
        return cls(text, tuple(tuple(_conditions(part, text)) for part in text.split("||")))

    def fits(self, tag: str) -> bool:
        """Whether the tag is a version in the range."""
        version = Version.parse(tag)
        return version is not None and any(all(c.fits(version) for c in part) for part in self.alternatives)


def _conditions(part: str, whole: str) -> list[_Comparison]:
    rest = _FROM_TO.sub(r">=\1 <=\2", part.strip())
    if not rest:
        return [_Comparison(">=", Version(0), 0)]
    found = []
    while rest:
        match = _COMPARISON.match(rest)
        if match is None:
            raise ConfigError(
                f"{printable(whole, 80)!r} is not a range of versions", hint="such as '>=1.2 <2' or '~1.4 || ^2.1'"
            )
        operator, *numbers = match.groups()[:4]
        given = next((n for n, text in enumerate(numbers) if text is None or not text.isdigit()), 3)
        parts = [int(text) for text in numbers[:given]] + [0] * (3 - given)
        version = Version(parts[0], parts[1], parts[2], match[5] or "")
        found.append(_Comparison(_SAME.get(operator, operator), version, given))
        rest = rest[match.end() :]
    return found
