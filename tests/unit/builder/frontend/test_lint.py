"""Each lint rule: what triggers it, what does not, and the options that silence it."""

from __future__ import annotations

from typing import Any

import pytest

from builder.errors import ParseError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.instructions import parse_containerfile
from builder.frontend.lint import (
    CheckOptions,
    Finding,
    check_options,
    enforce,
    lint,
    parse_check_options,
    render_json,
    to_json,
    to_text,
)
from builder.frontend.rules import RULES
from builder.frontend.scope import BaseImage
from builder.frontend.source import SourceFile
from layers.oci import Platform

AMD64 = Platform("linux", "amd64")


def findings(text: str, **options: Any) -> list[Finding]:
    options.setdefault("target_platform", AMD64)
    options.setdefault("build_platform", AMD64)
    return lint(parse_containerfile(SourceFile("Containerfile", text)), **options)


def rules(text: str, **options: Any) -> list[tuple[str, int]]:
    return [(finding.rule, finding.range.start_line) for finding in findings(text, **options)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("FROM a AS x", []),
        ("FROM a AS Xy", [("StageNameCasing", 1)]),
        ("FROM a as x", [("FromAsCasing", 1)]),
        ("from a AS x", [("FromAsCasing", 1)]),
        ("FROM a As x", [("FromAsCasing", 1)]),
        ("FROM a\nRUN x \\\n\n y", [("NoEmptyContinuation", 4)]),
        ("FROM a\nrun x\nUSER y", [("ConsistentInstructionCasing", 2)]),
        ("from a\nRUN x\nuser y", [("ConsistentInstructionCasing", 2)]),
        ("FROM a\nrUN x", [("ConsistentInstructionCasing", 2)]),
        ("FROM a AS x\nFROM b AS X", [("StageNameCasing", 2), ("DuplicateStageName", 2)]),
        ("FROM a AS scratch", [("ReservedStageName", 1)]),
        ("FROM a AS context", [("ReservedStageName", 1)]),
        ("FROM a\nCMD x", [("JSONArgsRecommended", 2)]),
        ('FROM a\nCMD ["x"]\nENTRYPOINT x', [("JSONArgsRecommended", 3)]),
        ('FROM a\nSHELL ["sh"]\nCMD x', []),
        ('FROM a AS b\nSHELL ["sh"]\nFROM b\nCMD x', []),
        ("FROM a\nRUN x", []),
        ("FROM a\nMAINTAINER m", [("MaintainerDeprecated", 2)]),
        ("FROM a:$X", [("InvalidDefaultArgInFrom", 1), ("UndefinedArgInFrom", 1)]),
        ("ARG X\nFROM a:$X", [("InvalidDefaultArgInFrom", 2)]),
        ("ARG X=1\nFROM a:$X", []),
        ("ARG X\nFROM a:${X:-1}", []),
        ("ARG X\nFROM $X", [("InvalidDefaultArgInFrom", 2)]),
        ("FROM UPPER/x", []),
        ("FROM upper/X", [("InvalidDefaultArgInFrom", 1)]),
        ("FROM h.example:5000/a/b-c:t@sha256:" + "a" * 64, []),
        ("FROM a\nWORKDIR x", [("WorkdirRelativePath", 2)]),
        ("FROM a\nWORKDIR /x\nWORKDIR y", []),
        ("FROM a AS b\nWORKDIR /x\nFROM b\nWORKDIR y", []),
        ("FROM a\nENV W=/x\nWORKDIR $W", []),
        ("FROM a\nCOPY $X /y", [("UndefinedVar", 2)]),
        ("FROM a\nARG X\nCOPY $X /y", []),
        ("FROM a\nENV X=1 Y=$X", [("UndefinedVar", 2)]),
        ("FROM a\nRUN echo $X", []),
        ("FROM a\nRUN --mount=type=cache,target=/$X y", [("UndefinedVar", 2)]),
        ("FROM a\nARG A=$X", [("UndefinedVar", 2)]),
        ("FROM a\nCOPY <<E /y\n$X\nE", [("UndefinedVar", 2)]),
        ("FROM a\nCOPY <<'E' /y\n$X\nE", []),
        ("FROM a\nENV PATH=/x:$PATH", []),
        ("FROM a AS b\nENV X=1\nFROM b\nUSER $X", []),
        ("ARG X=1\nFROM a\nUSER $X", [("UndefinedVar", 3)]),
        ("ARG X=1\nFROM a\nARG X\nUSER $X", []),
        ('FROM a\nCMD ["x"]\nCMD ["y"]', [("MultipleInstructionsDisallowed", 2)]),
        ('FROM a\nCMD ["x"]\nFROM b\nCMD ["y"]', []),
        ("FROM a\nHEALTHCHECK NONE\nHEALTHCHECK NONE", [("MultipleInstructionsDisallowed", 2)]),
        ('FROM a\nENTRYPOINT ["x"]\nENTRYPOINT []', [("MultipleInstructionsDisallowed", 2)]),
        ("FROM a\nENV X y", [("LegacyKeyValueFormat", 2)]),
        ("FROM a\nLABEL X y", [("LegacyKeyValueFormat", 2)]),
        ("FROM a\nENV X=y Z=$PATH", []),
        ("FROM --platform=linux/arm64 a", [("FromPlatformFlagConstDisallowed", 1)]),
        ("FROM --platform=linux/arm64 a AS build-arm64", []),
        ("FROM --platform=$BUILDPLATFORM a", []),
        ("FROM --platform=$TARGETPLATFORM a", [("RedundantTargetPlatform", 1)]),
        ("FROM --platform=${TARGETPLATFORM:-x} a", [("RedundantTargetPlatform", 1)]),
        ("FROM --platform=$TARGETOS/$TARGETARCH a", []),
        ("FROM a\nARG API_KEY", [("SecretsUsedInArgOrEnv", 2)]),
        ("FROM a\nENV DB_PASSWORD=x MONKEY=y token=z", [("SecretsUsedInArgOrEnv", 2), ("SecretsUsedInArgOrEnv", 2)]),
        ("FROM a\nENV PUBLIC_KEY=x", []),
        ("FROM a\nEXPOSE 80/TCP 81/udp", [("ExposeProtoCasing", 2)]),
        ("FROM a\nEXPOSE 127.0.0.1:80:80 81:81", [("ExposeInvalidFormat", 2), ("ExposeInvalidFormat", 2)]),
    ],
)
def test_a_rule(text: str, found: list[tuple[str, int]]) -> None:
    assert rules(text) == found


def test_details_and_suggestions() -> None:
    text = "ARG VERSION=1\nFROM a:$VERSON AS x\nENV NAME=1\nUSER $NAMEE"
    assert [f.detail for f in findings(text)][1:] == [
        "FROM argument 'VERSON' is not declared (did you mean VERSION?)",
        "Usage of undefined variable '$NAMEE' (did you mean $NAME?)",
    ]
    assert findings("FROM a\nENV A_KEY=1")[0].detail == (
        'Do not use ARG or ENV instructions for sensitive data (ENV "A_KEY")'
    )


def test_every_rule_can_report() -> None:
    """Each name in the table is produced by some file here; the table has no dead entry."""
    seen = {finding.rule for finding in findings(EVERYTHING, ignore=IgnoreMatcher.parse("secret"), base_image=arm_base)}
    assert seen == set(RULES)


def arm_base(image: str, platform: str | None) -> BaseImage:
    return BaseImage({"FROM_BASE": image}, platform=Platform("linux", "arm64"))


EVERYTHING = """# check=experimental=all
ARG TAG
# not a description
FROM --platform=linux/386 busybox:$TAG as Base
from --platform=$TARGETPLATFORM alpine:$OTHER AS scratch
MAINTAINER x
ENV FOO bar
ENV GITHUB_TOKEN=x
COPY $MISSING secret /x
WORKDIR foo
CMD echo hi
CMD ["x"]
EXPOSE 80/TCP 127.0.0.1:80:80
RUN a \\

  b
FROM scratch AS base
"""


class TestBaseImages:
    def test_their_variables_are_defined(self) -> None:
        text = "FROM a\nUSER $FROM_BASE\nUSER $NOT"
        found = findings(text, base_image=lambda image, platform: BaseImage({"FROM_BASE": "x"}))
        assert [(f.rule, f.range.start_line) for f in found] == [("UndefinedVar", 3)]

    def test_of_an_unknown_one_nothing_is_said(self) -> None:
        assert rules("FROM a\nUSER $X\nFROM scratch\nUSER $X", base_image=lambda *_: None) == [("UndefinedVar", 4)]

    def test_a_shell_of_the_base_counts(self) -> None:
        assert rules("FROM a\nCMD x", base_image=lambda *_: BaseImage({}, has_shell=True)) == []

    def test_the_platform_is_compared(self) -> None:
        (finding,) = findings("FROM a", base_image=arm_base)
        assert finding.detail == (
            'Base image a was pulled with platform "linux/arm64", expected "linux/amd64" for current build'
        )

    def test_stages_that_are_not_asked_for_are_read_as_text_only(self) -> None:
        text = "FROM a AS X\nUSER $A\nFROM b\nUSER $B"
        assert rules(text, stages=[1]) == [("StageNameCasing", 1), ("UndefinedVar", 4)]


class TestIgnoredFiles:
    def test_sources_of_the_context(self) -> None:
        ignore = IgnoreMatcher.parse("secret\n*.log", ".containerignore")
        text = "FROM a\nCOPY secret b.log ok /x/\nADD ./secret /x\nADD https://x/secret /x\nCOPY --from=b secret /x"
        found = findings(text, ignore=ignore)
        assert [f.range.start_line for f in found] == [2, 2, 3]
        assert found[0].detail == 'Attempting to Copy file "secret" that is excluded by .containerignore'
        assert found[2].detail.startswith("Attempting to Add file")

    @pytest.mark.parametrize(
        ("patterns", "source", "count"),
        [
            (".*", ".", 0),
            ("*", ".", 1),
            ("**", "/", 1),
            ("**/*", "./", 1),
            ("**\n!x", ".", 0),
            ("**\n!x", "./x", 0),
            ("**\n!x", "y", 1),
            ("**\n!d", "d/e", 0),
            ("d/", "d/e", 1),
            ("d\n!d/b", "d/e", 1),
            ("d\n!d/b", "d", 0),
            ("d\n!d/b", "d/b", 0),
            ("d\n!d/*.txt", "d/e", 0),
            ("d\n!*/keep", "d", 0),
            ("d\n!other/*.txt", "d/e", 1),
            ("!d/b\nd", "d/e", 1),
        ],
    )
    def test_the_root_and_exceptions(self, patterns: str, source: str, count: int) -> None:
        assert len(findings(f"FROM a\nCOPY {source} /x/", ignore=IgnoreMatcher.parse(patterns))) == count


class TestAboveAnInstruction:
    """`# check=skip=RULE // why` counts for the next instruction alone."""

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("FROM a\n# check=skip=JSONArgsRecommended\nCMD x\nENTRYPOINT y", [("JSONArgsRecommended", 4)]),
            ("FROM a\n# check=skip=SecretsUsedInArgOrEnv // it is public\nENV password=x\nARG password", [
                ("SecretsUsedInArgOrEnv", 4)
            ]),
            ("FROM a\n# why\n#check = skip=all // all\n# because\nMAINTAINER x\nMAINTAINER y", [
                ("MaintainerDeprecated", 6)
            ]),
            ("FROM a\n# check=skip=all\n\nMAINTAINER x", [("MaintainerDeprecated", 4)]),
            ("FROM a\n# check=nonsense\nMAINTAINER x", [("MaintainerDeprecated", 3)]),
            ("FROM a\n# checks are good\nMAINTAINER x", [("MaintainerDeprecated", 3)]),
            ("FROM a\n# check=skip=LegacyKeyValueFormat\nENV a b\nLABEL a b", [("LegacyKeyValueFormat", 4)]),
            ("\n# check=skip=RedundantTargetPlatform\nFROM --platform=$TARGETPLATFORM a", []),
            ("FROM a\n# check=skip=WorkdirRelativePath\nWORKDIR b", []),
            ("FROM a\n# check=skip=ConsistentInstructionCasing\nrun b", []),
        ],
    )  # fmt: skip
    def test_reported(self, text: str, found: list[tuple[str, int]]) -> None:
        assert rules(text) == found


@pytest.mark.parametrize("name", ["TOKEN_FILE", "password_file", "AUTH_MODULE_VERSION", "PUBLIC_KEY", "tokens"])
def test_names_that_hold_no_secret(name: str) -> None:
    assert rules(f"FROM a\nENV {name}=x\nARG {name}") == []


def test_an_experimental_rule_that_is_asked_for_is_not_skipped_with_the_others() -> None:
    text = "# check=skip=all;experimental=InvalidDefinitionDescription\n\n# bad\nFROM a AS b\nMAINTAINER c"
    assert rules(text) == [("InvalidDefinitionDescription", 4)]


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "options"),
        [
            ("", CheckOptions()),
            ("skip=A, B", CheckOptions(skip=frozenset({"A", "B"}))),
            ("skip=all;error=true", CheckOptions(skip=frozenset({"all"}), error=True)),
            ("error=false; experimental=A", CheckOptions(experimental=frozenset({"A"}))),
        ],
    )
    def test_parsed(self, text: str, options: CheckOptions) -> None:
        assert parse_check_options(text) == options

    @pytest.mark.parametrize("text", ["skip", "sikp=A", "error=perhaps", "A;B"])
    def test_refused(self, text: str) -> None:
        with pytest.raises(ParseError):
            parse_check_options(text)

    def test_in_the_file(self) -> None:
        assert rules("# check=skip=StageNameCasing\nFROM a AS X\nMAINTAINER y") == [("MaintainerDeprecated", 3)]
        assert rules("# check=skip=all\nFROM a AS X") == []
        assert [f.level for f in findings("# check=error=true\nFROM a AS X")] == ["error"]
        assert [f.level for f in findings("FROM a AS X")] == ["warning"]

    def test_of_the_caller_replace_those_of_the_file(self) -> None:
        assert rules("# check=skip=all\nFROM a AS X", options=CheckOptions()) == [("StageNameCasing", 2)]

    def test_a_build_argument_replaces_those_of_the_file(self) -> None:
        text = "# check=error=true\nFROM a AS X"
        assert rules(text, build_args={"BUILDKIT_DOCKERFILE_CHECK": "skip=all"}) == []
        assert [f.level for f in findings(text, build_args={"BUILDKIT_DOCKERFILE_CHECK": "error=false"})] == ["warning"]
        with pytest.raises(ParseError, match="--build-arg BUILDKIT_DOCKERFILE_CHECK: invalid check option"):
            rules(text, build_args={"BUILDKIT_DOCKERFILE_CHECK": "x=y"})

    def test_error_true_refuses_the_build(self) -> None:
        file = parse_containerfile(SourceFile("C", "# check=error=true\nFROM a AS X\nMAINTAINER y"))
        with pytest.raises(ParseError, match="rules: MaintainerDeprecated, StageNameCasing") as caught:
            enforce(file, lint(file))
        assert str(caught.value).startswith("C:2:1: ")
        enforce(file, lint(file, options=CheckOptions()))

    def test_an_error_names_the_line(self) -> None:
        file = parse_containerfile(SourceFile("C", "# syntax=x\n# check=skp=A\nFROM a"))
        with pytest.raises(ParseError, match=r"did you mean skip") as caught:
            check_options(file)
        assert str(caught.value).startswith("C:2")

    def test_experimental_rules_wait_to_be_asked(self) -> None:
        text = "# a remark\nFROM a AS x\n# y is\nARG x\n# x is\nARG x\n# remark\n\nARG x"
        assert rules(text) == []
        found = findings("# check=experimental=InvalidDefinitionDescription\n" + text)
        assert [f.range.start_line for f in found] == [3, 5]


@pytest.mark.parametrize(
    "text", ["FROM a\nUSER ${X", "ARG A=${\nFROM a", "FROM ${", "FROM a\nARG B=${", "FROM a\nEXPOSE $("]
)
def test_what_cannot_be_expanded_is_an_error_with_a_place(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        findings(text)
    assert caught.value.range is not None


def test_plain_text() -> None:
    file = parse_containerfile(SourceFile("web/Containerfile", "FROM a AS X\n"))
    assert to_text(file, lint(file)) == (
        "web/Containerfile:1: warning: StageNameCasing: Stage name 'X' should be lowercase\n"
        "   1 | FROM a AS X\n"
        "     | ^^^^^^^^^^^\n"
    )
    assert to_text(file, []) == ""


def test_json() -> None:
    file = parse_containerfile(SourceFile("C", "FROM a AS X\n"))
    assert to_json(file, lint(file)) == {
        "sources": [{"filename": "C"}],
        "warnings": [
            {
                "ruleName": "StageNameCasing",
                "description": "Stage names should be lowercase",
                "detail": "Stage name 'X' should be lowercase",
                "level": "warning",
                "location": {
                    "sourceIndex": 0,
                    "ranges": [{"start": {"line": 1, "character": 0}, "end": {"line": 1, "character": 11}}],
                },
            }
        ],
    }
    assert render_json(file, []).startswith("{\n")
