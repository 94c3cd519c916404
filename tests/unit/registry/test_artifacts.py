"""Artifacts: the seam to oras, and the names that a pull refuses."""

from __future__ import annotations

import inspect
from pathlib import Path

import oras.container
import oras.provider
import pytest

from registry.artifacts import ArtifactError, ArtifactFile, OrasRegistry, push_artifact, safe_name
from registry.client import RegistryClient
from registry.reference import Reference

OVERRIDDEN = ("upload_blob", "download_blob", "get_manifest", "upload_manifest", "do_request", "pull")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_take_what_oras_takes(name: str) -> None:
    """A new oras with other parameters must fail here, not at a user's push."""
    theirs = inspect.signature(getattr(oras.provider.Registry, name))
    ours = inspect.signature(getattr(OrasRegistry, name))
    assert list(ours.parameters) == list(theirs.parameters)
    for key, parameter in theirs.parameters.items():
        assert ours.parameters[key].default == parameter.default, key


def test_oras_calls_nothing_that_we_do_not_stand_in_for() -> None:
    used = set()
    for method in ("push", "get_tags", "delete_tag", "get_container"):
        source = inspect.getsource(getattr(oras.provider.Registry, method))
        used |= {
            name for name in ("load_configs", "authenticate_request", "set_basic_auth") if f"auth.{name}" in source
        }
    assert used <= {"load_configs"}


@pytest.mark.parametrize("text", ["localhost/foo:1", "localhost:5000/a/b:c", "debian", "h.x/a@sha256:" + "a" * 64])
def test_references_are_ours(text: str) -> None:
    registry = OrasRegistry(RegistryClient(environ={}))
    ref = Reference.parse(text)
    container = registry.get_container(text)
    assert (container.registry, container.api_prefix) == (ref.domain, ref.path)
    assert registry._ref(container).repository == ref.repository
    assert container.manifest_url().endswith(f"/manifests/{ref.target}")


def test_a_default_host_as_oras_has_it() -> None:
    registry = OrasRegistry(RegistryClient(environ={}), "h.x:5000")
    assert registry.get_container("a/b:1").registry == "h.x:5000"
    assert registry.get_container("h.x:5000/a/b:1").uri == "h.x:5000/a/b:1"
    given = oras.container.Container("q.x/a:1")
    assert registry.get_container(given) is given


@pytest.mark.parametrize("title", ["a", "a/b.txt", "sha256:" + "a" * 64, "ü.txt", "..a"])
def test_safe_names(title: str) -> None:
    assert str(safe_name(title)) == title


@pytest.mark.parametrize(
    "title",
    ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "./a", "a/", "a\0b", "a\nb", "a\\b", "x" * 300, "a/" * 3000],
)
def test_unsafe_names(title: str) -> None:
    with pytest.raises(ArtifactError, match="plain relative path"):
        safe_name(title)


def test_a_missing_file_is_told_before_anything_is_sent(tmp_path: Path) -> None:
    client = RegistryClient(environ={})
    with pytest.raises(ArtifactError, match="no such file"):
        push_artifact(client, Reference.parse("127.0.0.1:1/a:b"), [ArtifactFile(tmp_path / "none")])
