"""The step cache in a registry, a directory and inside an image, read by a store that has nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base} AS build\nCOPY src /src\n"
        "RUN --mount=type=cache,target=/cache,id=travels echo kept >> /cache/file && cp /src /out && rm /bin/true\n"
        f"FROM {busybox_base}\nCOPY --from=build /out /out\nRUN cat /out > /last\n"
    )
    return write_context(tmp_path / "context", text, {"src": "text\n"})


@pytest.fixture
def other(tmp_path: Path) -> Pybuild:
    """Another machine: a store that has nothing."""
    return Pybuild(tmp_path / "other")


def metadata(pybuild: Pybuild, context: Path, *flags: str) -> dict[str, Any]:
    path = context.parent / "meta.json"
    pybuild.build(context, "--metadata-file", path, *flags)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def executed(document: dict[str, Any]) -> list[str]:
    return [s["name"] for s in document["pybuild.steps"]["list"] if not s["cached"]]


def cache_of(registry: RegistryServer, name: str) -> str:
    return f"type=registry,ref={registry.host}/cache/{name}:main"


def test_nothing_runs_on_the_other_machine(
    pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path
) -> None:
    ref = cache_of(registry, "all")
    first = metadata(pybuild, context, "--cache-to", f"{ref},mode=max", "--cache-mounts")
    assert len(executed(first)) == 4
    second = metadata(other, context, "--cache-from", ref, "--cache-mounts", "-t", "app:1")
    assert executed(second) == []
    assert second["containerimage.digest"] == first["containerimage.digest"]
    # Only what the output needs: not the layers of the stage `build`.
    blobs = {p.name for p in (other.root / "blobs/sha256").iterdir()}
    manifest = json.loads((other.root / "blobs" / first["containerimage.digest"].replace(":", "/")).read_bytes())
    needed = {d["digest"].removeprefix("sha256:") for d in manifest["layers"]}
    assert needed <= blobs
    assert len(blobs) <= len(needed) + 5, "the base's and the image's documents, and the cache mount"
    # The cache mount is back.
    (mount,) = [p for p in (other.root / "cachemounts").iterdir() if p.is_dir()]
    assert (mount / "file").read_text() == "kept\n"
    root = other.unpack("app:1", context.parent / "root")
    assert (root / "last").read_text() == "text\n"


def test_one_request_resolves_all_steps(
    pybuild: Pybuild, other: Pybuild, fresh_registry: RegistryServer, registry: RegistryServer, context: Path
) -> None:
    ref = f"type=registry,ref={fresh_registry.host}/c:1"
    pybuild.build(context, "--cache-to", f"{ref},mode=max")
    before = len(fresh_registry.requests_seen())
    other.run("plan", "--cache-from", ref, context)
    asked = [r for r in fresh_registry.requests_seen()[before:] if "/v2/c/" in r]
    assert len(asked) == 1, asked
    assert "manifests/1" in asked[0]


def test_a_later_step_runs_on_layers_of_the_cache(
    pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path
) -> None:
    ref = cache_of(registry, "later")
    pybuild.build(context, "--cache-to", f"{ref},mode=max")
    path = context / "Containerfile"
    path.write_text(path.read_text() + "RUN ls -l /out /last > /listing; test -e /bin/true\n")
    document = metadata(other, context, "--cache-from", ref, "-t", "more:1")
    assert [n.rpartition("] ")[2][:8] for n in executed(document)] == ["RUN ls -"]
    root = other.unpack("more:1", context.parent / "root")
    assert "/out" in (root / "listing").read_text()


def test_whiteouts_travel(pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path) -> None:
    ref = cache_of(registry, "whiteouts")
    pybuild.build(context, "--target", "build", "--cache-to", ref)
    path = context / "Containerfile"
    text = path.read_text().split("FROM")[1]
    path.write_text(f"FROM{text}RUN test ! -e /bin/true && touch /gone\n")
    document = metadata(other, context, "--cache-from", ref)
    assert len(executed(document)) == 1


def test_min_keeps_the_results_steps_alone(
    pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path
) -> None:
    ref = cache_of(registry, "min")
    pybuild.build(context, "--cache-to", f"{ref},mode=min")
    assert executed(metadata(other, context, "--cache-from", ref)) == []
    shutil.rmtree(other.root)
    assert len(executed(metadata(other, context, "--cache-from", ref, "--target", "build"))) == 2


def test_a_directory_holds_a_cache(pybuild: Pybuild, other: Pybuild, context: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    pybuild.build(context, "--cache-to", f"type=local,dest={place},mode=max")
    assert json.loads((place / "index.json").read_text())["manifests"]
    assert executed(metadata(other, context, "--cache-from", f"type=local,src={place}")) == []


def test_a_directory_does_not_grow_for_ever(pybuild: Pybuild, other: Pybuild, context: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    pybuild.build(context, "-o", f"type=oci,tar=false,dest={place},name=x:kept")
    sizes = []
    for number in range(4):
        (context / "src").write_text(f"text {number}\n")
        pybuild.build(context, "--cache-to", f"type=local,dest={place},mode=max")
        sizes.append(len(list((place / "blobs/sha256").iterdir())))
    assert sizes[1:] == [sizes[0]] * 3, "what only the last cache had is gone"
    assert executed(metadata(other, context, "--cache-from", f"type=local,src={place}")) == []

    other.run("copy", f"oci:{place}:kept", "storage:kept:1")


def test_an_image_carries_its_cache(pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path) -> None:
    name = f"{registry.host}/cache/inline:1"
    pybuild.build(context, "--cache-to", "type=inline", "--push", "-t", name)
    document = metadata(other, context, "--cache-from", f"type=registry,ref={name}")
    assert executed(document) == []


def test_a_cache_that_is_not_there_is_a_warning(other: Pybuild, registry: RegistryServer, context: Path) -> None:
    result = other.build(context, "--cache-from", cache_of(registry, "missing"), "--progress", "plain")
    assert "importing cache" in result.stderr


def test_a_damaged_cache_is_a_warning(
    pybuild: Pybuild, other: Pybuild, registry: RegistryServer, context: Path, tmp_path: Path
) -> None:
    place = tmp_path / "cache"
    pybuild.build(context, "--cache-to", f"type=local,dest={place}")
    for blob in (place / "blobs/sha256").iterdir():
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(data)
    document = metadata(other, context, "--cache-from", f"type=local,src={place}")
    assert len(executed(document)) == 4


def test_layers_that_a_cache_has_lost_are_made_again(
    pybuild: Pybuild, other: Pybuild, context: Path, tmp_path: Path
) -> None:
    place = tmp_path / "cache"
    pybuild.build(context, "--cache-to", f"type=local,dest={place},mode=max", "-t", "app:1")
    index = json.loads((place / "index.json").read_text())["manifests"][0]["digest"]
    manifest = json.loads((place / "blobs" / index.replace(":", "/")).read_text())
    for layer in manifest["layers"][-1:]:
        (place / "blobs" / layer["digest"].replace(":", "/")).unlink()
    again = tmp_path / "again"
    meta = tmp_path / "meta.json"
    flags = ("--cache-from", f"type=local,src={place}", "--cache-to", f"type=local,dest={again},mode=max")
    result = other.build(context, *flags, "-t", "app:1", "--progress", "plain", "--metadata-file", meta)
    assert "no cache has layer" in result.stderr
    assert executed(json.loads(meta.read_text()))
    assert (other.unpack("app:1", tmp_path / "root") / "last").read_text() == "text\n"
    third = Pybuild(tmp_path / "third")
    assert executed(metadata(third, context, "--cache-from", f"type=local,src={again}")) == []


def test_an_export_that_fails_fails_the_build_unless_told_otherwise(pybuild: Pybuild, context: Path) -> None:
    ref = "type=registry,ref=127.0.0.1:1/nobody/here:1"
    assert pybuild.build(context, "--cache-to", ref, check=False).status != 0
    pybuild.build(context, "--cache-to", f"{ref},ignore-error=true")


@pytest.mark.parametrize(
    "flag", ["type=s3,ref=x", "type=registry", "type=local,mode=mid,dest=x", "type=local,dest=x,a=b"]
)
def test_wrong_cache_flags_are_refused(pybuild: Pybuild, context: Path, flag: str) -> None:
    result = pybuild.build(context, "--cache-to", flag, check=False)
    assert result.status == 2
    assert "--cache-to" in result.stderr
