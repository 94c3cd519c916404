"""Where the text of a Containerfile comes from: files, stdin, URLs, several of them as one, cpp(1).

Called by the verbs that read one. A file whose name ends in `.in` goes through the C preprocessor first,
as in buildah; several are one after the other what one file would be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from builder.errors import ContextError
from builder.frontend.source import SourceFile

DEFAULT_NAMES = ("Containerfile", "Dockerfile", "dockerfile")
_MAX_BYTES = 64 << 20
_CPP_TIMEOUT_S = 60.0


def default_file(directory: Path) -> Path:
    """The Containerfile of a directory. Raises: ContextError if it has none."""
    for name in DEFAULT_NAMES:
        if (directory / name).exists():
            return directory / name
    raise ContextError(
        f"no Containerfile or Dockerfile in {directory}", hint="name one with -f, or give its directory as the context"
    )


def find_file(name: str, directory: Path) -> Path:
    """The file that -f names: from here, or else from the context's directory."""
    path = Path(name)
    if not path.exists() and not path.is_absolute() and (directory / path).exists():
        return directory / path
    return path


def read_containerfile(names: Sequence[str], directory: Path, *, cpp_flags: Sequence[str] = ()) -> SourceFile:
    """What the -f flags name (nothing: the directory's own file), as one text.

    Reads files, `-` and URLs. `directory` is the context: where files are looked for as well, and what
    a preprocessed file includes from. Raises: ContextError; FetchError for a URL.
    """
    if not names:
        return _read_file(default_file(directory), directory, cpp_flags)
    sources = [_read_any(name, directory, cpp_flags) for name in names]
    if len(sources) == 1:
        return sources[0]
    text = "\n".join([source.text.rstrip("\n") for source in sources]) + "\n"
    return SourceFile(", ".join([source.name for source in sources]), text)


def read_stdin() -> SourceFile:
    """The Containerfile of `-f -`. Raises: ContextError if it is too large."""
    return as_source("-", sys.stdin.buffer.read(_MAX_BYTES + 1))


def as_source(name: str, data: bytes) -> SourceFile:
    """Bytes as a Containerfile. Raises: ContextError if they are too many."""
    if len(data) > _MAX_BYTES:
        raise ContextError(f"{name} is larger than {_MAX_BYTES >> 20} MiB")
    return SourceFile(name, data.decode("utf-8", "surrogateescape"))


def ignore_file_for(path: Path, explicit: str | None) -> Path | None:
    """The ignore file that belongs to a Containerfile, if it has one of its own. Raises: ContextError."""
    if explicit:
        if not Path(explicit).is_file():
            raise ContextError(f"cannot read the ignore file {explicit}")
        return Path(explicit)
    for suffix in (".containerignore", ".dockerignore"):
        own = path.with_name(path.name + suffix)
        if own.is_file():
            return own
    return None


def _read_any(name: str, directory: Path, cpp_flags: Sequence[str]) -> SourceFile:
    if name == "-":
        return read_stdin()
    if "://" in name:
        return _download(name)
    return _read_file(find_file(name, directory), directory, cpp_flags)


def _read_file(path: Path, directory: Path, cpp_flags: Sequence[str]) -> SourceFile:
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ContextError(f"cannot read {path}: {e.strerror}") from e
    if path.name.endswith(".in"):
        data = _preprocess(path, data, directory, cpp_flags)
    return as_source(str(path), data)


def _download(url: str) -> SourceFile:
    import tempfile

    from builder.solve.fetch import fetch_http

    with tempfile.TemporaryDirectory(prefix="pybuild-") as place:
        return as_source(url, fetch_http(url, Path(place), environ=os.environ).path.read_bytes())


def _preprocess(path: Path, data: bytes, directory: Path, flags: Sequence[str]) -> bytes:
    """What cpp(1) makes of a file, with buildah's flags. Comments are gone then, the parser's directives too.

    Raises: ContextError if there is no cpp, or it gives up.
    """
    import shlex
    import shutil
    import subprocess

    program = shutil.which("cpp")
    if program is None:
        raise ContextError(
            f"{path}: a file ending in .in goes through the C preprocessor, and there is no cpp",
            hint="install cpp, or rename the file",
        )
    arguments = ["-E", "-iquote", str(directory), "-traditional", "-undef", "-"]
    try:
        arguments += shlex.split(os.environ.get("BUILDAH_CPPFLAGS", ""))
    except ValueError as e:
        raise ContextError(f"BUILDAH_CPPFLAGS: {e}") from e
    command = [program, *arguments, *flags]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_CPP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as e:
        raise ContextError(f"{path}: cpp took longer than {_CPP_TIMEOUT_S:g} s") from e
    said = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode and (not done.stdout or "fatal error:" in said or done.returncode < 0):
        raise ContextError(f"{path}: cpp failed: {said or f'exit status {done.returncode}'}")
    # It takes every comment of the Containerfile for a directive that it does not know, and leaves it out.
    told = [line for line in said.splitlines() if "invalid preprocessing directive" not in line]
    if told:
        print(f"warning: {path}: cpp: {'; '.join(told)}", file=sys.stderr)
    return done.stdout
