"""Go's notation of durations, which HEALTHCHECK uses: `1h30m`, `1.5s`, `250ms`."""

from __future__ import annotations

import re

from builder.errors import ParseError

_UNITS = {"ns": 1, "us": 10**3, "\xb5s": 10**3, "\u03bcs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9,
          "h": 3600 * 10**9}  # fmt: skip
_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
_MAX_NS = (1 << 63) - 1


def parse_duration(text: str) -> int:
    """Nanoseconds. Raises: ParseError without a place."""
    body = text[1:] if text[:1] in ("+", "-") else text
    total = at = 0
    if body == "0":
        return 0
    while at < len(body):
        part = _PART.match(body, at)
        if part is None or not (part[1] or part[2]) or len(part[1]) > 19:
            break
        unit = _UNITS[part[3]]
        fraction = (part[2] or "")[:18]
        total += int(part[1] or "0") * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
        at = part.end()
    if not body or at < len(body) or total > _MAX_NS:
        raise ParseError(f'invalid duration "{text}"', hint="a number with a unit, such as 30s, 1m30s or 500ms")
    return -total if text.startswith("-") else total
