"""The keys of one graph's steps, and the files that they are made of.

A definition key is known before anything runs; a content key once what is beneath the step is. How a
key is put together is `builder.solve.cachekey`'s matter; what is found under it, the solver's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from builder.errors import SourceNotFound, locate
from builder.plan.graph import BuildGraph, CopyOp, MkdirOp, RunOp, SourceOp, Step
from builder.solve import cachekey
from builder.solve.steps import StepContext, copy_options, open_mount
from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.solve.contenthash import ContentEntry, ContentKey


class StepKeys:
    """`here` gives the snapshot of a step that is here already, `bring` makes it be here first."""

    def __init__(
        self,
        ctx: StepContext,
        graph: BuildGraph,
        *,
        here: Callable[[int], str | None],
        bring: Callable[[int], str | None],
    ) -> None:
        self._ctx = ctx
        self._graph = graph
        self._here = here
        self._bring = bring
        self._content: dict[int, list[str]] = {}
        self._taken: dict[tuple[int, int], ContentKey] = {}
        self.definition: list[str] = []
        """By number of step, once `define` has been called."""

    def define(self) -> None:
        """Make the definition keys. Raises: PybuildError for files that cannot be read."""
        keys: list[str] = []
        for step in self._graph.steps:
            parent = None if step.parent is None else keys[step.parent]
            inputs = [keys[i] for i in step.inputs]
            match step.op:
                case SourceOp():
                    key = cachekey.source_key(step.op)
                case RunOp():
                    key = cachekey.run_key(step.op, self._ctx.request.run, parent, inputs)
                case MkdirOp():
                    key = cachekey.mkdir_key(step.op, parent, self._ctx.request.source_date_epoch)
                case CopyOp():
                    try:
                        content = [self._item_key(step, step.op, at, inputs) for at in range(len(step.op.items))]
                    except PybuildError as e:
                        locate_step(self._ctx, e, step)
                        raise
                    self._content[step.number] = content
                    key = cachekey.copy_key(step.op, parent, content, self._ctx.request.source_date_epoch)
                    if step.op.link:
                        key = cachekey.stack_key(parent, key)
            keys.append(key)
        self.definition = keys

    def content(self, step: Step, key_of: Callable[[int], str]) -> tuple[str, str]:
        """The content key, and for `--link` the key of the layer by itself."""
        parent = None if step.parent is None else key_of(step.parent)
        inputs = [key_of(i) for i in step.inputs]
        match step.op:
            case RunOp() as op:
                key = cachekey.run_key(op, self._ctx.request.run, parent, inputs)
                return key, key
            case MkdirOp() as op:
                key = cachekey.mkdir_key(op, parent, self._ctx.request.source_date_epoch)
                return key, key
            case CopyOp() as op:
                content = self._content[step.number]
                if op.input is not None:
                    tree = self._here(op.input) or self._bring(op.input)
                    with open_mount(self._ctx.store.snapshots.view(tree)) as root:
                        content = [
                            self._digest_tree(step, op, at, root) if item.kind == "path" else content[at]
                            for at, item in enumerate(op.items)
                        ]
                layer = cachekey.copy_key(op, parent, content, self._ctx.request.source_date_epoch)
                return (cachekey.stack_key(parent, layer) if op.link else layer), layer
            case SourceOp():
                return self.definition[step.number], ""

    def entries(self, step: Step) -> Sequence[ContentEntry] | None:
        """The files that a COPY takes, one by one; None where they cannot be known yet, or are very many."""
        if not isinstance(step.op, CopyOp):
            return None
        op = step.op
        found: list[ContentEntry] = []
        for at, item in enumerate(op.items):
            if item.kind != "path" or (op.input is None and op.context is None):
                continue
            if (step.number, at) not in self._taken and op.input is not None:
                if self._here(op.input) is None:
                    return None
                with open_mount(self._ctx.store.snapshots.view(self._here(op.input))) as root:
                    self._digest_tree(step, op, at, root)
            entries = self._taken[step.number, at].entries()
            if entries is None:
                return None
            found += entries
        return found

    def last_source(self, step: Step) -> ContentKey | None:
        """What the last source of a COPY comes to, as far as that had to be looked at."""
        return self._taken.get((step.number, len(step.op.items) - 1)) if isinstance(step.op, CopyOp) else None

    def _item_key(self, step: Step, op: CopyOp, at: int, inputs: Sequence[str]) -> str:
        """What decides about one item before anything ran: context files by content, stages by definition."""
        item = op.items[at]
        if item.kind == "path" and op.input is None:
            if op.context is None:
                return "empty"
            return self._digest_tree(step, op, at, self._ctx.session.context(op.context).fd)
        if item.kind == "path":
            return inputs[0]
        if item.kind in {"http", "git"}:
            return self._ctx.remotes.key(self._ctx, op, item)
        return "inline"

    def _digest_tree(self, step: Step, op: CopyOp, at: int, root: int) -> str:
        from builder.solve.contenthash import content_key

        item = op.items[at]
        options = copy_options(self._ctx, op, item, owner=None)
        key = content_key(root, [item.source], options, stats_cache=self._ctx.store.filestats)
        self._taken[step.number, at] = key
        return key.digest


def locate_step(ctx: StepContext, error: PybuildError, step: Step) -> None:
    """Let an error that knows no place in the Containerfile tell the step's, and what to do about a missing source."""
    missing = error.path.strip("/") if isinstance(error, SourceNotFound) else ""
    if step.range is not None:
        locate(error, ctx.source, ctx.source.locate(missing, step.range))
    if isinstance(error, SourceNotFound) and isinstance(step.op, CopyOp) and step.op.context is not None:
        error.hint = error.hint or ctx.session.context(step.op.context).advice(error.path)
