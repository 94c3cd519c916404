"""The entry point: every command is there, wrong usage is one message, errors become exit statuses."""

from __future__ import annotations

import argparse
import errno
import re
from importlib import import_module
from pathlib import Path

import pytest

from builder.cli import main as entry
from builder.cli.main import VERBS, main, report
from builder.errors import ParseError, StepError, UsageError
from builder.frontend.source import SourceFile, SourceRange
from layers.errors import Cancelled, DigestMismatch, PybuildError


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_its_module_and_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"builder.cli.{VERBS[verb].module}")
    assert callable(module.configure)
    assert callable(module.run)
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pybuild {verb}")
    assert "--root DIR" in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_explains_every_word(verb: str) -> None:
    parser = argparse.ArgumentParser(prog=f"pybuild {verb}", add_help=False)
    import_module(f"builder.cli.{VERBS[verb].module}").configure(verb, parser)
    for action in parser._actions:
        names = "/".join(action.option_strings) or action.dest
        assert action.help, f"{verb} {names}: no help"
        assert not action.help.startswith("("), f"{verb} {names}: nothing but a default"


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_help_fits_the_terminal(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for verb in ("build", "manifest", "copy", "modify"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
    out = capsys.readouterr().out
    words = [line for line in out.splitlines() if not line.startswith(("usage:", "  "))]
    assert max(map(len, words)) <= min(int(columns), 100)
    # Each flag with its value once, in a group; each action with what it does, and which flags are its own.
    assert re.search(r"^the image:\n  -t, --tag NAME +name of the image", out, re.MULTILINE)
    assert re.search(r"^  --pull\[=POLICY\]", out, re.MULTILINE)
    assert re.search(r"^actions:\n  get NAME +print a manifest", out, re.MULTILINE)
    assert re.search(r"^  -a, --amend +create: ", out, re.MULTILINE)
    assert "usage: pybuild modify [FLAG…] OLD NEW [-- COMMAND…]" in out
    assert "docker-archive:FILE:NAME:TAG" in out


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_flag_is_one_message(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The status of run and exec is their command's: their own failures have one apart, as docker has it.
    assert main([verb, "--no-such-flag-at-all"]) == (125 if verb in {"run", "create", "exec", "modify"} else 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) <= 3


def test_every_command_is_in_one_section_of_the_overview() -> None:
    from builder.cli.overview import SECTIONS

    listed = [verb for verbs in SECTIONS.values() for verb in verbs.split()]
    assert sorted(listed) == sorted(VERBS)


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    out = capsys.readouterr().out
    for verb, entry_ in VERBS.items():
        assert f"  {verb} " in out
        assert entry_.help in out


def test_the_readme_names_every_command() -> None:
    text = (Path(__file__).resolve().parents[4] / "README.md").read_text()
    missing = [verb for verb in VERBS if f"`{verb}`" not in text]
    assert not missing


@pytest.mark.parametrize(("word", "meant"), [("biuld", "build"), ("pul", "pull"), ("frobnicate", None)])
def test_an_unknown_command_names_the_nearest(word: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    err = capsys.readouterr().err
    assert f"'{word}'" in err
    if meant:
        assert f"did you mean {meant}" in err.replace("'", "").replace("`", "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{entry.version_line()}\n"


def text() -> SourceFile:
    return SourceFile("Containerfile", "FROM a\nRUN false\n")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PybuildError("what failed", hint="what to do"), 1, ["error: what failed", "hint: what to do"]),
        (UsageError("wrong"), 2, ["error: wrong"]),
        (Cancelled(), 130, ["cancelled"]),
        (DigestMismatch("bytes"), 8, ["error: bytes"]),
        (OSError(errno.ENOSPC, "No space left on device", "/store"), 1, ["/store", "No space left"]),
        (RecursionError(), 1, ["nested too deeply"]),
        (RuntimeError("oops"), 1, ["internal error", "RuntimeError", "--debug"]),
    ],
)
def test_errors_become_words_and_statuses(
    error: Exception, status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in words:
        assert word in captured.err
    assert "Traceback" not in captured.err


def test_errors_of_a_containerfile_show_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    source = text()
    where = SourceRange(2, 2, 1, 10)
    assert report(ParseError("bad", source=source, range=where)) == 1
    failed = StepError("it ended", step="RUN", exit_status=42, source=source, range=where)
    assert report(failed) == 42
    err = capsys.readouterr().err
    assert err.count("Containerfile:2") == 2
    assert err.count("RUN false") == 2
    assert "^" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_what_ends_a_command_from_outside(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry, "_dispatch", fail)
    assert main(["images"]) == {KeyboardInterrupt: 130, BrokenPipeError: 141}[error]
    assert "Traceback" not in capfd.readouterr().err


def test_what_an_error_quotes_sends_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    source, where = SourceFile("Containerfile", "RUN \x1b[2Jx\n"), SourceRange(1, 1)
    report(PybuildError("the registry said: \x1b]52;c;aGk=\x07no\n  twice\x9b2J", hint="\x1b[8mhidden"))
    report(ParseError("bad", source=source, range=where))
    words = capsys.readouterr().err
    assert "error: the registry said: no\n  twice\nhint: hidden\n" in words
    assert not set(words) & {"\x1b", "\x07", "\x9b"}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["from", "--pull", "never", "debian"], "a value of --pull goes after `=`"),
        (["build", "--squash", ".", "other"], "see `pybuild build --help`"),
    ],
)
def test_a_word_too_many(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert hint in capsys.readouterr().err
