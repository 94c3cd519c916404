"""Executes a build graph: looks up what is known, runs the rest in parallel, makes layers meanwhile.

In order: definition keys for every step (pure, but for the digests of context files); one lookup of
them all; from the targets down, the steps that are not known; then those run as soon as their
inputs are there, on `jobs` threads. A step that turns out equal by content is found, not run. A
finished snapshot's layer is packed in the background while the next step runs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from builder.errors import ContextError, StepError
from builder.plan.graph import BuildGraph, CopyOp, MkdirOp, RunOp, SourceOp, Step
from builder.solve.layering import LayerBook, active_changes
from builder.solve.results import FailedStep, StepResult, from_record, to_record
from builder.solve.scheduler import Stop, run_graph
from builder.solve.sources import ImageSources
from builder.solve.stepkeys import StepKeys, locate_step
from builder.solve.steps import StepContext, run_command, run_copy, run_mkdir
from layers.errors import BlobNotFound, Cancelled, LayerError, PybuildError, StoreError
from layers.events import Vertex
from layers.oci import Platform, chain_id
from layers.snapshot import ActiveSnapshot, Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.sandbox.launcher import Usage
    from builder.solve.audit import AuditResult
    from builder.solve.explain import BuildPlan
    from builder.solve.remotecache import RemoteCache
    from builder.solve.report import StepReport
    from layers.oci import Descriptor
    from layers.records import LayerRecord


_TOUCH_AFTER_NS = 600 * 10**9
_MAX_LOOKS = 5
_PACKED_FILES = 500
_PACKED_BYTES = 64 << 20
"""From so much on, a COPY that ends an image is packed without being made on the disk first."""


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
        arguments: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._ctx = ctx
        self._graph = graph
        self._sources = sources
        self._layers = layers
        self._jobs = jobs or os.cpu_count() or 1
        self._tick = tick
        self._host = Platform.host()
        self._before_threads = before_threads
        self._keys = StepKeys(ctx, graph, here=self._here, bring=self._snapshot)
        self._needed: list[Step] | None = None
        self._arguments = arguments
        self._in_images = {step.number for image in graph.images for step in graph.chain(image.top)}
        used = {i for step in graph.steps for i in (step.parent, *step.inputs)}
        self._last = {image.top for image in graph.images if image.top is not None} - used
        """Steps whose files nobody needs to build upon or to copy."""
        self.results: dict[int, StepResult] = {}
        self.made_ns: dict[int, int] = {}
        self._lock = threading.Lock()
        self._slots: list[str] | None = None
        self._held = ExitStack()
        self._known: dict[int, StepResult] = {}
        self._anew: set[int] = set()
        """Steps that are to run whatever the cache has, and those on top of them."""
        self._remote: RemoteCache | None = None
        ttl_s = ctx.request.cache_ttl_s
        self._not_before_ns = 0 if ttl_s is None else time.time_ns() - int(ttl_s * 1e9)
        self._phases: dict[int, dict[str, float]] = {}
        self._times: dict[int, tuple[int, int]] = {}
        self._usage: dict[int, Usage] = {}
        self._materialised: dict[str, threading.Lock] = {}
        self.failed: FailedStep | None = None
        """What the first failed RUN left, if the request wants a capsule of it."""

    def solve(self) -> dict[int, StepResult]:
        """Bring every target's topmost step to a result. Raises: what the first failing step raised."""
        needed = self._find_and_hold()
        self._announce(needed)
        if needed:
            if any(s.platform != self._host for s in needed):
                from builder.solve.emulation import require_runnable

                require_runnable(needed)
            self._before_threads()
            self._execute(needed)
        return self.results

    def close(self) -> None:
        """Let go of what was found: a prune may take it. Idempotent."""
        self._held.close()

    def _find_and_hold(self) -> list[Step]:
        """The steps that have to run; what the others came to stays until `close`."""
        for tries_left in reversed(range(_MAX_LOOKS)):
            needed = self._prepare()
            if not needed:
                break  # nothing to run: what is found goes into the image at once
            try:
                self._held.enter_context(self._hold())
                break
            except StoreError:
                # A prune came between. What it took is not found the next time.
                if not tries_left:
                    raise
                self._begin_again()
        return needed

    def _prepare(self) -> list[Step]:
        if self._needed is None:
            self._keys.define()
            self._needed = self._look_up()
        return self._needed

    def _hold(self) -> AbstractContextManager[None]:
        """Keep what was found from a prune that comes between. Raises: StoreError if one has come already."""
        snapshots = self._ctx.store.snapshots
        ids = {r.snapshot for r in self.results.values() if r.snapshot is not None}
        for step in self._graph.steps:
            if isinstance(step.op, SourceOp) and step.op.image.config.diff_ids:
                top = chain_id(step.op.image.config.diff_ids)
                if snapshots.get(top) is not None:
                    ids.add(top)
        return self._ctx.store.lease(snapshots=ids)

    # Lookup

    def forecast(self) -> BuildPlan:
        """What `solve` would do, and why. Runs no step and fetches no layer.

        Raises: ContextError, StoreError.
        """
        from builder.solve.forecast import Forecast

        needed = {s.number for s in self._prepare()}
        made = Forecast(
            self._ctx,
            self._graph,
            self._keys,
            needed=needed,
            anew=self._anew,
            results=self.results,
            here=self._here,
        )
        plan = made.plan(self._arguments())
        self.made_ns |= made.made_ns
        return plan

    def _look_up(self) -> list[Step]:
        """The steps that have to run, in order; what is known goes to `results`."""
        steps = self._graph.steps
        wanted = [
            self._keys.definition[s.number] for s in steps if not isinstance(s.op, SourceOp) and not s.ignore_cache
        ]
        records = self._ctx.store.cache.get_many(wanted)
        known: dict[int, StepResult] = {}
        unsure: set[int] = set()
        for step in steps:
            if isinstance(step.op, SourceOp):
                continue
            record = records.get(self._keys.definition[step.number])
            result = None if record is None else from_record(record.record, record.snapshot_id)
            expired = result is not None and result.created_ns < self._not_before_ns
            if step.ignore_cache or expired or self._stands_on(step, self._anew):
                self._anew.add(step.number)
            elif any(i in self._anew or i in unsure for i in (step.parent, *step.inputs)):
                unsure.add(step.number)  # until the files that it takes are made: their content decides
            elif result is not None:
                known[step.number] = result
                # Also of steps that need no look themselves: the image's history tells their times.
                self.made_ns[step.number] = result.created_ns
            elif self._remote is not None:
                self._look_afar(step, known)
        self._known = known
        old_ns = time.time_ns() - _TOUCH_AFTER_NS
        stale = [key for key, record in records.items() if record.used_ns < old_ns]
        if stale:
            # What prunes by age or to a size forgets the least recently used first.
            self._ctx.store.cache.touch([*stale, *(f"inputs:{key}" for key in stale)])
        visited: set[int] = set()
        needed: list[int] = []
        waiting = [*self._graph.demanded, *(image.top for image in self._graph.images if image.top is not None)]
        while waiting:
            index = waiting.pop()
            if index in visited:
                continue
            visited.add(index)
            step = steps[index]
            if isinstance(step.op, SourceOp):
                self.results[index] = StepResult(self._keys.definition[index], None, 0, True)
                continue
            if index in known:
                self.results[index] = known[index]
                continue
            needed.append(index)
            waiting += [i for i in (step.parent, *step.inputs) if i is not None]
        return [steps[i] for i in sorted(needed)]

    @staticmethod
    def _stands_on(step: Step, steps: set[int]) -> bool:
        """Whether one of the steps is what this one runs on or mounts, so that its key does not tell its files."""
        below = (step.parent, *(step.inputs if isinstance(step.op, RunOp) else ()))
        return any(i in steps for i in below)

    def _look_afar(self, step: Step, known: dict[int, StepResult]) -> None:
        """Take a step's result from a remote cache, if those of all steps that it stands on are known as well."""
        assert self._remote is not None
        below = None if step.parent is None else self._graph.steps[step.parent]
        if below is not None and below.number not in known and not isinstance(below.op, SourceOp):
            return
        found = self._remote.find(self._keys.definition[step.number], not_before_ns=self._not_before_ns)
        if found is not None:
            known[step.number] = StepResult(found.key, None, found.created_ns, True, found.layer)
            self.made_ns[step.number] = found.created_ns

    def use_remote(self, remote: RemoteCache) -> None:
        """Look into other machines' caches, too. To be called before `solve`."""
        self._remote = remote

    def forget_remote(self) -> None:
        """Begin again without other machines' caches; what was made meanwhile is found."""
        self._remote = None
        self._begin_again()

    def _begin_again(self) -> None:
        self._needed = None
        self._anew = set()
        self.results = {}
        self.made_ns = {}

    def fetch_remote(self, layers: Sequence[Descriptor]) -> None:
        """Make layers that only a remote cache has be in the store. Raises: PybuildError."""
        for layer in layers:
            if self._remote is None:
                raise BlobNotFound(f"layer {layer.digest} is not in the store")
            self._remote.fetch(layer)

    def definition(self, step: Step) -> str:
        """A step's definition key."""
        return self._keys.definition[step.number]

    def layer_of(self, step: Step) -> tuple[StepResult, LayerRecord] | None:
        """A step's result and the layer that it adds; None for an image, and where nothing is known of it."""
        result = self.results.get(step.number) or self._known.get(step.number)
        if result is None or isinstance(step.op, SourceOp):
            return None
        if result.layer is not None:
            return result, result.layer
        if result.snapshot is None or self._ctx.store.snapshots.get(result.snapshot) is None:
            return None
        return result, self._layers.get(result.snapshot)

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
            locate_step(ctx, e, step)
            raise
        completed = time.time_ns()
        self._times[step.number] = (started, completed)
        used = self._usage.get(step.number)
        usage = None if used is None else used._asdict()
        ctx.events.emit(Vertex(vertex, step.name, inputs, started, completed, cached=cached, usage=usage))
        return result

    def _solve_step(
        self, ctx: StepContext, step: Step, vertex: str, inputs: tuple[str, ...]
    ) -> tuple[StepResult, bool]:
        if ctx.cancelled():
            raise Cancelled
        key, layer_key = self._keys.content(step, lambda i: self.results[i].key)
        store = ctx.store
        if step.number in self._anew:
            return self._make(ctx, step, vertex, inputs, key, layer_key), False
        waited = time.perf_counter()
        with self._flight(ctx, key):
            self._phase(step.number, "wait", waited)
            record = store.cache.get(key)
            if record is not None and store.snapshots.get(record.snapshot_id or "") is not None:
                found = from_record(record.record, record.snapshot_id)
                if found is not None and found.created_ns >= self._not_before_ns:
                    store.cache.put(self._keys.definition[step.number], record.snapshot_id, record.record)
                    self._layers.submit(lambda: self._remember(step))
                    return found, True
            remote = None if self._remote is None else self._remote.find(key, not_before_ns=self._not_before_ns)
            if remote is not None:
                return StepResult(key, None, remote.created_ns, True, remote.layer), True
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
        began = time.perf_counter()
        parent = self._snapshot(step.parent)
        for i in step.inputs:
            self._snapshot(i)
        self._phase(step.number, "pull", began)
        # Told after what it stands on: an image that is fetched for it is a vertex of its own, and comes first.
        ctx.events.emit(Vertex(vertex, step.name, inputs, time.time_ns()))
        if isinstance(step.op, CopyOp) and step.op.link:
            snapshot = self._linked(ctx, step, step.op, layer_key, parent, vertex)
        elif isinstance(step.op, CopyOp) and self._may_pack(step):
            snapshot = self._packed(ctx, step, step.op, parent, vertex) or self._build(ctx, step, parent, vertex)
        else:
            snapshot = self._build(ctx, step, parent, vertex)
        result = StepResult(key, snapshot, time.time_ns(), False)
        store = ctx.store
        record_bytes = to_record(key, result.created_ns)
        store.cache.put(key, snapshot, record_bytes)
        if self._keys.definition[step.number] != key:
            store.cache.put(self._keys.definition[step.number], snapshot, record_bytes)
        self._layers.start(snapshot, wanted=step.number in self._in_images)
        self._layers.submit(lambda: self._remember(step))
        return result

    def _remember(self, step: Step) -> None:
        """Keep what a step's key was made of, to compare with when it is not found one day."""
        from builder.solve.explain import INPUTS, describe, encode, slot_of

        cache, key = self._ctx.store.cache, self._keys.definition[step.number]
        with self._lock:
            if self._slots is None:
                self._slots = slot_of(self._ctx.request, self._graph)
        try:
            entries = self._keys.entries(step)
        except PybuildError:
            entries = None  # a file of the context has gone meanwhile: the build is none the worse for it
        cache.put(INPUTS + key, None, encode(describe(step, self._graph, self._ctx.request, entries)))
        cache.put(self._slots[step.number], None, key.encode())

    def _build(self, ctx: StepContext, step: Step, parent: str | None, vertex: str) -> str:
        snapshots = ctx.store.snapshots
        began = time.perf_counter()
        active = snapshots.prepare(parent)
        began = self._phase(step.number, "prepare", began)
        try:
            match step.op:
                case RunOp() as op:
                    trees = {i: self._view(i) for i in step.inputs}
                    self._usage[step.number] = run_command(ctx, step, op, active, trees, vertex)
                case CopyOp() as op:
                    run_copy(ctx, op, active, None if op.input is None else self._view(op.input), vertex=vertex)
                case MkdirOp() as op:
                    run_mkdir(ctx, op, active)
                case SourceOp():
                    raise AssertionError("sources are not built")
        except StepError as e:
            self._keep_failed(step, active, e)
            raise
        except BaseException:
            snapshots.discard(active)
            raise
        began = self._phase(step.number, "sandbox" if isinstance(step.op, RunOp) else "copy", began)
        committed = snapshots.commit(active).id
        self._phase(step.number, "commit", began)
        return committed

    def _may_pack(self, step: Step) -> bool:
        """Whether a COPY's layer is made of its source alone, and that is worth it: nobody needs its files."""
        size = self._keys.last_source(step)
        if size is None or not self._layers.packs or step.number not in self._last:
            return False
        snapshots = self._ctx.store.snapshots
        large = size.files >= _PACKED_FILES or size.size_bytes >= _PACKED_BYTES
        return large and snapshots.driver == "overlay" and snapshots.can_defer

    def _packed(self, ctx: StepContext, step: Step, op: CopyOp, parent: str | None, vertex: str) -> str | None:
        """The snapshot of a COPY as its layer alone; None where its files have to be made to know that."""
        from builder.solve.treepack import LeftOut

        snapshots = ctx.store.snapshots
        began = time.perf_counter()
        active = snapshots.prepare(parent)
        began = self._phase(step.number, "prepare", began)
        left_out = LeftOut()
        try:
            run_copy(ctx, op, active, None if op.input is None else self._view(op.input), left_out, vertex=vertex)
            self._phase(step.number, "copy", began)
            if not left_out:
                return snapshots.commit(active).id
            made = active_changes(snapshots, active)
            return self._layers.pack(left_out.changes(made), active.path, parent)
        except (LayerError, ContextError):
            # Not packed as it is: what cannot be copied either is said by the copy.
            return None
        finally:
            left_out.close()
            snapshots.discard(active)

    def _keep_failed(self, step: Step, active: ActiveSnapshot, error: StepError) -> None:
        """Throw away what a failed step left, unless a capsule is to be made of it: the first failure's."""
        snapshots = self._ctx.store.snapshots
        with self._lock:
            if self._ctx.request.capsule is not None and self.failed is None:
                try:
                    self.failed = FailedStep(step, snapshots.commit(active).id, error)
                except PybuildError as e:
                    error.hint = f"no capsule could be made: {e.message}"
                else:
                    return
        snapshots.discard(active)

    def forget_failed(self) -> None:
        """Remove what a failed step left. Idempotent."""
        failed, self.failed = self.failed, None
        if failed is not None:
            self._ctx.store.snapshots.remove(failed.snapshot)

    # What came of it

    def _phase(self, number: int, name: str, began: float) -> float:
        """Add the time since `began` to a phase of a step; the time now."""
        now = time.perf_counter()
        phases = self._phases.setdefault(number, {})
        phases[name] = phases.get(name, 0.0) + now - began
        return now

    def reports(self) -> tuple[StepReport, ...]:
        """Every step that was found or run, in order; once `solve` has returned."""
        from builder.solve.report import StepReport

        found: list[StepReport] = []
        for step in self._graph.steps:
            below = tuple(i for i in (step.parent, *step.inputs) if i is not None)
            times = self._times.get(step.number)
            if times is None or self.results[step.number].cached:
                found.append(StepReport(step.number, step.name, step.stage, below, cached=True))
                continue
            usage = self._usage.get(step.number)
            layer = self._layers.report(self.results[step.number].snapshot)
            found.append(
                StepReport(
                    step.number, step.name, step.stage, below, False, *times,
                    phases={**self._phases.get(step.number, {}), **layer.phases},
                    user_s=0.0 if usage is None else usage.user_s,
                    system_s=0.0 if usage is None else usage.system_s,
                    max_rss_bytes=0 if usage is None else usage.max_rss_bytes,
                    read_bytes=0 if usage is None else usage.read_bytes,
                    written_bytes=0 if usage is None else usage.written_bytes,
                    layer_bytes=layer.size_bytes,
                )
            )  # fmt: skip
        return tuple(found)

    def audit(self, count: int, seed: int) -> list[AuditResult]:
        """Run found steps again, `count` of them (0: all), and compare what they change with what is kept.

        What is run is thrown away. Raises: what a step raises; StoreError.
        """
        from builder.solve.audit import AuditResult, compare, sample

        self._prepare()
        found = [n for n, r in sorted(self._known.items()) if r.snapshot is not None]
        self._before_threads()
        results: list[AuditResult] = []
        for number in sample(found, count, seed):
            step = self._graph.steps[number]
            snapshots = self._ctx.store.snapshots
            kept = snapshots.get(str(self._known[number].snapshot))
            if kept is None:
                continue
            for i in (step.parent, *step.inputs):
                self._snapshot(i)
            again = self._build(self._ctx, step, kept.parent, vertex_id(step))
            try:
                results.append(AuditResult(step.name, compare(self._ctx.store, kept.id, again)))
            finally:
                snapshots.remove(again)
        return results

    def snapshot(self, index: int) -> str | None:
        """The snapshot of a step that is solved; an image is fetched and unpacked if it must be."""
        return self._snapshot(index)

    def _linked(self, ctx: StepContext, step: Step, op: CopyOp, layer_key: str, parent: str | None, vertex: str) -> str:
        """`COPY --link`: a layer made on nothing, found again on whatever parent, stacked without a copy."""
        snapshots = ctx.store.snapshots
        record = None if step.number in self._anew else ctx.store.cache.get(layer_key)
        if record is not None and record.snapshot_id and snapshots.get(record.snapshot_id) is not None:
            layer = record.snapshot_id
        else:
            # Names in --chown are those of the image that the layer will lie on.
            if op.chown and not op.chown.replace(":", "").isdigit():
                return self._build(ctx, step, parent, vertex)
            layer = self._build(ctx, step, None, vertex)
            ctx.store.cache.put(layer_key, layer, to_record(layer_key, time.time_ns()))
        return layer if parent is None else snapshots.rebase(layer, parent).id

    def _view(self, index: int) -> Mount:
        return self._ctx.store.snapshots.view(self._snapshot(index))

    def _here(self, index: int) -> str | None:
        """The snapshot of a step if it is here already."""
        step = self._graph.steps[index]
        if isinstance(step.op, SourceOp):
            top = chain_id(step.op.image.config.diff_ids)
            return top if self._ctx.store.snapshots.get(top) is not None else None
        result = self.results.get(index)
        return None if result is None else result.snapshot

    def _snapshot(self, index: int | None) -> str | None:
        """The snapshot of a result; an image's layers are fetched and unpacked when first asked for."""
        if index is None:
            return None
        step = self._graph.steps[index]
        result = self.results.get(index) or self._known.get(index)
        if result is None:  # a FROM beneath a step that a remote cache has
            result = StepResult(self._keys.definition[index], None, 0, True)
        if result.snapshot is not None or (result.layer is None and not isinstance(step.op, SourceOp)):
            return result.snapshot
        place = step.op.image.digest if isinstance(step.op, SourceOp) else vertex_id(step)
        with self._lock:
            lock = self._materialised.setdefault(place, threading.Lock())
        with lock:
            done = self.results.get(index)
            if done is not None and done.snapshot is not None:
                return done.snapshot
            if isinstance(step.op, SourceOp):
                snapshot = self._sources.unpack(step.op.image, vertex_id(step), step.name)
            else:
                snapshot = self._materialise(step, result)
            self.results[index] = result._replace(snapshot=snapshot)
        return snapshot

    def _materialise(self, step: Step, result: StepResult) -> str:
        """Fetch and unpack a step's layer, and those of the steps beneath it, from a remote cache."""
        assert self._remote is not None
        assert result.layer is not None
        parent = self._snapshot(step.parent)
        snapshot = self._remote.materialise(result.layer, parent, vertex_id(step))
        record = to_record(result.key, result.created_ns)
        for key in {result.key, self._keys.definition[step.number]}:
            self._ctx.store.cache.put(key, snapshot, record)
        return snapshot


def vertex_id(step: Step) -> str:
    return f"step:{step.number}"
