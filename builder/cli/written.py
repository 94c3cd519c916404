"""Where a command's `--output` goes: stdout, or a file that is there whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written(place: str | None) -> Iterator[BinaryIO]:
    """A stream to write to: stdout for None and `-`; else a file that takes its name when the block ends well.

    Raises: OSError.
    """
    if place is None or place == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    temporary = Path(f"{place}.{os.getpid()}.part")
    try:
        with open(temporary, "xb") as out:
            yield out
        temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
