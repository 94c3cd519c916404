"""Whatever text comes: an answer, or a ParseError that knows its place. Never anything else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from builder.errors import ContextError, ParseError
from builder.frontend import instructions
from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.instructions import Containerfile, parse_containerfile, parse_instruction, parse_onbuild
from builder.frontend.lint import lint, render_json, to_text
from builder.frontend.outline import outline, targets
from builder.frontend.outline import to_text as outline_text
from builder.frontend.parser import parse_syntax
from builder.frontend.source import SourceFile
from builder.frontend.syntaxjson import to_json

KEYWORDS = [*(keyword for keyword in instructions.KEYWORDS), "from", "Copy", "NOSUCH"]
PIECES = [
    " ", "\t", "\n", "\r\n", "\\\n", "\\", "`", "#", "# escape=`\n", "# check=skip=all\n", "=", "$", "${", "}", "A",
    "b", "\"", "'", "<<E", "<<-'E'", "\nE\n", "[", "]", ",", '"x"', '["a"]', "--from=", "--mount=type=cache,target=/x",
    "--chown=", "--", ":-", "//", "#", "%", "?", "80", "-90/udp", "AS", "x", "CMD", "5s", "--interval=", "\ufeff", "é",
    "\x00", "\udc80", "\u2028", "scratch", "/", "*",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
LINE = st.tuples(st.sampled_from(KEYWORDS), st.sampled_from([" ", "  ", "\t", ""]), SOUP).map("".join)
FILE = st.lists(st.one_of(LINE, SOUP), max_size=6).map("\n".join)
ENVIRONMENT = {"A": "value", "x": "", "b": "a b"}


def read(text: str) -> Containerfile | None:
    source = SourceFile("Containerfile", text)
    try:
        tree = parse_syntax(source)
        assert len(to_json(tree)) == len(tree.nodes)
        return parse_containerfile(source)
    except ParseError as e:
        assert e.source is source
        assert e.range is not None
        assert 1 <= e.range.start_line <= len(source.lines)
        assert e.message in e.render()
        return None


def expand_everything(file: Containerfile) -> None:
    for stage in file.stages:
        for instruction in (*file.global_args, stage.from_, *stage.instructions):
            try:
                once = instruction.expand(ENVIRONMENT, file.escape)
                assert once.range == instruction.range
            except ParseError as e:
                assert e.source is file.source
                assert e.range is not None


@settings(max_examples=400)
@given(FILE)
def test_files(text: str) -> None:
    file = read(text)
    if file is not None:
        expand_everything(file)


@settings(max_examples=300)
@given(SOUP.map("FROM scratch\n".__add__), SOUP)
def test_reading_without_building(text: str, ignore: str) -> None:
    file = read(text)
    if file is None:
        return
    try:
        matcher = IgnoreMatcher.parse(ignore)
    except ContextError:
        matcher = IgnoreMatcher.parse("")
    try:
        found = lint(file, ignore=matcher)
        to_text(file, found)
        render_json(file, found)
        outline_text(outline(file))
        outline_text(targets(file))
    except ParseError as e:
        assert e.range is not None


@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    read(text)


@given(LINE)
def test_lone_instructions(text: str) -> None:
    for parse in (parse_instruction, parse_onbuild):
        try:
            parse(text).expand(ENVIRONMENT, "\\")
        except ParseError as e:
            assert e.source is not None


@given(SOUP, st.lists(st.sampled_from(["a", "b", "*", "A", "é", "\udc80"]), min_size=1, max_size=4).map("/".join))
def test_ignore_files(text: str, path: str) -> None:
    try:
        matcher = IgnoreMatcher.parse(text)
    except ContextError:
        return
    assert matcher.match(path) is matcher.decide(path)[0]
