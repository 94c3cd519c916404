"""Lines, directives, comments, continuations and heredocs to nodes."""

from __future__ import annotations

import pytest

from builder.errors import ParseError
from builder.frontend import parser
from builder.frontend.heredoc import heredocs_of_line, parse_heredoc
from builder.frontend.parser import Node, SyntaxTree, parse_syntax
from builder.frontend.source import SourceFile, SourceRange


def tree_of(text: str) -> SyntaxTree:
    return parse_syntax(SourceFile("Containerfile", text))


def node_of(line: str) -> Node:
    (node,) = tree_of(line).nodes
    return node


@pytest.mark.parametrize(
    ("line", "flags", "args"),
    [
        ("FROM base AS x", (), ("base", "AS", "x")),
        ("from\tbase   as\tx  ", (), ("base", "as", "x")),
        ("RUN echo  a   b ", (), ("echo  a   b",)),
        ("RUN", (), ()),
        ("COPY --from=x --link a b", ("--from=x", "--link"), ("a", "b")),
        ('COPY --chown="a b" c d', ("--chown=a b",), ("c", "d")),
        (r"COPY --chown=a\ b c d", ("--chown=a b",), ("c", "d")),
        ("COPY '--link' a b", (), ("'--link'", "a", "b")),
        ("COPY --link -- --odd b", ("--link",), ("--odd", "b")),
        ("COPY --link --", ("--link",), ()),
        ("RUN --mount=type=bind -- x", ("--mount=type=bind",), ("x",)),
        ("RUN -x --y", (), ("-x --y",)),
        ("COPY a --link b", (), ("a", "--link", "b")),
        ('COPY ["a b", "c"]', (), ("a b", "c")),
        ("VOLUME /a /b", (), ("/a", "/b")),
        ("EXPOSE 80 81/udp", (), ("80", "81/udp")),
        ("USER a b", (), ("a b",)),
        ("WORKDIR /a dir", (), ("/a dir",)),
        ("ARG A B=c 'D=e f'", (), ("A", "B=c", "'D=e f'")),
        ("ENV A=b C='d e' F=g\\ h", (), ("A", "b", "=", "C", "'d e'", "=", "F", "g\\ h", "=")),
        ("ENV A  b c ", (), ("A", "b c", "")),
        ("ENV A b=c", (), ("A", "b=c", "")),
        ("LABEL a=", (), ("a", "", "=")),
        ('LABEL "a b"=c', (), ('"a b"', "c", "=")),
        ("LABEL a='", (), ("a", "'", "=")),
        ("HEALTHCHECK --retries=2 CMD  x y", ("--retries=2",), ("CMD", "x y")),
        ("HEALTHCHECK NONE", (), ("NONE",)),
        ("NOSUCH a b", (), ("",)),
    ],
)
def test_a_line(line: str, flags: tuple[str, ...], args: tuple[str, ...]) -> None:
    node = node_of(line)
    assert (node.flags, node.args) == (flags, args)


@pytest.mark.parametrize(
    ("rest", "args", "json"),
    [
        ('["a", "b"]', ("a", "b"), True),
        (' [ "a" ] ', ("a",), True),
        ("[]", (), True),
        (r'["\u00e9\n\"\\"]', ('é\n"\\',), True),
        (r'["\ud83d\ude00 \ud800"]', ("😀 \ufffd",), True),
        ('["a"', ('["a"',), False),
        ('["a"] && b', ('["a"] && b',), False),
        ("['a']", ("['a']",), False),
        ('["a",]', ('["a",]',), False),
        ('"a"', ('"a"',), False),
        ("[ -f x ]", ("[ -f x ]",), False),
        ("[NaN]", ("[NaN]",), False),
        ('["a\tb"]', ('["a\tb"]',), False),
        ("[" + "9" * 400 + "]", ("[" + "9" * 400 + "]",), False),
    ],
)
def test_the_json_form(rest: str, args: tuple[str, ...], json: bool) -> None:
    node = node_of("CMD " + rest)
    assert (node.args, node.json) == (args, json)


@pytest.mark.parametrize(
    "rest", ["[1]", '["a", null]', '[["a"]]', '[{"a": "b"}]', "[1e5]", "[" * 100_000 + "]" * 100_000]
)
def test_an_array_of_other_things_is_refused(rest: str) -> None:
    with pytest.raises(ParseError, match="arrays must be comprised of strings only"):
        node_of("RUN " + rest)


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "file with no instructions", 1),
        ("# only a comment\n\n", "file with no instructions", 2),
        ("FROM x\nENV A", "ENV must have two arguments", 2),
        ("FROM x\nLABEL A", "LABEL must have two arguments", 2),
        ("FROM x\nENV A=b c", 'can\'t find = in "c"', 2),
        ("# escape=x\nFROM x", "invalid escape token 'x'", 1),
        ("# escape=`\n#escape=`\nFROM x", "only one escape parser directive", 2),
        ("FROM x\nRUN <<E\nx\n", "unterminated heredoc", 2),
        ("ONBUILD " * 50 + "RUN x", "nested too deeply", 1),
    ],
)
def test_what_is_refused(text: str, message: str, line: int) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        tree_of(text)
    assert caught.value.range is not None
    assert caught.value.range.start_line == line
    assert str(caught.value).startswith(f"Containerfile:{line}")


def test_a_line_with_an_open_quote_announces_no_heredoc() -> None:
    assert [node.instruction for node in tree_of("RUN <<E && 'x\nE\n").nodes] == ["run", "e"]


def test_continuations_drop_comments_and_blank_lines() -> None:
    tree = tree_of("RUN a \\\n  # note\n\n  b\\   \n\t# more\n c\nRUN d\n")
    assert [node.args for node in tree.nodes] == [("a   b c",), ("d",)]
    assert [node.range[:2] for node in tree.nodes] == [(1, 6), (7, 7)]
    assert [(w.range.start_line, "Empty continuation" in w.message) for w in tree.warnings] == [(6, True)]


def test_a_comment_between_is_no_empty_continuation() -> None:
    assert tree_of("RUN a \\\n# note\n b").warnings == ()


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("RUN a\\\\\nUSER b", [("a\\\\",), ("b",)]),
        ("RUN a \\", [("a",)]),
        ("RUN a\\\n", [("a",)]),
        ("RUN a \\ \t\nb", [("a b",)]),
        ("RUN a \\x\nUSER b", [("a \\x",), ("b",)]),
        ("# escape=`\nRUN a\\\nUSER b `\nc", [("a\\",), ("b c",)]),
        ("\\\nRUN a", [("a",)]),
    ],
)
def test_where_a_line_continues(text: str, args: list[tuple[str, ...]]) -> None:
    assert [node.args for node in tree_of(text).nodes] == args


def test_byte_order_mark_and_crlf() -> None:
    tree = tree_of("\ufeff# escape=`\r\nFROM x\r\nRUN a `\r\n  b\r\n\r\nCOPY <<E /f\r\ntext\r\nE\r\n")
    assert tree.escape == "`"
    assert [node.args for node in tree.nodes] == [("x",), ("a   b",), ("<<E", "/f")]
    assert tree.nodes[2].heredocs[0].content == "text\r\n"


def test_directives() -> None:
    tree = tree_of(
        "# syntax = example/front:1 \n#CHECK=skip=all;error=true\n# escape=\\\n# other=1\n# escape=`\nFROM x"
    )
    assert [(d.name, d.value, d.range.start_line) for d in tree.directives] == [
        ("syntax", "example/front:1", 1),
        ("check", "skip=all;error=true", 2),
        ("escape", "\\", 3),
    ]


@pytest.mark.parametrize("above", ["\n", "# a comment\n", "FROM y\n"])
def test_a_directive_must_come_first(above: str) -> None:
    tree = tree_of(above + "# escape=`\nFROM x")
    assert (tree.escape, tree.directives) == ("\\", ())


def test_after_a_shebang_only_syntax_and_check_are_directives() -> None:
    tree = tree_of("#!/usr/bin/env pybuild\n# check=skip=all\n# escape=`\nFROM x")
    assert [d.name for d in tree.directives] == ["check"]
    assert tree.escape == "\\"


def test_comments_above_an_instruction() -> None:
    tree = tree_of("# syntax=x\n# one\n#\n# two\n#three\nFROM x\n# four\n\nRUN y\n# five\nRUN z")
    assert [node.comments for node in tree.nodes] == [("two", "three"), (), ("five",)]


def test_onbuild_nests() -> None:
    node = node_of("ONBUILD copy --link a b")
    assert node.child is not None
    assert (node.child.instruction, node.child.keyword, node.child.flags) == ("copy", "copy", ("--link",))
    assert node_of("ONBUILD").child is None


def test_ranges_have_columns() -> None:
    node = tree_of("\n  RUN a \\\n   b\n").nodes[0]
    assert node.range == SourceRange(2, 3, 3, 5)


class TestHeredocs:
    def test_several_on_a_line(self) -> None:
        tree = tree_of("RUN cat <<A - <<B\na\nA\n# b\nB\nUSER x")
        node = tree.nodes[0]
        assert [(h.name, h.content) for h in node.heredocs] == [("A", "a\n"), ("B", "# b\n")]
        assert node.range.end_line == 5
        assert tree.nodes[1].args == ("x",)

    def test_nested_delimiters_belong_to_the_first_document(self) -> None:
        node = node_of("COPY <<A <<B /\nB\nA\nA\nB")
        assert [(h.name, h.content) for h in node.heredocs] == [("A", "B\n"), ("B", "A\n")]

    def test_chomp_looks_past_tabs_for_the_end_and_keeps_the_body(self) -> None:
        node = node_of("RUN <<-E\n\ta\n\t\tE")
        assert node.heredocs[0].content == "\ta\n"
        assert node.heredocs[0].text == "a\n"

    def test_backslashes_continue_nothing_within(self) -> None:
        assert node_of("RUN <<E\na \\\nE").heredocs[0].content == "a \\\n"

    def test_onbuild_may_have_one(self) -> None:
        assert node_of("ONBUILD RUN <<E\na\nE").heredocs[0].content == "a\n"

    @pytest.mark.parametrize(
        "line", ['RUN ["<<E"]', 'RUN "<<E"', "RUN '<<E'", "CMD <<E", "RUN a<<E<", "RUN <<", "RUN \\<<E"]
    )
    def test_none(self, line: str) -> None:
        assert node_of(line).heredocs == ()

    @pytest.mark.parametrize(
        ("word", "name", "expand", "chomp", "fd"),
        [
            ("<<E", "E", True, False, 0),
            ("<<-E", "E", True, True, 0),
            ("3<<E", "E", True, False, 3),
            ("<<'E'", "E", False, False, 0),
            ('<<-"E"', "E", False, True, 0),
            ("<<a'b'", "ab", False, False, 0),
            ("<<'a b'", "a b", False, False, 0),
            (r"<<a\'b", "a'b", True, False, 0),
            ("<<$E", "$E", True, False, 0),
            ("<<${E:-x}", "${E:-x}", True, False, 0),
            ("<< E", "E", True, False, 0),
        ],
    )
    def test_a_word(self, word: str, name: str, expand: bool, chomp: bool, fd: int) -> None:
        heredoc = parse_heredoc(word)
        assert heredoc is not None
        found = (heredoc.name, heredoc.expand, heredoc.chomp, heredoc.file_descriptor)
        assert found == (name, expand, chomp, fd)

    @pytest.mark.parametrize("word", ["E", "<E", "<<", "<<-", "<<a b", "x<<E", "<<<E", "<<E<"])
    def test_no_heredoc_word(self, word: str) -> None:
        assert parse_heredoc(word) is None

    def test_a_line_with_a_space(self) -> None:
        assert [h.name for h in heredocs_of_line("RUN cat <<  E > /x")] == ["E"]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "MAX_INSTRUCTIONS", 10)
    with pytest.raises(ParseError, match="more than 10 instructions"):
        tree_of("RUN x\n" * 11)
    monkeypatch.setattr(parser, "MAX_TEXT_CHARS", 100)
    with pytest.raises(ParseError, match="the file is larger"):
        tree_of("FROM x\n" * 100)


def test_long_lines_are_no_trouble() -> None:
    assert len(node_of("RUN " + "x" * 1_000_000).args[0]) == 1_000_000
    assert len(node_of("ENV " + "A=b " * 100_000).args) == 300_000
