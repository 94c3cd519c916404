"""The functions that build files may call: those of HCL's standard library that depend on their arguments alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from builder.hcl import MAX_TEXT, Function, number, text_of, truth
from layers.regex import Found, compile_pattern

_MAX_ITEMS = 10_000


def _format(pattern: str, *values: Any) -> str:
    """`%s %v %d %q %t %f %%` with widths, as in Go."""
    left = list(values)

    def one(match: re.Match[str]) -> str:
        if match[2] == "%":
            return "%"
        if not left:
            raise ValueError("too few values")
        value = left.pop(0)
        match match[2]:
            case "q":
                shown = json.dumps(text_of(value))
            case "d":
                return f"%{match[1]}d" % int(number(value))
            case "f":
                return f"%{match[1]}f" % float(number(value))
            case _:
                shown = text_of(value)
        return f"%{match[1]}s" % shown

    found = re.sub(r"%(-?0?\d{0,3}(?:\.\d{1,3})?)([svdqtf%])", one, pattern)
    if left:
        raise ValueError("too many values")
    return found


def _range(*limits: Any) -> list[int]:
    items = range(*(int(number(limit)) for limit in limits))
    if len(items) > _MAX_ITEMS:
        raise ValueError(f"more than {_MAX_ITEMS} numbers")
    return list(items)


def _flatten(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        found += _flatten(item) if isinstance(item, list) else [item]
    return found


def _coalesce(*values: Any) -> Any:
    return _first(value for value in values if value not in (None, ""))


def _first(values: Iterable[Any]) -> Any:
    for value in values:
        return value
    raise ValueError("none of the values has anything in it")


def _lookup(whole: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return whole.get(key, default)


def _index(whole: Any, wanted: Any) -> Any:
    return whole.index(wanted)


def _merge(*maps: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in maps:
        merged |= each
    return merged


def _substr(text: str, start: Any, length: Any) -> str:
    begin, count = int(number(start)), int(number(length))
    begin = max(len(text) + begin, 0) if begin < 0 else begin
    return text[begin:] if count < 0 else text[begin : begin + count]


def _regex_replace(text: str, pattern: str, by: str) -> str:
    _check_length((len(text) + 1) * len(by))  # an empty pattern is found everywhere

    def replaced(found: Found) -> str:
        def group(name: re.Match[str]) -> str:
            word = name[2] or name[1]
            number = int(word) if word.isdigit() and len(word) < 4 else found.names.get(word, -1)
            return found.groups[number] or "" if 0 <= number < len(found.groups) else ""

        return re.sub(r"\$(\d+|\{(\w+)\})", group, by)

    return compile_pattern(pattern).sub(replaced, text)


def _replace(text: str, old: str, new: str) -> str:
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _indent(count: Any, text: str) -> str:
    margin = " " * min(int(number(count)), 1000)
    return _replace(text, "\n", "\n" + margin)


def _join(separator: str, *lists: Iterable[Any]) -> str:
    texts = [text_of(item) for each in lists for item in each]
    _check_length(len(separator) * len(texts) + sum(map(len, texts)))
    return separator.join(texts)


def _check_length(characters: int) -> None:
    """Before a text is made that would not fit into memory. Raises: ValueError."""
    if characters > MAX_TEXT:
        raise ValueError(f"a text of more than {MAX_TEXT} characters")


def _trim(text: str, characters: str) -> str:
    return text.strip(characters)


FUNCTIONS: dict[str, Function] = {
    "abs": lambda value: abs(number(value)),
    "add": lambda a, b: number(a) + number(b),
    "and": lambda a, b: truth(a) and truth(b),
    "base64decode": lambda text: base64.b64decode(text, validate=True).decode(),
    "base64encode": lambda text: base64.b64encode(text.encode()).decode(),
    "basename": lambda path: path.rstrip("/").rpartition("/")[2] or "/",
    "chomp": lambda text: text.rstrip("\r\n"),
    "coalesce": _coalesce,
    "coalescelist": lambda *lists: _first(each for each in lists if each),
    "compact": lambda items: [item for item in items if item not in (None, "")],
    "concat": lambda *lists: [item for each in lists for item in each],
    "contains": lambda items, wanted: wanted in items,
    "dirname": lambda path: path.rpartition("/")[0] or ("/" if path.startswith("/") else "."),
    "distinct": lambda items: list(dict.fromkeys(items)),
    "divide": lambda a, b: number(a) / number(b),
    "element": lambda items, at: items[int(number(at)) % len(items)],
    "equal": lambda a, b: a == b,
    "flatten": _flatten,
    "format": _format,
    "greaterthan": lambda a, b: number(a) > number(b),
    "greaterthanorequalto": lambda a, b: number(a) >= number(b),
    "indent": _indent,
    "index": lambda whole, key: whole[key] if isinstance(whole, Mapping) else whole[int(number(key))],
    "indexof": _index,
    "int": lambda value: int(number(value)),
    "join": _join,
    "jsondecode": json.loads,
    "jsonencode": lambda value: json.dumps(value, separators=(",", ":")),
    "keys": sorted,
    "length": len,
    "lessthan": lambda a, b: number(a) < number(b),
    "lessthanorequalto": lambda a, b: number(a) <= number(b),
    "lookup": _lookup,
    "lower": lambda text: text.lower(),
    "max": lambda *values: max(map(number, values)),
    "md5": lambda text: hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(),
    "merge": _merge,
    "min": lambda *values: min(map(number, values)),
    "modulo": lambda a, b: number(a) % number(b),
    "multiply": lambda a, b: number(a) * number(b),
    "negate": lambda value: -number(value),
    "not": lambda value: not truth(value),
    "notequal": lambda a, b: a != b,
    "or": lambda a, b: truth(a) or truth(b),
    "parseint": lambda text, base: int(text, int(number(base))),
    "range": _range,
    "regex_replace": _regex_replace,
    "replace": _replace,
    "reverse": lambda text: text[::-1],
    "reverselist": lambda items: items[::-1],
    "sanitize": lambda text: re.sub(r"[^A-Za-z0-9_-]", "_", text),
    "sha1": lambda text: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(),
    "sha256": lambda text: hashlib.sha256(text.encode()).hexdigest(),
    "slice": lambda items, start, end: items[int(number(start)) : int(number(end))],
    "sort": sorted,
    "split": lambda separator, text: text.split(separator) if separator else list(text),
    "strlen": len,
    "substr": _substr,
    "subtract": lambda a, b: number(a) - number(b),
    "title": lambda text: re.sub(r"\b\w", lambda match: match[0].upper(), text),
    "trim": _trim,
    "trimprefix": lambda text, prefix: text.removeprefix(prefix),
    "trimspace": lambda text: text.strip(),
    "trimsuffix": lambda text, suffix: text.removesuffix(suffix),
    "upper": lambda text: text.upper(),
    "values": lambda whole: [whole[key] for key in sorted(whole)],
}
