"""Outlines and lists of targets."""

from __future__ import annotations

from typing import Any

import pytest

from builder.errors import ParseError
from builder.frontend.instructions import Containerfile, parse_containerfile
from builder.frontend.outline import outline, targets, to_text
from builder.frontend.source import SourceFile

TEXT = """# BASE names the image
ARG BASE=debian
# TAG of it
ARG TAG=${BASE}-slim
ARG UNUSED=1
# deps installs
FROM $BASE:$TAG AS deps
# JOBS in parallel
ARG JOBS=4
RUN --mount=type=secret,id=token,required --mount=type=secret,source=dir/pass --mount=type=ssh make
FROM --platform=$BUILDPLATFORM scratch AS app
ARG TAG
ARG MODE=fast$TAG
COPY --from=deps /a /b
RUN --mount=type=secret,target=/run/key.pem --mount=type=ssh,id=deploy x
FROM scratch AS other
ARG ELSE
"""


def file_of(text: str = TEXT) -> Containerfile:
    return parse_containerfile(SourceFile("Containerfile", text))


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]


def test_targets() -> None:
    entries = targets(file_of())["targets"]
    assert [(e["name"], e["default"], e["base"]) for e in entries] == [
        ("deps", False, "$BASE:$TAG"),
        ("app", False, "scratch"),
        ("other", True, "scratch"),
    ]
    assert entries[0]["description"] == "installs"
    assert entries[1]["platform"] == "$BUILDPLATFORM"
    assert entries[0]["location"] == {"ranges": [{"start": {"line": 7}, "end": {"line": 7}}]}


def test_an_outline_follows_what_the_stage_needs() -> None:
    result = outline(file_of(), "app")
    assert names(result["args"]) == ["BASE", "TAG", "JOBS", "MODE"]
    assert [arg.get("value") for arg in result["args"]] == ["debian", "debian-slim", "4", "fastdebian-slim"]
    assert result["args"][2]["description"] == "in parallel"
    assert [(s["name"], s.get("required", False)) for s in result["secrets"]] == [
        ("dir/pass", False),
        ("token", True),
        ("key.pem", False),
    ]
    assert names(result["ssh"]) == ["default", "deploy"]


def test_what_is_declared_again_has_its_last_value() -> None:
    text = (
        "ARG FOO=123\nARG ABC=abc\nARG DEF=def\nARG FOO=${FOO}${ABC}\nARG BAR=${FOO}456\nARG FOO=${FOO}456${BAR}\n"
        "FROM scratch\nARG FOO\nARG IN=123\nARG INBAR=${IN}456\nARG IN=${IN}456${INBAR}\n"
    )
    assert [(arg["name"], arg["value"]) for arg in outline(file_of(text))["args"]] == [
        ("ABC", "abc"),
        ("BAR", "123abc456"),
        ("FOO", "123abc456123abc456"),
        ("INBAR", "123456"),
        ("IN", "123456123456"),
    ]


def test_by_number_and_by_default() -> None:
    assert outline(file_of(), "0")["name"] == "deps"
    assert outline(file_of())["name"] == "other"
    assert names(outline(file_of())["args"]) == ["ELSE"]
    assert outline(file_of(), "DEPS")["description"] == "installs"


def test_build_arguments_show_their_values() -> None:
    result = outline(file_of(), "app", build_args={"TAG": "13", "MODE": "slow"})
    values = {arg["name"]: arg.get("value") for arg in result["args"]}
    assert (values["TAG"], values["MODE"]) == ("13", "slow")


def test_an_unknown_target() -> None:
    with pytest.raises(ParseError, match=r"target stage 'ap' could not be found \(did you mean app\?\)"):
        outline(file_of(), "ap")
    with pytest.raises(ParseError, match="'7' could not be found"):
        outline(file_of(), "7")


def test_an_error_has_a_place() -> None:
    with pytest.raises(ParseError) as caught:
        outline(file_of("FROM --platform=${ a\n"))
    assert caught.value.range is not None


def test_a_long_chain_of_stages() -> None:
    text = "FROM a AS s0\nARG FIRST\n" + "".join(f"FROM s{i} AS s{i + 1}\n" for i in range(3000))
    assert names(outline(file_of(text))["args"]) == ["FIRST"]


def test_tables() -> None:
    assert to_text(targets(file_of())).splitlines()[1] == "deps             $BASE:$TAG  installs"
    shown = to_text(outline(file_of(), "deps"))
    assert "TARGET: deps" in shown
    assert "JOBS       4            in parallel" in shown
    assert "token     yes" in shown
