"""`--output`, `--push`: several at once, judged by other tools."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool
from tests.support.oracles import skopeo_inspect
from tests.support.registries import RegistryServer
from tests.support.waiting import until


@pytest.fixture
def context(tmp_path: Path) -> Path:
    text = "FROM scratch\nCOPY --chmod=640 --chown=3:4 file /dir/file\nCOPY tree /\nENV A=1\n"
    folder = write_context(tmp_path / "context", text, {"file": "content\n"})
    (folder / "tree").mkdir()
    (folder / "tree/link").symlink_to("dir/file")
    return folder


def inspected(location: str) -> dict[str, Any]:
    need_tool("skopeo")
    done = subprocess.run(["skopeo", "inspect", location], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.registry
def test_several_outputs_at_once(pybuild: Pybuild, registry: RegistryServer, context: Path, tmp_path: Path) -> None:
    name = f"{registry.host}/graph/many:1"
    outputs = [
        f"type=oci,dest={tmp_path}/oci.tar",
        f"type=oci,tar=false,dest={tmp_path}/layout",
        f"type=docker,dest={tmp_path}/docker.tar",
        f"type=tar,dest={tmp_path}/root.tar",
        f"type=local,dest={tmp_path}/root",
        "type=image",
    ]
    flags = [flag for output in outputs for flag in ("-o", output)]
    meta = tmp_path / "meta.json"
    pybuild.build(context, "-t", name, "--push", "--metadata-file", meta, *flags)
    document = json.loads(meta.read_text())
    assert [o["type"] for o in document["pybuild.outputs"]] == ["oci", "oci", "docker", "tar", "local", "registry"]
    digest = document["containerimage.digest"]
    assert skopeo_inspect(name)["Digest"] == digest
    assert inspected(f"oci:{tmp_path}/layout:1")["Digest"] == digest
    assert inspected(f"oci-archive:{tmp_path}/oci.tar:1")["Digest"] == digest
    assert "A=1" in inspected(f"docker-archive:{tmp_path}/docker.tar")["Env"]
    with tarfile.open(tmp_path / "root.tar") as tar:
        members = {m.name: m for m in tar}
    assert sorted(members) == ["dir", "dir/file", "link"]
    assert (members["dir/file"].mode, members["dir/file"].uid, members["dir/file"].gid) == (0o640, 3, 4)
    assert (tmp_path / "root/dir/file").read_text() == "content\n"
    assert os.readlink(tmp_path / "root/link") == "dir/file"


def test_a_bare_directory_and_stdout(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context, "-o", tmp_path / "out")
    assert (tmp_path / "out/dir/file").read_text() == "content\n"
    result = pybuild.build(context, "-o", "-")
    (tmp_path / "stdout.tar").write_bytes(result.stdout)
    listing = subprocess.run(["tar", "tf", tmp_path / "stdout.tar"], capture_output=True, text=True, check=True)
    assert "dir/file" in listing.stdout.split()


def test_platforms_get_directories_and_an_index(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    place = tmp_path / "layout"
    pybuild.build(
        context, "--platform", "linux/amd64,linux/arm64", "-o", f"type=oci,tar=false,dest={place}",
        "-o", f"type=local,dest={tmp_path}/roots", "-t", "multi:1",
    )  # fmt: skip
    assert (tmp_path / "roots/linux_arm64/dir/file").exists()
    assert (tmp_path / "roots/linux_amd64/dir/file").exists()
    (entry,) = json.loads((place / "index.json").read_text())["manifests"]
    index = json.loads((place / "blobs" / entry["digest"].replace(":", "/")).read_text())
    assert {m["platform"]["architecture"] for m in index["manifests"]} == {"amd64", "arm64"}


@pytest.mark.parametrize(
    "output",
    [
        *("type=oci", "type=registry", "type=nothing,dest=x", "type=oci,dest=x,colour=red", "type=tar"),
        *(
            "type=oci,dest=x,push-by-digest=true",
            "type=image,name=x,push-by-digest=true",
            "type=image,name-canonical=true",
        ),
    ],
)
def test_wrong_outputs_are_refused(pybuild: Pybuild, context: Path, output: str) -> None:
    result = pybuild.build(context, "-o", output, check=False)
    assert result.status == 2
    assert result.stderr.startswith("error: ")


def test_a_tar_that_fails_leaves_no_part(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    result = pybuild.build(context, "-o", f"type=tar,dest={tmp_path}/missing/root.tar", check=False)
    assert result.status == 1
    assert not list(tmp_path.glob("**/.root.tar*"))


def test_the_timeline_is_a_picture(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    import xml.etree.ElementTree as ET

    pybuild.build(context, "--timeline", tmp_path / "t.svg", "--no-cache")
    svg = ET.fromstring((tmp_path / "t.svg").read_text())
    assert svg.tag.endswith("svg")
    texts = [t.text or "" for t in svg.iter() if t.tag.endswith("text")]
    assert any("COPY" in t for t in texts)
    pybuild.build(context, "--timeline", tmp_path / "t.html", "--no-cache")
    assert "<svg" in (tmp_path / "t.html").read_text()
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    pybuild.build(context, "--timeline", tmp_path / "t.json", "--no-cache", env={"TRACEPARENT": parent})
    (scope,) = json.loads((tmp_path / "t.json").read_text())["resourceSpans"][0]["scopeSpans"]
    assert {span["traceId"] for span in scope["spans"]} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert any("COPY" in span["name"] for span in scope["spans"])


def test_the_summary_tells_steps_and_phases(pybuild: Pybuild, context: Path) -> None:
    result = pybuild.build(context, "--summary=true", "-q")
    assert "2 steps run" in result.stderr
    assert "from the cache" in result.stderr


@pytest.mark.registry
def test_layers_are_sent_while_later_steps_run(
    pybuild: Pybuild, registry: RegistryServer, busybox_base: str, tmp_path: Path
) -> None:
    wait = "until test -e /gate/open; do sleep 0.05; done"
    text = f"FROM {busybox_base}\nRUN head -c 3000000 /dev/urandom > /early\nRUN {wait}\n"
    meta = tmp_path / "meta.json"
    name = f"{registry.host}/graph/early:1"
    gate = tmp_path / "gate"
    gate.mkdir()
    flags = ("--push", "-t", name, "--metadata-file", meta, "-v", f"{gate}:/gate:ro")
    building = pybuild.start("build", *flags, write_context(tmp_path / "early", text))
    stored = registry.storage / "docker/registry/v2"

    def is_there() -> bool:
        layers = (stored / "repositories/graph/early/_layers/sha256").glob("*")
        places = [stored / "blobs/sha256" / layer.name[:2] / layer.name / "data" for layer in layers]
        return any(place.exists() and place.stat().st_size >= 3_000_000 for place in places)

    until(is_there, lambda: "the layer would come with the image")
    (gate / "open").touch()
    _, words = building.communicate()
    assert building.returncode == 0, words
    document = json.loads(meta.read_text())
    first = next(s for s in document["pybuild.steps"]["list"] if "early" in s["name"])
    assert first["phases"]["push"] > 0
    # What was left for the end: documents and small layers.
    assert document["pybuild.outputs"][0]["moved_bytes"] < 1_000_000
    assert document["pybuild.sent_bytes"] > 3_000_000
    assert skopeo_inspect(name)["Digest"] == document["containerimage.digest"]


@pytest.mark.registry
@pytest.mark.parametrize("pushed", ["elsewhere", "beside the base"])
def test_the_bases_layers_are_there_before_the_steps_are_done(
    pybuild: Pybuild,
    fresh_registry: RegistryServer,
    busybox_base: str,
    busybox_layout: Path,
    tmp_path: Path,
    pushed: str,
) -> None:
    beside = pushed == "beside the base"
    if beside:
        fresh_registry.push_layout(busybox_layout, "base/busybox", "1")
    base = f"{fresh_registry.host}/base/busybox:1" if beside else busybox_base
    pybuild.run("pull", base)
    (layer,) = pybuild.run("inspect", "--raw", base).json()["layers"]
    text = f"FROM {base}\nRUN until test -e /gate/open; do sleep 0.05; done; echo made > /made\n"
    name = f"{fresh_registry.host}/graph/app:1"
    gate = tmp_path / "gate"
    gate.mkdir()
    flags = ("--push", "-t", name, "-v", f"{gate}:/gate:ro")
    building = pybuild.start("build", *flags, write_context(tmp_path / "app", text))

    def is_there() -> bool:
        return fresh_registry.request("HEAD", f"/v2/graph/app/blobs/{layer['digest']}")[0] == 200

    until(is_there, lambda: "the layer would come with the image")
    (gate / "open").touch()
    _, words = building.communicate()
    assert building.returncode == 0, words
    assert skopeo_inspect(name)["Layers"][0] == layer["digest"]
    asked = [r for r in fresh_registry.requests_seen() if "/v2/graph/app/" in r]
    sent = [r for r in asked if layer["digest"].removeprefix("sha256:") in r]
    assert any("mount=" in r for r in sent) == beside, asked
    assert any(r.startswith("PUT") for r in sent) == (not beside), asked


def test_a_squashfs_image(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    need_tool("sqfstar", "unsquashfs")
    place = tmp_path / "image.sqfs"
    pybuild.build(context, "-o", f"type=squashfs,dest={place},compression=zstd", "--timestamp", "7")
    listed = subprocess.run(["unsquashfs", "-lln", place], capture_output=True, text=True, check=True).stdout
    assert listed.splitlines()[0].startswith("drwxr-xr-x 0/0"), "the root directory has its own mode"
    assert any(line.startswith("-rw-r-----") and " 3/4 " in line for line in listed.splitlines()), listed
    assert "squashfs-root/link -> dir/file" in listed
    shown = subprocess.run(["unsquashfs", "-cat", place, "dir/file"], capture_output=True, check=True).stdout
    assert shown == b"content\n"
    again = tmp_path / "again.sqfs"
    time.sleep(1.1)
    pybuild.build(context, "-o", f"type=squashfs,dest={again},compression=zstd", "--timestamp", "7")
    assert again.read_bytes() == place.read_bytes()
    assert not list(tmp_path.glob(".image*"))


def test_a_squashfs_image_that_cannot_be_written_is_told(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    need_tool("sqfstar")
    result = pybuild.build(context, "-o", f"type=squashfs,dest={tmp_path}/missing/x", check=False)
    assert (result.status, "missing/x" in result.stderr) == (1, True)
    result = pybuild.build(context, "-o", f"type=squashfs,dest={tmp_path}/x", env={"PATH": "/nowhere"}, check=False)
    assert "squashfs-tools" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.registry
def test_platforms_built_apart_are_put_together(
    pybuild: Pybuild, registry: RegistryServer, context: Path, tmp_path: Path
) -> None:
    name = f"{registry.host}/graph/parts"
    members = []
    for platform in ("linux/amd64", "linux/arm64"):
        meta = tmp_path / "meta.json"
        output = f"type=image,name={name},push-by-digest=true,name-canonical=true,push=true"
        pybuild.build(context, "--platform", platform, "-o", output, "--metadata-file", meta)
        members.append(f"docker://{name}@{json.loads(meta.read_text())['containerimage.digest']}")
    _, _, tags = registry.request("GET", "/v2/graph/parts/tags/list")
    assert not json.loads(tags).get("tags"), "nothing has a tag yet"
    pybuild.run("manifest", "create", f"docker://{name}:1", *members)
    found = registry.manifest("graph/parts", "1")["manifests"]
    assert [entry["platform"]["architecture"] for entry in found] == ["amd64", "arm64"]


@pytest.mark.registry
def test_a_base_for_another_platform_is_no_image_of_its_own(
    pybuild: Pybuild, registry: RegistryServer, busybox_base: str, tmp_path: Path
) -> None:
    """The store has it under its name and the platform, which is no name for a registry or a mount."""
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nLABEL a=b\n")
    name = f"{registry.host}/graph/foreign:1"
    pybuild.build(context, "--platform=linux/amd64,linux/arm64", "-t", name)
    pybuild.run("push", name)
    assert len(registry.manifest("graph/foreign", "1")["manifests"]) == 2
    pybuild.run("image", "mount", "--all")
    pybuild.run("image", "unmount", "--all")
