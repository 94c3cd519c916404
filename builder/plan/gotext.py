"""Texts as Go's fmt writes them: the history of an image is BuildKit's word for word."""

from __future__ import annotations

from collections.abc import Iterable

_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v",
}  # fmt: skip


def go_quoted(words: Iterable[str]) -> str:
    """`%q` of a list of strings: `["a" "b"]`."""
    return "[" + " ".join([f'"{_escaped(word)}"' for word in words]) + "]"


def _escaped(word: str) -> str:
    if word.isascii() and word.isprintable() and '"' not in word and "\\" not in word:
        return word
    return "".join([_ESCAPES.get(c) or _character(c) for c in word])


def _character(c: str) -> str:
    code = ord(c)
    if c.isprintable():
        return c
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the file that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def go_duration(ns: int) -> str:
    """A time.Duration: `1h0m30s`, `1.5s`, `300ms`, `0s`."""
    if ns == 0:
        return "0s"
    if ns < 1_000_000_000:
        unit, name = next((u, n) for u, n in ((1_000_000, "ms"), (1000, "µs"), (1, "ns")) if ns >= u)
        return _decimal(ns, unit) + name
    seconds, below = divmod(ns, 60_000_000_000)
    text = _decimal(below, 1_000_000_000) + "s"
    hours, minutes = divmod(seconds, 60)
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _decimal(value: int, unit: int) -> str:
    whole, rest = divmod(value, unit)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
