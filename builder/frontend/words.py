"""Shell words as the Containerfile language knows them: quotes, escapes, `$name` and `${name...}`.

A word is expanded to one string, or split at the white space outside quotes *after* expansion. The
rules are BuildKit's, where they differ from a shell's too: no field is ever empty, `$1` and `$@`
are ordinary (unset) variables, and `${x=y}` does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from builder.errors import ParseError
from layers.values import NamedTuple

GO_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space, which is less than what `str.isspace` accepts (that adds U+001C to U+001F)."""

MAX_EXPANSION_CHARS = 16 << 20
"""What the variables of one word may add. Forty lines of `ENV A=$A$A` would otherwise ask for a terabyte."""

_MAX_NESTING = 100
_SPECIAL_PARAMETERS = frozenset("@*#?-$!0")
_PLAIN = re.compile(r"""[^$'"<\\`}/]+""")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*+)(?![^\x00-\x7f])|\{([A-Za-z_][A-Za-z0-9_]*)\})")
"""The common forms, `$name` and `${name}`; a letter of another alphabet would belong to the name."""
_SPACES = re.compile(f"[{GO_SPACE}]+")
_CHARACTERS = re.compile(r"[A-Za-z0-9./:-]+")
"""Of words that mean themselves, as a port does."""
_EMPTY: Mapping[str, str] = {}


class WordError(ParseError):
    """A word cannot be expanded. It knows no place until the instruction that owns the word adds it."""


class Expansion(NamedTuple):
    """A word's value, its fields, and the names of the variables that it used and that were not set."""

    text: str
    words: tuple[str, ...]
    used: frozenset[str]
    unmatched: frozenset[str]


def expand_word(word: str, env: Mapping[str, str], escape: str = "\\") -> str:
    """The value of a word, not split.

    Raises: WordError on an unclosed quote or brace, an unknown modifier or a required variable that is missing.
    """
    if "$" not in word and "'" not in word and '"' not in word and escape not in word:
        return word
    return _Lexer(word, env, escape).run()


def expand_words(word: str, env: Mapping[str, str], escape: str = "\\") -> list[str]:
    """The fields that a word's value has; fields that come out empty vanish. Raises: WordError."""
    if _CHARACTERS.fullmatch(word) and escape not in word:
        return [word]
    lexer = _Lexer(word, env, escape, split=True)
    lexer.run()
    return lexer.words


def expand(word: str, env: Mapping[str, str], escape: str = "\\") -> Expansion:
    """Expand with an account of the variables; for lint and for cache keys. Raises: WordError."""
    if _CHARACTERS.fullmatch(word) and escape not in word:
        return Expansion(word, (word,), frozenset(), frozenset())
    lexer = _Lexer(word, env, escape, split=True)
    text = lexer.run()
    return Expansion(text, tuple(lexer.words), frozenset(lexer.used), frozenset(lexer.unmatched))


def expand_text(text: str, env: Mapping[str, str]) -> str:
    """Expand the body of a heredoc: variables only; quotes stay, the escape is always a backslash.

    Raises: WordError.
    """
    if "$" not in text and "\\" not in text:
        return text
    return _Lexer(text, env, "\\", keep_quotes=True).run()


def text_variables(text: str, env: Mapping[str, str]) -> frozenset[str]:
    """The names that `expand_text` finds no value for. Raises: WordError."""
    if "$" not in text:
        return frozenset()
    lexer = _Lexer(text, env, "\\", keep_quotes=True)
    lexer.run()
    return frozenset(lexer.unmatched)


def raw_words(line: str) -> list[str]:
    """Fields with their quotes, escapes and variables as written; for finding heredocs. Raises: WordError."""
    lexer = _Lexer(line, _EMPTY, "\\", split=True, raw_quotes=True, raw_escapes=True, skip_unset=True)
    lexer.run()
    return lexer.words


def heredoc_words(text: str, *, raw_quotes: bool) -> list[str]:
    """Fields of a heredoc's delimiter with its variables as written. Raises: WordError."""
    lexer = _Lexer(text, _EMPTY, "\\", split=True, raw_quotes=raw_quotes, skip_unset=True)
    lexer.run()
    return lexer.words


class _Lexer:
    """One pass over one word. The methods are named for what they consume."""

    def __init__(
        self,
        text: str,
        env: Mapping[str, str],
        escape: str,
        *,
        split: bool = False,
        raw_quotes: bool = False,
        raw_escapes: bool = False,
        keep_quotes: bool = False,
        skip_unset: bool = False,
    ) -> None:
        self.text = text.removeprefix("\ufeff")
        self.at = 0
        self.env = env
        self.escape = escape
        self.split = split
        self.raw_quotes = raw_quotes
        self.raw_escapes = raw_escapes
        self.keep_quotes = keep_quotes
        self.skip_unset = skip_unset
        self.words: list[str] = []
        self.used: set[str] = set()
        self.unmatched: set[str] = set()
        self.budget = MAX_EXPANSION_CHARS
        self.depth = 0

    def run(self) -> str:
        try:
            text, self.words = self._until("", self.raw_escapes)
        except WordError as e:
            shown = self.text if len(self.text) <= 200 else self.text[:200] + "..."
            raise WordError(f'failed to process "{shown}": {e.message}', hint=e.hint) from None
        return text

    def _peek(self) -> str:
        """The next character, or nothing at the end."""
        return self.text[self.at] if self.at < len(self.text) else ""

    def _next(self) -> str:
        ch = self._peek()
        self.at += 1 if ch else 0
        return ch

    def _until(self, stop: str, raw_escapes: bool) -> tuple[str, list[str]]:
        """Consume up to and including `stop`; with no `stop`, to the end."""
        if self.depth >= _MAX_NESTING:
            raise WordError(f"substitutions nested more than {_MAX_NESTING} deep")
        outer_raw, self.raw_escapes = self.raw_escapes, raw_escapes
        self.depth += 1
        try:
            return self._parts(stop)
        finally:
            self.raw_escapes = outer_raw
            self.depth -= 1

    def _parts(self, stop: str) -> tuple[str, list[str]]:
        result: list[str] = []
        fields = _Fields() if self.split else None
        while ch := self._peek():
            if ch == stop:
                self.at += 1
                return "".join(result), fields.done() if fields else []
            divisible = False
            if ch == "$":
                part, divisible = self._dollar(), True
            elif ch == "'" and not self.keep_quotes:
                part = self._single_quoted()
            elif ch == '"' and not self.keep_quotes:
                part = self._double_quoted()
            elif ch == "<":
                part = self._less_than()
            elif ch == self.escape:
                self.at += 1
                part = (self.escape if self.raw_escapes else "") + self._next()
            else:
                plain = _PLAIN.match(self.text, self.at)
                part, divisible = plain.group() if plain else ch, True
                self.at += len(part)
            result.append(part)
            if fields:
                fields.add(part, divisible)
        if stop:
            raise WordError(f"unexpected end of statement while looking for matching {stop}")
        return "".join(result), fields.done() if fields else []

    def _less_than(self) -> str:
        """`<`, or `<<` with the spaces that follow: `<< EOF` is one word."""
        start = self.at
        self.at += 1
        if self._peek() == "<":
            self.at += 1
            while self._peek() and self._peek() in "\t\v\f\r ":
                self.at += 1
        return self.text[start : self.at]

    def _single_quoted(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise WordError("unexpected end of statement while looking for matching single-quote")
        start, self.at = self.at, end + 1
        return self.text[start : self.at] if self.raw_quotes else self.text[start + 1 : end]

    def _double_quoted(self) -> str:
        quote = '"' if self.raw_quotes else ""
        result = [quote]
        self.at += 1
        while ch := self._peek():
            if ch == '"':
                self.at += 1
                result.append(quote)
                return "".join(result)
            if ch == "$":
                result.append(self._dollar())
                continue
            plain = _PLAIN.match(self.text, self.at)
            part = plain.group() if plain else ch
            self.at += len(part)
            if ch == self.escape:
                if self.raw_escapes:
                    result.append(ch)
                following = self._peek()
                if not following:
                    continue  # an escape as the word's last character is dropped
                if following in ('"', "$", self.escape):
                    part = self._next()
            result.append(part)
        raise WordError("unexpected end of statement while looking for matching double-quote")

    def _name(self) -> str:
        """A variable's name: letters, digits and `_`; or digits alone; or one special parameter."""
        start = self.at
        ch = self._peek()
        if ch.isdecimal():
            while self._peek().isdecimal():
                self.at += 1
        elif ch in _SPECIAL_PARAMETERS:
            self.at += 1
        else:
            while (ch := self._peek()) and (ch == "_" or ch.isalpha() or ch.isdecimal()):
                self.at += 1
        return self.text[start : self.at]

    def _lookup(self, name: str) -> str | None:
        value = self.env.get(name)
        if value is None:
            self.unmatched.add(name)
            return None
        self.used.add(name)
        self.budget -= len(value)
        if self.budget < 0:
            raise WordError(f"the expansion is longer than {MAX_EXPANSION_CHARS} characters")
        return value

    def _dollar(self) -> str:
        if common := _VARIABLE.match(self.text, self.at):
            self.at = common.end()
            value = self._lookup(common[1] or common[2])
            if value is None:
                return common[0] if self.skip_unset else ""
            return value
        self.at += 1
        if self._peek() != "{":
            name = self._name()
            if not name:
                return "$"
            value = self._lookup(name)
            if value is None:
                return "$" + name if self.skip_unset else ""
            return value
        self.at += 1
        if not (ch := self._peek()):
            raise WordError("syntax error: missing '}'")
        if ch in "{}:":
            raise WordError("syntax error: bad substitution")
        name = self._name()
        modifier = ch = self._next()
        if ch == "}":
            value = self._lookup(name)
            if value is None:
                return "${" + name + "}" if self.skip_unset else ""
            return value
        if ch == "/":
            return self._replace(name)
        if ch == ":":
            ch = self._next()
            modifier += ch
        if ch not in ("+", "-", "?", "#", "%") and modifier[:1] != ":":
            raise WordError(f"unsupported modifier ({modifier}) in substitution")
        word = self._operand("}", raw_escapes=ch in ("#", "%"), missing="missing '}'")
        value = self._lookup(name)
        if value is None and self.skip_unset:
            return "${" + name + modifier + word + "}"
        return self._modified(name, value, modifier, word)

    def _operand(self, stop: str, *, raw_escapes: bool, missing: str) -> str:
        split, self.split = self.split, False
        try:
            return self._until(stop, raw_escapes)[0]
        except WordError:
            if not self._peek():
                raise WordError(f"syntax error: {missing}") from None
            raise
        finally:
            self.split = split

    def _modified(self, name: str, value: str | None, modifier: str, word: str) -> str:
        operator = modifier[-1]
        null = value is None or (modifier[0] == ":" and value == "")
        if operator == "-":
            return word if null else value or ""
        if operator == "+":
            return "" if null else word
        if operator == "?":
            if null:
                reason = "unset" if value is None else "empty"
                raise WordError(f"{name}: {word or f'is not allowed to be {reason}'}")
            return value or ""
        if operator in ("#", "%"):
            from builder.frontend.shellpattern import remove_prefix, remove_suffix

            longest = word.startswith(operator)
            remove = remove_prefix if operator == "#" else remove_suffix
            return remove(value or "", word[1:] if longest else word, longest=longest)
        raise WordError(f"unsupported modifier ({modifier}) in substitution")

    def _replace(self, name: str) -> str:
        everywhere = self._peek() == "/"
        self.at += 1 if everywhere else 0
        pattern = self._operand("/", raw_escapes=True, missing="missing '/' in ${}")
        replacement = self._operand("}", raw_escapes=True, missing="missing '}'")
        value = self._lookup(name)
        if value is None and self.skip_unset:
            return "${" + f"{name}/{pattern}/{replacement}" + "}"
        from builder.frontend.shellpattern import replace

        result = replace(value or "", pattern, replacement, everywhere=everywhere, limit=self.budget)
        self.budget -= len(result)
        return result


class _Fields:
    """Collects fields. White space divides unless it was quoted or escaped."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._parts: list[str] = []

    def add(self, part: str, divisible: bool) -> None:
        if not divisible:
            self._parts.append(part)
            return
        first, *others = _SPACES.split(part)
        self._parts.append(first)
        for field in others:
            self._close()
            self._parts.append(field)

    def _close(self) -> None:
        if word := "".join(self._parts):
            self._words.append(word)
        self._parts.clear()

    def done(self) -> list[str]:
        self._close()
        return self._words
