"""Where the text of a Containerfile comes from."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path

import pytest

from builder.cli.containerfile import DEFAULT_NAMES, read_containerfile
from builder.errors import ContextError

needs_cpp = pytest.mark.skipif(shutil.which("cpp") is None, reason="needs cpp")


@pytest.mark.parametrize("name", DEFAULT_NAMES)
def test_a_directory_has_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("FROM scratch\n")
    source = read_containerfile([], tmp_path)
    assert (source.name, source.text) == (str(tmp_path / name), "FROM scratch\n")


def test_the_first_of_the_usual_names_is_taken(tmp_path: Path) -> None:
    for name in DEFAULT_NAMES:
        (tmp_path / name).write_text(name)
    assert read_containerfile([], tmp_path).text == "Containerfile"


def test_a_directory_without_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="no Containerfile or Dockerfile"):
        read_containerfile([], tmp_path)


def test_files_are_looked_for_here_and_in_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "b").write_text("RUN b\n\n\n")
    (tmp_path / "a").write_text("FROM scratch")
    monkeypatch.chdir(tmp_path)
    source = read_containerfile(["a", "b"], tmp_path / "context")
    assert source.text == "FROM scratch\nRUN b\n"
    assert source.name == f"a, {tmp_path / 'context' / 'b'}"
    with pytest.raises(ContextError, match="cannot read c: No such file"):
        read_containerfile(["a", "c"], tmp_path / "context")


@needs_cpp
def test_a_file_that_ends_in_dot_in_is_preprocessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BUILDAH_CPPFLAGS", "-DENVIRONMENT='a b'")
    (tmp_path / "common.h").write_text("#define COMMON LABEL common=yes\n")
    text = '#include "common.h"\nFROM BASE\n#ifdef FLAG\nENV F=FLAG\n#endif\n# apart\nCOMMON\n'
    text += "ENV E=ENVIRONMENT\n"
    (tmp_path / "Containerfile.in").write_text(text)
    source = read_containerfile(
        [str(tmp_path / "Containerfile.in")], tmp_path, cpp_flags=["-DBASE=scratch", "-DFLAG=x y"]
    )
    lines = [line for line in source.lines if line and not line.startswith("#")]
    assert lines == ["FROM scratch", "ENV F=x y", "LABEL common=yes", "ENV E=a b"]
    assert capsys.readouterr().err == ""


@needs_cpp
def test_what_cpp_gives_up_on_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.in").write_text('FROM scratch\n#include "nosuch.h"\nRUN x\n')
    with pytest.raises(ContextError, match=r"cpp failed: .*fatal error"):
        read_containerfile([str(tmp_path / "x.in")], tmp_path)


def test_without_cpp_it_is_told_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.in").write_text("FROM scratch\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContextError, match="there is no cpp"):
        read_containerfile([str(tmp_path / "x.in")], tmp_path)


@needs_cpp
@pytest.mark.parametrize("spelled", ['"{outside}"', "<{outside}>", '"../secret"', '"link"', '"dir/secret"'])
def test_what_lies_outside_of_the_context_is_not_included(tmp_path: Path, spelled: str) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (tmp_path / "secret").write_text("ENV SECRET=sesame\n")
    (context / "link").symlink_to(tmp_path / "secret")
    (context / "dir").symlink_to(tmp_path)
    name = spelled.format(outside=tmp_path / "secret")
    (context / "x.in").write_text(f"FROM scratch\n#include {name}\n")
    for flags in ((), ("-P",)):
        with pytest.raises(ContextError, match="outside of") as caught:
            read_containerfile([str(context / "x.in")], context, cpp_flags=flags)
        assert "sesame" not in str(caught.value)
    # Unless whoever builds says so.
    source = read_containerfile([str(context / "x.in")], context, cpp_flags=["-I", str(tmp_path)])
    assert "ENV SECRET=sesame" in source.lines


@needs_cpp
def test_what_never_ends_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.cli.containerfile._CPP_TIMEOUT_S", 1.0)
    doubled = "\n".join(f"#define A{n} A{n - 1} A{n - 1}" for n in range(1, 40))
    (tmp_path / "x.in").write_text(f"FROM scratch\n#define A0 xxxxxxxxxxxxxxxx\n{doubled}\nRUN A39\n")
    began = time.monotonic()
    with pytest.raises(ContextError, match="took longer"):
        read_containerfile([str(tmp_path / "x.in")], tmp_path)
    assert time.monotonic() - began < 30
    (tmp_path / "x.in").write_text("FROM scratch\n" + "x" * 5000)
    monkeypatch.setattr("builder.cli.containerfile._MAX_BYTES", 1000)
    with pytest.raises(ContextError, match=r"cpp failed|larger"):
        read_containerfile([str(tmp_path / "x.in")], tmp_path)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
