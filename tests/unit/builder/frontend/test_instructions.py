"""Typed instructions: their fields, their expansion, what is refused and how it is said."""

from __future__ import annotations

from typing import TypeVar

import pytest

from builder.errors import ParseError
from builder.frontend.heredoc import Heredoc
from builder.frontend.instructions import (
    Add,
    Arg,
    ArgPair,
    Cmd,
    Containerfile,
    Copy,
    Entrypoint,
    Env,
    Expose,
    Healthcheck,
    Label,
    Maintainer,
    Onbuild,
    Pair,
    Run,
    RunDevice,
    RunMount,
    Script,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
    parse_containerfile,
    parse_instruction,
    parse_onbuild,
)
from builder.frontend.language import Statement
from builder.frontend.source import SourceFile, SourceRange

Kind = TypeVar("Kind", bound=Statement)
ENV = {"V": "value", "P": "81", "S": "a b"}


def file_of(text: str) -> Containerfile:
    return parse_containerfile(SourceFile("Containerfile", text))


def only(text: str, kind: type[Kind]) -> Kind:
    instruction: Statement
    (instruction,) = file_of("FROM scratch\n" + text).stages[0].instructions
    if not isinstance(instruction, kind):
        raise TypeError(f"expected {kind.__name__}, read {instruction!r}")
    return instruction


def expanded(text: str, kind: type[Kind]) -> Kind:
    return only(text, kind).expand(ENV, "\\")


def refused(text: str) -> ParseError:
    with pytest.raises(ParseError) as caught:
        expand_all(file_of(text))
    assert caught.value.source is not None
    assert caught.value.range is not None
    return caught.value


def expand_all(file: Containerfile) -> None:
    for stage in file.stages:
        for instruction in stage.instructions:
            instruction.expand(ENV, file.escape)


def test_stages() -> None:
    file = file_of("ARG A=1\nARG B\nfrom --platform=$P img:$A as Base\nUSER x\n\nFROM base\n")
    assert [pair for arg in file.global_args for pair in arg.pairs] == [ArgPair("A", "1"), ArgPair("B", None)]
    first, second = file.stages
    assert (first.index, first.name, first.from_.image, first.from_.platform) == (0, "base", "img:$A", "$P")
    assert (first.from_.as_written, first.from_.as_keyword, first.from_.written) == ("Base", "as", "from")
    assert first.range == SourceRange(3, 4, 1, 7)
    assert (second.index, second.name, second.from_.image, second.instructions) == (1, None, "base", ())
    assert first.from_.expand({"P": "linux/arm64", "A": "2"}, "\\").image == "img:2"
    assert first.from_.expand({"P": "linux/arm64"}, "\\").platform == "linux/arm64"


def test_a_stage_has_the_description_above_it() -> None:
    file = file_of("# base does things\nFROM x AS base\n# other\nFROM y AS last\n")
    assert [stage.description for stage in file.stages] == ["does things", ""]


def test_pairs_are_expanded_on_both_sides() -> None:
    assert expanded("ENV A=$V B='$V' $V=\"x y\"", Env).pairs == (
        Pair("A", "value"),
        Pair("B", "$V"),
        Pair("value", "x y"),
    )
    assert expanded("LABEL a.b $V  c", Label).pairs == (Pair("a.b", "value  c", legacy=True),)
    assert expanded("ARG A=$V B C=", Arg).pairs == (ArgPair("A", "value"), ArgPair("B", None), ArgPair("C", ""))


def test_one_environment_for_a_whole_instruction() -> None:
    env = only("ENV A=new B=$A", Env).expand({"A": "old"}, "\\")
    assert env.pairs == (Pair("A", "new"), Pair("B", "old"))


def test_plain_words_are_expanded() -> None:
    assert expanded("WORKDIR /x/$V", Workdir).path == "/x/value"
    assert expanded("USER $V:g", User).user == "value:g"
    assert expanded("VOLUME /a/$V /b", Volume).paths == ("/a/value", "/b")
    assert expanded('VOLUME ["/a $V", " /b "]', Volume).paths == ("/a value", "/b")


def test_commands_are_not_expanded() -> None:
    run = expanded("RUN echo $V 'x'", Run)
    assert (run.args, run.shell) == (("echo $V 'x'",), True)
    assert expanded('CMD ["$V"]', Cmd) == only('CMD ["$V"]', Cmd)
    assert expanded("ENTRYPOINT $V x", Entrypoint).args == ("$V x",)
    assert expanded("MAINTAINER $V a", Maintainer).name == "$V a"
    assert expanded("HEALTHCHECK CMD $V", Healthcheck).test == ("CMD-SHELL", "$V")
    assert expanded('SHELL ["$V"]', Shell).args == ("$V",)


def test_empty_commands() -> None:
    assert (only("CMD", Cmd).args, only("CMD", Cmd).shell) == ((), True)
    assert (only("ENTRYPOINT []", Entrypoint).args, only("ENTRYPOINT []", Entrypoint).shell) == ((), False)


class TestTransfers:
    def test_copy(self) -> None:
        copy = expanded(
            "COPY --from=img:1 --chown=$V:2 --chmod=u=$V --link --parents=true --exclude=*.$V --exclude=b c$V d /f/",
            Copy,
        )
        assert (copy.from_, copy.chown, copy.chmod) == ("img:1", "value:2", "u=value")
        assert (copy.link, copy.parents, copy.exclude) == (True, True, ("*.$V", "b"))
        assert (copy.sources, copy.destination) == (("cvalue", "d"), "/f/")
        assert expanded('COPY ["a $V", "\'b c\'", "/d"]', Copy).sources == ("a value", "b c")

    def test_add(self) -> None:
        add = expanded("ADD --checksum=sha256:$V --keep-git-dir=true --unpack=false https://h/$V /d", Add)
        assert (add.checksum, add.keep_git_dir, add.unpack) == ("sha256:value", True, False)
        assert (add.sources, add.destination) == (("https://h/value",), "/d")
        bare = only("ADD a b", Add)
        assert (bare.checksum, bare.keep_git_dir, bare.unpack, bare.link) == (None, None, None, False)

    def test_heredocs_are_sources_and_expand_unless_quoted(self) -> None:
        copy = expanded("COPY <<A <<-'B' c$V /d\n\"$V\" \\$V\nA\n\t$V\nB\n", Copy)
        assert copy.heredocs == (
            Heredoc("A", '"value" $V\n', expand=True),
            Heredoc("B", "$V\n", expand=False, chomp=True),
        )
        assert copy.sources == ("cvalue",)

    @pytest.mark.parametrize(
        ("line", "message", "column"),
        [
            ("COPY a", "requires at least two arguments", 1),
            ("COPY a <<E\nE", "cannot accept a heredoc as a destination", 8),
            ("COPY --chwon=a b c", r"unknown flag: --chwon \(did you mean --chown\?\)", 6),
            ("COPY --unpack=true a b", "unknown flag: --unpack", 6),
            ("ADD --from=x a b", "unknown flag: --from", 5),
            ("COPY --link=perhaps a b", "expecting boolean value for flag link, not: perhaps", 6),
            ("COPY --link= a b", "missing a value on flag: link", 6),
            ("COPY --chown a b", "missing a value on flag: chown", 6),
            ("COPY --chown=a --chown=b c d", "duplicate flag specified: chown", 6),
            ("COPY --from=$V a b", "doesn't support variable expansion", 6),
        ],
    )
    def test_refused(self, line: str, message: str, column: int) -> None:
        error = refused("FROM x\n" + line)
        assert error.range is not None
        with pytest.raises(ParseError, match=message):
            raise error
        assert (error.range.start_line, error.range.start_col) == (2, column)


class TestRun:
    def test_options(self) -> None:
        run = only("RUN --network=none --security=insecure --device=vendor.com/gpu=0,required a", Run)
        assert (run.network, run.security) == ("none", "insecure")
        assert run.devices == (RunDevice("vendor.com/gpu=0", required=True),)
        assert only("RUN a", Run).network is None

    def test_mounts_without_variables_are_known_at_once(self) -> None:
        run = only("RUN --mount=type=cache,target=/c,sharing=locked --mount=from=st,target=/s,rw a", Run)
        assert run.mounts == (
            RunMount(type="cache", target="/c", sharing="locked", readonly=False),
            RunMount(type="bind", from_="st", target="/s", readonly=False),
        )

    def test_mounts_with_variables_are_known_after_expansion(self) -> None:
        text = "RUN --mount=type=secret,id=$V,env=TOKEN --mount=type=tmpfs,target=/t,size=${P}m a"
        assert only(text, Run).mounts == ()
        assert expanded(text, Run).mounts == (
            RunMount(type="secret", id="value", env="TOKEN"),
            RunMount(type="tmpfs", target="/t", size_bytes=81 << 20, readonly=False),
        )

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("RUN --mount=type=cash,target=/x a", r"unsupported mount type \"cash\" \(did you mean cache\?\)"),
            ("RUN --mount=type=cache,targt=/x a", r"unexpected key 'targt' in 'targt=/x' \(did you mean target\?\)"),
            ("RUN --mount=from=$V,target=/x a", "doesn't support variable expansion"),
            ("RUN --mount=type=$NOPE a", "unsupported mount type"),
            ("RUN --network=bridge a", 'network "bridge" is not valid'),
            ("RUN --security=none a", 'security "none" is not valid'),
            ("RUN --privileged a", "unknown flag: --privileged"),
        ],
    )
    def test_refused(self, line: str, message: str) -> None:
        error = refused("FROM x\n" + line)
        with pytest.raises(ParseError, match=message):
            raise error
        assert error.range == SourceRange(2, 2, 5, 5 + len(line.split()[1].partition("=")[0])) or "$NOPE" in line

    @pytest.mark.parametrize(
        ("text", "script"),
        [
            ("RUN a b", Script(("a b",), True)),
            ('RUN ["a", "b"]', Script(("a", "b"), False)),
            ("RUN <<E\na $V\nE", Script(("a $V\n",), True)),
            ("RUN <<-'E'\n\ta\nE", Script(("a\n",), True)),
            ("RUN <<E\n#!/bin/awk\nx\nE", Script(("/dev/pipes/E",), True, ("E", "#!/bin/awk\nx\n"))),
            ("RUN cat <<A <<B\na\nA\nb\nB", Script(("cat <<A <<B\na\nA\nb\nB",), True)),
            ("RUN sh -e <<E\n#!x\nE", Script(("sh -e <<E\n#!x\nE",), True)),
        ],
    )
    def test_script(self, text: str, script: Script) -> None:
        assert expanded(text, Run).script() == script


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("80", ("80/tcp",)),
        ("80 443/TCP 53/udp 80/tcp", ("443/tcp", "53/udp", "80/tcp")),
        ("7000-7002/sctp", ("7000/sctp", "7001/sctp", "7002/sctp")),
        ("$P ${NONE}", ("81/tcp",)),
        ("$P-83", ("81/tcp", "82/tcp", "83/tcp")),
        ("8080:80 127.0.0.1:1:2 [::1]:3:4", ("2/tcp", "80/tcp", "4/tcp")),
        ("9000-9010:80", ("80/tcp",)),
        ("80/", ("80/tcp",)),
    ],
)
def test_expose(text: str, wanted: tuple[str, ...]) -> None:
    assert expanded("EXPOSE " + text, Expose).ports == wanted


@pytest.mark.parametrize(
    "text", ["0x50", "65536", "-1", "2-1", "1-2-3", "/tcp", "80/icmp", "x:80", "1-2:3-5", "300.0.0.1:1:2", "٣", "1_0"]
)
def test_expose_refuses(text: str) -> None:
    assert refused("FROM x\nEXPOSE " + text).range == SourceRange(2, 2, 1, 8 + len(text))


def test_healthcheck() -> None:
    check = only(
        "HEALTHCHECK --interval=1m30s --timeout=1.5s --start-period=0s "
        '--start-interval=250ms --retries=4 CMD ["a", "b"]',
        Healthcheck,
    )
    assert check.test == ("CMD", "a", "b")
    assert (check.interval_ns, check.timeout_ns, check.start_period_ns) == (90 * 10**9, 1_500_000_000, 0)
    assert (check.start_interval_ns, check.retries) == (250_000_000, 4)
    assert only("HEALTHCHECK none", Healthcheck).test == ("NONE",)
    assert only("HEALTHCHECK cmd x y", Healthcheck).test == ("CMD-SHELL", "x y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HEALTHCHECK", "requires at least one argument"),
        ("HEALTHCHECK CMD", "Missing command"),
        ("HEALTHCHECK NONE x", "takes no arguments"),
        ("HEALTHCHECK CONNECT x", 'Unknown type "CONNECT"'),
        ("HEALTHCHECK --interval=5 CMD x", "invalid duration"),
        ("HEALTHCHECK --interval=1us CMD x", "cannot be less than 1ms"),
        ("HEALTHCHECK --retries=-1 CMD x", "cannot be negative"),
        ("HEALTHCHECK --retries=x CMD x", "invalid number of retries"),
        ("HEALTHCHECK --retries=2147483648 CMD x", "invalid number of retries"),
        ("SHELL /bin/sh -c", "requires the arguments to be in JSON form"),
        ("SHELL []", "requires at least one argument"),
        ("STOPSIGNAL SIGFOO", "invalid signal: SIGFOO"),
        ("STOPSIGNAL SIGTREM", r"did you mean SIGTERM\?"),
        ("STOPSIGNAL 0", "invalid signal"),
        ("STOPSIGNAL", "requires exactly one argument"),
        ("USER", "requires exactly one argument"),
        ("WORKDIR", "requires exactly one argument"),
        ("MAINTAINER", "requires exactly one argument"),
        ("ENV", "requires at least one argument"),
        ("ENV =x", "names can not be blank"),
        ("LABEL =x", "names can not be blank"),
        ("ARG", "requires at least one argument"),
        ("ARG =x", "names can not be blank"),
        ("EXPOSE", "requires at least one argument"),
        ("VOLUME []", "requires at least one argument"),
        ('VOLUME ["a", " "]', "can not be an empty string"),
        ("VOLUME $NONE", "can not be an empty string"),
        ("USER --now x", "unknown flag: --now"),
        ("ENTRYPONT x", r"unknown instruction: ENTRYPONT \(did you mean ENTRYPOINT\?\)"),
        ("INCLUDE x", "unknown instruction: INCLUDE"),
        ("ENV A='x", "unexpected end of statement"),
        ("WORKDIR ${V", "unsupported modifier"),
        ("FROM a b", "either one or three arguments"),
        ("FROM a as 1b", "invalid name for build stage"),
        ("FROM a AS b!", "invalid name for build stage"),
        ("FROM --os=x a", "unknown flag: --os"),
    ],
)
def test_refused(text: str, message: str) -> None:
    error = refused("FROM scratch\n" + text)
    with pytest.raises(ParseError, match=message):
        raise error
    assert error.range is not None
    assert error.range.start_line == 2
    assert "Containerfile:2:" in str(error)


@pytest.mark.parametrize("signal", ["SIGTERM", "term", "9", "SigRtMin+3", "RTMAX-14", "37", "$V9"])
def test_stopsignal(signal: str) -> None:
    assert only("STOPSIGNAL " + signal, StopSignal).expand({"V9": "KILL"}, "\\").signal in (signal, "KILL")


class TestOnbuild:
    def test_keeps_the_text_and_the_meaning(self) -> None:
        onbuild = only("onbuild  COPY --chown=$V a b", Onbuild)
        assert onbuild.expression == "COPY --chown=$V a b"
        assert isinstance(onbuild.instruction, Copy)
        assert onbuild.expand(ENV, "\\") == onbuild

    def test_keeps_heredocs(self) -> None:
        onbuild = only("ONBUILD RUN cat <<A <<B\na\nA\nb\nB", Onbuild)
        assert onbuild.expression == "RUN cat <<A <<B\na\nA\nb\nB"
        again = parse_onbuild(onbuild.expression)
        assert isinstance(again, Run)
        assert [h.content for h in again.heredocs] == ["a\n", "b\n"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ONBUILD", "requires at least one argument"),
            ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD"),
            ("ONBUILD from x", "FROM isn't allowed as an ONBUILD trigger"),
            ("ONBUILD MAINTAINER x", "MAINTAINER isn't allowed"),
            ("ONBUILD --x RUN y", "unknown flag: --x"),
            ("ONBUILD COPY x", "requires at least two arguments"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        with pytest.raises(ParseError, match=message):
            file_of("FROM x\n" + text)

    def test_a_trigger_of_a_base_image_points_at_the_from(self) -> None:
        source, place = SourceFile("Containerfile", "FROM base\n"), SourceRange(1, 1, 1, 10)
        trigger = parse_onbuild("RUN make", source, place)
        assert isinstance(trigger, Run)
        assert (trigger.range, trigger.source, trigger.original) == (place, source, "RUN make")
        with pytest.raises(ParseError, match=r"Containerfile:1:1: in `COPY a`: COPY requires"):
            try:
                parse_onbuild("COPY a", source, place)
            except ParseError as e:
                raise ParseError(str(e)) from e
        with pytest.raises(ParseError, match="isn't allowed"):
            parse_onbuild("FROM x", source, place)


def test_a_lone_instruction() -> None:
    assert parse_instruction('CMD ["a"]') == parse_instruction('CMD ["a"]')
    with pytest.raises(ParseError, match="single instruction"):
        parse_instruction("USER a\nUSER b")
    with pytest.raises(ParseError, match="no instructions"):
        parse_instruction("")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ARG A", "contains no stages"),
        ("RUN x\nFROM y", "RUN stands before the first FROM"),
        ("FORM x", r"unknown instruction: FORM \(did you mean FROM\?\)"),
    ],
)
def test_a_file_must_begin_with_from(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        file_of(text)


def test_undefined_variables() -> None:
    copy = only("COPY --chown=$A $V <<E /x\n$B\nE", Copy)
    assert copy.undefined(ENV, "\\") == {"A", "B"}


def test_records_are_values() -> None:
    user = only("USER a", User)
    assert user == only("USER a", User)
    assert hash(user) == hash(only("USER a", User))
    assert user != only("USER b", User)
    assert user.replace(user="b", original="USER b") == only("USER b", User)
    assert repr(user).startswith("User(range=")
    with pytest.raises(AttributeError):
        user.user = "b"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del user.user
    with pytest.raises(TypeError, match=r"missing \['user'\]"):
        User(range=user.range, original="", source=user.source)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"unknown \['name'\]"):
        user.replace(name="x")
