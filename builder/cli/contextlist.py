"""`pybuild context ls`: what of a build context is sent, how large it is, and which line decided."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from builder.cli.images import human_size
from builder.cli.options import store_root
from builder.errors import ContextError, UsageError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.source import SourceFile
from builder.plan.request import BuildRequest
from builder.session import Session
from layers.values import NamedTuple


class Entry(NamedTuple):
    """A path of the context. `size_bytes` is a file's own; `why` names the deciding line of the ignore file."""

    path: str
    kind: str
    size_bytes: int
    sent: bool
    why: str


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=["ls"], help="list it")
    add("context", nargs="?", default=".", metavar="CONTEXT", help="a directory (default: the working directory)")
    add("-f", "--file", metavar="FILE", help="the Containerfile, whose own ignore file counts first")
    add("--ignorefile", metavar="FILE", help="use this ignore file")
    add("--why", action="store_true", help="also what is left out, and the line that decided")
    add("--json", action="store_true", help="print JSON")


def run(verb: str, options: Namespace) -> int:
    from builder.cli.containerfile import ignore_file_for

    directory = Path(options.context)
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory")
    file = Path(options.file) if options.file else _own_file(directory)
    request = BuildRequest(
        containerfile=SourceFile(str(file), ""),
        context=directory,
        ignore_file=ignore_file_for(file, options.ignorefile),
    )
    session = Session(request, store_root(options))
    try:
        entries = list(list_context(session))
    finally:
        session.close()
    shown = entries if options.why else [e for e in entries if e.sent]
    if options.json:
        print(json.dumps([e._asdict() for e in shown], indent=2))
        return 0
    for entry in shown:
        mark = "" if not options.why else ("+ " if entry.sent else "- ")
        why = f"   {entry.why}" if options.why and entry.why else ""
        size = human_size(entry.size_bytes) if entry.kind == "file" else entry.kind
        print(f"{mark}{size:>8}  {entry.path}{why}")
    sent = [e for e in entries if e.sent and e.kind == "file"]
    print(f"{len(sent)} files, {human_size(sum(e.size_bytes for e in sent))}")
    return 0


def _own_file(directory: Path) -> Path:
    """The Containerfile of a directory; a context may be looked at before there is one."""
    from builder.cli.containerfile import default_file

    try:
        return default_file(directory)
    except ContextError:
        return directory / "Containerfile"


def list_context(session: Session) -> Iterator[Entry]:
    """Every path of the main context, in order; directories that are left out whole are not entered."""
    tree = session.context("")
    yield from _walk(tree.fd, "", tree.ignore)


def _walk(fd: int, prefix: str, ignore: IgnoreMatcher | None) -> Iterator[Entry]:
    with os.scandir(fd) as listing:
        found = sorted(listing, key=lambda e: e.name)
    for item in found:
        path = prefix + item.name
        directory = item.is_dir(follow_symlinks=False)
        ignored, line = ignore.decide(path) if ignore else (False, None)
        why = f"{line[0]}:{line[1]}: {line[2]}" if line else ""
        kind = "dir" if directory else "link" if item.is_symlink() else "file" if item.is_file() else "other"
        size = item.stat(follow_symlinks=False).st_size if kind == "file" else 0
        yield Entry(path, kind, size, not ignored, why)
        if directory and not (ignored and ignore is not None and ignore.can_prune(path)):
            child = os.open(item.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                yield from _walk(child, path + "/", ignore)
            finally:
                os.close(child)
