"""Failure capsules: a failed RUN in a file, to be looked into, and gone on from, on another machine.

A capsule is an OCI archive with two names in it. `capsule` is an image: the layers that the step stood
on, one more of what it had written when it failed, and a config with its environment, directory and
user, whose command is the failed one; any tool can unpack or run it. A field of the config, `FIELD`,
says what failed. `cache` is the step cache of what was built until then, for `--cache-from`.

Values of secrets are searched for in what the step left: a capsule that would give one away is not
written. Cache mounts, secrets and ssh agents are not in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import ContextError, SecretLeakError
from layers.errors import ImageError, PybuildError
from layers.values import NamedTuple

if TYPE_CHECKING:
    from builder.building import Parts
    from builder.plan.graph import RunOp
    from builder.plan.request import BuildRequest
    from builder.solve.results import FailedStep
    from layers.events import EventSink
    from layers.oci import Descriptor, Manifest
    from registry.transport import ImageSource, TransportContext

IMAGE_NAME = "capsule"
CACHE_NAME = "cache"
"""As `--cache-from type=local` expects it in a layout."""
FIELD = "pybuild.capsule.v1"


class Capsule(NamedTuple):
    """What failed. `line` and `end_line` are those of the instruction in `containerfile`, from 1 on."""

    step: str
    command: tuple[str, ...]
    exit_status: int
    message: str
    output: str
    file: str
    containerfile: str
    line: int
    end_line: int
    platform: str
    mounts: tuple[str, ...] = ()
    network: str = "default"

    @property
    def instruction(self) -> str:
        """The lines of the Containerfile that failed."""
        return "\n".join(self.containerfile.splitlines()[max(0, self.line - 1) : self.end_line])


# Writing


def keep(parts: Parts, request: BuildRequest, events: EventSink) -> None:
    """Write the capsule of the step that failed, and have its error say where; no failure of this hides the step's."""
    from layers.events import Vertex

    failed = parts.solver.failed
    if failed is None or request.capsule is None:
        return
    title, started = f"[internal] writing capsule {request.capsule}", time.time_ns()
    events.emit(Vertex("capsule", title, (), started))
    try:
        _write(parts, request, failed, request.capsule)
    except PybuildError as e:
        failed.error.hint = f"no capsule could be made: {e.message}"
        events.emit(Vertex("capsule", title, (), started, time.time_ns(), error=e.message))
    else:
        failed.error.hint = (
            f"`pybuild shell {request.capsule}` looks into what the step left; "
            f"`--cache-from type=local,src={request.capsule}` goes on from there"
        )
        events.emit(Vertex("capsule", title, (), started, time.time_ns()))
    finally:
        parts.solver.forget_failed()


def _write(parts: Parts, request: BuildRequest, failed: FailedStep, path: Path) -> None:
    from builder.solve.remotecache import cache_manifest, send_manifest, step_rows
    from registry.transports.archive import OciArchiveDestination, OciArchiveLocation

    image = _image(parts, request, failed)
    cache = cache_manifest(parts, list(step_rows(parts, "max")))
    destination = OciArchiveDestination(OciArchiveLocation(path, IMAGE_NAME), parts.transports().scratch_dir)
    try:
        send_manifest(parts, destination, image)
        destination.rename(CACHE_NAME)
        send_manifest(parts, destination, cache)
        destination.commit()
    finally:
        destination.close()


def _image(parts: Parts, request: BuildRequest, failed: FailedStep) -> Manifest:
    """The image of the capsule, its documents and layers in the store."""
    from builder.export import format_time
    from builder.plan.graph import RunOp, SourceOp
    from layers.image import describe_image

    op = failed.step.op
    assert isinstance(op, RunOp)
    layers: list[Descriptor] = []
    diff_ids: list[str] = []
    for step in parts.graph.chain(failed.step.parent):
        if isinstance(step.op, SourceOp):
            parts.sources.ensure_layers(step.op.image)
            layers += step.op.image.manifest.layers
            diff_ids += step.op.image.config.diff_ids
        elif (found := parts.solver.layer_of(step)) is not None:
            layers.append(found[1].descriptor)
            diff_ids.append(found[1].diff_id)
    parts.solver.fetch_remote([d for d in layers if parts.store.stat(d.digest) is None])
    capsule = _describe(failed, op)
    _check_secrets(parts, request, failed, capsule)
    left = parts.layers.get(failed.snapshot)
    layers.append(left.descriptor)
    diff_ids.append(left.diff_id)
    now = format_time(time.time_ns())
    document: dict[str, Any] = {
        "created": now,
        **failed.step.platform.to_json(),
        "config": {
            "Env": [f"{key}={value}" for key, value in op.env],
            "Cmd": list(op.args),
            "WorkingDir": op.cwd,
            "User": op.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [str(d) for d in diff_ids]},
        FIELD: capsule._asdict(),
    }
    config, manifest = describe_image(document, layers)
    parts.store.put(config, manifest.config.media_type)
    return manifest


def _describe(failed: FailedStep, op: RunOp) -> Capsule:
    error, source, place = failed.error, failed.error.source, failed.step.range
    return Capsule(
        step=failed.step.name,
        command=op.args,
        exit_status=error.exit_status,
        message=error.message,
        output=error.log_tail,
        file="" if source is None else source.name,
        containerfile="" if source is None else source.text,
        line=0 if place is None else place.start_line,
        end_line=0 if place is None else place.end_line,
        platform=str(failed.step.platform),
        mounts=tuple(f"type={m.type},target={m.target or m.id}" for m in op.mounts),
        network=op.network,
    )


def _check_secrets(parts: Parts, request: BuildRequest, failed: FailedStep, capsule: Capsule) -> None:
    """Raises: SecretLeakError if the step left a secret's value in its files or its output."""
    if not request.secrets:
        return
    from builder.solve import secretgate

    wanted = secretgate.needles({id: parts.session.secret(id) or b"" for id in request.secrets})
    found = secretgate.search_snapshot(parts.store, failed.snapshot, wanted, "what the step left")
    found += secretgate.search_text(capsule.output.encode("utf-8", "replace"), wanted, "the step's output")
    if found:
        places = "; ".join(dict.fromkeys(f"secret {f.id!r} in {f.place}" for f in found[:4]))
        raise SecretLeakError(f"it would give away {places}")


# Reading


def location(path: Path) -> str:
    """Where the image of a capsule is, as transports name it."""
    return f"oci-archive:{path}:{IMAGE_NAME}"


def read_capsule(path: Path, context: TransportContext) -> Capsule:
    """What failed, by the capsule in the file. Raises: ContextError if there is none, ImageError, StoreError."""
    from layers.oci import MAX_CONFIG_BYTES, Manifest
    from registry.transport import check_manifest, parse_location, read_blob

    if not path.is_file():
        raise ContextError(f"there is no capsule {path}")
    source: ImageSource = parse_location(location(path)).source(context)
    try:
        manifest = Manifest.parse(check_manifest(source.get_manifest(), None).raw)
        document = json.loads(read_blob(source, manifest.config, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{path}: the config of its image is no JSON") from e
    finally:
        source.close()
    field = document.get(FIELD) if isinstance(document, dict) else None
    if not isinstance(field, Mapping):
        raise ImageError(f"{path} is an image, but no capsule of a failed step")
    try:
        return Capsule(
            **{name: str(field[name]) for name in ("step", "message", "output", "file", "containerfile", "platform")},
            command=tuple(map(str, field["command"])),
            exit_status=int(field["exit_status"]),
            line=int(field["line"]),
            end_line=int(field["end_line"]),
            mounts=tuple(map(str, field.get("mounts", ()))),
            network=str(field.get("network", "default")),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ImageError(f"{path}: what it says of the failed step cannot be read: {e}") from e
