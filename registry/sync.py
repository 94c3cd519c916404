"""Mirrors repositories: many copies over `registry.copy`, in parallel, and the deletion of what is gone.

What is there already costs two requests per tag. A failed image does not stop the others; what
failed is in the report. `registry.syncfile` says what to mirror.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from layers.errors import Cancelled, PybuildError
from layers.events import EventSink, NullSink
from layers.oci import Digest
from layers.values import NamedTuple
from registry.copy import DEFAULT_JOBS, CopyOptions, HostSlots, copy_location, run_parallel
from registry.errors import ConfigError, InvalidReference, NotFoundError, RegistryError
from registry.reference import Reference
from registry.syncfile import Access, SyncConfig, SyncEntry
from registry.tags import delete_tag
from registry.transport import ImageLocation, TransportContext, split_transport
from registry.transports.directory import DirLocation
from registry.transports.docker import DockerLocation
from registry.transports.oci import REF_NAME, LayoutDir, OciLocation

ContextFor = Callable[[Access], TransportContext]
"""Gives the context to reach an entry's source with; the same for the same."""
_ABOUT_A_MANIFEST = re.compile(r"sha256-[0-9a-f]{64}(\..*)?")
"""Tags by which registries without a referrers API, and cosign, find what refers to a manifest: no versions."""
_IMAGES_AT_ONCE = 4
_LISTS_AT_ONCE = 6


class SyncItem(NamedTuple):
    """One image to copy."""

    source: DockerLocation
    destination: ImageLocation
    entry: SyncEntry


class SyncFailure(NamedTuple):
    """What could not be mirrored, and why."""

    what: str
    error: PybuildError


class SyncReport(NamedTuple):
    """What was done, by the names of the targets. `planned` is what a dry run would have done."""

    copied: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    planned: tuple[str, ...]
    failures: tuple[SyncFailure, ...]
    moved_bytes: int


class Target(NamedTuple):
    """Where one repository is mirrored to: a repository, a layout, or a directory with one directory per tag."""

    kind: str
    ref: Reference | None
    path: Path | None

    @classmethod
    def of(cls, entry: SyncEntry, destination: str | None, *, scoped: bool) -> Target:
        """The entry's own target, or its place below `destination`. Raises: ConfigError, InvalidReference."""
        if entry.target is None and destination is None:
            raise ConfigError(
                f"nothing says where to mirror {entry.source.repository} to",
                hint="give a destination, or set `destination` or `target` in the file",
            )
        kind, rest = split_transport(entry.target or destination or "")
        kind = kind or "docker"
        if kind not in {"docker", "oci", "dir"}:
            raise ConfigError(f"cannot mirror to {kind}:", hint="the destinations are docker://, oci: and dir:")
        name = ""
        if entry.target is None:
            name = entry.source.repository if scoped else entry.source.path
        if kind == "docker":
            ref = Reference.parse("/".join(filter(None, (rest.rstrip("/"), name))) if "/" in rest or name else rest)
            if ref.tag is not None or ref.digest is not None:
                raise InvalidReference(f"{rest!r} names an image; a repository is wanted here")
            return cls(kind, ref, None)
        if ":" in rest:
            raise InvalidReference(f"{kind}:{rest}: a directory is wanted here, without a tag")
        return cls(kind, None, Path(rest) / name.replace(":", "_"))

    def location(self, tag: str | None, digest: Digest | None) -> ImageLocation:
        """The place of one image."""
        if self.ref is not None:
            return DockerLocation(self.ref.with_tag(tag) if tag is not None else self.ref.with_digest(digest or ""))
        assert self.path is not None
        name = tag if tag is not None else f"{(digest or '').replace(':', '-')}"
        return OciLocation(self.path, name) if self.kind == "oci" else DirLocation(self.path / name)


def plan_sync(
    config: SyncConfig,
    context_for: ContextFor,
    *,
    destination: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[list[tuple[SyncEntry, Target, list[SyncItem]]], list[SyncFailure]]:
    """What each entry's patterns come to, asking the registries for their tags; and what could not be asked."""
    planned: list[tuple[SyncEntry, Target, list[SyncItem]]] = []
    failures: list[SyncFailure] = []
    targets = [Target.of(e, destination or config.destination, scoped=config.scoped) for e in config.entries]
    contexts = [context_for(entry.access) for entry in config.entries]
    answers: dict[int, list[str] | RegistryError] = {}

    def ask(number: int) -> None:
        try:
            answers[number] = _tags(config.entries[number], contexts[number])
        except RegistryError as e:
            answers[number] = e

    tasks = [partial(ask, number) for number in range(len(config.entries))]
    run_parallel(tasks, _LISTS_AT_ONCE, threading.Event(), cancelled)
    for number, (entry, target) in enumerate(zip(config.entries, targets, strict=True)):
        tags = answers[number]
        if isinstance(tags, RegistryError):
            # Planned all the same: what another entry wants of the target must not be taken for all of it.
            failures.append(SyncFailure(entry.source.repository, tags))
            planned.append((entry, target, []))
            continue
        try:
            items = [SyncItem(DockerLocation(entry.source.with_tag(t)), target.location(t, None), entry) for t in tags]
        except InvalidReference as e:
            # A registry may list what is no tag, such as a path to somewhere else: of the others nothing is wrong.
            failures.append(SyncFailure(entry.source.repository, e))
            planned.append((entry, target, []))
            continue
        items += [
            SyncItem(DockerLocation(entry.source.with_digest(d)), target.location(None, d), entry)
            for d in entry.digests
        ]
        if not items:
            error = NotFoundError(f"{entry.source.repository} has no tag that fits", status=None)
            failures.append(SyncFailure(entry.source.repository, error))
        planned.append((entry, target, items))
    return planned, failures


def _tags(entry: SyncEntry, context: TransportContext) -> list[str]:
    if entry.needs_list:
        return sorted(entry.select(context.client.list_tags(entry.source)))
    return entry.select(dict.fromkeys(p.text for p in entry.tags))


def sync(
    config: SyncConfig,
    context_for: ContextFor,
    destination_context: TransportContext,
    *,
    destination: str | None = None,
    delete: bool | None = None,
    dry_run: bool = False,
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    jobs: int = DEFAULT_JOBS,
    cancelled: Callable[[], bool] | None = None,
) -> SyncReport:
    """Mirror what `config` says; `destination` and `delete` override it.

    Raises: ConfigError, InvalidReference, Cancelled; all else is in the report.
    """
    planned, failures = plan_sync(config, context_for, destination=destination, cancelled=cancelled)
    work = _Sync(context_for, destination_context, options or CopyOptions(), events or NullSink(), jobs, cancelled)
    work.failures.extend(failures)
    items = [item for _, _, group in planned for item in group]
    if dry_run:
        work.planned.extend(f"{item.source} -> {item.destination}" for item in items)
    else:
        run_parallel([partial(work.copy, item) for item in items], _IMAGES_AT_ONCE, threading.Event(), cancelled)
    work.prune_all(planned, config.delete if delete is None else delete, forced=delete is not None, dry_run=dry_run)
    return work.report()


class _Sync:
    """The state of one run. Thread-safe by the lock."""

    def __init__(
        self,
        context_for: ContextFor,
        destination_context: TransportContext,
        options: CopyOptions,
        events: EventSink,
        jobs: int,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._context_for = context_for
        self._destination_context = destination_context
        self._options = options
        self._events = events
        self._jobs = jobs
        self._cancelled = cancelled
        self._slots = HostSlots(jobs)
        self._lock = threading.Lock()
        self.planned: list[str] = []
        self.failures: list[SyncFailure] = []
        self._copied: list[str] = []
        self._unchanged: list[str] = []
        self._deleted: list[str] = []
        self._moved_bytes = 0

    def report(self) -> SyncReport:
        return SyncReport(
            tuple(sorted(self._copied)),
            tuple(sorted(self._unchanged)),
            tuple(sorted(self._deleted)),
            tuple(self.planned),
            tuple(self.failures),
            self._moved_bytes,
        )

    def copy(self, item: SyncItem) -> None:
        options = self._options
        if item.entry.platform is not None:
            options = options._replace(platform=item.entry.platform, all_platforms=False)
        elif options.platform is None:
            options = options._replace(all_platforms=True)
        try:
            result = copy_location(
                item.source,
                item.destination,
                self._context_for(item.entry.access),
                destination_context=self._destination_context,
                options=options,
                events=self._events,
                jobs=self._jobs,
                cancelled=self._cancelled,
                slots=self._slots,
            )
        except Cancelled:
            raise
        except PybuildError as e:
            with self._lock:
                self.failures.append(SyncFailure(str(item.source), e))
            return
        with self._lock:
            changed = result.copied_blobs or result.reused_blobs or result.written
            (self._copied if changed else self._unchanged).append(str(item.destination))
            self._moved_bytes += result.moved_bytes

    def prune_all(
        self,
        planned: Sequence[tuple[SyncEntry, Target, list[SyncItem]]],
        default: bool,
        *,
        forced: bool,
        dry_run: bool,
    ) -> None:
        """Remove from the targets whose entries ask for it what none of their entries wants.

        Nothing is removed where a source could not be read, or has nothing that fits: an empty answer
        is more often a mistake than a wish.
        """
        failed = {f.what for f in self.failures}
        for target in dict.fromkeys(t for _, t, _ in planned):
            group = [(entry, items) for entry, t, items in planned if t == target]
            wishes = [default if forced or entry.delete is None else entry.delete for entry, _ in group]
            names = {str(item.source) for _, items in group for item in items}
            names |= {entry.source.repository for entry, _ in group}
            if any(wishes) and not names & failed:
                self._prune(target, {_name_at(i.destination) for _, items in group for i in items}, dry_run=dry_run)

    def _prune(self, target: Target, keep: set[str], *, dry_run: bool) -> None:
        try:
            for name in sorted(n for n in set(self._names(target)) - keep if not _ABOUT_A_MANIFEST.fullmatch(n)):
                shown = str(target.location(name, None))
                if dry_run:
                    self.planned.append(f"delete {shown}")
                else:
                    self._remove(target, name)
                    self._deleted.append(shown)
        except PybuildError as e:
            self.failures.append(SyncFailure(f"deletion at {target.ref or target.path}", e))

    def _names(self, target: Target) -> list[str]:
        if target.ref is not None:
            try:
                return list(self._destination_context.client.list_tags(target.ref))
            except NotFoundError:
                return []
        assert target.path is not None
        if not target.path.is_dir():
            return []
        if target.kind == "dir":
            return [n for n in os.listdir(target.path) if (target.path / n / "version").is_file()]
        layout = LayoutDir(target.path)
        try:
            return [d.annotations[REF_NAME] for d in layout.read_index().manifests if REF_NAME in d.annotations]
        finally:
            layout.close()

    def _remove(self, target: Target, name: str) -> None:
        if target.ref is not None:
            # Never by the manifest: a tag that is kept may name the same one, or an index that it is a part of.
            delete_tag(self._destination_context.client, target.ref.with_tag(name))
            return
        assert target.path is not None
        if target.kind == "dir":
            shutil.rmtree(target.path / name)
            return
        layout = LayoutDir(target.path)
        try:
            layout.update_index(
                lambda entries: [e for e in entries if (e.get("annotations") or {}).get(REF_NAME) != name]
            )
        finally:
            layout.close()


def _name_at(location: ImageLocation) -> str:
    if isinstance(location, DockerLocation):
        return location.ref.tag or str(location.ref.digest)
    if isinstance(location, OciLocation):
        return location.ref or ""
    assert isinstance(location, DirLocation)
    return location.path.name
