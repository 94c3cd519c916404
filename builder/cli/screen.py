"""Stdout on a terminal: what images, registries and containers are called must not work it.

Names, labels, file names and histories are others' words, and `print` would send their escape sequences to
the terminal. There, text is written without them; pipes and files get it as it is, and so does everybody
what goes to `sys.stdout.buffer`: a container's own output, a file's bytes. Caller: `builder.cli.program`.
"""

from __future__ import annotations

import io

TYPE_CHECKING = False  # as in `builder.cli.main`
if TYPE_CHECKING:
    from typing import TextIO


class Screen(io.TextIOWrapper):
    """A text stream over another's bytes that keeps lines and tabs, and drops other control characters."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        self._beneath = stream  # which would close the bytes, were it collected

    def write(self, text: str, /) -> int:
        if text != "\n" and not text.isprintable():
            from builder.cli.progress import sanitise

            text = "\n".join(map(sanitise, text.split("\n")))
        return super().write(text)
