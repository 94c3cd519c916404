"""Completion scripts, asked by the shells themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from builder.cli.completion import _RENDERERS, commands
from builder.cli.main import VERBS
from tests.support.machine import need_tool


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one script a shell."""
    folder = tmp_path_factory.mktemp("completion")
    table = commands()
    for shell, render in _RENDERERS.items():
        (folder / shell).write_text("\n".join(render(table)) + "\n")
    return folder


def asked(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["pybuild", "doct"], {"doctor"}),
        (["pybuild", "build", "--progress", "r"], {"rawjson"}),
        (["pybuild", "build", "--progress", "=", "r"], {"rawjson"}),
        (["pybuild", "build", "--cache-t"], {"--cache-to", "--cache-ttl"}),
        (["pybuild", "--on-er"], {"--on-error"}),
        (["pybuild", "--root", "/x", "cache", "au"], {"audit"}),
        (["pybuild", "build", "-f", "ba"], {"bash"}),
        (["pybuild", "push", "--on-er"], set()),
    ],
)
def test_bash_completes(scripts: Path, line: list[str], wanted: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in line)
    asks = f'. ./bash; COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _pybuild; printf "%s\\n" "${{COMPREPLY[@]}}"'
    assert set(asked(["bash", "-c", asks], scripts).split()) == wanted


HOSTILE = "app:$(touch evil) app:`touch evil` app:${IFS/touch/x} app:* app:;touch$IFS'evil app:1"


def test_bash_runs_nothing_that_a_store_names(scripts: Path) -> None:
    names = scripts / "names"
    names.write_text(HOSTILE.replace(" app", "\napp") + "\n")
    for verb in ("inspect", "stop"):
        asks = f"pybuild() {{ cat names; }}; . ./bash; COMP_WORDS=(pybuild {verb} app); COMP_CWORD=2; _pybuild;"
        found = asked(["bash", "-c", asks + ' printf "%s\\n" "${COMPREPLY[@]}"'], scripts)
        assert found == names.read_text()
    assert not (scripts / "evil").exists()


def test_fish_runs_nothing_that_a_store_names(scripts: Path) -> None:
    need_tool("fish")
    (scripts / "names").write_text(HOSTILE.replace(" app", "\napp") + "\n")
    asks = "function pybuild; cat names; end; source fish; complete -C 'pybuild inspect app'"
    assert "app:1" in asked(["fish", "-N", "-c", asks], scripts)
    assert not (scripts / "evil").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_of_their_shells_language(scripts: Path, shell: str) -> None:
    need_tool(shell)
    asked([shell, "-n", shell], scripts)


def test_fish_completes(scripts: Path) -> None:
    need_tool("fish")
    asks = (
        "source fish; complete -C 'pybuild doct'; complete -C 'pybuild build --progress r'; complete -C 'pybuild --sq'"
    )
    found = [line.split("\t")[0] for line in asked(["fish", "-N", "-c", asks], scripts).splitlines()]
    assert found == ["doctor", "rawjson", "--squash", "--squash-all"]


def test_every_command_is_known_with_its_flags() -> None:
    table = {command.verb: command for command in commands()}
    assert set(table) == set(VERBS)
    names = {name for flag in table["build"].flags for name in flag.names}
    assert {"--file", "-f", "--push", "--root", "--help"} <= names
