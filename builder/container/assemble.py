"""From a working container to an image: its layers, its config, its history, as a build of the same steps has them.

Also what is to be told of one: `inspect` and `diff`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from builder.container import commit as containers
from builder.container import mounting
from builder.container.byhand import Change, Draft, drafting, state_of
from builder.container.commit import CommittedImage
from builder.container.records import Record
from builder.container.working import WorkingContainer, layer_snapshots
from builder.frontend.source import SourceFile
from builder.plan.graph import HistoryEntry, ResolvedImage
from builder.plan.request import BuildRequest
from builder.plan.stage import image_document
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.layerdiff import Change as FileChange
    from layers.records import LayerRecord


class ImageOptions(NamedTuple):
    """What a commit is told besides what the container has.

    `changes` are for this image alone, and leave no line in its history. With `squash`, one layer takes the
    place of all. `epoch_s` is the image's time, and no file of a new layer is newer.
    """

    names: Sequence[str] = ()
    changes: Sequence[Change] = ()
    author: str = ""
    message: str = ""
    squash: bool = False
    omit_history: bool = False
    epoch_s: int | None = None
    format: Literal["oci", "docker"] = "oci"
    compression: Literal["gzip", "zstd", "none"] = "gzip"


def commit_working(container: WorkingContainer, options: ImageOptions) -> CommittedImage:
    """Make an image of a working container, which stays as it is. Equal containers give equal images.

    `names` are fully spelled references; without one the image is kept under its ID.
    Raises: StoreError, LayerError, UsageError (a change), ContainerError.
    """
    from layers.image import describe_image

    store = container.store
    request = BuildRequest(
        containerfile=SourceFile(container.record.name, ""),
        context=None,
        source_date_epoch=options.epoch_s,
        compression=options.compression,
        format=options.format,
        squash_all=options.squash,
    )
    with mounting.set_aside(container), drafting(container, request) as (draft, _):
        lines = list(container.settings["history"])
        for change in options.changes:
            change(draft)
        base = _base(container.record)
        made = _layers(container, request, options.squash)
        document, history = _documents(draft, lines, base, options)
    below = None if options.squash else base
    inherited = [] if below is None else containers.base_layers(store, below.manifest)
    diff_ids = [*([] if below is None else below.config.diff_ids), *(record.diff_id for record in made)]
    if options.squash:
        from builder.export import merge_history

        merge_history(history, len(diff_ids), keep=0)
    document["rootfs"] = {"type": "layers", "diff_ids": [str(digest) for digest in diff_ids]}
    if not options.omit_history:
        document["history"] = history
    annotations = draft.annotations if options.format == "oci" else None
    layers = [*inherited, *(record.descriptor for record in made)]
    config, manifest = describe_image(document, layers, annotations=annotations, format=options.format)
    store.put(config, manifest.config.media_type)
    descriptor = store.put(manifest.raw, manifest.media_type)
    image_id = str(manifest.config.digest)
    store.publish(dict.fromkeys(options.names or (f"@{image_id}",), descriptor))
    return CommittedImage(descriptor, image_id)


def _base(record: Record) -> ResolvedImage | None:
    if not record.settings["image_id"]:
        return None
    manifest, config = containers.base_of(record)
    return ResolvedImage(str(record.settings["image"]), manifest.descriptor.digest, manifest, config)


def _layers(container: WorkingContainer, request: BuildRequest, squash: bool) -> list[LayerRecord]:
    from builder.solve.layering import LayerBook

    book = LayerBook(container.store, request, lambda: False)
    try:
        if squash:
            return [] if container.top is None else [book.squashed(container.top, None)]
        return [book.get(snapshot) for snapshot in container.layers]
    finally:
        book.close()


def _documents(
    draft: Draft, lines: Sequence[Mapping[str, Any]], base: ResolvedImage | None, options: ImageOptions
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The config document, without its rootfs and history, and the history."""
    from builder.export import image_history

    layered = [line.get("snapshot") is not None for line in lines]
    entries = [
        HistoryEntry(str(line["created_by"]), number if layered[number] else None) for number, line in enumerate(lines)
    ]
    times = {number: int(line["created_ns"]) for number, line in enumerate(lines) if layered[number]}
    history, created = image_history(base, entries, times, options.epoch_s)
    if options.author:
        draft.state.author = options.author
    document: dict[str, Any] = {
        "created": created,
        **image_document(draft.state, draft.state.platform, labels={}, env={}),
    }
    extra = draft.extra
    if options.format == "docker":
        for name in ("hostname", "domainname"):
            if name in extra:
                document["config"] = {**document["config"], name.capitalize(): extra[name]}
        if "comment" in extra:
            document["comment"] = extra["comment"]
    ours = history[len(history) - len(lines) :]
    topmost = next((line for line in reversed(ours) if not line.get("empty_layer")), ours[-1] if ours else None)
    if topmost is not None:
        topmost["created_by"] = extra.get("created-by", topmost["created_by"])
        topmost["comment"] = options.message or extra.get("history-comment", topmost["comment"])
        if options.author:
            topmost["author"] = options.author
    return document, history


# Telling


@contextmanager
def changes_of(container: WorkingContainer) -> Iterator[Iterator[FileChange]]:
    """What the steps, and a mount, have changed in the base's tree; for as long as the block lasts."""
    from builder.rootfs import opened
    from builder.solve.layering import squashed_changes
    from layers.layerdiff import diff_trees

    store = container.store
    with ExitStack() as stack:
        place = mounting.mounted_at(container.record)
        if place is None:
            if container.top == container.base:
                yield iter(())
            else:
                assert container.top is not None, "it differs from the base, which may be none"
                yield squashed_changes(store, container.top, container.base, stack)[0]
            return
        beneath = None
        if container.base is not None:
            fd = stack.enter_context(opened(store.snapshots.view(container.base)))
            beneath = f"/proc/self/fd/{fd}/."
        yield diff_trees(beneath, place)


def inspect_document(record: Record) -> dict[str, Any]:
    """A working container as JSON, with names that buildah and docker give."""
    from builder.export import format_time

    settings = record.settings
    state = state_of(record)
    place = mounting.mounted_at(record)
    return {
        "Type": "working container",
        "Id": record.id,
        "Name": record.name,
        "Created": format_time(int(settings["created_ns"])),
        "FromImage": settings["image"],
        "FromImageID": settings["image_id"],
        "MountPoint": "" if place is None else os.fspath(place),
        **image_document(state, state.platform, labels={}, env={}),
        "Annotations": settings["annotations"],
        **({"Extra": settings["extra"]} if settings["extra"] else {}),
        "Steps": len(layer_snapshots(settings)),
        "History": [
            {
                "created": format_time(int(line["created_ns"])),
                "created_by": line["created_by"],
                **({} if line.get("snapshot") is not None else {"empty_layer": True}),
            }
            for line in settings["history"]
        ],
    }
