"""`--format`: the part of Go's text/template that people use with docker's commands.

    {{.Field.Inner}}  {{json .}}  {{json .Field}}  {{index .Labels "key"}}  {{len .X}}  {{join .X ", "}}
    {{lower .X}} {{upper .X}} {{title .X}}  {{range .X}}…{{.}}…{{end}}  {{if .X}}…{{else}}…{{end}}  {{println .}}

Values are what JSON can hold. A format that begins with `table ` gets a heading and aligned columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from builder.errors import UsageError

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r"\"(?:[^\"\\]|\\.)*\"|`[^`]*`|[^\s\"`]+")
_ESCAPES = {"\\t": "\t", "\\n": "\n", "\\\\": "\\", '\\"': '"'}
_MAX_DEPTH = 16


class _Text(str):
    __slots__ = ()


class _Action(str):
    __slots__ = ()


def render(template: str, value: Any) -> str:
    """Fill in a template. Raises: UsageError for what is not understood, or a field that is not there."""
    parts = _split(template)
    try:
        position, output = _block(parts, 0, value, 0)
    except (TypeError, ValueError) as e:
        raise UsageError(f"--format: a function got a value that it cannot use: {e}") from e
    if position != len(parts):
        raise UsageError(f"--format: {{{{{parts[position]}}}}} has no beginning")
    return output


def print_formatted(template: str, values: Iterable[Mapping[str, Any]]) -> None:
    """One line for each value; `json` prints each as JSON, `table …` a table with the fields' names above."""
    if template == "json":
        template = "{{json .}}"
    if not template.startswith("table "):
        for value in values:
            print(render(template, value))
        return
    from builder.cli.images import print_table

    text = template.removeprefix("table ").strip()
    head = [_ACTION.sub(lambda m: m[2].rpartition(".")[2].upper(), column) for column in _columns(text)]
    rows = [[render(column, value) for column in _columns(text)] for value in values]
    print_table([head, *rows])


def _columns(text: str) -> list[str]:
    return text.replace("\\t", "\t").split("\t")


def _split(template: str) -> list[_Text | _Action]:
    parts: list[_Text | _Action] = []
    position = 0
    trim = False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        if trim:
            text = text.lstrip()
        if match[1]:
            text = text.rstrip()
        parts += [_Text(_unescaped(text)), _Action(match[2])]
        trim, position = bool(match[3]), match.end()
    rest = template[position:]
    if "{{" in rest:
        raise UsageError(f"--format: an action is not closed in {template!r}")
    parts.append(_Text(_unescaped(rest.lstrip() if trim else rest)))
    return parts


def _unescaped(text: str) -> str:
    # Shells pass \t and \n as two characters each; docker takes them for what they mean.
    return re.sub(r"\\[tn]", lambda m: _ESCAPES[m[0]], text)


def _block(parts: Sequence[_Text | _Action], position: int, value: Any, depth: int) -> tuple[int, str]:
    """What the parts give up to the end of the block; the position of its `end` or `else`."""
    if depth > _MAX_DEPTH:
        raise UsageError("--format: blocks are nested too deeply")
    output: list[str] = []
    while position < len(parts):
        part = parts[position]
        if isinstance(part, _Text):
            output.append(part)
            position += 1
            continue
        keyword, _, rest = part.partition(" ")
        if keyword in {"end", "else"}:
            break
        if keyword in {"range", "if", "with"}:
            position, text = _nested(parts, position, keyword, rest, value, depth)
            output.append(text)
            continue
        output.append(_shown(_evaluate(part, value)))
        position += 1
    return position, "".join(output)


def _nested(
    parts: Sequence[_Text | _Action], position: int, keyword: str, rest: str, value: Any, depth: int
) -> tuple[int, str]:
    found = _evaluate(rest, value)
    items: list[Any]
    if keyword == "range":
        items = list(found.values()) if isinstance(found, Mapping) else list(found or ())
    else:
        items = [found if keyword == "with" else value] if found else []
    # Both branches are walked, to find where they end; what is not chosen is not evaluated.
    first = position + 1
    end = _end_of(parts, first)
    output = "".join(_block(parts[: end[0]], first, item, depth + 1)[1] for item in items)
    if not items and end[0] != end[1]:
        output = _block(parts[: end[1]], end[0] + 1, value, depth + 1)[1]
    return end[1] + 1, output


def _end_of(parts: Sequence[_Text | _Action], position: int) -> tuple[int, int]:
    """Where a block's `else` (or its `end`) and its `end` are."""
    depth, middle = 0, -1
    for index in range(position, len(parts)):
        part = parts[index]
        if isinstance(part, _Text):
            continue
        keyword = part.partition(" ")[0]
        if keyword in {"range", "if", "with"}:
            depth += 1
        elif keyword == "else" and depth == 0:
            middle = index
        elif keyword == "end":
            if depth == 0:
                return (index if middle < 0 else middle), index
            depth -= 1
    raise UsageError("--format: a block lacks its {{end}}")


def _evaluate(action: str, value: Any) -> Any:
    piped: list[Any] = []
    for stage in action.split("|"):
        words = _WORD.findall(stage)
        if not words:
            raise UsageError(f"--format: {{{{{action}}}}} is empty")
        piped = [_call(words, value, piped)]
    return piped[0]


def _call(words: list[str], value: Any, piped: list[Any]) -> Any:
    if words[0][0] in '.$"`':
        return _operand(words[0], value)
    arguments = [_operand(word, value) for word in words[1:]] + piped
    name = words[0]
    if not arguments:
        raise UsageError(f"--format: {name} lacks an argument, or is no field: fields begin with a dot")
    first = arguments[0]
    match name:
        case "json":
            return json.dumps(first, ensure_ascii=False, separators=(",", ":"))
        case "len":
            return len(first)
        case "index":
            for key in arguments[1:]:
                first = _field(first, int(key) if isinstance(first, list) else str(key), missing_is_empty=True)
            return first
        case "join":
            return str(arguments[1] if len(arguments) > 1 else "").join(map(_shown, first or ()))
        case "lower" | "upper" | "title":
            return str(getattr(str(first), name)())
        case "print" | "println":
            return " ".join(map(_shown, arguments)) + ("\n" if name == "println" else "")
        case _:
            raise UsageError(
                f"--format: unknown function {name!r}", hint="there are json, len, index, join, lower, upper, title"
            )


def _operand(word: str, value: Any) -> Any:
    if word[0] in '"`':
        return re.sub(r"\\[tn\"\\]", lambda m: _ESCAPES[m[0]], word[1:-1]) if word[0] == '"' else word[1:-1]
    if word.isdigit():
        return int(word)
    if word[0] not in ".$":
        raise UsageError(f"--format: {word!r} is no field: fields begin with a dot")
    for key in word.lstrip("$").strip(".").split("."):
        if key:
            value = _field(value, key)
    return value


def _field(value: Any, key: str | int, *, missing_is_empty: bool = False) -> Any:
    """A member, whatever the case of its first letters: docker's names and those of our JSON both serve."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        folded = str(key).lower()
        for name, member in value.items():
            if str(name).lower() == folded:
                return member
        if missing_is_empty:
            return ""
        raise UsageError(f"--format: there is no field {key!r}", hint="there are: " + ", ".join(map(str, value)))
    if isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    raise UsageError(f"--format: no {key!r} in {type(value).__name__}")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + " ".join(map(_shown, value)) + "]"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{k}:{_shown(v)}" for k, v in sorted(value.items())) + "]"
    return str(value)
