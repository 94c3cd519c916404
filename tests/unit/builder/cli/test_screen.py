"""Stdout on a terminal: the words of images and registries reach it, their control characters do not."""

from __future__ import annotations

import io

import pytest

from builder.cli.screen import Screen


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("plain\n", "plain\n"),
        ("a\tb\n\nc", "a\tb\n\nc"),
        ("größe 漢字 🙂", "größe 漢字 🙂"),
        ("\x1b[2Jgone", "gone"),
        ("\x1b]0;title\x07name", "name"),
        ("\x1b]52;c;cm0gLXJmIC8K\x1b\\name", "name"),
        ("a\x9b31mred\x07", "ared"),
        ("safe\u202egnp.exe", "safegnp.exe"),
        ("one\x1b[1A\ntwo\x08\x08\x08", "one\ntwo"),
        ("\udc9b\udcff", ""),
    ],
)
def test_what_is_shown(said: str, shown: str) -> None:
    bytes_ = io.BytesIO()
    screen = Screen(io.TextIOWrapper(bytes_, encoding="utf-8"))
    print(said, end="", file=screen)
    screen.flush()
    assert bytes_.getvalue().decode() == shown


def test_bytes_are_the_callers_own_matter() -> None:
    bytes_ = io.BytesIO()
    screen = Screen(io.TextIOWrapper(bytes_, encoding="utf-8"))
    screen.write("a\n")
    screen.flush()
    screen.buffer.write(b"\x1b[2J")
    screen.buffer.flush()
    assert bytes_.getvalue() == b"a\n\x1b[2J"
