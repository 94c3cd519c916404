"""Several images into one archive or layout, each under its own name, as `docker save a b` does it.

Blobs that the images share are written once; the archive appears when all images are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layers.events import EventSink
from registry.copy import DEFAULT_JOBS, CopyOptions, CopyResult, HostSlots, copy_image, copy_location
from registry.errors import InvalidReference
from registry.reference import Reference
from registry.transport import ImageLocation, TransportContext
from registry.transports.archive import OciArchiveDestination, OciArchiveLocation
from registry.transports.docker import DockerLocation
from registry.transports.dockerarchive import DockerArchiveDestination, DockerArchiveLocation
from registry.transports.oci import OciLocation
from registry.transports.storage import StorageLocation


def copy_several(
    sources: Sequence[ImageLocation],
    destination: ImageLocation,
    context: TransportContext,
    *,
    destination_context: TransportContext | None = None,
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    jobs: int = DEFAULT_JOBS,
    cancelled: Callable[[], bool] | None = None,
) -> list[CopyResult]:
    """Copy all `sources` to `destination`, an `oci:`, `oci-archive:` or `docker-archive:` without a name.

    Raises: InvalidReference for other destinations, sources without a name, and two of one name;
    what `copy_location` raises: an archive is then as it was, a layout has the images before the failure.
    """
    if not isinstance(destination, OciLocation | OciArchiveLocation | DockerArchiveLocation) or destination.ref:
        raise InvalidReference(
            f"cannot copy several images to {destination}", hint="use oci:, oci-archive: or docker-archive: and no tag"
        )
    names = [name_of(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InvalidReference(f"two of the images would be named {name.familiar()}")
    slots = HostSlots(jobs)
    target_context = destination_context or context
    if isinstance(destination, OciLocation):
        return [
            copy_location(
                source, destination._replace(ref=name.familiar()), context, destination_context=target_context,
                options=options, events=events, jobs=jobs, cancelled=cancelled, slots=slots,
            )
            for source, name in zip(sources, names, strict=True)
        ]  # fmt: skip
    target = destination.destination(target_context)
    results = []
    try:
        for source, name in zip(sources, names, strict=True):
            if isinstance(target, DockerArchiveDestination):
                target.rename(name)
            else:
                assert isinstance(target, OciArchiveDestination)
                target.rename(name.familiar())
            opened = source.source(context)
            try:
                results.append(
                    copy_image(
                        opened, target, options=options, events=events, jobs=jobs, cancelled=cancelled, slots=slots,
                        scratch_dir=context.scratch_dir,
                    )
                )  # fmt: skip
            finally:
                opened.close()
        target.commit()
    finally:
        target.close()
    return results


def name_of(location: ImageLocation) -> Reference:
    """The name under which an image travels. Raises: InvalidReference if its location has none."""
    if isinstance(location, DockerLocation):
        return location.ref
    text: str | None = None
    if isinstance(location, StorageLocation):
        text = location.name
    elif isinstance(location, OciLocation | OciArchiveLocation):
        text = location.ref
    elif isinstance(location, DockerArchiveLocation) and location.ref is not None:
        return location.ref
    if text is None:
        raise InvalidReference(f"{location} has no name to copy it under")
    return Reference.parse(text).with_default_tag()
