"""ADD of URLs and git repositories: fetched once a build, keyed by content, copied like any tree.

The key of a download is its digest, that of a repository its commit: a build asks the server whether
there is something new, and takes from its cache what is not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.plan.graph import CopyItem, CopyOp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.frontend.gitref import GitRef
    from builder.solve.fetch import HttpFile
    from builder.solve.gitfetch import GitSource, GitTree
    from builder.solve.steps import StepContext


class RemoteSources:
    """The remote sources of one build. Thread-safe; each is fetched once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str], HttpFile] = {}
        self._commits: dict[tuple[str, str, bool], str] = {}
        self._trees: dict[tuple[str, str, bool], GitTree] = {}
        self._places: list[Path] = []

    def key(self, ctx: StepContext, op: CopyOp, item: CopyItem) -> str:
        """What a step that adds this depends on. Raises: ContextError, Cancelled."""
        if item.kind == "http":
            return self._file(ctx, op, item).cache_key
        return self._git_key(ctx, op, item)

    @contextmanager
    def tree(self, ctx: StepContext, op: CopyOp, item: CopyItem) -> Iterator[tuple[int, str]]:
        """A directory that holds what was fetched, and the path to copy from it."""
        if item.kind == "git":
            fd = os.open(self._tree(ctx, op, item).path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield fd, "/"
            finally:
                os.close(fd)
            return
        import tempfile

        file = self._file(ctx, op, item)
        place = tempfile.mkdtemp(dir=self._directory())
        try:
            os.link(file.path, os.path.join(place, file.name))
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield fd, "/" + file.name
            finally:
                os.close(fd)
        finally:
            from layers.trees import remove_tree

            remove_tree(place)

    def _file(self, ctx: StepContext, op: CopyOp, item: CopyItem) -> HttpFile:
        from builder.solve.fetch import fetch_http

        checksum = item.checksum or op.checksum
        key = (item.source, checksum)
        with self._lock:
            if key not in self._files:
                self._files[key] = fetch_http(
                    item.source,
                    self._root,
                    checksum=checksum or None,
                    secrets=ctx.session.secret,
                    environ=ctx.request.environ,
                    cancelled=ctx.cancelled,
                )
            return self._files[key]

    def _ref(self, op: CopyOp, item: CopyItem) -> GitRef:
        from builder.frontend.gitref import parse_git_ref

        ref = parse_git_ref(item.source, known=True)
        assert ref is not None, "the planner lets only repositories through"
        checksum = item.checksum or op.checksum
        return ref._replace(checksum=checksum) if checksum and not ref.checksum else ref

    def _access(self, ctx: StepContext) -> GitSource:
        from builder.solve.gitfetch import GitSource

        return GitSource(ctx.session.secret, ctx.session.ssh_socket("default"), None, ctx.request.environ)

    def _git_key(self, ctx: StepContext, op: CopyOp, item: CopyItem) -> str:
        from builder.solve.gitfetch import git_cache_key, resolve_git

        ref = self._ref(op, item)
        import tempfile

        key = (item.source, op.checksum, op.keep_git_dir)
        with self._lock:
            if key not in self._commits:
                with tempfile.TemporaryDirectory(dir=self._directory()) as scratch:
                    self._commits[key] = resolve_git(ref, Path(scratch), self._access(ctx), cancelled=ctx.cancelled)
            return git_cache_key(self._commits[key], ref, keep_git_dir=op.keep_git_dir)

    def _tree(self, ctx: StepContext, op: CopyOp, item: CopyItem) -> GitTree:
        import tempfile

        from builder.solve.gitfetch import fetch_git

        key = (item.source, op.checksum, op.keep_git_dir)
        with self._lock:
            if key not in self._trees:
                place = Path(tempfile.mkdtemp(dir=self._directory()))
                self._places.append(place)
                self._trees[key] = fetch_git(
                    self._ref(op, item),
                    place,
                    keep_git_dir=op.keep_git_dir,
                    access=self._access(ctx),
                    cancelled=ctx.cancelled,
                )
            return self._trees[key]

    def _directory(self) -> Path:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._root

    def close(self) -> None:
        """Remove the checkouts; downloaded files stay for the next build."""
        if self._places:
            from layers.trees import remove_tree

            for place in self._places:
                remove_tree(str(place))
        self._places.clear()
