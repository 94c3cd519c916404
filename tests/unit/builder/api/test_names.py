"""The names that programs may import from `builder`, and what an error's class says."""

from __future__ import annotations

import importlib

import pytest

import builder
from builder.errors import StepError
from layers.errors import PybuildError

NAMES = [
    "Annotation",
    "BuildError",
    "BuildPlan",
    "BuildRequest",
    "BuildResult",
    "CacheRef",
    "Cancelled",
    "Capsule",
    "ContentError",
    "ContextError",
    "Descriptor",
    "Digest",
    "EventSink",
    "Image",
    "ImageError",
    "LayerError",
    "Lock",
    "Output",
    "OutputResult",
    "ParseError",
    "PlanError",
    "Platform",
    "PybuildError",
    "Reason",
    "RegistryError",
    "RegistryOptions",
    "ResourceLimits",
    "RunMount",
    "RunOptions",
    "SandboxError",
    "SecretLeakError",
    "SecretSource",
    "SourceFile",
    "SourcePolicy",
    "StepError",
    "StepPlan",
    "StepReport",
    "StoreError",
    "UsageError",
    "Vertex",
    "VertexLog",
    "VertexStatus",
    "VertexWarning",
    "build",
    "check",
    "copy",
    "inspect",
    "lock",
    "plan_build",
    "prepare_namespaces",
    "pull",
    "push",
    "read_capsule",
    "unpack",
]


def test_the_public_names() -> None:
    """A name added here is a promise; one taken away breaks programs."""
    assert sorted(builder.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(builder, name) is not None
    assert set(NAMES) <= set(dir(builder))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        builder.no_such_name  # noqa: B018


def test_public_functions_are_documented() -> None:
    for name in NAMES:
        value = getattr(builder, name)
        assert value.__doc__, name


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("UsageError", 2),
        ("Cancelled", 130),
        ("ParseError", 1),
        ("ContextError", 1),
        ("StoreError", 1),
        ("LayerError", 1),
    ],
)
def test_an_error_class_has_one_exit_status(name: str, status: int) -> None:
    kind = getattr(builder, name)
    assert issubclass(kind, PybuildError)
    assert kind.exit_code == status


def test_a_failed_step_exits_with_the_status_of_its_command() -> None:
    assert StepError("failed", step="RUN x", exit_status=42).exit_code == 42
    assert StepError("failed", step="RUN x", exit_status=0).exit_code == 1


def test_every_submodule_is_reached_after_the_package() -> None:
    """`builder.plan` is a package: the function has another name, or it would depend on who came first."""
    assert importlib.import_module("builder.plan").__name__ == "builder.plan"
    assert "plan" not in builder.__all__
