"""The printed forms of trees and words."""

from __future__ import annotations

import json

import pytest

from builder.frontend.parser import parse_syntax
from builder.frontend.source import SourceFile
from builder.frontend.syntaxjson import to_json, words_json


def test_a_tree() -> None:
    text = 'FROM x\nONBUILD COPY --link a b\nENV A=b C=d\nRUN <<-"E"\n\tx\nE\nCMD []\n'
    assert to_json(parse_syntax(SourceFile("C", text))) == [
        {"instruction": "from", "flags": [], "args": ["x"]},
        {
            "instruction": "onbuild",
            "flags": [],
            "args": [{"instruction": "copy", "flags": ["--link"], "args": ["a", "b"]}],
        },
        {"instruction": "env", "flags": [], "args": ["A", "b", "=", "C", "d", "="]},
        {
            "instruction": "run",
            "flags": [],
            "args": ['<<-"E"'],
            "heredocs": [{"name": "E", "content": "\tx\n", "expand": False, "chomp": True, "file_descriptor": 0}],
        },
        {"instruction": "cmd", "flags": [], "args": []},
    ]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ({"word": "$A é", "env": {"A": "1"}, "mode": "word"}, "1 é"),
        ({"word": "$A b", "env": {"A": "1 2"}, "mode": "words"}, ["1", "2", "b"]),
        ({"word": "a"}, "a"),
        ({"word": "`$A", "escape": "`"}, "$A"),
    ],
)
def test_words(request_: object, answer: object) -> None:
    assert json.loads(words_json(json.dumps(request_))) == answer


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[",
        "[]",
        "1",
        "{}",
        '{"word": 1}',
        '{"word": "a", "env": {"A": 1}}',
        '{"word": "a", "env": []}',
        '{"word": "a", "env": [1]}',
        '{"word": "a", "mode": "x"}',
        '{"word": "a", "escape": 3}',
        '{"word": "${"}',
        "[" * 100_000,
    ],
)
def test_a_bad_request_is_answered(line: str) -> None:
    answer = json.loads(words_json(line))
    assert list(answer) == ["error"]
