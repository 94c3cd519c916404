"""Executes a build graph: looks up what is known, runs the rest in parallel, makes layers meanwhile.

In order: definition keys for every step (pure, but for the digests of context files); one lookup of
them all; from the targets down, the steps that are not known; then those run as soon as their
inputs are there, on `jobs` threads. A step that turns out equal by content is found, not run. A
finished snapshot's layer is packed in the background while the next step runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from builder.errors import ParseError, StepError
from builder.plan.graph import BuildGraph, CopyOp, MkdirOp, RunOp, SourceOp, Step
from builder.solve import cachekey
from builder.solve.layering import LayerBook
from builder.solve.scheduler import Stop, run_graph
from builder.solve.sources import ImageSources
from builder.solve.steps import StepContext, copy_options, open_mount, run_command, run_copy, run_mkdir
from layers.errors import Cancelled, PybuildError
from layers.events import Vertex
from layers.oci import Platform
from layers.snapshot import Mount
from layers.values import NamedTuple


class StepResult(NamedTuple):
    """What a step came to. `snapshot` is None for an image whose layers nobody needed yet.

    `key` is the content key, on which its users build theirs.
    """

    key: str
    snapshot: str | None
    created_ns: int
    cached: bool


class Solver:
    """One build's execution. Not reusable."""

    def __init__(
        self,
        ctx: StepContext,
        graph: BuildGraph,
        sources: ImageSources,
        layers: LayerBook,
        *,
        jobs: int,
        tick: Callable[[], None] = lambda: None,
        before_threads: Callable[[], None] = lambda: None,
    ) -> None:
        self._ctx = ctx
        self._graph = graph
        self._sources = sources
        self._layers = layers
        self._jobs = jobs or os.cpu_count() or 1
        self._tick = tick
        self._host = Platform.host()
        self._before_threads = before_threads
        self._definition: list[str] = []
        self._content: dict[int, list[str]] = {}
        self.results: dict[int, StepResult] = {}
        self.made_ns: dict[int, int] = {}
        self._lock = threading.Lock()
        self._materialised: dict[str, threading.Lock] = {}

    def solve(self) -> dict[int, StepResult]:
        """Bring every target's topmost step to a result. Raises: what the first failing step raised."""
        self._define()
        needed = self._look_up()
        self._announce(needed)
        if needed:
            if any(s.platform != self._host for s in needed):
                from builder.solve.emulation import require_runnable

                require_runnable(needed)
            self._before_threads()
            self._execute(needed)
        return self.results

    # Keys and lookup

    def _define(self) -> None:
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
                        content = [self._item_key(step.op, at, inputs) for at in range(len(step.op.items))]
                    except PybuildError as e:
                        self._locate(e, step)
                        raise
                    self._content[step.number] = content
                    key = cachekey.copy_key(step.op, parent, content, self._ctx.request.source_date_epoch)
                    if step.op.link:
                        key = cachekey.stack_key(parent, key)
            keys.append(key)
        self._definition = keys

    def _item_key(self, op: CopyOp, at: int, inputs: Sequence[str]) -> str:
        """What decides about one item before anything ran: context files by content, stages by definition."""
        item = op.items[at]
        if item.kind == "path" and op.input is None:
            if op.context is None:
                return "empty"
            return self._digest_tree(op, at, self._ctx.session.context(op.context).fd)
        if item.kind == "path":
            return inputs[0]
        if item.kind in {"http", "git"}:
            return self._ctx.remotes.key(self._ctx, op, item)
        return "inline"

    def _digest_tree(self, op: CopyOp, at: int, root: int) -> str:
        from builder.solve.contenthash import content_key

        item = op.items[at]
        options = copy_options(self._ctx, op, item, owner=None)
        return content_key(root, [item.source], options, stats_cache=self._ctx.store.filestats).digest

    def _look_up(self) -> list[Step]:
        """The steps that have to run, in order; what is known goes to `results`."""
        steps = self._graph.steps
        wanted = [self._definition[s.number] for s in steps if not isinstance(s.op, SourceOp) and not s.ignore_cache]
        records = self._ctx.store.cache.get_many(wanted)
        known: dict[int, StepResult] = {}
        for step in steps:
            record = records.get(self._definition[step.number])
            result = None if record is None else _from_record(record.record, record.snapshot_id)
            if result is not None and not step.ignore_cache and not isinstance(step.op, SourceOp):
                known[step.number] = result
                # Also of steps that need no look themselves: the image's history tells their times.
                self.made_ns[step.number] = result.created_ns
        visited: set[int] = set()
        needed: list[int] = []
        waiting = [image.top for image in self._graph.images if image.top is not None]
        while waiting:
            index = waiting.pop()
            if index in visited:
                continue
            visited.add(index)
            step = steps[index]
            if isinstance(step.op, SourceOp):
                self.results[index] = StepResult(self._definition[index], None, 0, True)
                continue
            if index in known:
                self.results[index] = known[index]
                continue
            needed.append(index)
            waiting += [i for i in (step.parent, *step.inputs) if i is not None]
        return [steps[i] for i in sorted(needed)]

    def _announce(self, needed: Sequence[Step]) -> None:
        """Tell of the steps that are found, and of those below them, which are not even looked at."""
        running = {s.number for s in needed}
        now = time.time_ns()
        for step in self._graph.steps:
            if step.number in running:
                continue
            is_source = isinstance(step.op, SourceOp)
            if is_source and any(step.number in (s.parent, *s.inputs) for s in needed):
                continue
            self._ctx.events.emit(Vertex(vertex_id(step), step.name, (), now, now, cached=True))

    # Execution

    def _execute(self, needed: Sequence[Step]) -> None:
        stop = Stop(self._ctx.cancelled)
        ctx = self._ctx._replace(cancelled=stop, stop_fd=stop.fd)

        def work(number: int) -> None:
            result = self._run_step(ctx, self._graph.steps[number])
            self.results[number] = result
            self.made_ns[number] = result.created_ns

        inputs = {s.number: [i for i in (s.parent, *s.inputs) if i is not None] for s in needed}
        try:
            run_graph(inputs, work, jobs=self._jobs, stop=stop, tick=self._tick)
        finally:
            stop.close()

    def _run_step(self, ctx: StepContext, step: Step) -> StepResult:
        vertex = vertex_id(step)
        inputs = tuple(f"step:{i}" for i in (step.parent, *step.inputs) if i is not None)
        started = time.time_ns()
        try:
            result, cached = self._solve_step(ctx, step, vertex, inputs)
        except Cancelled:
            ctx.events.emit(Vertex(vertex, step.name, inputs, started, time.time_ns(), error="cancelled"))
            raise
        except PybuildError as e:
            ctx.events.emit(Vertex(vertex, step.name, inputs, started, time.time_ns(), error=e.message))
            self._locate(e, step)
            raise
        ctx.events.emit(Vertex(vertex, step.name, inputs, started, time.time_ns(), cached=cached))
        return result

    def _locate(self, error: PybuildError, step: Step) -> None:
        """Let an error that knows no place in the Containerfile tell the step's."""
        if step.range is not None and not isinstance(error, (ParseError, StepError)):
            error.add_note(f"{self._ctx.source.name}:{step.range.start_line}")

    def _solve_step(
        self, ctx: StepContext, step: Step, vertex: str, inputs: tuple[str, ...]
    ) -> tuple[StepResult, bool]:
        if ctx.cancelled():
            raise Cancelled
        key, layer_key = self._content_key(step)
        store = ctx.store
        if step.ignore_cache:
            return self._make(ctx, step, vertex, inputs, key, layer_key), False
        with self._flight(ctx, key):
            record = store.cache.get(key)
            if record is not None and store.snapshots.get(record.snapshot_id or "") is not None:
                found = _from_record(record.record, record.snapshot_id)
                if found is not None:
                    store.cache.put(self._definition[step.number], record.snapshot_id, record.record)
                    return found, True
            return self._make(ctx, step, vertex, inputs, key, layer_key), False

    @contextmanager
    def _flight(self, ctx: StepContext, key: str) -> Iterator[None]:
        """Be the only build that makes what `key` stands for; another one's end is waited for. Raises: Cancelled."""
        delay_s = 0.005
        while True:
            with ctx.store.flight(f"step:{key}", wait=False) as alone:
                if alone:
                    yield
                    return
            if ctx.cancelled():
                raise Cancelled
            time.sleep(delay_s)
            delay_s = min(0.1, delay_s * 1.5)

    def _make(
        self, ctx: StepContext, step: Step, vertex: str, inputs: tuple[str, ...], key: str, layer_key: str
    ) -> StepResult:
        ctx.events.emit(Vertex(vertex, step.name, inputs, time.time_ns()))
        parent = self._snapshot(step.parent)
        if isinstance(step.op, CopyOp) and step.op.link:
            snapshot = self._linked(ctx, step, step.op, layer_key, parent, vertex)
        else:
            snapshot = self._build(ctx, step, parent, vertex)
        result = StepResult(key, snapshot, time.time_ns(), False)
        store = ctx.store
        record_bytes = json.dumps({"key": key, "created_ns": result.created_ns}).encode()
        store.cache.put(key, snapshot, record_bytes)
        if self._definition[step.number] != key:
            store.cache.put(self._definition[step.number], snapshot, record_bytes)
        self._layers.start(snapshot)
        return result

    def _build(self, ctx: StepContext, step: Step, parent: str | None, vertex: str) -> str:
        snapshots = ctx.store.snapshots
        active = snapshots.prepare(parent)
        try:
            match step.op:
                case RunOp() as op:
                    trees = {i: self._view(i) for i in step.inputs}
                    run_command(ctx, step, op, active, trees, vertex)
                case CopyOp() as op:
                    run_copy(ctx, op, active, None if op.input is None else self._view(op.input))
                case MkdirOp() as op:
                    run_mkdir(ctx, op, active)
                case SourceOp():
                    raise AssertionError("sources are not built")
        except BaseException:
            snapshots.discard(active)
            raise
        return snapshots.commit(active).id

    def _linked(self, ctx: StepContext, step: Step, op: CopyOp, layer_key: str, parent: str | None, vertex: str) -> str:
        """`COPY --link`: a layer made on nothing, found again on whatever parent, stacked without a copy."""
        snapshots = ctx.store.snapshots
        record = None if step.ignore_cache else ctx.store.cache.get(layer_key)
        if record is not None and record.snapshot_id and snapshots.get(record.snapshot_id) is not None:
            layer = record.snapshot_id
        else:
            # Names in --chown are those of the image that the layer will lie on.
            if op.chown and not op.chown.replace(":", "").isdigit():
                return self._build(ctx, step, parent, vertex)
            layer = self._build(ctx, step, None, vertex)
            ctx.store.cache.put(layer_key, layer, json.dumps({"key": layer_key, "created_ns": time.time_ns()}).encode())
        return layer if parent is None else snapshots.rebase(layer, parent).id

    def _content_key(self, step: Step) -> tuple[str, str]:
        """The content key, and for `--link` the key of the layer by itself."""
        parent = None if step.parent is None else self.results[step.parent].key
        inputs = [self.results[i].key for i in step.inputs]
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
                    with open_mount(self._view(op.input)) as root:
                        content = [
                            self._digest_tree(op, at, root) if item.kind == "path" else content[at]
                            for at, item in enumerate(op.items)
                        ]
                layer = cachekey.copy_key(op, parent, content, self._ctx.request.source_date_epoch)
                return (cachekey.stack_key(parent, layer) if op.link else layer), layer
            case SourceOp():
                return self._definition[step.number], ""

    def _view(self, index: int) -> Mount:
        return self._ctx.store.snapshots.view(self._snapshot(index))

    def _snapshot(self, index: int | None) -> str | None:
        """The snapshot of a result; an image's layers are fetched and unpacked when first asked for."""
        if index is None:
            return None
        result = self.results[index]
        op = self._graph.steps[index].op
        if result.snapshot is not None or not isinstance(op, SourceOp):
            return result.snapshot
        with self._lock:
            lock = self._materialised.setdefault(op.image.digest, threading.Lock())
        with lock:
            result = self.results[index]
            if result.snapshot is None:
                step = self._graph.steps[index]
                snapshot = self._sources.unpack(op.image, vertex_id(step), step.name)
                result = result._replace(snapshot=snapshot)
                self.results[index] = result
        return result.snapshot


def vertex_id(step: Step) -> str:
    return f"step:{step.number}"


def _from_record(record: bytes | Mapping[str, object], snapshot: str | None) -> StepResult | None:
    """A cache record as a result; None if it is of another kind or version."""
    if snapshot is None:
        return None
    try:
        doc = json.loads(record) if isinstance(record, (bytes, str)) else record
        return StepResult(str(doc["key"]), snapshot, int(str(doc["created_ns"])), True)
    except (ValueError, KeyError, TypeError):
        return None
