"""Quotes, escapes and the forms of `${...}`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.frontend import words
from builder.frontend.words import WordError, expand, expand_text, expand_word, expand_words

ENV = {"NAME": "app", "EMPTY": "", "FILE": "dir/pack.tar.gz", "SPACED": "  two  words ", "DIRS": "/a/b/a"}


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("plain", "plain"),
        ("$NAME", "app"),
        ("${NAME}s", "apps"),
        ("$NAMEs", ""),
        ("pre$NAME-post", "preapp-post"),
        ("$UNSET.", "."),
        ("a$ b", "a$ b"),
        ("100$", "100$"),
        ("$.x", "$.x"),
        ("$$", ""),
        ("$12x", "x"),
        ("$1x", "x"),
        ("é$NAME", "éapp"),
        ("$NAMEé", ""),  # a letter continues a name, whatever alphabet it is of
        (r"\$NAME", "$NAME"),
        (r"\\$NAME", r"\app"),
        (r"a\b", "ab"),
        ("end\\", "end"),
        ("'$NAME \\'", "$NAME \\"),
        ("\"$NAME 'q'\"", "app 'q'"),
        (r'"\$NAME \" \\ \n"', r'$NAME " \ \n'),
        ('"a\'b"', "a'b"),
        ("<< EOF", "<< EOF"),
        ("a<b", "a<b"),
    ],
)
def test_a_word(word: str, wanted: str) -> None:
    assert expand_word(word, ENV) == wanted


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("${NAME:-x}", "app"),
        ("${UNSET:-x}", "x"),
        ("${EMPTY:-x}", "x"),
        ("${EMPTY-x}", ""),
        ("${UNSET-x}", "x"),
        ("${NAME:+x}", "x"),
        ("${EMPTY:+x}", ""),
        ("${EMPTY+x}", "x"),
        ("${UNSET+x}", ""),
        ("${NAME:?gone}", "app"),
        ("${EMPTY?gone}", ""),
        ("${UNSET:-${EMPTY:-$NAME}}", "app"),
        ("${UNSET:-'a b'}", "a b"),
        ("${UNSET:-a}}", "a}"),
        (r"${UNSET:-\}}", "}"),
        ("${UNSET:-}", ""),
        ("${FILE#*.}", "tar.gz"),
        ("${FILE##*.}", "gz"),
        ("${FILE%.*}", "dir/pack.tar"),
        ("${FILE%%.*}", "dir/pack"),
        ("${FILE%/*}", "dir"),
        ("${FILE##*/}", "pack.tar.gz"),
        ("${FILE#nothing}", "dir/pack.tar.gz"),
        ("${FILE#di?}", "/pack.tar.gz"),
        ("${FILE/a/A}", "dir/pAck.tar.gz"),
        ("${FILE//a/A}", "dir/pAck.tAr.gz"),
        ("${FILE/.*/}", "dir/pack"),
        (r"${DIRS//\//-}", "-a-b-a"),
        ("${DIRS//$UNSET/x}", "x/xax/xbx/xax"),
        ("${FILE//[/x}", "dir/pack.tar.gz"),
        ("${UNSET/a/b}", ""),
        ("${FILE#${NAME}}", "dir/pack.tar.gz"),
    ],
)
def test_a_modifier(word: str, wanted: str) -> None:
    assert expand_word(word, ENV) == wanted


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("'open", "single-quote"),
        ('"open', "double-quote"),
        ("${NAME", "unsupported modifier"),
        ("${", "missing '}'"),
        ("${}", "bad substitution"),
        ("${{NAME}}", "bad substitution"),
        ("${:-x}", "bad substitution"),
        ("${NAME:-x", "missing '}'"),
        ("${NAME:", "missing '}'"),
        ("${NAME:=x}", r"unsupported modifier \(:=\)"),
        ("${NAME:x}", "unsupported modifier"),
        ("${NAME!x}", "unsupported modifier"),
        ("${NAME/x}", "missing '/'"),
        ("${NAME/x/y", "missing '}'"),
        ("${UNSET:?set it}", "UNSET: set it"),
        ("${UNSET?}", "UNSET: is not allowed to be unset"),
        ("${EMPTY:?}", "EMPTY: is not allowed to be empty"),
        (r"${NAME#\a}", "invalid escape"),
    ],
)
def test_what_cannot_be_expanded(word: str, message: str) -> None:
    with pytest.raises(WordError, match=message):
        expand_word(word, ENV)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("   ", []),
        ("one two\tthree", ["one", "two", "three"]),
        ("'one two' three", ["one two", "three"]),
        (r"one\ two", ["one two"]),
        ("$SPACED", ["two", "words"]),
        ('"$SPACED"', ["  two  words "]),
        ("a${SPACED}b", ["a", "two", "words", "b"]),
        ("$UNSET ''", []),
        ("a''b", ["ab"]),
        ("x\u3000y\x1cz", ["x", "y\x1cz"]),
        ("cat << EOF", ["cat", "<< EOF"]),
    ],
)
def test_fields(text: str, wanted: list[str]) -> None:
    assert expand_words(text, ENV) == wanted


def test_backquote_as_the_escape() -> None:
    assert expand_word(r"c:\$NAME`$NAME", ENV, "`") == r"c:\app$NAME"


def test_the_text_of_a_heredoc_keeps_its_quotes() -> None:
    assert expand_text("echo \"$NAME\" 'it' \\$HOME\n", ENV) == "echo \"app\" 'it' $HOME\n"


def test_an_account_of_the_variables() -> None:
    expansion = expand("$NAME ${MISSING:-$OTHER} ${EMPTY}", ENV)
    assert expansion.text == "app  "
    assert expansion.used == {"NAME", "EMPTY"}
    assert expansion.unmatched == {"MISSING", "OTHER"}


def test_raw_words_keep_everything() -> None:
    assert words.raw_words(r"""a "b c" \d $e ${f:-g}""") == ["a", '"b c"', r"\d", "$e", "${f:-g}"]


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(WordError, match="nested"):
        expand_word("${a:-" * 5000 + "}" * 5000, {})


def test_an_expansion_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MAX_EXPANSION_CHARS", 1000)
    with pytest.raises(WordError, match="longer than"):
        expand_word("$BIG" * 20, {"BIG": "x" * 100})
    with pytest.raises(WordError, match="longer than"):
        expand_word("${BIG//x/yyyyyyyyyyyyyyyyyyyyyy}", {"BIG": "x" * 100})


def test_the_error_shows_a_long_word_shortened() -> None:
    with pytest.raises(WordError) as caught:
        expand_word("x" * 100_000 + "'", {})
    assert len(str(caught.value)) < 400


@given(
    st.text("ab$'\"\\{}:-+?#%/<*. \t", max_size=30), st.dictionaries(st.sampled_from("ab"), st.text("a b", max_size=4))
)
def test_anything_expands_or_is_a_word_error(word: str, env: dict[str, str]) -> None:
    try:
        text = expand_word(word, env)
        fields = expand_words(word, env)
    except WordError:
        return
    assert "".join(fields) == "".join(c for c in text if c not in " \t") or any(q in word for q in "'\"\\")


@given(st.text(st.characters(exclude_characters="$'\"\\"), max_size=50))
def test_a_word_without_signs_is_itself(word: str) -> None:
    assert expand_word(word, ENV) == word
