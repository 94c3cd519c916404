"""The nearest right spelling of a wrong word, for error messages and lint findings."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, options: Iterable[str], *, match_case: bool = False) -> str | None:
    """The option that `word` was most likely meant to be; None if none is near or it is one already.

    An edit is an insertion, deletion, substitution or a swap of neighbours; one is allowed in a short
    word, two from four letters on, three from nine. Ties go to the first option.
    """
    wanted = word if match_case else word.lower()
    if not 0 < len(wanted) <= 64:
        return None
    allowed = 1 + (len(wanted) >= 4) + (len(wanted) >= 9)
    best: str | None = None
    for option in options:
        candidate = option if match_case else option.lower()
        if candidate == wanted:
            return None
        if abs(len(candidate) - len(wanted)) > allowed:
            continue
        distance = _distance(wanted, candidate)
        if distance <= allowed and distance < max(len(wanted), len(candidate)):
            best, allowed = option, distance - 1
            if not allowed:
                return best
    return best


def did_you_mean(word: str, options: Iterable[str], *, match_case: bool = False) -> str:
    """` (did you mean X?)`, or nothing."""
    found = nearest(word, options, match_case=match_case)
    return f" (did you mean {found}?)" if found else ""


def _distance(a: str, b: str) -> int:
    """Optimal string alignment distance."""
    above: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, above, row = above, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
    return row[-1]
