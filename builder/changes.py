"""`--change INSTRUCTION`: instructions that alter an image's config, without a build.

The text goes through the same parser and planner as a Containerfile, so that `--change 'ENV A=$B'` means
what it means there. Callers: `builder.rootfs` (import), commits of working containers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from builder.errors import UsageError
from layers.errors import PybuildError
from layers.oci import Digest, ImageConfig, Manifest, Platform

if TYPE_CHECKING:
    from builder.plan.graph import ResolvedImage

_ALLOWED = (
    *("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "LABEL", "MAINTAINER", "ONBUILD", "SHELL"),
    *("STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
_NO_DIGEST = Digest("sha256:" + "0" * 64)
_BASE = "base.invalid/image:changed"


def changed_config(
    changes: Sequence[str], *, platform: Platform, base: tuple[Manifest, ImageConfig] | None = None
) -> dict[str, Any]:
    """The config document that `changes` make of a base's (None: of nothing), without rootfs and history.

    Raises: UsageError for an instruction that makes files, ParseError for one that is malformed.
    """
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.source import SourceFile
    from builder.plan.graph import ResolvedImage
    from builder.plan.planner import plan
    from builder.plan.request import BuildRequest

    check_changes(changes)
    triggers: object = None
    resolver = _OneImage(None)
    if base is not None:
        document = dict(base[1].document)
        config = dict(document.get("config") or {})
        # A change is no build: what the image has waiting for one stays where it is.
        triggers = config.pop("OnBuild", None)
        document["config"] = config
        from layers.oci import encode_json

        resolver = _OneImage(ResolvedImage(_BASE, _NO_DIGEST, base[0], ImageConfig.parse(encode_json(document))))
    source = SourceFile("--change", "\n".join([f"FROM {_BASE if base else 'scratch'}", *changes, ""]))
    request = BuildRequest(containerfile=source, context=None, platforms=(platform,), pull="never")
    graph = plan(request, parse_containerfile(source), resolver)
    result = dict(graph.images[0].document)
    if triggers:
        made = dict(result.get("config") or {})
        made["OnBuild"] = [*(triggers if isinstance(triggers, list) else []), *(made.get("OnBuild") or [])]
        result["config"] = made
    return result


def check_changes(changes: Sequence[str]) -> None:
    """Raises: UsageError for an instruction that makes files, or is none."""
    for change in changes:
        word = change.split(maxsplit=1)[0].upper() if change.strip() else ""
        if word not in _ALLOWED or "\n" in change.strip():
            raise UsageError(f"--change {change!r}: not possible", hint="there are: " + ", ".join(_ALLOWED))


class _OneImage:
    """A resolver that knows one image."""

    def __init__(self, image: ResolvedImage | None) -> None:
        self._image = image

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        if self._image is None:
            raise PybuildError(f"a change cannot name the image {name!r}")
        return self._image

    def resolve_layout(self, location: str, platform: Platform) -> ResolvedImage:
        return self.resolve_image(location, platform)
