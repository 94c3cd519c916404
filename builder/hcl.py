"""HCL's native syntax, as far as build files need it: bodies of attributes and blocks, and expressions.

Expressions have literals, templates, heredocs, lists, maps, operators, conditionals, `for`, indices and
function calls. They are parsed into functions of a scope, so that a matrix can evaluate one many times.
No expression can reach anything but its scope. Spec: github.com/hashicorp/hcl/blob/main/hclsyntax/spec.md
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from layers.values import NamedTuple

Scope = Mapping[str, Any]
Expression = Callable[[Scope], Any]
Function = Callable[..., Any]

_MAX_DEPTH = 200
MAX_TEXT = 1 << 20
_MAX_ITEMS = 100_000
_MAX_BITS = 4096
_MAX_TURNS = 200_000
_MAX_SECONDS = 20
_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*|//[^\n]*|/\*.*?\*/)
    |(?P<newline>\n)
    |(?P<heredoc><<-?[A-Za-z_][\w-]*\n)
    |(?P<name>[A-Za-z_][\w-]*)
    |(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<quote>")
    |(?P<sign>\.\.\.|=>|==|!=|<=|>=|&&|\|\||[-+*/%!<>=?:.,(){}\[\]])""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_OPERATORS = (("||",), ("&&",), ("==", "!="), ("<", "<=", ">", ">="), ("+", "-"), ("*", "/", "%"))


class Block(NamedTuple):
    """`type "label" { … }`."""

    type: str
    labels: tuple[str, ...]
    body: Body


class Body(NamedTuple):
    """What a file or a block holds."""

    attributes: dict[str, Expression]
    blocks: list[Block]


class _Library:
    """The functions of a file, and what its evaluation may still take: turns of `for`s and calls, and time."""

    def __init__(self, known: Mapping[str, Function]) -> None:
        self.known = known
        self._turns = 0
        self._until = time.process_time() + _MAX_SECONDS

    def turn(self) -> None:
        """Raises: ValueError for a file that would go on and on: three `for`s in one another suffice for years."""
        self._turns += 1
        if self._turns > _MAX_TURNS or time.process_time() > self._until:
            raise ValueError(f"it takes more than {_MAX_TURNS} steps, or {_MAX_SECONDS} s, to evaluate")

    def each(self, names: list[str], source: Expression, keep: Expression | None, scope: Scope) -> Iterator[Scope]:
        """The scopes of a `for`."""
        values = source(scope)
        for key, value in list(values.items()) if isinstance(values, Mapping) else list(enumerate(values)):
            self.turn()
            inner = {**scope, names[-1]: value, **({names[0]: key} if len(names) == 2 else {})}
            if keep is None or truth(keep(inner)):
                yield inner


class _Token(NamedTuple):
    kind: str
    value: Any
    line: int


def parse_hcl(text: str, functions: Mapping[str, Function]) -> Body:
    """A file's body. `functions` may be called in it, and may grow until it is evaluated.

    Raises: ValueError naming the line.
    """
    library = _Library(functions)
    parser = _Parser(_tokens(text, library, 1), library)
    body = parser.body("end")
    parser.take("end")
    return body


def _tokens(text: str, functions: _Library, line: int) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: unexpected {text[at]!r}")
        kind = str(match.lastgroup)
        at = match.end()
        if kind == "quote":
            template, at = _template(text, at, '"', functions, line)
            found.append(_Token("template", template, line))
        elif kind == "heredoc":
            template, at = _heredoc(text, match[0], at, functions, line)
            found += [_Token("template", template, line), _Token("newline", "\n", line)]
        elif kind == "number":
            found.append(_Token(kind, float(match[0]) if re.search("[.eE]", match[0]) else int(match[0]), line))
        elif kind != "skip":
            found.append(_Token(kind, match[0], line))
        line += text.count("\n", match.start(), at)
    found.append(_Token("end", "the end", line))
    return found


def _heredoc(text: str, opening: str, at: int, functions: _Library, line: int) -> tuple[Expression, int]:
    mark = opening.strip().lstrip("<-")
    end = re.compile(rf"^[ \t]*{re.escape(mark)}[ \t\r]*$", re.MULTILINE).search(text, at)
    if end is None:
        raise ValueError(f"line {line}: the heredoc {mark} has no end")
    content = text[at : end.start()]
    if opening.startswith("<<-"):
        lines = content.split("\n")
        margin = min((len(row) - len(row.lstrip()) for row in lines if row.strip()), default=0)
        content = "\n".join(row[margin:] for row in lines)
    template, _ = _template(content, 0, "", functions, line)
    return template, min(end.end() + 1, len(text))


def _template(text: str, at: int, end: str, functions: _Library, line: int) -> tuple[Expression, int]:
    """The parts of a text up to `end`, with what stands in `${…}` evaluated."""
    parts: list[str | Expression] = []
    plain: list[str] = []
    while True:
        if at >= len(text):
            if end:
                raise ValueError(f"line {line}: a text has no end")
            break
        two = text[at : at + 2]
        if end and text[at] == end:
            at += 1
            break
        if end and text[at] == "\n":
            raise ValueError(f"line {line}: a text has no end")
        if text[at : at + 3] in {"$${", "%%{"}:
            plain.append(text[at + 1 : at + 3])
            at += 3
        elif two == "%{":
            raise ValueError(f"line {line}: %{{…}} in texts is not possible")
        elif two == "${":
            inner, at = _interpolation(text, at + 2, functions, line)
            parts += ["".join(plain), inner]
            plain = []
        elif end and text[at] == "\\":
            word, at = _escape(text, at, line)
            plain.append(word)
        else:
            plain.append(text[at])
            at += 1
    parts.append("".join(plain))
    pieces = [part for part in parts if part != ""]
    if len(pieces) == 1 and not isinstance(pieces[0], str):
        return pieces[0], at
    return lambda scope: bounded("".join(p if isinstance(p, str) else text_of(p(scope)) for p in pieces)), at


def _escape(text: str, at: int, line: int) -> tuple[str, int]:
    letter = text[at + 1 : at + 2]
    if letter in _ESCAPES:
        return _ESCAPES[letter], at + 2
    digits = {"u": 4, "U": 8}.get(letter, 0)
    word = text[at + 2 : at + 2 + digits]
    if not digits or not re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", word) or int(word, 16) > 0x10FFFF:
        raise ValueError(f"line {line}: unknown escape \\{letter}")
    return chr(int(word, 16)), at + 2 + digits


def _interpolation(text: str, at: int, functions: _Library, line: int) -> tuple[Expression, int]:
    """An expression up to its `}`: braces and texts in it are counted."""
    start, depth = at, 1
    while depth:
        match = re.compile(r'"(?:\\.|[^"\\])*"|[{}]').search(text, at)
        if match is None:
            raise ValueError(f"line {line}: ${{ has no end")
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        at = match.end()
    parser = _Parser(_tokens(text[start : at - 1].strip("~"), functions, line), functions)
    inner = parser.expression()
    parser.skip_newlines()
    parser.take("end")
    return inner, at


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: list[_Token], functions: _Library) -> None:
        self._tokens = tokens
        self._functions = functions
        self._at = 0
        self._depth = 0

    def body(self, end: str) -> Body:
        body = Body({}, [])
        while True:
            self.skip_newlines()
            if self._peek().value == end or self._peek().kind == "end":
                return body
            name = self.take("name")
            if self._accept("="):
                if name in body.attributes:
                    raise self._error(f"{name} is set twice")
                body.attributes[name] = self.expression()
            else:
                labels: list[str] = []
                while self._peek().kind in {"name", "template"}:
                    token = self._next()
                    labels.append(token.value if token.kind == "name" else text_of(token.value({})))
                self.take("sign", "{")
                inner = self._nested(lambda: self.body("}"))
                self.take("sign", "}")
                body.blocks.append(Block(name, tuple(labels), inner))
            if self._peek().kind not in {"newline", "end"} and self._peek().value != end:
                raise self._error(f"unexpected {self._peek().value!r}")

    def expression(self) -> Expression:
        condition: Expression = self._nested(lambda: self._binary(0))
        if not self._accept("?"):
            return condition
        first = self.expression()
        self.take("sign", ":")
        second = self.expression()
        return lambda scope: first(scope) if truth(condition(scope)) else second(scope)

    def _binary(self, level: int) -> Expression:
        if level == len(_OPERATORS):
            return self._unary()
        left = self._binary(level + 1)
        while self._peek().kind == "sign" and self._peek().value in _OPERATORS[level]:
            operator = self._next().value
            left = _operation(operator, left, self._binary(level + 1))
        return left

    def _unary(self) -> Expression:
        if self._accept("!"):
            inner = self._nested(self._unary)
            return lambda scope: not truth(inner(scope))
        if self._accept("-"):
            inner = self._nested(self._unary)
            return lambda scope: -number(inner(scope))
        return self._postfix(self._primary())

    def _postfix(self, value: Expression) -> Expression:
        while True:
            if self._accept("."):
                token = self._next()
                if token.kind not in {"name", "number"}:
                    raise self._error(f"unexpected {token.value!r}")
                value = _indexed(value, lambda _scope, key=token.value: key)  # type: ignore[misc]
            elif self._accept("["):
                key = self.expression()
                self.take("sign", "]")
                value = _indexed(value, key)
            else:
                return value

    def _primary(self) -> Expression:
        token = self._next()
        if token.kind == "template":
            made: Expression = token.value
            return made
        if token.kind == "number":
            return lambda _scope: token.value
        if token.kind == "name":
            return self._name(token.value)
        if token.value == "(":
            inner = self._spanning(self.expression)
            self.take("sign", ")")
            return inner
        if token.value == "[":
            return self._list()
        if token.value == "{":
            return self._map()
        raise self._error(f"unexpected {token.value!r}")

    def _name(self, name: str) -> Expression:
        if name in {"true", "false", "null"}:
            constant = {"true": True, "false": False, "null": None}[name]
            return lambda _scope: constant
        if not self._accept("("):
            return lambda scope: _looked_up(scope, name)
        arguments: list[tuple[Expression, bool]] = []
        while not self._accept(")", over_lines=True):
            value = self.expression()
            arguments.append((value, self._accept("...")))
            if not self._accept(",", over_lines=True):
                self.skip_newlines()
                self.take("sign", ")")
                break
        functions = self._functions

        def call(scope: Scope) -> Any:
            function = functions.known.get(name)
            functions.turn()
            if function is None:
                raise ValueError(f"there is no function {name}")
            values: list[Any] = []
            for value, spread in arguments:
                values += value(scope) if spread else [value(scope)]
            try:
                return bounded(function(*bounded(values)))
            except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
                raise ValueError(f"{name}(): {e}") from e

        return call

    def _list(self) -> Expression:
        self.skip_newlines()
        if self._accept_for():
            names, source = self._for_head()
            value = self.expression()
            keep = self._for_tail("]")
            return lambda scope: [value(inner) for inner in self._functions.each(names, source, keep, scope)]
        items: list[Expression] = []
        while not self._accept("]", over_lines=True):
            items.append(self.expression())
            if not self._accept(",", over_lines=True):
                self.skip_newlines()
                self.take("sign", "]")
                break
        return lambda scope: [item(scope) for item in items]

    def _map(self) -> Expression:
        self.skip_newlines()
        if self._accept_for():
            names, source = self._for_head()
            key = self.expression()
            self.take("sign", "=>")
            value = self.expression()
            keep = self._for_tail("}")
            each = self._functions.each
            return lambda scope: {text_of(key(s)): value(s) for s in each(names, source, keep, scope)}
        pairs: list[tuple[Expression, Expression]] = []
        while not self._accept("}", over_lines=True):
            token = self._peek()
            follows = self._tokens[self._at + 1].value
            if token.kind == "name" and follows in {"=", ":"}:
                self._next()
                key = lambda _scope, name=token.value: name  # type: ignore[misc]  # noqa: E731
            else:
                key = self.expression()
            if not self._accept("="):
                self.take("sign", ":")
            pairs.append((key, self.expression()))
            self._accept(",")
            self.skip_newlines()
        return lambda scope: {text_of(key(scope)): value(scope) for key, value in pairs}

    def _accept_for(self) -> bool:
        token = self._peek()
        if token.kind == "name" and token.value == "for" and self._tokens[self._at + 1].kind == "name":
            self._next()
            return True
        return False

    def _for_head(self) -> tuple[list[str], Expression]:
        names = [self.take("name")]
        if self._accept(","):
            names.append(self.take("name"))
        if self.take("name") != "in":
            raise self._error("a for has no in")
        source = self.expression()
        self.take("sign", ":")
        self.skip_newlines()
        return names, source

    def _for_tail(self, end: str) -> Expression | None:
        keep = None
        self.skip_newlines()
        if self._peek().kind == "name" and self._peek().value == "if":
            self._next()
            keep = self.expression()
        self.skip_newlines()
        self.take("sign", end)
        return keep

    # Tokens

    def skip_newlines(self) -> None:
        while self._peek().kind == "newline":
            self._at += 1

    def take(self, kind: str, value: str | None = None) -> str:
        """The next token, which has to be this. Raises: ValueError."""
        token = self._next()
        if token.kind != kind or (value is not None and token.value != value):
            raise ValueError(f"line {token.line}: expected {value or kind}, not {token.value!r}")
        return str(token.value)

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _accept(self, sign: str, *, over_lines: bool = False) -> bool:
        at = self._at
        if over_lines:
            self.skip_newlines()
        if self._peek().kind == "sign" and self._peek().value == sign:
            self._at += 1
            return True
        self._at = at
        if over_lines:
            self.skip_newlines()
        return False

    def _spanning(self, parse: Callable[[], Expression]) -> Expression:
        self.skip_newlines()
        found = parse()
        self.skip_newlines()
        return found

    def _nested(self, parse: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error("nested too deeply")
        try:
            return parse()
        finally:
            self._depth -= 1

    def _error(self, words: str) -> ValueError:
        return ValueError(f"line {self._peek().line}: {words}")


def _looked_up(scope: Scope, name: str) -> Any:
    if name not in scope:
        raise ValueError(f"there is no variable {name}")
    return scope[name]


def _indexed(value: Expression, key: Expression) -> Expression:
    def get(scope: Scope) -> Any:
        whole, index = value(scope), key(scope)
        try:
            return whole[index] if isinstance(whole, Mapping) else whole[int(index)]
        except (LookupError, TypeError, ValueError) as e:
            raise ValueError(f"there is no {index!r} in it") from e

    return get


def _operation(operator: str, left: Expression, right: Expression) -> Expression:
    def apply(scope: Scope) -> Any:
        a = left(scope)
        match operator:
            case "||":
                return truth(a) or truth(right(scope))
            case "&&":
                return truth(a) and truth(right(scope))
            case "==":
                return a == right(scope)
            case "!=":
                return a != right(scope)
        x, y = number(a), number(right(scope))
        match operator:
            case "<":
                return x < y
            case "<=":
                return x <= y
            case ">":
                return x > y
            case ">=":
                return x >= y
            case "+":
                return x + y
            case "-":
                return x - y
            case "*":
                return bounded(x * y)
        if y == 0:
            raise ValueError("a division by zero")
        if operator == "%":
            return x % y
        return x // y if isinstance(x, int) and isinstance(y, int) and x % y == 0 else x / y

    return apply


# Values


def bounded(value: Any) -> Any:
    """The value, if it is of a size that a build file has use for: a few lines may double one forty times.

    Raises: ValueError.
    """
    _written_size(value, {})
    return value


def _written_size(value: Any, known: dict[int, int]) -> int:
    """How many values it is when what is in it several times is written out as often. Raises: ValueError."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"a text of more than {MAX_TEXT} characters")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"a number of more than {_MAX_BITS} bits")
    if not isinstance(value, (list, dict)):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_size(item, known) for item in items)
    if known[id(value)] > _MAX_ITEMS:
        raise ValueError(f"a list or map of more than {_MAX_ITEMS} values")
    return known[id(value)]


def truth(value: Any) -> bool:
    """A bool, or its word. Raises: ValueError."""
    if isinstance(value, bool):
        return value
    if value in ("true", "1"):
        return True
    if value in ("false", "0"):
        return False
    raise ValueError(f"{value!r}: expected true or false")


def number(value: Any) -> int | float:
    """A number, or its digits. Raises: ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r}: expected a number")  # noqa: TRY004
    if isinstance(value, str):
        return float(value) if "." in value else int(value)
    return value


def text_of(value: Any) -> str:
    """A value within a text. Raises: ValueError for lists and maps."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{value!r}: expected a text")
