"""Build contexts that are not directories: a tar on stdin, an archive's URL, a git repository.

Each becomes a directory that lives as long as the command.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, cast

from builder.errors import ContextError

_HEAD_BYTES = 1 << 16
_MAX_CONTAINERFILE_BYTES = 64 << 20


def is_remote(context: str) -> bool:
    """Whether a context argument is something to fetch or to read from stdin."""
    from builder.frontend.gitref import is_git_source, is_http_source

    return context == "-" or is_http_source(context) or is_git_source(context) or context.startswith("github.com/")


def fetch_context(context: str, stack: ExitStack, file: str | None) -> tuple[Path | None, str | None]:
    """The context as a directory; or, where it is no archive but a Containerfile, its text.

    `file` is `-f`: with it, stdin must be an archive. Raises: ContextError.
    """
    from builder.frontend.gitref import is_git_source

    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pybuild-context-")))
    if context == "-":
        return _from_stream(sys.stdin.buffer, place, "stdin", file)
    if is_git_source(context) or context.startswith("github.com/"):
        return _from_git(context, place), None
    from builder.solve.fetch import fetch_http

    fetched = fetch_http(context, place / "download", environ=os.environ)
    tree = place / "tree"
    tree.mkdir()
    with fetched.path.open("rb") as stream:
        return _from_stream(stream, tree, context, file)


def _from_stream(stream: BinaryIO, place: Path, what: str, file: str | None) -> tuple[Path | None, str | None]:
    from builder.solve.unpack import unpack_stream

    head = stream.read(_HEAD_BYTES)
    if not head:
        raise ContextError(f"{what} is empty: expected a tar archive or a Containerfile")
    if file is None and not _is_archive(head):
        data = head + stream.read(_MAX_CONTAINERFILE_BYTES + 1 - len(head))
        if len(data) > _MAX_CONTAINERFILE_BYTES:
            raise ContextError(f"{what} is larger than {_MAX_CONTAINERFILE_BYTES >> 20} MiB")
        return None, data.decode("utf-8", "surrogateescape")
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        whole = cast(BinaryIO, _Chained(head, stream))
        if not unpack_stream(whole, fd, what=what):
            raise ContextError(f"{what} is not a tar archive")
    finally:
        os.close(fd)
    return place, None


def _is_archive(head: bytes) -> bool:
    from layers.compression import detect

    return detect(head[:16]) not in {None, "none"} or head[257:262] == b"ustar"


def _from_git(context: str, place: Path) -> Path:
    from builder.frontend.gitref import parse_git_ref
    from builder.solve.gitfetch import GitSource, fetch_git

    try:
        ref = parse_git_ref(context)
    except ValueError as e:
        raise ContextError(f"{context}: {e}") from e
    if ref is None:
        raise ContextError(f"{context}: not a git repository's address")
    socket = os.environ.get("SSH_AUTH_SOCK")
    access = GitSource(ssh_socket=Path(socket) if socket else None, environ=os.environ)
    return fetch_git(ref, place, keep_git_dir=bool(ref.keep_git_dir), access=access).path


class _Chained:
    """A stream with its first bytes put back."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = io.BytesIO(head)
        self._rest = rest

    def read(self, size: int = -1) -> bytes:
        data = self._head.read(size)
        return data or self._rest.read(size)
