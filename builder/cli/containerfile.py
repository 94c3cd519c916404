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
_CPP_MEMORY_BYTES = 1 << 30
_MAX_SAID_BYTES = 1 << 20
_CPP_OWN = ("/usr/include", "/usr/local/include", "/usr/lib/gcc")


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

    program = shutil.which("cpp")
    if program is None:
        raise ContextError(
            f"{path}: a file ending in .in goes through the C preprocessor, and there is no cpp",
            hint="install cpp, or rename the file",
        )
    try:
        chosen = [*shlex.split(os.environ.get("BUILDAH_CPPFLAGS", "")), *flags]
    except ValueError as e:
        raise ContextError(f"BUILDAH_CPPFLAGS: {e}") from e
    arguments = ["-E", "-H", "-iquote", str(directory), "-traditional", "-undef", "-"]
    status, made, words = _run_bounded([program, *arguments, *chosen], data, path)
    included, said = _included(words)
    # 1 is also what it ends with for a comment that it takes for a directive; more is a failure of its own.
    if status not in {0, 1} or (status and (not made or "fatal error:" in said)):
        raise ContextError(f"{path}: cpp failed: {said or f'exit status {status}'}")
    places = [str(directory), str(path.parent), *_CPP_OWN, *_search_path(chosen)]
    allowed = tuple(os.path.realpath(place) + "/" for place in places)
    for name in included:
        real = os.path.realpath(name)
        if not f"{real}/".startswith(allowed):
            raise ContextError(
                f"{path}: it includes {name}, which is outside of {directory}",
                hint=f"to allow that: --cpp-flag=-I{os.path.dirname(real)}",
            )
    # It takes every comment of the Containerfile for a directive that it does not know, and leaves it out.
    told = [line for line in said.splitlines() if "invalid preprocessing directive" not in line]
    if told:
        print(f"warning: {path}: cpp: {'; '.join(told)}", file=sys.stderr)
    return made


def _run_bounded(command: Sequence[str], data: bytes, path: Path) -> tuple[int, bytes, str]:
    """Status, stdout and stderr of a program that gets bounded time, memory and output. Raises: ContextError."""
    import resource
    import signal
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(data)
        given.seek(0)
        limits = {resource.RLIMIT_AS: _CPP_MEMORY_BYTES, resource.RLIMIT_FSIZE: _MAX_BYTES}
        before = {number: resource.getrlimit(number) for number in limits}
        try:
            # For as long as it is started, they are ours: what it starts in its turn inherits them.
            for number, most in limits.items():
                hard = before[number][1]
                resource.setrlimit(number, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
            process = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, start_new_session=True)
        finally:
            for number, pair in before.items():
                resource.setrlimit(number, pair)
        try:
            status = process.wait(_CPP_TIMEOUT_S)
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(e, subprocess.TimeoutExpired):
                raise ContextError(f"{path}: cpp took longer than {_CPP_TIMEOUT_S:g} s") from e
            raise
        for stream in (out, err):
            stream.seek(0)
        return status, out.read(_MAX_BYTES), err.read(_MAX_SAID_BYTES).decode("utf-8", "replace").strip()


def _included(words: str) -> tuple[list[str], str]:
    """The files that cpp names as included (-H), and what else it says."""
    words = words.partition("Multiple include guards may be useful for:")[0]
    names, rest = [], []
    for line in words.splitlines():
        dots, blank, name = line.partition(" ")
        if blank and dots and not dots.strip("."):
            names.append(name)
        else:
            rest.append(line)
    return names, "\n".join(rest).strip()


def _search_path(flags: Sequence[str]) -> list[str]:
    """The places that flags of the user's own name: in them a Containerfile may include what it likes."""
    found: list[str] = []
    for number, flag in enumerate(flags):
        for name in ("-I", "-iquote", "-isystem", "-idirafter", "-include", "-imacros"):
            if flag == name:
                found += flags[number + 1 : number + 2]
            elif flag.startswith(name):
                found.append(flag.removeprefix(name))
    return [place for place in found if place]
