"""The small notations: durations, sizes, mount options, signals, spellings, excerpts, error texts."""

from __future__ import annotations

import pytest

from builder.errors import (
    BuildError,
    ContextError,
    ParseError,
    PlanError,
    SandboxError,
    StepError,
    UsageError,
)
from builder.frontend.durations import parse_duration
from builder.frontend.language import RunDevice, RunMount
from builder.frontend.runoptions import check_mount, parse_device, parse_mount, parse_size, split_csv
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.spelling import did_you_mean, nearest


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("5s", 5 * 10**9),
        ("1h2m3s", 3723 * 10**9),
        ("1.5ms", 1_500_000),
        (".5s", 500_000_000),
        ("1.s", 10**9),
        ("2us", 2000),
        ("2µs", 2000),
        ("-1m", -60 * 10**9),
        ("+3ns", 3),
        ("0.0000000019s", 1),
    ],
)
def test_durations(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "5", "s", ".s", "1d", "1 s", "-", "1s2", "9999999h", "1e3s", "٣s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ParseError, match="invalid duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("5b", 5), ("64m", 64 << 20), ("1.5GiB", 3 << 29), ("100 KB", 100 << 10), ("2T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1mm", "1ib", "1 2m", "1.2.3m", "1e9999", "9" * 30])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ParseError, match="invalid value for size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("option", "mount"),
    [
        ("target=/x", RunMount(target="/x")),
        ("type=bind,src=a,dst=/x,readwrite", RunMount(source="a", target="/x", readonly=False)),
        ("type=bind,dst=/x,rw=false", RunMount(target="/x", readonly=True)),
        ("TYPE=Cache,id=x,destination=/x", RunMount(type="cache", id="x", target="/x", readonly=False)),
        (
            "type=cache,target=/x,ro,mode=0700,uid=1,gid=2",
            RunMount(type="cache", target="/x", mode=0o700, uid=1, gid=2),
        ),
        ("type=secret,target=/run/x,required", RunMount(type="secret", target="/run/x", required=True)),
        ("type=secret,id=x,required=false", RunMount(type="secret", id="x")),
        ("type=ssh", RunMount(type="ssh")),
        ("type=ssh,id=k,mode=600,required=1", RunMount(type="ssh", id="k", mode=0o600, required=True)),
        ('type=bind,"source=a,b",target=/x', RunMount(source="a,b", target="/x")),
        ("type=secret,id=a,env=", RunMount(type="secret", id="a", env="")),
    ],
)
def test_mounts(option: str, mount: RunMount) -> None:
    assert parse_mount(option, str) == mount


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("type=bind,target", "must be a key=value pair"),
        ("type=bind,sorce", "unexpected key 'sorce'"),
        ("", "unexpected key ''"),
        ("required,type=secret,id=x", "unexpected key 'required' for mount type 'bind'"),
        ("type=cache,target=/x,required", "unexpected key 'required' for mount type 'cache'"),
        ("type=cache,target=/x,size=1m", "unexpected key 'size' for mount type 'cache'"),
        ("type=tmpfs,target=/x,size=big", "invalid value for size"),
        ("type=bind,target=/x,mode=700", "mode not allowed"),
        ("type=tmpfs,target=/x,uid=1", "uid not allowed"),
        ("type=cache,target=/x,mode=9", "invalid value 9 for mode"),
        ("type=cache,target=/x,uid=root", "invalid value root for uid"),
        ("type=cache,target=/x,gid=4294967296", "invalid value 4294967296 for gid"),
        ("type=cache,target=/x,sharing=lockd", "did you mean locked"),
        ("type=bind,target=/x,sharing=locked", "invalid cache sharing set for bind mount"),
        ("type=bind,target=/x,ro=yes", "invalid value for ro: yes"),
        ("type=secret", "one of source, target required"),
        ("type=secret,id=a,source=b", "both source and id can't be set"),
        ("type=secret,id=a,from=b", "should not have a from"),
        ("type=secret,id=a,sharing=locked", "should not define sharing"),
        ("from=$x,target=/x", "doesn't support variable expansion"),
        ('a"b=c', "bare"),
        ('"a=b', "extraneous or missing"),
        ('"a=b"c', "extraneous or missing"),
    ],
)
def test_bad_mounts(option: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse_mount(option, str)


def test_a_lone_dollar_in_from_is_no_variable() -> None:
    check_mount("from=a$,target=/x")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a,b", ["a", "b"]),
        ("", [""]),
        ("a,", ["a", ""]),
        ('"a,b",c', ["a,b", "c"]),
        ('"a""b"', ['a"b']),
        ('"",x', ["", "x"]),
    ],
)
def test_csv(text: str, fields: list[str]) -> None:
    assert split_csv(text, "mounts") == fields


def test_devices() -> None:
    assert parse_device("v.com/d=x") == RunDevice("v.com/d=x")
    assert parse_device("name=v.com/d,required=true") == RunDevice("v.com/d", required=True)
    for bad in ("a,b", "a,name=b", "a,b=c", "a,required=maybe"):
        with pytest.raises(ParseError):
            parse_device(bad)


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("form", "FROM"),
        ("RNU", "RUN"),
        ("copyy", "COPY"),
        ("healthchek", "HEALTHCHECK"),
        ("xyz", None),
        ("", None),
        ("run", None),
    ],
)
def test_spelling(word: str, wanted: str | None) -> None:
    assert nearest(word, ["FROM", "RUN", "COPY", "HEALTHCHECK"]) == wanted


def test_spelling_can_mind_the_case() -> None:
    assert nearest("FOo", ["FOO"], match_case=True) == "FOO"
    assert did_you_mean("nothing", ["else"]) == ""
    assert nearest("x" * 100_000, ["y"]) is None


class TestExcerpts:
    SOURCE = SourceFile("C", "FROM x\n\tRUN a\n" + "y" * 500 + "\n")

    def test_a_token(self) -> None:
        place = self.SOURCE.locate("x", SourceRange(1, 2))
        assert place == SourceRange(1, 1, 6, 7)
        assert self.SOURCE.position(place) == "C:1:6"
        assert self.SOURCE.excerpt(place) == "   1 | FROM x\n     |      ^"

    def test_tabs_keep_the_caret_in_place(self) -> None:
        assert self.SOURCE.excerpt(SourceRange(2, 2)) == "   2 | \tRUN a\n     | \t^^^^^"

    def test_a_long_line_is_cut(self) -> None:
        shown = self.SOURCE.excerpt(SourceRange(3, 3, 300, 301))
        text, carets = shown.split("\n")
        assert max(len(text), len(carets)) < 200
        assert text[carets.index("^")] == "y"

    def test_no_place(self) -> None:
        assert self.SOURCE.locate("missing", SourceRange(1, 2)) == SourceRange(1, 2)
        assert self.SOURCE.excerpt(SourceRange(99, 99)) == ""

    def test_control_characters_are_not_sent_to_a_terminal(self) -> None:
        assert "\x1b" not in SourceFile("C", "RUN \x1b[2J").excerpt(SourceRange(1, 1))


class TestErrors:
    def test_a_parse_error(self) -> None:
        source = SourceFile("C", "FORM x\n")
        error = ParseError("unknown", source=source, range=SourceRange(1, 1, 1, 5), hint="try FROM")
        assert (error.message, str(error), error.exit_code) == ("unknown", "C:1:1: unknown", 1)
        assert error.render() == "C:1:1: unknown\n   1 | FORM x\n     | ^^^^\nhint: try FROM"
        assert ParseError("bare").render() == "bare"
        assert str(ParseError("m", source=source)) == "C: m"
        assert isinstance(PlanError("x"), ParseError)

    @pytest.mark.parametrize(("status", "code"), [(3, 3), (137, 137), (0, 1), (-9, 1), (256, 1)])
    def test_a_step_error_exits_with_the_status(self, status: int, code: int) -> None:
        error = StepError("failed", step="RUN x", exit_status=status)
        assert error.exit_code == code
        assert StepError("other", step="", exit_status=7).exit_code == 7
        assert BuildError("x").exit_code == 1

    def test_the_others(self) -> None:
        error = SandboxError("no", operation="mount", errno=1, path="/proc")
        assert (error.operation, error.errno, error.path) == ("mount", 1, "/proc")
        assert UsageError("x").exit_code == 2
        assert ContextError("x").exit_code == 1
        place = SourceRange(1, 1, 1, 5)
        assert str(StepError("f", step="s", exit_status=1, source=SourceFile("C", "RUN x"), range=place)) == "C:1:1: f"
