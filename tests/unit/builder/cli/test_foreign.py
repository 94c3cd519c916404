"""Flags of other tools: each is refused, and the refusal says what there is instead."""

from __future__ import annotations

import re
from argparse import REMAINDER, ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest

from builder.cli import foreign
from builder.cli.main import VERBS, _split_verb, main
from builder.cli.options import take_booleans

OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OF_OTHERS = {"--user", "--scope", "--filter"}
"""What a hint quotes of another program, or of another verb."""


def flags_of(verb: str) -> set[str]:
    parser = ArgumentParser(prog=f"pybuild {verb}", add_help=False)
    import_module(f"builder.cli.{VERBS[verb].module}").configure(verb, parser)
    return {"--debug", "--root", *(name for action in parser._actions for name in action.option_strings)}


@pytest.mark.parametrize("verb", sorted(foreign._OF))
def test_what_is_refused_is_no_flag_and_what_is_named_is_one(verb: str) -> None:
    known = flags_of(verb)
    for flag, hint in foreign._OF[verb].items():
        assert flag not in known, f"{verb} {flag} is a flag of its own"
        if verb in {"build", "run"}:
            missing = set(OPTION.findall(hint)) - known - OF_OTHERS
            assert not missing, f"{verb} {flag}: {hint}"


def test_hints_for_every_command_name_flags_that_there_are() -> None:
    everything = set[str]().union(*map(flags_of, VERBS))
    for flag, hint in foreign._EVERYWHERE.items():
        assert set(OPTION.findall(hint)) <= everything | OF_OTHERS, f"{flag}: {hint}"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["build", "--attest=type=sbom", "."], "hint: pybuild makes no attestations"),
        (["run", "--gpus", "all", "image"], "hint: --device"),
        (["copy", "--dest-username", "me", "a", "b"], "hint: --dest-creds"),
        (["stop", "--latest"], "hint: name the container"),
        (["build", "--nonsense"], "hint: see `pybuild build --help`"),
        (["buildx", "build", "."], "hint: `pybuild build`, `pybuild bake`"),
        (["version"], "hint: `pybuild --version`"),
    ],
)
def test_a_refusal_says_what_there_is_instead(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(words)
    said = capsys.readouterr().err
    assert status == (125 if words[0] == "run" else 2), said
    assert hint in said and ("unrecognized arguments" in said or f"unknown command {words[0]!r}" in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--stop-signal", "SIGNONE", "image"], "error: --stop-signal: invalid signal: SIGNONE"),
        (["check", "--target", "nosuch"], "could not be found"),
        (["build", "--check", "--target", "nosuch"], "could not be found"),
    ],
)
def test_a_value_that_means_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Containerfile").write_text("FROM scratch AS only\n")
    monkeypatch.chdir(tmp_path)
    assert main(["--root", str(tmp_path / "store"), *words]) not in {0, 127}
    assert message in capsys.readouterr().err


def test_a_noun_before_the_command() -> None:
    spelled = {"ls": "images", "rm": "rmi", "inspect": "inspect", "mount": "image", "tree": "image", "prune": "prune"}
    for word, verb in spelled.items():
        assert _split_verb(["image", word, "x"])[0] == verb
    assert _split_verb(["--debug", "container", "ls", "-a"]) == ("ps", ["--debug", "-a"])
    assert _split_verb(["container", "prune"]) == ("container", ["prune"])
    assert set(foreign.COMMANDS) & set(VERBS) == set()


def test_flags_without_a_value_take_one_as_gos_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Containerfile").write_text("FROM scratch AS only\n")
    build = ["--root", str(tmp_path / "store"), "build", "--check", str(tmp_path)]
    assert main([*build, "--no-cache=true", "--squash=false", "--push=0", "--load=F"]) == 0
    assert main([*build, "--squash=perhaps"]) == 2
    assert "--squash" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["true", "false"])
def test_of_several_values_of_a_flag_the_last_counts(value: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("-n", "--now", action="store_true")
    parser.add_argument("image")
    parser.add_argument("command", nargs=REMAINDER)
    take_booleans(parser)
    for flag in ("-n", "--now"):
        found = parser.parse_args(["--now=1", f"{flag}={value}", "it", "--now=false", "-n=true"])
        assert found.now is (value == "true") and found.command == ["--now=false", "-n=true"]


@pytest.mark.parametrize("verb", ["copy", "sync", "manifest"])
def test_media_types_by_their_other_name(verb: str) -> None:
    parser = ArgumentParser()
    import_module(f"builder.cli.{VERBS[verb].module}").configure(verb, parser)
    assert parser.parse_args(["--format", "v2s2", *["create"] * (verb == "manifest"), "a", "b"]).format == "docker"
