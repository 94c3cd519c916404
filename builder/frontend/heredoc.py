"""Heredocs: recognising `<<EOF` words, and the documents that follow the line."""

from __future__ import annotations

import re

from builder.frontend.words import WordError, heredoc_words, raw_words
from layers.values import NamedTuple

_WORD = re.compile(r"([0-9]*)<<(-?)[\t\n\f\r ]*([^<]*)")
_LEADING_TABS = re.compile(r"^\t+", re.MULTILINE)


class Heredoc(NamedTuple):
    """One here-document. `expand`: its delimiter was not quoted. `chomp`: `<<-`, leading tabs go."""

    name: str
    content: str = ""
    expand: bool = True
    chomp: bool = False
    file_descriptor: int = 0

    @property
    def text(self) -> str:
        """The content as the file or the script has it, without the tabs that `<<-` removes."""
        return chomp(self.content) if self.chomp else self.content


def parse_heredoc(word: str) -> Heredoc | None:
    """The heredoc that a word announces, without its content; None if the word is none.

    Raises: WordError for a delimiter with an open quote.
    """
    match = _WORD.fullmatch(word)
    if match is None or not match[3]:
        return None
    plain = heredoc_words(match[3], raw_quotes=False)
    if len(plain) != 1:
        return None
    raw = heredoc_words(match[3], raw_quotes=True)
    # A quote that an escape made literal counts in both, one that quotes in the raw form alone.
    quoted = _quotes(plain[0]) != _quotes("".join(raw))
    descriptor = int(match[1][:18] or "0")
    return Heredoc(plain[0], expand=not quoted, chomp=bool(match[2]), file_descriptor=descriptor)


def is_heredoc(word: str) -> bool:
    """Whether a word announces a heredoc; a malformed delimiter is none."""
    try:
        return "<<" in word and parse_heredoc(word) is not None
    except WordError:
        return False


def heredocs_of_line(line: str) -> list[Heredoc]:
    """The heredocs that a line announces, in order. A line with an open quote announces none.

    Raises: WordError for a delimiter with an open quote.
    """
    try:
        words = raw_words(line)
    except WordError:
        return []
    found = (parse_heredoc(word) for word in words if "<<" in word)
    return [heredoc for heredoc in found if heredoc is not None]


def chomp(text: str) -> str:
    """Remove the tabs that lines begin with."""
    return _LEADING_TABS.sub("", text)


def _quotes(text: str) -> int:
    return text.count("'") + text.count('"')
