"""Flags from a configuration file: what they mean, what wins over them, and what is refused."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from builder.cli import build
from builder.cli.defaults import default_words
from builder.cli.main import main
from builder.errors import UsageError


def parsed(tmp_path: Path, text: str, *line: str, verb: str = "build") -> Namespace:
    """The options of a command line, those of the file before them."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    parser = ArgumentParser()
    build.configure(verb, parser)
    return parser.parse_args([*default_words(file, verb, parser), *line])


def test_flags_of_the_file_count(tmp_path: Path) -> None:
    text = (
        '[build]\ncompression = "zstd"\njobs = 3\nno-cache = true\nsquash = false\nbuild-arg = ["A=1", "B=2"]\n'
        "rewrite-timestamp = false\n[push]\nretry = 8\n"
    )
    options = parsed(tmp_path, text, "--build-arg", "C=3")
    assert (options.compression, options.jobs, options.no_cache, options.squash) == ("zstd", 3, True, False)
    assert options.build_arg == ["A=1", "B=2", "C=3"], "one that may be repeated adds to the file's"
    assert options.rewrite_timestamp is False


def test_the_command_line_wins(tmp_path: Path) -> None:
    assert parsed(tmp_path, '[build]\ncompression = "zstd"\n', "--compression", "none").compression == "none"


def test_what_a_build_would_do_is_asked_with_the_same_flags(tmp_path: Path) -> None:
    options = parsed(tmp_path, '[build]\ntarget = "a"\n[plan]\ntarget = "b"\n', verb="plan")
    assert options.target == "b"
    assert parsed(tmp_path, '[build]\ntarget = "a"\n', verb="plan").target == "a"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[build]\nnonsense = 1\n", "no flag --nonsense"),
        ("[build]\nroot = '/x'\n", "no flag --root"),
        ("[built]\njobs = 1\n", "no command 'built'"),
        ("build = 1\n", "a table"),
        ("[build]\njobs = [1, 2]\n", "given once"),
        ("[build]\nno-cache = 'yes'\n", "true or false"),
        ("[build]\njobs = {a = 1}\n", "a text or a number"),
        ("[build\n", "no TOML"),
        ("\x00", "no TOML"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parsed(tmp_path, text)
    assert "config.toml" in str(caught.value)


def test_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pybuild").mkdir()
    (tmp_path / "pybuild" / "config.toml").write_text("[doctor]\nnonsense = 1\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("PYBUILD_CONFIG", raising=False)
    assert main(["doctor"]) == 2
    assert "[doctor] nonsense" in capsys.readouterr().err
    monkeypatch.setenv("PYBUILD_CONFIG", str(tmp_path / "missing"))
    assert main(["doctor"]) == 2
    assert "cannot read" in capsys.readouterr().err
