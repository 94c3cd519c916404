"""Building: the Containerfile language, the graph, the sandbox, the commands.

The public API is re-exported here, loaded when first used, so that importing one part of the
package costs that part alone. `builder.api` documents it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.api import (
        build,
        check,
        copy,
        inspect,
        lock,
        plan_build,
        prepare_namespaces,
        pull,
        push,
        read_capsule,
        unpack,
    )
    from builder.building import BuildResult, OutputResult
    from builder.capsule import Capsule
    from builder.definition import Image, RunMount
    from builder.errors import (
        BuildError,
        ContextError,
        ParseError,
        PlanError,
        SandboxError,
        SecretLeakError,
        StepError,
        UsageError,
    )
    from builder.frontend.source import SourceFile
    from builder.lock import Lock
    from builder.plan.request import (
        Annotation,
        BuildRequest,
        CacheRef,
        Output,
        ResourceLimits,
        RunOptions,
        SecretSource,
    )
    from builder.plan.sourcepolicy import SourcePolicy
    from builder.solve.explain import BuildPlan, Reason, StepPlan
    from builder.solve.report import StepReport
    from layers.errors import Cancelled, ContentError, ImageError, LayerError, PybuildError, StoreError
    from layers.events import EventSink, Vertex, VertexLog, VertexStatus, VertexWarning
    from layers.oci import Descriptor, Digest, Platform
    from registry.errors import RegistryError
    from registry.hosts import RegistryOptions

_HOMES = {
    "builder.api": (
        *("build", "check", "copy", "inspect", "lock", "plan_build", "prepare_namespaces", "pull", "push"),
        *("read_capsule", "unpack"),
    ),
    "builder.building": ("BuildResult", "OutputResult"),
    "builder.capsule": ("Capsule",),
    "builder.definition": ("Image", "RunMount"),
    "builder.errors": (
        *("BuildError", "ContextError", "ParseError", "PlanError"),
        *("SandboxError", "SecretLeakError", "StepError", "UsageError"),
    ),
    "builder.frontend.source": ("SourceFile",),
    "builder.lock": ("Lock",),
    "builder.plan.request": (
        *("Annotation", "BuildRequest", "CacheRef", "Output", "ResourceLimits", "RunOptions", "SecretSource"),
    ),
    "builder.plan.sourcepolicy": ("SourcePolicy",),
    "builder.solve.explain": ("BuildPlan", "Reason", "StepPlan"),
    "builder.solve.report": ("StepReport",),
    "layers.errors": ("Cancelled", "ContentError", "ImageError", "LayerError", "PybuildError", "StoreError"),
    "layers.events": ("EventSink", "Vertex", "VertexLog", "VertexStatus", "VertexWarning"),
    "layers.oci": ("Descriptor", "Digest", "Platform"),
    "registry.errors": ("RegistryError",),
    "registry.hosts": ("RegistryOptions",),
}

__all__ = [
    "Annotation", "BuildError", "BuildPlan", "BuildRequest", "BuildResult", "CacheRef", "Cancelled", "Capsule",
    "ContentError", "ContextError", "Descriptor", "Digest", "EventSink", "Image", "ImageError", "LayerError",
    "Lock", "Output", "OutputResult", "ParseError", "PlanError", "Platform", "PybuildError", "Reason",
    "RegistryError", "RegistryOptions", "ResourceLimits", "RunMount", "RunOptions", "SandboxError",
    "SecretLeakError", "SecretSource", "SourceFile", "SourcePolicy", "StepError", "StepPlan", "StepReport",
    "StoreError", "UsageError", "Vertex", "VertexLog", "VertexStatus", "VertexWarning", "build", "check", "copy",
    "inspect", "lock", "plan_build", "prepare_namespaces", "pull", "push", "read_capsule", "unpack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
