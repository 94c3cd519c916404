"""From a container back to an image: what its command changed becomes a layer on its image's.

The layer is read from the upper directory, of a running container too (paused meanwhile, where it can
be). The config is the container's own, changed as by the instructions of `--change`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from builder.container import codec, lifecycle
from builder.container.records import ContainerError, Record
from builder.sandbox.spec import DEFAULT_CAPABILITIES
from layers.oci import Descriptor, ImageConfig, Manifest
from layers.snapshot import Mount
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.layerdiff import Change
    from layers.store import Store


class CommittedImage(NamedTuple):
    """The image that was made. `image_id` is the config's digest."""

    descriptor: Descriptor
    image_id: str


def commit(
    store: Store,
    record: Record,
    *,
    names: Sequence[str] = (),
    changes: Sequence[str] = (),
    author: str = "",
    message: str = "",
    pause: bool = True,
    squash: bool = False,
    epoch_s: int | None = None,
    format: Literal["oci", "docker"] = "oci",
    compression: Literal["gzip", "zstd", "none"] = "gzip",
) -> CommittedImage:
    """Make an image of a container as it is now, under `names` (fully spelled references).

    With `squash`, one layer takes the place of all. `epoch_s` (SOURCE_DATE_EPOCH) is the image's time and
    no file is newer. Raises: UsageError, ParseError (a change), StoreError, LayerError, ContainerError.
    """
    from builder.changes import changed_config
    from builder.export import format_time
    from layers.image import describe_image

    manifest, base = base_of(record)
    document = dict(base.document)
    document["config"] = record.settings["config"]
    changed = ImageConfig.build(document)
    document = changed_config(changes, platform=base.platform, base=(manifest, changed)) if changes else document
    document = {key: value for key, value in document.items() if key not in {"history", "rootfs", "created"}}
    with still(record, wanted=pause):
        layer, diff_id = _write_layer(store, record, squash, epoch_s, compression)
    created = format_time(time.time_ns() if epoch_s is None else epoch_s * 10**9)
    history = {"created": created, "created_by": " ".join(record.settings["sandbox"]["args"])}
    history |= {key: value for key, value in (("author", author), ("comment", message)) if value}
    below = [] if squash else [dict(entry) for entry in base.history]
    diff_ids = [diff_id] if squash else [*base.diff_ids, diff_id]
    document = {"created": created, **({"author": author} if author else {}), **document}
    document["rootfs"] = {"type": "layers", "diff_ids": [str(digest) for digest in diff_ids]}
    document["history"] = [*below, history]
    layers = [layer] if squash else [*base_layers(store, manifest), layer]
    config, made = describe_image(document, layers, format=format)
    store.put(config, made.config.media_type)
    descriptor = store.put(made.raw, made.media_type)
    image_id = str(made.config.digest)
    store.publish(dict.fromkeys(names or (f"@{image_id}",), descriptor))
    return CommittedImage(descriptor, image_id)


def base_of(record: Record) -> tuple[Manifest, ImageConfig]:
    """The image that a container was made of, from its own copy. Raises: ContainerError."""
    try:
        manifest = Manifest.parse((record.path("base") / "manifest.json").read_bytes())
        return manifest, ImageConfig.parse((record.path("base") / "config.json").read_bytes())
    except OSError as e:
        raise ContainerError(f"container {record.name} has lost what it knew of its image: {e.strerror}") from e


def base_layers(store: Store, manifest: Manifest) -> Sequence[Descriptor]:
    missing = [layer.digest for layer in manifest.layers if store.stat(layer.digest) is None]
    if missing:
        raise ContainerError(
            f"layer {missing[0]} of the container's image is not in the store any more",
            hint="pull the image again, or use --squash, which needs it not",
        )
    return manifest.layers


@contextlib.contextmanager
def still(record: Record, *, wanted: bool) -> Iterator[None]:
    """For the block, with the container frozen if it runs and can be."""
    frozen = False
    if wanted and record.state.get("status") == "running" and record.locked():
        with contextlib.suppress(ContainerError):
            lifecycle.pause(record.root, record.id)
            frozen = True
    try:
        yield
    finally:
        if frozen:
            with contextlib.suppress(ContainerError):
                lifecycle.unpause(record.root, record.id)


def readable(record: Record) -> Mount:
    """A container's tree, read-only, whether it runs or not: its upper as the topmost of the lower layers."""
    root = codec.decode_mount(record.settings["sandbox"]["root"])
    if root.type == "bind" or root.upper is None:
        return root._replace(readonly=True)
    return Mount("overlay", (root.upper, *root.lower), None, None, True, root.dialect, root.program)


def changes_of(store: Store, record: Record) -> tuple[Iterator[Change], Path]:
    """What a container changed in its image's tree, and the directory of its files. Raises: StoreError."""
    from layers.layerdiff import diff_overlay, diff_trees

    root = codec.decode_mount(record.settings["sandbox"]["root"])
    if root.type == "overlay" and root.upper is not None:
        if root.program is not None:
            from layers import fusemount

            fusemount.normalize(str(root.upper), root.dialect)
        return diff_overlay(root.upper, root.lower, root.dialect), root.upper
    parent = record.settings["parent"]
    below = store.snapshots.get(parent) if parent else None
    if parent and below is None:
        raise ContainerError(f"container {record.name}: its image's files are gone")
    return diff_trees(below.path if below else None, root.lower[0]), root.lower[0]


def _write_layer(
    store: Store, record: Record, squash: bool, epoch_s: int | None, compression: Literal["gzip", "zstd", "none"]
) -> tuple[Descriptor, str]:
    from builder.rootfs import opened
    from layers.changeset import write_layer
    from layers.layerdiff import diff_trees

    with contextlib.ExitStack() as stack:
        if squash:
            fd = stack.enter_context(opened(readable(record)))
            place: Path | str = f"/proc/self/fd/{fd}/."
            found = diff_trees(None, place)
        else:
            found, place = changes_of(store, record)
        ingest = stack.enter_context(store.ingest())
        result = write_layer(
            found, place, ingest, compression=compression, clamp_mtime=epoch_s, reproducible=epoch_s is not None
        )
        ingest.commit()
    descriptor = Descriptor(media_type=result.media_type, digest=result.digest, size_bytes=result.size_bytes)
    return descriptor, str(result.diff_id)


def inspect_document(record: Record) -> dict[str, object]:
    """A container as JSON, with the names that docker gives."""
    from builder.export import format_time

    settings, state = record.settings, record.state
    sandbox = settings["sandbox"]

    def moment(time_ns: object) -> str:
        return format_time(int(str(time_ns))) if time_ns else ""

    return {
        "Id": record.id,
        "Name": record.name,
        "Created": moment(settings["created_ns"]),
        "Path": sandbox["args"][0],
        "Args": sandbox["args"][1:],
        "State": {
            "Status": record.status,
            "Running": record.running,
            "Paused": record.status == "paused",
            "OOMKilled": bool(state.get("oom_killed")),
            "Pid": state.get("pid") or 0,
            "ExitCode": state.get("exit_code") or 0,
            "Error": state.get("error") or "",
            "StartedAt": moment(state.get("started_ns")),
            "FinishedAt": moment(state.get("finished_ns")),
            **({"Health": state["health"]} if state.get("health") else {}),
        },
        "Image": settings["image_id"],
        "RestartCount": state.get("restarts") or 0,
        "LogPath": os.fspath(record.path("log")),
        "Config": {**settings["config"], "Image": settings["image"], "Hostname": sandbox["hostname"]},
        "HostConfig": _host_config(settings),
        "NetworkSettings": {"Ports": _ports(state.get("ports") or [] if record.running else [])},
        "Mounts": [
            {"Type": m["kind"], "Source": m["source"] if isinstance(m["source"], str) else "",
             "Destination": m["target"], "RW": not m["readonly"]}
            for m in sandbox["mounts"]
        ],
    }  # fmt: skip


def _host_config(settings: dict[str, Any]) -> dict[str, object]:
    sandbox, limits = settings["sandbox"], settings["sandbox"]["resources"]
    policy, retries = settings["restart"]
    period = limits.get("cpu_period_us") or 100_000
    return {
        "AutoRemove": settings["auto_remove"],
        "CapAdd": sorted(set(sandbox["capabilities"]) - DEFAULT_CAPABILITIES),
        "CapDrop": sorted(DEFAULT_CAPABILITIES - set(sandbox["capabilities"])),
        "CpuPeriod": limits.get("cpu_period_us") or 0,
        "CpuQuota": limits.get("cpu_quota_us") or 0,
        "CpuShares": limits.get("cpu_shares") or 0,
        "CpusetCpus": limits.get("cpuset_cpus") or "",
        "Init": sandbox["init"],
        "Memory": limits.get("memory_bytes") or 0,
        "MemorySwap": limits.get("memory_swap_bytes") or 0,
        "NanoCpus": 10**9 * (limits.get("cpu_quota_us") or 0) // period,
        "NetworkMode": sandbox["network"],
        "PidsLimit": limits.get("pids") or 0,
        "PortBindings": _ports(settings["ports"]),
        "Privileged": sandbox["privileged"],
        "ReadonlyRootfs": sandbox["readonly_root"],
        "RestartPolicy": {"Name": policy, "MaximumRetryCount": retries},
        "Runtime": settings.get("runtime") or "",
        "ShmSize": sandbox["shm_size_bytes"],
    }


def _ports(rows: list[list[Any]]) -> dict[str, list[dict[str, str]]]:
    """Published ports by the container's, as docker shows them."""
    found: dict[str, list[dict[str, str]]] = {}
    for ip, host, port, protocol in rows:
        found.setdefault(f"{port}/{protocol}", []).append({"HostIp": ip, "HostPort": str(host)})
    return found
