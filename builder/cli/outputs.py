"""Flags for where a build's result and its cache go: `--output`, `--push`, `--load`, `--cache-to`, `--cache-from`."""

from __future__ import annotations

from argparse import Namespace
from typing import Literal, cast

from builder.cli.options import boolean, fields
from builder.errors import UsageError
from builder.plan.request import CacheRef, Output

_TYPES = ("registry", "oci", "docker", "tar", "local", "squashfs", "image")


def outputs(options: Namespace) -> tuple[Output, ...]:
    """What the flags ask for. Raises: UsageError."""
    found = [output for text in options.output for output in _output(text)]
    if options.push and not any(o.type == "registry" for o in found):
        found.append(Output("registry"))
    if options.load and not any(o.type == "docker-daemon" for o in found):
        found.append(Output("docker-daemon"))
    for output in found:
        if output.type in {"oci", "docker", "tar", "local", "squashfs"} and not output.dest:
            raise UsageError(f"--output type={output.type} needs dest=PATH")
        if output.type in {"registry", "docker-daemon"} and not output.name and not options.tag:
            raise UsageError(
                f"--output type={output.type} needs a name", hint="add -t NAME, or name=NAME to the output"
            )
    return tuple(found)


def _output(text: str) -> list[Output]:
    if text == "-":
        return [Output("tar", "-")]
    if "=" not in text:
        return [Output("local", text)]
    values = fields(text, "--output")
    kind = values.pop("type", "")
    if kind not in _TYPES:
        raise UsageError(f"--output {text!r}: type is one of {', '.join(_TYPES)}, not {kind!r}")
    push = boolean(values.pop("push", "false"))
    dest = values.pop("dest", None)
    compression = values.pop("compression", None)
    if compression not in {None, "gzip", "zstd", "none", "uncompressed"}:
        raise UsageError(f"--output {text!r}: compression is gzip, zstd or none, not {compression!r}")
    tar = boolean(values.pop("tar", "true"))
    by_digest = boolean(values.pop("push-by-digest", "false"))
    # As buildx has it beside the other: the name is then one with a digest, which it is.
    if boolean(values.pop("name-canonical", "false")) and not by_digest:
        raise UsageError(f"--output {text!r}: name-canonical goes with push-by-digest")
    name = values.pop("name", None) or None
    if values:
        raise UsageError(f"--output {text!r}: unknown field {', '.join(sorted(values))}")
    if kind == "docker" and dest is None:
        kind = "docker-daemon"
    if kind == "image":
        kind = "registry" if push else "image"
    if by_digest and kind != "registry":
        raise UsageError(f"--output {text!r}: push-by-digest is for type=registry, or type=image,push=true")
    packed = cast("Literal['gzip', 'zstd', 'none'] | None", "none" if compression == "uncompressed" else compression)
    names = [n for n in name.split(",") if n] if name else [None]
    return [Output(kind, dest, each, tar, by_digest, packed) for each in names]  # type: ignore[arg-type]


def caches(texts: list[str], flag: str) -> tuple[CacheRef, ...]:
    """`type=registry,ref=NAME`, `type=local,src=DIR|dest=DIR`, `type=inline`, or a bare NAME. Raises: UsageError."""
    return tuple(_cache(text, flag) for text in texts)


def _cache(text: str, flag: str) -> CacheRef:
    if "=" not in text:
        return CacheRef("registry", text)
    values = fields(text, flag)
    kind = values.pop("type", "")
    ref = _reference(values, kind)
    if kind not in {"registry", "local", "inline"}:
        raise UsageError(f"{flag} {text!r}: type is one of registry, local, inline, not {kind!r}")
    if kind != "inline" and not ref:
        raise UsageError(f"{flag} {text!r}: {'ref' if kind == 'registry' else 'dest'} is missing")
    mode = values.pop("mode", "min")
    if mode not in {"min", "max"}:
        raise UsageError(f"{flag} {text!r}: mode is min or max, not {mode!r}")
    ignore = boolean(values.pop("ignore-error", "false"))
    if values:
        raise UsageError(f"{flag} {text!r}: unknown field {', '.join(sorted(values))}")
    return CacheRef(kind, ref, mode, ignore)  # type: ignore[arg-type]


def _reference(values: dict[str, str], kind: str) -> str:
    names = ("ref",) if kind == "registry" else ("src", "dest") if kind == "local" else ()
    return next(filter(None, [values.pop(name, "") for name in names]), "")
