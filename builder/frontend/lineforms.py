"""How each instruction's line divides into arguments: JSON arrays, name=value pairs, words, one string.

Called by `parser` alone. Nothing is expanded here, and quotes stay where the instruction's own
expansion will want them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from builder.errors import ParseError
from builder.frontend.words import GO_SPACE

BLANKS = re.compile("[\t\v\f\r ]+")

Arguments = tuple[tuple[str, ...], bool]
"""The arguments, and whether they came as a JSON array."""


class NotStrings(ParseError):
    """A JSON array of something other than strings: an error, where other bad JSON means the shell form."""


def split_command(line: str) -> tuple[str, tuple[str, ...], str]:
    """The instruction's keyword as written, its `--flags`, and the rest of the line."""
    parts = BLANKS.split(line.strip(GO_SPACE), maxsplit=1)
    if len(parts) == 1:
        return parts[0], (), ""
    if not parts[1].lstrip(GO_SPACE).startswith("--"):
        return parts[0], (), parts[1].strip(GO_SPACE)
    flags, rest = _flags(parts[1])
    return parts[0], tuple(flags), rest.strip(GO_SPACE)


def _flags(line: str) -> tuple[list[str], str]:
    """Leading words that begin with `--`, unquoted; `--` alone ends them."""
    flags: list[str] = []
    at, size = 0, len(line)
    while True:
        while at < size and line[at] in GO_SPACE:
            at += 1
        if not line.startswith("--", at):
            return flags, line[at:]
        word: list[str] = []
        quote, quoted = "", False
        while at < size and (quote or line[at] not in GO_SPACE):
            ch = line[at]
            at += 1
            if ch == quote:
                quote = ""
            elif not quote and ch in "'\"":
                quote, quoted = ch, True
            elif ch != "\\":
                word.append(ch)
            elif at < size:
                word.append(line[at])
                at += 1
        flag = "".join(word)
        if flag == "--" and (at < size or not quoted):
            return flags, line[at:]
        if flag or quoted:
            flags.append(flag)


def split_words(rest: str, escape: str) -> list[str]:
    """Words divided by white space outside quotes; quotes and escapes are kept in them."""
    words: list[str] = []
    word: list[str] = []
    quote, blank_ok = "", False
    special = re.compile(rf"""[^'"{re.escape(escape)}{GO_SPACE}]+""")
    at, size = 0, len(rest)
    while at < size:
        ch = rest[at]
        if plain := special.match(rest, at):
            word.append(plain.group())
            at = plain.end()
            continue
        at += 1
        if not quote and ch in GO_SPACE:
            if word or blank_ok:
                words.append("".join(word))
            word.clear()
            blank_ok = False
            continue
        if not quote and ch in "'\"":
            quote, blank_ok = ch, True
        elif ch == quote:
            quote = ""
        elif ch == escape and quote != "'":
            if at == size:
                quote = ""
                break  # an escape as the last character is dropped
            word.append(ch)
            ch = rest[at]
            at += 1
        word.append(ch)
    if word or blank_ok:
        words.append("".join(word))
    return words


def _ignored(rest: str, escape: str) -> Arguments:
    return ("",), False


def _string(rest: str, escape: str) -> Arguments:
    return ((rest,) if rest else ()), False


def _blank_delimited(rest: str, escape: str) -> Arguments:
    return (tuple(BLANKS.split(rest)) if rest else ()), False


def _names(rest: str, escape: str) -> Arguments:
    return tuple(split_words(rest, escape)), False


def _pairs(keyword: str) -> Callable[[str, str], Arguments]:
    def parse(rest: str, escape: str) -> Arguments:
        words = split_words(rest, escape)
        if not words:
            return (), False
        if "=" not in words[0]:
            parts = BLANKS.split(rest, maxsplit=1)
            if len(parts) < 2:
                raise ParseError(f"{keyword} must have two arguments")
            return (parts[0], parts[1], ""), False
        triples: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise ParseError(
                    f'Syntax error - can\'t find = in "{word}". Must be of the form: name=value',
                    hint="quote a value that has spaces",
                )
            triples += (name, value, "=")
        return tuple(triples), False

    return parse


def _json(rest: str) -> tuple[str, ...] | None:
    """The strings of a JSON array; None if it is no JSON array. Raises: NotStrings."""
    rest = rest.lstrip(GO_SPACE)
    if not rest.startswith("["):
        return None
    import json

    try:
        value = json.loads(rest, parse_constant=_no_json, parse_float=_finite, parse_int=_finite)
    except RecursionError:
        raise NotStrings("when using JSON array syntax, arrays must be comprised of strings only") from None
    except ValueError:
        return None
    if not all(isinstance(item, str) for item in value):
        raise NotStrings("when using JSON array syntax, arrays must be comprised of strings only")
    return tuple([_without_halves(item, rest) for item in value]) if "\\u" in rest else tuple(value)


def _without_halves(text: str, source: str) -> str:
    """Go puts U+FFFD for half a surrogate pair (`\\uD800`). What the file has itself is a raw byte, and stays."""
    if text.isascii():
        return text
    return "".join(["\ufffd" if "\ud800" <= c <= "\udfff" and c not in source else c for c in text])


def _no_json(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _finite(number: str) -> None:
    """Go refuses a number that no float64 holds; the array is then read as a shell command."""
    if len(number) > 300 and abs(float(number)) == float("inf"):
        raise ValueError("number out of range")


def _maybe_json(rest: str, escape: str) -> Arguments:
    strings = _json(rest) if rest else None
    return _string(rest, escape) if strings is None else (strings, True)


def _maybe_json_list(rest: str, escape: str) -> Arguments:
    strings = _json(rest)
    return _blank_delimited(rest, escape) if strings is None else (strings, True)


def _health(rest: str, escape: str) -> Arguments:
    if not rest:
        return (), False
    kind = rest.split(maxsplit=1)
    command, as_json = _maybe_json(kind[1] if len(kind) > 1 else "", escape)
    return (kind[0], *command), as_json


FORMS: dict[str, Callable[[str, str], Arguments]] = {
    "add": _maybe_json_list,
    "arg": _names,
    "cmd": _maybe_json,
    "copy": _maybe_json_list,
    "entrypoint": _maybe_json,
    "env": _pairs("ENV"),
    "expose": _blank_delimited,
    "from": _blank_delimited,
    "healthcheck": _health,
    "label": _pairs("LABEL"),
    "maintainer": _string,
    "run": _maybe_json,
    "shell": _maybe_json,
    "stopsignal": _string,
    "user": _string,
    "volume": _maybe_json_list,
    "workdir": _string,
}


def arguments_of(keyword: str, rest: str, escape: str) -> Arguments:
    """The arguments of an instruction whose lower-case keyword is given. Raises: ParseError without a place."""
    return FORMS.get(keyword, _ignored)(rest, escape)
