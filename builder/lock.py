"""Lock files: every external input of a Containerfile, pinned to a digest or commit.

A lock file is a source policy (`builder.plan.sourcepolicy`) of conversions, one an input, so that other
builders that know such policies can use it, too. It is made by planning every stage and asking
registries, servers and repositories what their names mean now; nothing is built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import PlanError, UsageError
from builder.frontend.gitref import parse_git_ref
from builder.plan.graph import BuildGraph, CopyItem, CopyOp, ResolvedImage
from builder.plan.request import BuildRequest
from builder.plan.sourcepolicy import Rule, SourcePolicy, git_source, policy_document, read_policy
from layers.errors import PybuildError
from layers.events import EventSink
from layers.oci import Platform
from layers.values import NamedTuple, replace
from registry.reference import Reference

if TYPE_CHECKING:
    from builder.frontend.instructions import Containerfile
    from builder.session import Session
    from builder.solve.sources import ImageSources
    from layers.store import Store
    from registry.transport import TransportContext


class Lock(NamedTuple):
    """A lock's rules, sorted, and what differs from the rules before: identifiers of sources."""

    rules: tuple[Rule, ...]
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def document(self) -> bytes:
        """The lock file's bytes."""
        return policy_document(self.rules)


def locked_policy(path: Path, policy: SourcePolicy | None) -> SourcePolicy:
    """The policy that a lock file means, asked after `policy`. Raises: UsageError if it cannot be read."""
    before = () if policy is None else policy.policies
    return SourcePolicy((*before, read_policy(path)), complete=True)


def make_lock(
    request: BuildRequest,
    store: Store,
    transports: Callable[[], TransportContext],
    *,
    old: Sequence[Rule],
    update: Collection[str] | None,
    events: EventSink,
    warn: Callable[[str], None],
) -> Lock:
    """Find the external inputs of all stages and pin those that `old` does not; `update` names the ones to
    pin anew whatever `old` says, None all of them. What nothing uses any more goes.

    Raises: ParseError, PlanError (of the target alone: for other stages `warn` is called), ContextError,
    RegistryError, UsageError if `update` names nothing.
    """
    from builder.frontend.instructions import parse_containerfile
    from builder.session import Session
    from builder.solve.sources import ImageSources

    containerfile = parse_containerfile(request.containerfile)
    session = Session(request)
    try:
        # What a name means is for its registry to say; the store's image of that name counts where there is none.
        sources = ImageSources(store, transports, policy="newer", events=events, cancelled=lambda: False)
        inputs = _Inputs(request, store, session, sources, transports)
        for graph in _graphs(request, containerfile, inputs, warn):
            inputs.take(graph)
        known = {rule.selector: rule for rule in old}
        rules = {}
        for identifier, pin in inputs.found.items():
            keep = identifier in known and update is not None and not _named(identifier, update)
            rules[identifier] = known[identifier] if keep else pin()
        for name in update or ():
            if not any(_named(identifier, [name]) for identifier in inputs.found):
                have = ", ".join(i.partition("://")[2] if i.startswith("docker-image") else i for i in inputs.found)
                raise UsageError(
                    f"--update {name}: the Containerfile uses no such input", hint=f"it uses {have or 'none'}"
                )
    finally:
        session.close()
    return Lock(
        tuple(rules[name] for name in sorted(rules)),
        added=tuple(sorted(rules.keys() - known.keys())),
        changed=tuple(sorted(name for name in rules if name in known and known[name] != rules[name])),
        removed=tuple(sorted(known.keys() - rules.keys())),
    )


def _named(identifier: str, names: Collection[str]) -> bool:
    """Whether one of `names` is meant: an identifier, or an image's or URL's plain name."""
    plain = identifier.partition("://")[2]
    familiar = ""
    if identifier.startswith("docker-image://"):
        familiar = Reference.parse(plain).familiar()
    return any(name in {identifier, plain, familiar, familiar.partition(":")[0]} for name in names)


def _graphs(
    request: BuildRequest, containerfile: Containerfile, inputs: _Inputs, warn: Callable[[str], None]
) -> list[BuildGraph]:
    from builder.plan.planner import plan

    graphs = [plan(request, containerfile, inputs)]
    for stage in containerfile.stages:
        target = str(stage.index)
        try:
            graphs.append(plan(replace(request, target=target), containerfile, inputs))
        except PlanError as e:
            warn(f"stage {stage.name or target} is not locked: {e.message}")
    return graphs


class _Inputs:
    """The external inputs of a build, by identifier, each with what pins it. A `Resolver` that takes notes."""

    def __init__(
        self,
        request: BuildRequest,
        store: Store,
        session: Session,
        sources: ImageSources,
        transports: Callable[[], TransportContext],
    ) -> None:
        self.found: dict[str, Callable[[], Rule]] = {}
        self._request = request
        self._store = store
        self._session = session
        self._sources = sources
        self._transports = transports
        self._resolved: dict[tuple[str, str], ResolvedImage] = {}

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        key = (name, str(platform))
        if key not in self._resolved:
            self._resolved[key] = self._sources.resolve_image(name, platform)
        image = self._resolved[key]
        reference = Reference.parse(name).with_default_tag()
        if reference.digest is None:
            self.found[f"docker-image://{reference.canonical()}"] = lambda: self._pin_image(reference, image)
        return image

    def resolve_layout(self, location: str, platform: Platform) -> ResolvedImage:
        return self._sources.resolve_layout(location, platform)

    def take(self, graph: BuildGraph) -> None:
        """Note what ADD fetches."""
        for step in graph.steps:
            if isinstance(step.op, CopyOp):
                for item in step.op.items:
                    self._take_item(step.op, item)

    def _take_item(self, op: CopyOp, item: CopyItem) -> None:
        if item.kind == "http" and not (item.checksum or op.checksum):
            self.found[item.source] = lambda: self._pin_file(item.source)
        elif item.kind == "git":
            ref = parse_git_ref(item.source, known=True)
            assert ref is not None, "the planner lets only repositories through"
            if not (ref.checksum or op.checksum):
                self.found[git_source(ref).identifier] = lambda: self._pin_repository(item.source)

    def _pin_image(self, asked: Reference, image: ResolvedImage) -> Rule:
        """By the digest of what the name means, an index if it is one: the lock holds for every platform."""
        meant = Reference.parse(image.reference).with_default_tag()
        try:
            remote = self._transports().client.head_manifest(meant)
        except PybuildError:
            remote = None
        found = remote or self._store.names.get(meant.canonical())
        digest = image.digest if found is None else found.digest
        tagged = meant._replace(digest=digest).canonical()
        return Rule("CONVERT", f"docker-image://{asked.canonical()}", "EXACT", identifier=f"docker-image://{tagged}")

    def _pin_file(self, url: str) -> Rule:
        from builder.solve.fetch import fetch_http

        place = self._store.root / "remote"
        file = fetch_http(url, place, secrets=self._session.secret, environ=self._request.environ)
        return Rule("CONVERT", url, "EXACT", attributes=(("http.checksum", file.digest),))

    def _pin_repository(self, text: str) -> Rule:
        import tempfile

        from builder.solve.gitfetch import GitSource, resolve_git

        ref = parse_git_ref(text, known=True)
        assert ref is not None
        access = GitSource(self._session.secret, self._session.ssh_socket("default"), None, self._request.environ)
        with tempfile.TemporaryDirectory(prefix="pybuild-git-") as scratch:
            commit = resolve_git(ref, Path(scratch), access)
        source = git_source(ref).identifier
        return Rule("CONVERT", source, "EXACT", identifier=git_source(ref._replace(ref=commit)).identifier)
