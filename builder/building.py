"""One build from its request to its outputs: puts the session, the planner, the solver and the exporter together.

`builder.api` gives this to callers; nothing here knows of the command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from builder.errors import CacheLostError
from builder.plan.request import BuildRequest, RunOptions
from layers.events import EventSink, VertexWarning
from layers.oci import Descriptor, Digest
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.export import ExportedImage
    from builder.frontend.instructions import Containerfile
    from builder.output import EarlyPush
    from builder.plan.graph import BuildGraph
    from builder.sandbox.launcher import Launcher
    from builder.session import Session
    from builder.solve.explain import BuildPlan
    from builder.solve.layering import LayerBook
    from builder.solve.report import StepReport
    from builder.solve.secretgate import LogGate
    from builder.solve.solver import Solver
    from builder.solve.sources import ImageSources
    from builder.solve.steps import OnError
    from layers.store import Store
    from registry.transport import TransportContext
    from registry.wire import RateLimit

NAMELESS = "@"
"""With the image's id, the store's name of an image that was built without a tag."""


class OutputResult(NamedTuple):
    """What was written besides the store: where, and the digest of the image there (None for a file system)."""

    type: str
    place: str
    digest: Digest | None
    moved_bytes: int = 0


class BuildResult(NamedTuple):
    """A finished build. `image_id` is the config's digest; for several platforms the index's.

    `steps` are those that were looked at or run, with their times.
    """

    descriptor: Descriptor
    image_id: Digest
    tags: tuple[str, ...]
    executed: int
    cached: int
    steps: tuple[StepReport, ...] = ()
    outputs: tuple[OutputResult, ...] = ()
    wall_s: float = 0.0
    fetched_bytes: int = 0
    folded_bytes: int = 0
    sent_bytes: int = 0
    pulls_left: tuple[tuple[str, RateLimit], ...] = ()


class Parts(NamedTuple):
    """What a build works with, once its graph is known."""

    store: Store
    session: Session
    sources: ImageSources
    layers: LayerBook
    graph: BuildGraph
    solver: Solver
    transports: Callable[[], TransportContext]
    epoch_s: int | None = None
    gate: LogGate | None = None


Check = Callable[["Containerfile", "Session", "ImageSources"], None]


@contextmanager
def prepared(
    request: BuildRequest,
    store: Store,
    transports: Callable[[], TransportContext],
    *,
    events: EventSink,
    cancelled: Callable[[], bool],
    check: Check,
    tick: Callable[[], None] = lambda: None,
    launcher: Launcher | None = None,
    on_error: OnError | None = None,
) -> Iterator[Parts]:
    """Parse and plan the request; what it opened is closed with the block.

    Raises: ParseError, PlanError, ContextError.
    """
    from builder.frontend.instructions import parse_containerfile
    from builder.plan.planner import plan
    from builder.session import Session
    from builder.solve.layering import LayerBook
    from builder.solve.remote import RemoteSources
    from builder.solve.solver import Solver
    from builder.solve.sources import ImageSources
    from builder.solve.steps import StepContext

    containerfile = parse_containerfile(request.containerfile)
    with ExitStack() as stack:
        zygote = Zygote(launcher, request.run)
        stack.callback(zygote.close)
        session = Session(request, store.root)
        stack.callback(session.close)
        sources = ImageSources(
            store,
            transports,
            policy=request.pull,
            events=events,
            cancelled=cancelled,
            additional=request.additional_stores,
        )
        remotes = RemoteSources(store.root / "remote")
        stack.callback(remotes.close)
        layers = LayerBook(store, request, cancelled)
        stack.callback(layers.close)
        check(containerfile, session, sources)
        graph = plan(request, containerfile, sources)
        gate: LogGate | None = None
        if request.secrets and request.secret_gate:
            from builder.solve.secretgate import LogGate, needles

            gate = LogGate(events, needles({id: session.secret(id) or b"" for id in request.secrets}))
        context = StepContext(
            store=store,
            session=session,
            request=request,
            launcher=zygote.get,
            events=gate or events,
            cancelled=cancelled,
            source=request.containerfile,
            remotes=remotes,
            on_error=on_error,
        )
        solver = Solver(
            context,
            graph,
            sources,
            layers,
            jobs=request.jobs,
            tick=tick,
            before_threads=_needs_zygote(graph, zygote),
            arguments=_argument_names(containerfile),
        )
        stack.callback(solver.close)
        yield Parts(store, session, sources, layers, graph, solver, transports, request.source_date_epoch, gate)


def _argument_names(containerfile: Containerfile) -> Callable[[], frozenset[str]]:
    def names() -> frozenset[str]:
        from builder.frontend.language import Arg

        everything = [*containerfile.global_args, *(i for s in containerfile.stages for i in s.instructions)]
        return frozenset(pair.name for i in everything if isinstance(i, Arg) for pair in i.pairs)

    return names


def finish(
    parts: Parts,
    request: BuildRequest,
    *,
    events: EventSink,
    cancelled: Callable[[], bool],
    on_plan: Callable[[BuildPlan], None] | None = None,
) -> BuildResult:
    """Solve, export, name and output a prepared build. Raises: see `builder.api.build`."""
    from registry.reference import Reference

    started = time.monotonic()
    store, solver = parts.store, parts.solver
    names = [Reference.parse(tag).with_default_tag() for tag in request.tags]
    if request.cache_from:
        from builder.solve.remotecache import import_caches

        import_caches(parts, request, events)
    if on_plan is not None:
        on_plan(solver.forecast())
    early = _begin_push(parts, request, tuple(map(str, names)))
    try:
        try:
            image = _solve(parts, request)
        except CacheLostError as e:
            events.emit(VertexWarning("cache", f"{e.message}; the steps are run"))
            solver.forget_remote()
            image = _solve(parts, request)
    except BaseException as e:
        if early is not None:
            early.close(failed=True)
        if solver.failed is not None and solver.failed.error is e:
            from builder import capsule

            capsule.keep(parts, request, events)
        raise
    finally:
        solver.forget_failed()
    parts.layers.finish()
    if parts.gate is not None:
        _search(parts, parts.gate, image)
    if names:
        store.publish({name.canonical(): image.descriptor for name in names})
    else:
        store.publish({f"{NAMELESS}{image.image_id}": image.descriptor})
    if early is not None:
        early.close()
    outputs = _outputs(parts, request, image, tuple(map(str, names)), events, cancelled)
    if request.cache_to:
        from builder.solve.remotecache import export_caches

        export_caches(parts, request, image, events)
    executed = sum(not r.cached for r in solver.results.values())
    return BuildResult(
        image.descriptor,
        image.image_id,
        tuple(map(str, names)),
        executed,
        len(parts.graph.steps) - executed,
        solver.reports(),
        outputs,
        time.monotonic() - started,
        parts.sources.fetched_bytes,
        parts.layers.saved_bytes,
        sum(output.moved_bytes for output in outputs) + (0 if early is None else early.moved_bytes),
        parts.sources.pulls_left(),
    )


def _solve(parts: Parts, request: BuildRequest) -> ExportedImage:
    """Bring all steps to results, and them into an image; not named yet."""
    from builder.export import Exporter

    solver = parts.solver
    results = solver.solve()
    return Exporter(parts.store, request, parts.sources, parts.layers, solver).export(
        parts.graph, results, solver.made_ns
    )


def _begin_push(parts: Parts, request: BuildRequest, names: tuple[str, ...]) -> EarlyPush | None:
    """Before steps run: find out whether their image may be pushed, and begin to. Raises: AuthError, NetworkError."""
    if not any(output.type == "registry" for output in request.outputs):
        return None
    if parts.solver.forecast().count("hit") == len(parts.graph.steps):
        return None  # likely all of it is there already: one question at the end will tell
    from builder.output import EarlyPush, check_rights

    check_rights(parts, request.outputs, names)
    if all(output.compression is not None for output in request.outputs if output.type == "registry"):
        return None
    changed = request.force_compression or request.squash_all
    bases = [] if changed else [image.base for image in parts.graph.images if image.base is not None]
    return EarlyPush(parts, request.outputs, names, bases)


def _search(parts: Parts, gate: LogGate, image: ExportedImage) -> None:
    """Look for the values of secrets in what is about to be named. Raises: SecretLeakError."""
    from builder.solve import secretgate

    if not gate.wanted:
        return
    findings = list(gate.findings)
    for plan in parts.graph.images:
        for step in parts.graph.chain(plan.top):
            found = parts.solver.layer_of(step)
            if found is not None and found[0].snapshot is not None:
                layer = f"{step.name}, layer {found[1].descriptor.digest}"
                findings += secretgate.search_snapshot(parts.store, found[0].snapshot, gate.wanted, layer)
    for document in image.documents:
        findings += secretgate.search_text(document, gate.wanted, "the image's config or history")
    secretgate.refuse(findings)


def _outputs(
    parts: Parts,
    request: BuildRequest,
    image: ExportedImage,
    names: tuple[str, ...],
    events: EventSink,
    cancelled: Callable[[], bool],
) -> tuple[OutputResult, ...]:
    if not request.outputs:
        return ()
    from builder.output import write_output

    return tuple(
        result
        for output in request.outputs
        for result in write_output(parts, output, image, names, events=events, cancelled=cancelled)
    )


def _needs_zygote(graph: BuildGraph, zygote: Zygote) -> Callable[[], None]:
    from builder.plan.graph import RunOp

    return zygote.start if any(isinstance(s.op, RunOp) for s in graph.steps) else (lambda: None)


class Zygote:
    """The launcher of a build: started when the first step is to run, before there are threads."""

    def __init__(self, launcher: Launcher | None, options: RunOptions) -> None:
        self._launcher = launcher
        self._options = options
        self._own = launcher is None

    def start(self) -> None:
        if self._launcher is None:
            from builder.sandbox.tiers import start_launcher

            options = self._options
            self._launcher = start_launcher(options.isolation, options.runtime, own_pids="pid" not in options.shared)

    def get(self) -> Launcher:
        self.start()
        assert self._launcher is not None
        return self._launcher

    def close(self) -> None:
        if self._own and self._launcher is not None:
            self._launcher.close()
            self._launcher = None


def metadata(result: BuildResult) -> Mapping[str, object]:
    """A result as the JSON document of `--metadata-file`; the keys with dots are buildx's."""
    return {
        "containerimage.config.digest": result.image_id,
        "containerimage.digest": result.descriptor.digest,
        "containerimage.descriptor": result.descriptor.to_json(),
        "image.name": ",".join(result.tags),
        "pybuild.steps": {
            "executed": result.executed,
            "cached": result.cached,
            "list": [step.to_json() for step in result.steps],
        },
        "pybuild.outputs": [o._asdict() for o in result.outputs],
        "pybuild.wall_s": round(result.wall_s, 4),
        "pybuild.fetched_bytes": result.fetched_bytes,
        "pybuild.sent_bytes": result.sent_bytes,
        "pybuild.pulls_left": {host: limit._asdict() for host, limit in result.pulls_left},
    }
