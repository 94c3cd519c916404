"""What a build is given besides its Containerfile: contexts, ignore files, secrets, ssh agents.

A session opens them lazily and hands out trees and values; it never writes. Secret values live
here only, and never in a `repr`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from builder.errors import ContextError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.plan.request import BuildRequest, SecretSource
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tempfile import TemporaryDirectory

MAX_SECRET_BYTES = 500 << 10
"""BuildKit's ceiling for one secret."""
_MAX_IGNORE_BYTES = 8 << 20
TEMPORARY_CONTEXT = "pybuild-context-"
"""How the directories begin in which contexts that are no directories are put: of no interest to people."""
_MAX_NAMES = 10_000
"""Names of a directory among which the one that was meant is looked for."""


def _looks_remote(value: str) -> bool:
    return ":/" in value or value.startswith(("git@", "github.com/"))


class ContextTree(NamedTuple):
    """A build context: an open directory and the matcher of what it leaves out."""

    fd: int
    path: Path
    ignore: IgnoreMatcher | None

    def advice(self, source: str) -> str:
        """What to do about a source that the context does not show: a hint for people."""
        from builder.frontend.spelling import nearest
        from layers import linux

        name = os.path.normpath("/" + source).lstrip("/")
        ignored, line = self.ignore.decide(name) if self.ignore is not None else (False, None)
        if ignored and line is not None:
            with contextlib.suppress(OSError):
                os.close(linux.openat2(self.fd, name, os.O_PATH, 0, linux.RESOLVE_IN_ROOT))
                return f"{line.file}:{line.line} leaves it out of the build context: {line.pattern}"
        parent, base = os.path.split(name)
        try:
            fd = linux.openat2(self.fd, parent or ".", os.O_RDONLY | os.O_DIRECTORY, 0, linux.RESOLVE_IN_ROOT)
            try:
                with os.scandir(fd) as entries:
                    near = nearest(base, (entry.name for entry, _ in zip(entries, range(_MAX_NAMES), strict=False)))
            finally:
                os.close(fd)
        except OSError:
            near = None
        if near is not None:
            return f"did you mean {os.path.join(parent, near)}?"
        place = "" if TEMPORARY_CONTEXT in str(self.path) else f", {self.path.absolute()}"
        return f"sources are paths in the build context{place}"


class Session:
    """One build's inputs. Thread-safe. Close it to close the directories."""

    def __init__(self, request: BuildRequest, store_root: Path | None = None) -> None:
        self._request = request
        self._store_root = store_root
        self._lock = threading.Lock()
        self._trees: dict[str, ContextTree] = {}
        self._places: list[TemporaryDirectory[str]] = []

    def context(self, name: str) -> ContextTree:
        """The build context of that name; "" is the main one.

        Raises: ContextError if there is none, or it is not a directory.
        """
        with self._lock:
            if name not in self._trees:
                self._trees[name] = self._open(name)
            return self._trees[name]

    def _open(self, name: str) -> ContextTree:
        if name:
            value = self._request.contexts.get(name)
            path = Path(value) if value is not None else None
        else:
            path = self._request.context
        if path is None:
            raise ContextError(
                "this build has no context to take files from" if not name else f"no build context named {name!r}",
                hint="give a directory as the last argument" if not name else f"add --build-context {name}=DIR",
            )
        self._permit(name)
        if name and _looks_remote(str(path)):
            path = self._fetch(self._request.contexts[name])
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise ContextError(f"cannot open the build context {path}: {e.strerror}") from e
        return ContextTree(fd=fd, path=path, ignore=self._without_store(path, self._matcher(path, main=not name)))

    def _permit(self, name: str) -> None:
        """Ask the source policy. Raises: ContextError."""
        policy = self._request.source_policy
        if policy is None:
            return
        from builder.plan.sourcepolicy import SourceDenied

        value = self._request.contexts.get(name, "")
        try:
            if not _looks_remote(value):
                policy.local(name)
            elif policy.remote(value) != value:
                raise SourceDenied(f"the source policy changes the context {value}", "name the changed one yourself")
        except SourceDenied as e:
            raise ContextError(f"build context {name or '.'}: {e}", hint=e.hint) from e

    def _fetch(self, value: str) -> Path:
        """A context behind a URL or in a repository, as a directory that goes with the session."""
        import tempfile

        from builder.solve.remotecontext import ContextAccess, open_remote_context

        place = tempfile.TemporaryDirectory(prefix=TEMPORARY_CONTEXT)
        self._places.append(place)
        access = ContextAccess(self.secret, self.ssh_socket("default"), None, self._request.environ)
        return open_remote_context(value, Path(place.name), Path(place.name) / "download", access=access).path

    def _matcher(self, root: Path, *, main: bool) -> IgnoreMatcher | None:
        """The ignore file that counts: the given one, else the context's own."""
        candidates = [root / ".containerignore", root / ".dockerignore"]
        if main and self._request.ignore_file is not None:
            candidates = [self._request.ignore_file]
        for path in candidates:
            try:
                with path.open("rb") as f:
                    data = f.read(_MAX_IGNORE_BYTES + 1)
            except FileNotFoundError:
                continue
            except OSError as e:
                raise ContextError(f"cannot read {path}: {e.strerror}") from e
            if len(data) > _MAX_IGNORE_BYTES:
                raise ContextError(f"{path} is larger than {_MAX_IGNORE_BYTES} bytes")
            return IgnoreMatcher.parse(data.decode("utf-8", "surrogateescape"), str(path))
        return None

    def _without_store(self, path: Path, ignore: IgnoreMatcher | None) -> IgnoreMatcher | None:
        """A store within the context is no part of it: a build would copy what it writes.

        Raises: ContextError where the context is the store.
        """
        if self._store_root is None:
            return ignore
        try:
            store, context = self._store_root.resolve(), path.resolve()
        except (OSError, RuntimeError) as e:
            raise ContextError(f"cannot tell where the build context {path} lies: {e}") from e
        if context == store:
            raise ContextError(f"the build context {path} is the store itself", hint="use another --root or context")
        if not store.is_relative_to(context):
            return ignore
        return (ignore or IgnoreMatcher(())).hiding(str(store.relative_to(context)), "the store itself")

    def secret(self, id: str) -> bytes | None:
        """A secret's value, None if it was not given. Raises: ContextError if it cannot be read."""
        source: SecretSource | None = self._request.secrets.get(id)
        if source is None:
            return None
        if source.value is not None:
            return source.value
        if source.path is None:
            return None
        try:
            with source.path.open("rb") as f:
                value = f.read(MAX_SECRET_BYTES + 1)
        except OSError as e:
            raise ContextError(f"cannot read secret {id!r} from {source.path}: {e.strerror}") from e
        if len(value) > MAX_SECRET_BYTES:
            raise ContextError(f"secret {id!r} is larger than {MAX_SECRET_BYTES} bytes")
        return value

    def ssh_socket(self, id: str) -> Path | None:
        """The agent's socket that `--ssh` named, None if there is none."""
        return self._request.ssh.get(id)

    def close(self) -> None:
        with self._lock:
            for tree in self._trees.values():
                os.close(tree.fd)
            self._trees.clear()
        for place in self._places:
            place.cleanup()
