"""The public API: one function per verb; what the command line and Python callers use.

    from builder import BuildRequest, build
    result = build(BuildRequest(containerfile=SourceFile("Containerfile", text), context=Path(".")))

Every input is an argument, every failure a `PybuildError`, all progress an event. Nothing is
printed and no environment variable is read here. All functions may be called from any thread, several
at once. As root, or after `prepare_namespaces`, a build runs in the calling process; for an ordinary
user it runs in a child process (`builder.inchild`), so that the caller stays who it is.

| Exception (`layers.errors`, `builder.errors`, `registry.errors`) | exit status |
|---|---|
| UsageError | 2 |
| StepError | that of the command of the step |
| Cancelled | 130 |
| every other PybuildError | its class's `exit_code`, 1 unless the class says otherwise |
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from builder.building import NAMELESS as NAMELESS
from builder.building import BuildResult as BuildResult
from builder.opening import may_stay
from builder.opening import open_store as open_store
from builder.opening import prepare_namespaces as prepare_namespaces
from builder.plan.request import BuildRequest
from layers.errors import PybuildError
from layers.events import EventSink, NullSink
from layers.oci import Descriptor, Platform
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.capsule import Capsule
    from builder.difference import Difference
    from builder.frontend.instructions import Containerfile
    from builder.frontend.lint import CheckOptions, Finding
    from builder.lock import Lock
    from builder.plan.sourcepolicy import Rule
    from builder.sandbox.launcher import Launcher
    from builder.session import Session
    from builder.solve.audit import AuditResult
    from builder.solve.explain import BuildPlan
    from builder.solve.sources import ImageSources
    from builder.solve.steps import OnError
    from layers.oci import ImageConfig, Index
    from layers.store import Store
    from registry.copy import CopyOptions, CopyResult
    from registry.hosts import RegistryOptions
    from registry.transport import RawManifest, TransportContext


def build(
    request: BuildRequest,
    *,
    root: Path,
    events: EventSink | None = None,
    registry: RegistryOptions | None = None,
    cancelled: Callable[[], bool] | None = None,
    tick: Callable[[], None] = lambda: None,
    launcher: Launcher | None = None,
    on_plan: Callable[[BuildPlan], None] | None = None,
    on_error: OnError | None = None,
) -> BuildResult:
    """Build the request's target and tag it in the store at `root`.

    Equal requests on equal inputs run nothing twice and give the same image. `tick` is called a few
    times a second from the calling thread. `on_plan` is told before anything runs what will be done and why;
    `on_error` (not where the build runs in a child) of a failed RUN whose sandbox can still be entered.
    Raises: ParseError, PlanError, ContextError, StepError, SandboxError, RegistryError, StoreError,
    Cancelled.
    """
    from builder.building import finish, prepared

    sink = events or NullSink()
    stopped = cancelled or _never
    if not may_stay(request.run.isolation):
        from builder.inchild import call

        result: BuildResult = call(
            "build", request, root=root, registry=registry, events=sink, cancelled=stopped, tick=tick, on_plan=on_plan
        )
        return result
    with (
        open_store(root, isolation=request.run.isolation, driver=request.run.storage_driver) as store,
        _lazy_transports(lambda: store, registry) as transports,
        prepared(
            request, store, transports, events=sink, cancelled=stopped, tick=tick, launcher=launcher, on_error=on_error,
            check=partial(_enforce_checks, request),
        ) as parts,
    ):  # fmt: skip
        return finish(parts, request, events=sink, cancelled=stopped, on_plan=on_plan)


def plan_build(
    request: BuildRequest,
    *,
    root: Path,
    registry: RegistryOptions | None = None,
    events: EventSink | None = None,
) -> BuildPlan:
    """What `build` would do with the request: each step found or to be run, and why; bytes to fetch.

    Fetches manifests and configs of base images, no layers; runs nothing.
    Raises: ParseError, PlanError, ContextError, RegistryError, StoreError.
    """
    from builder.building import prepared

    sink = events or NullSink()
    if not may_stay(request.run.isolation):
        from builder.inchild import call

        plan: BuildPlan = call("plan", request, root=root, registry=registry, events=sink, cancelled=_never)
        return plan
    with (
        open_store(root, isolation=request.run.isolation, driver=request.run.storage_driver) as store,
        _lazy_transports(lambda: store, registry) as transports,
        prepared(
            request, store, transports, events=sink, cancelled=_never, check=partial(_enforce_checks, request)
        ) as parts,
    ):
        if request.cache_from:
            from builder.solve.remotecache import import_caches

            import_caches(parts, request, sink)
        return parts.solver.forecast()


def lock(
    request: BuildRequest,
    *,
    root: Path,
    old: Sequence[Rule] = (),
    update: Collection[str] | None = (),
    registry: RegistryOptions | None = None,
    events: EventSink | None = None,
    warn: Callable[[str], None] = lambda _words: None,
) -> Lock:
    """Pin every external input of the request's Containerfile: images, downloads, repositories.

    What `old` pins stays as it is, but for what `update` names (None: everything). Builds nothing.
    Raises: ParseError, PlanError, ContextError, RegistryError, StoreError.
    """
    from builder.lock import make_lock

    with open_store(root) as store, _lazy_transports(lambda: store, registry) as transports:
        return make_lock(
            request, store, transports, old=old, update=update, events=events or NullSink(), warn=warn
        )  # fmt: skip


def audit_cache(
    request: BuildRequest,
    *,
    root: Path,
    registry: RegistryOptions | None = None,
    events: EventSink | None = None,
    sample: int = 0,
    seed: int = 0,
) -> list[AuditResult]:
    """Run steps that the cache has once more, `sample` of them (0: all), and compare the results.

    Runs in the calling process: see `prepare_namespaces`. Raises: as `build`.
    """
    from builder.building import prepared

    sink = events or NullSink()
    prepare_namespaces()
    with (
        open_store(root, isolation=request.run.isolation, driver=request.run.storage_driver) as store,
        _lazy_transports(lambda: store, registry) as transports,
        prepared(
            request, store, transports, events=sink, cancelled=_never, check=partial(_enforce_checks, request)
        ) as parts,
    ):
        return parts.solver.audit(sample, seed)


def check(request: BuildRequest, *, root: Path, options: CheckOptions | None = None) -> list[Finding]:
    """Lint the request's Containerfile without building it; base images are looked up in the store alone.

    Raises: ParseError, ContextError, StoreError.
    """
    from builder.frontend.instructions import parse_containerfile
    from builder.session import Session
    from builder.solve.sources import ImageSources

    containerfile = parse_containerfile(request.containerfile)
    session = Session(request)
    try:
        with open_store(root) as store, _lazy_transports(lambda: store, None) as transports:
            sources = ImageSources(store, transports, policy="never", events=NullSink(), cancelled=_never)
            return _lint(request, containerfile, session, sources, options)
    finally:
        session.close()


def _enforce_checks(
    request: BuildRequest, containerfile: Containerfile, session: Session, sources: ImageSources
) -> None:
    """Refuse a file that asks for that when a lint rule finds something (`# check=error=true`)."""
    asked = any(d.name == "check" for d in containerfile.directives)
    if not asked and "BUILDKIT_DOCKERFILE_CHECK" not in request.build_args:
        return
    from builder.frontend.lint import effective_options, enforce

    options = effective_options(containerfile, request.build_args)
    enforce(containerfile, _lint(request, containerfile, session, sources, options))


def _lint(
    request: BuildRequest,
    containerfile: Containerfile,
    session: Session,
    sources: ImageSources,
    options: CheckOptions | None,
) -> list[Finding]:
    from builder.frontend.lint import effective_options, lint
    from builder.frontend.scope import BaseImage

    target = request.platforms[0] if request.platforms else Platform.host()

    def base_image(name: str, platform: str | None) -> BaseImage | None:
        try:
            image = sources.resolve_image(name, Platform.parse(platform) if platform else target)
        except PybuildError:
            return None
        env = dict(entry.partition("=")[::2] for entry in image.config.config.get("Env") or [])
        return BaseImage(env, bool(image.config.config.get("Shell")), image.config.platform)

    return lint(
        containerfile,
        options=options or effective_options(containerfile, request.build_args),
        build_args=request.build_args,
        target_platform=target,
        ignore=session.context("").ignore if request.context is not None else None,
        base_image=base_image,
    )


def _never() -> bool:
    return False


@contextmanager
def _lazy_transports(
    store: Callable[[], Store], registry: RegistryOptions | None
) -> Iterator[Callable[[], TransportContext]]:
    """The same, made when first called for: a cached build needs none. For one thread at a time."""
    with ExitStack() as stack:
        made: list[TransportContext] = []

        def get() -> TransportContext:
            if not made:
                made.append(stack.enter_context(_transports(store, registry)))
            return made[0]

        yield get


@contextmanager
def _transports(
    store: Callable[[], Store] | None, registry: RegistryOptions | None, *, uploads_dir: Path | None = None
) -> Iterator[TransportContext]:
    from registry.transport import TransportContext

    opened: list[object] = []

    def client() -> object:
        from registry.client import RegistryClient

        made = RegistryClient(registry) if registry is not None else RegistryClient()
        opened.append(made)
        return made

    try:
        policy = registry.signature_policy if registry is not None else None
        yield TransportContext(
            store=store, client=client, uploads_dir=uploads_dir, signature_policy=policy,  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        for made in opened:
            made.close()  # type: ignore[attr-defined]


def copy(
    source: str,
    destination: str,
    *,
    root: Path,
    options: CopyOptions | None = None,
    source_registry: RegistryOptions | None = None,
    destination_registry: RegistryOptions | None = None,
    default_source: str = "storage",
    default_destination: str = "docker",
    events: EventSink | None = None,
    jobs: int = 6,
    cancelled: Callable[[], bool] | None = None,
) -> CopyResult:
    """Copy an image from any transport to any other. Names as in `registry.transport`.

    Raises: InvalidReference, RegistryError, ContentError, ImageError, StoreError, Cancelled.
    """
    from registry.copy import copy_location
    from registry.transport import parse_location

    start = parse_location(source, default_source)  # type: ignore[arg-type]
    end = parse_location(destination, default_destination)  # type: ignore[arg-type]
    with (
        _lazy_store(root) as store,
        _transports(store, source_registry) as first,
        _transports(store, destination_registry, uploads_dir=root / "uploads") as second,
    ):
        return copy_location(
                start, end, first, destination_context=second, options=options, events=events, jobs=jobs,
                cancelled=cancelled,
            )  # fmt: skip


@contextmanager
def _lazy_store(root: Path) -> Iterator[Callable[[], Store]]:
    opened: list[Store] = []
    lock = threading.Lock()

    def get() -> Store:
        from layers.store import Store

        with lock:
            if not opened:
                opened.append(Store.open(root))
            return opened[0]

    try:
        yield get
    finally:
        for store in opened:
            store.close()


def push(source: str, destination: str, *, root: Path, **more: object) -> CopyResult:
    """Copy an image of the store to a registry (or another transport)."""
    return copy(source, destination, root=root, default_source="storage", default_destination="docker", **more)  # type: ignore[arg-type]


def pull(source: str, *, root: Path, name: str | None = None, **more: object) -> CopyResult:
    """Copy an image from a registry (or another transport) to the store, under its own name or `name`.

    A name without a registry means what registries.conf says of it.
    """
    from builder.places import pull_name
    from registry.transport import split_transport

    if split_transport(source)[0] is None:
        from typing import cast

        from registry.shortnames import find

        with _transports(None, cast("RegistryOptions | None", more.get("source_registry"))) as context:
            source = f"docker://{find(context.client, source).canonical()}"
    if name is None:
        name = pull_name(source)
    return copy(source, f"storage:{name}", root=root, default_source="docker", default_destination="storage", **more)  # type: ignore[arg-type]


def unpack(
    source: str,
    target: Path,
    *,
    root: Path,
    registry: RegistryOptions | None = None,
    platform: Platform | None = None,
    events: EventSink | None = None,
) -> None:
    """Write an image's flattened root file system to `target`, which must be empty or missing.

    No name or link in a layer reaches outside it. Raises: LayerError, ImageError, what `copy` raises.
    """
    from registry.transport import parse_location
    from registry.unpack import unpack_location

    location = parse_location(source, "storage")
    with _lazy_store(root) as store, _transports(store, registry) as context:
        unpack_location(location, context, target, platform=platform or Platform.host(), events=events or NullSink())


def read_capsule(path: Path) -> Capsule:
    """What failed, by a capsule that `BuildRequest.capsule` named. Raises: ContextError, ImageError, StoreError."""
    from builder import capsule

    with _transports(None, None) as context:
        return capsule.read_capsule(path, context)


def load_capsule(path: Path, *, root: Path) -> str:
    """Take the image of a capsule into the store, under the name that is returned; see `forget_capsule`."""
    from builder import capsule

    name = f"localhost/pybuild-capsule:{os.urandom(8).hex()}"
    copy(capsule.location(path), f"storage:{name}", root=root, default_destination="storage")
    return name


def forget_capsule(name: str, *, root: Path) -> None:
    """Take the name from a capsule's image. What is the capsule's alone goes with the next prune."""
    with _lazy_store(root) as store:
        store().names.delete(name)


class InspectedImage(NamedTuple):
    """What `inspect` found: the manifest that a name stands for; for an image also its config and layers.

    `chosen_from` is what the name stands for where that is an index.
    """

    name: str
    manifest: RawManifest
    config: ImageConfig | None
    layers: tuple[Descriptor, ...]
    chosen_from: Index | None = None


def inspect(
    source: str,
    *,
    root: Path,
    registry: RegistryOptions | None = None,
    platform: Platform | None = None,
    raw: bool = False,
) -> InspectedImage:
    """Read an image's manifest and config, without its layers; with `raw`, only what the name stands for.

    An index is narrowed to `platform` (this machine's if None) unless `raw`.
    Raises: InvalidReference, NameNotFound, ImageError, RegistryError.
    """
    from layers.oci import MAX_CONFIG_BYTES, ImageConfig, Index, parse_manifest
    from registry.transport import check_manifest, parse_location, read_blob

    location = parse_location(source, "storage")
    with _lazy_store(root) as store, _transports(store, registry) as context:
        opened = location.source(context)
        try:
            manifest = check_manifest(opened.get_manifest(), None)
            if raw:
                return InspectedImage(opened.name, manifest, None, ())
            document = parse_manifest(manifest.raw, manifest.media_type)
            index = document if isinstance(document, Index) else None
            while isinstance(document, Index):
                digest = document.select(platform or Platform.host()).digest
                manifest = check_manifest(opened.get_manifest(digest), digest)
                document = parse_manifest(manifest.raw, manifest.media_type)
            config = ImageConfig.parse(read_blob(opened, document.config, MAX_CONFIG_BYTES))
            return InspectedImage(opened.name, manifest, config, document.layers, index)
        finally:
            opened.close()


def differ(
    old: str,
    new: str,
    *,
    root: Path,
    registry: RegistryOptions | None = None,
    platform: Platform | None = None,
    times: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Difference:
    """How two images, layers or directories differ. See `builder.difference.differ`.

    Raises: NameNotFound, ImageError, LayerError, StoreError, RegistryError.
    """
    from builder import difference

    with _lazy_store(root) as store, _transports(store, registry) as context:
        return difference.differ(old, new, context, platform=platform, times=times, warn=warn)
