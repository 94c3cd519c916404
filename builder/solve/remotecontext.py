"""Build contexts that are not a directory: an archive on stdin or behind a URL, a git repository, a lone Containerfile.

Each becomes a directory that the caller removes. What is not an archive is taken for the
Containerfile itself, in an otherwise empty context, as `docker build -` and `docker build URL` do.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from builder.errors import ContextError
from builder.frontend.gitref import GitRef, is_http_source, parse_git_ref
from builder.solve.fetch import Secrets, no_secrets
from builder.solve.sourcetree import never_cancelled
from layers.values import NamedTuple

_CONTAINERFILE_MAX_BYTES = 16 * 1024 * 1024


class RemoteContext(NamedTuple):
    """`containerfile` is the text of one that came instead of an archive; `commit` is that of a repository.

    `time_s` is when that was committed, or when a server says that its file was changed.
    """

    path: Path
    containerfile: bytes | None = None
    commit: str = ""
    time_s: int | None = None

    def epoch(self) -> int | None:
        """The time of the context, in seconds since 1970: without `time_s` that of its newest file."""
        if self.time_s is not None:
            return self.time_s
        times = (os.lstat(os.path.join(top, name)).st_mtime for top, _, names in os.walk(self.path) for name in names)
        newest = max(times, default=None)
        return None if newest is None else int(newest)


class ContextAccess(NamedTuple):
    """What a remote context may need: see `builder.solve.fetch` and `builder.solve.gitfetch`."""

    secrets: Secrets = no_secrets
    ssh_socket: Path | None = None
    known_hosts: str | None = None
    environ: Mapping[str, str] = {}
    keep_git_dir: bool = False


def is_remote_context(text: str) -> bool:
    """Whether a context argument is not a directory. Raises: ContextError for a malformed repository reference."""
    return text == "-" or _git(text) is not None or is_http_source(text)


def _git(text: str) -> GitRef | None:
    try:
        return parse_git_ref(text)
    except ValueError as e:
        raise ContextError(f"{text}: {e}") from e


def open_remote_context(
    text: str,
    dest: Path,
    cache: Path,
    *,
    stdin: BinaryIO | None = None,
    access: ContextAccess | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> RemoteContext:
    """Make a directory beneath `dest` of the context `text`: `-`, a URL, or a repository.

    `cache` is where downloads are kept. Raises: ContextError; Cancelled.
    """
    access = access or ContextAccess()
    if text == "-":
        if stdin is None:
            raise ContextError("the context - is read from stdin, which is closed")
        return _from_stream(stdin, dest, cancelled, "the archive on stdin")
    git = _git(text)
    if git is not None:
        from builder.solve.gitfetch import GitSource, fetch_git

        tree = fetch_git(
            git,
            dest,
            keep_git_dir=access.keep_git_dir,
            access=GitSource(access.secrets, access.ssh_socket, access.known_hosts, access.environ),
            cancelled=cancelled,
        )
        return RemoteContext(tree.path, commit=tree.commit, time_s=tree.committed_s)
    from builder.solve.fetch import fetch_http

    file = fetch_http(text, cache, secrets=access.secrets, environ=access.environ, cancelled=cancelled)
    with file.path.open("rb", buffering=0) as stream:
        context = _from_stream(stream, dest, cancelled, f"the context {file.name}")
    return context._replace(time_s=file.last_modified_s)


class _Rewound(io.RawIOBase):
    """A stream that can be read once more from its start, as far as it was read within the limit."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.kept: bytearray | None = bytearray()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if self.kept is not None and data:
            self.kept += data
            if len(self.kept) > _CONTAINERFILE_MAX_BYTES:
                self.kept = None
        return data


def _from_stream(stream: BinaryIO, dest: Path, cancelled: Callable[[], bool], what: str) -> RemoteContext:
    from builder.solve.unpack import unpack_stream

    tree = dest / "context"
    try:
        tree.mkdir(mode=0o755)
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        try:
            rewound = _Rewound(stream)
            if unpack_stream(rewound, fd, cancelled=cancelled, what=what):  # type: ignore[arg-type]
                return RemoteContext(tree)
        finally:
            os.close(fd)
        while rewound.kept is not None and rewound.read(1 << 20):
            pass
    except OSError as e:
        raise ContextError(f"cannot read {what}: {e.strerror}") from e
    if rewound.kept is None:
        raise ContextError(
            f"{what} is neither an archive nor a Containerfile: it has more than {_CONTAINERFILE_MAX_BYTES >> 20} MiB"
        )
    if b"\0" in rewound.kept:
        raise ContextError(
            f"{what} is neither an archive nor a Containerfile", hint="tar, gzip, bzip2, xz and zstd are known"
        )
    return RemoteContext(tree, bytes(rewound.kept))
