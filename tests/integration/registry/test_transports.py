"""Every transport against a real registry, skopeo and umoci: what one writes the others read, digests and all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layers.errors import StoreError
from layers.store import Store
from registry.client import RegistryClient
from registry.copy import CopyOptions, CopyResult, copy_location
from registry.hosts import RegistryOptions
from registry.transport import TransportContext, parse_location
from tests.support.images import (
    Image,
    check_layout,
    layout_names,
    make_image,
    make_index,
    random_layer,
    write_layout,
)
from tests.support.machine import need_root, need_tool
from tests.support.registries import RegistryServer

Copy = Callable[..., CopyResult]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def copy(tmp_path: Path, store: Store) -> Iterator[Copy]:
    with RegistryClient(RegistryOptions(tls_verify=False), environ={}) as client:
        context = TransportContext(
            store=lambda: store, client=lambda: client, scratch_dir=tmp_path, uploads_dir=tmp_path / "uploads"
        )

        def run(source: str, destination: str, **options: Any) -> CopyResult:
            return copy_location(
                parse_location(source), parse_location(destination), context, options=CopyOptions(**options)
            )

        yield run


def skopeo(*arguments: str) -> str:
    need_tool("skopeo")
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def skopeo_copy(source: str, destination: str, *flags: str) -> None:
    skopeo("copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false", *flags, source, destination)


def skopeo_digest(name: str) -> str:
    return json.loads(skopeo("inspect", "--tls-verify=false", "--no-tags", name))["Digest"]  # type: ignore[no-any-return]


KINDS = ("docker", "oci", "oci-archive", "dir", "storage")


def place(kind: str, tmp_path: Path, registry: RegistryServer, name: str) -> str:
    return {
        "docker": f"docker://{registry.host}/transports/{name}:{tmp_path.name.replace('_', '-')[-60:].strip('-')}",
        "oci": f"oci:{tmp_path}/{name}:tag",
        "oci-archive": f"oci-archive:{tmp_path}/{name}.tar:tag",
        "docker-archive": f"docker-archive:{tmp_path}/{name}.dtar:app/{name}:1",
        "dir": f"dir:{tmp_path}/{name}.d",
        "storage": f"storage:app/{name}:1",
    }[kind]


@pytest.mark.parametrize("end", KINDS)
@pytest.mark.parametrize("start", KINDS)
def test_every_pair_keeps_the_digest(
    tmp_path: Path, registry: RegistryServer, copy: Copy, start: str, end: str
) -> None:
    image = make_image([random_layer("a", 50_000), {"b": b"text " * 5000}, {"empty": b""}])
    write_layout(tmp_path / "made", t=image)
    first, second = place(start, tmp_path, registry, "first"), place(end, tmp_path, registry, "second")
    copy(f"oci:{tmp_path}/made:t", first)
    assert copy(first, second).descriptor.digest == image.digest
    copy(second, f"oci:{tmp_path}/back:t", preserve_digests=True)
    assert layout_names(tmp_path / "back") == {"t": image.digest}
    check_layout(tmp_path / "back", image.digest)
    again = copy(first, second)
    assert (again.copied_blobs, again.moved_bytes) == (0, 0) or end == "oci-archive"


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_keeps_its_digest_everywhere(tmp_path: Path, registry: RegistryServer, copy: Copy, kind: str) -> None:
    index = make_index({"amd64": make_image(), "arm64": make_image(architecture="arm64")})
    write_layout(tmp_path / "made", t=index)
    there = place(kind, tmp_path, registry, "index")
    copy(f"oci:{tmp_path}/made:t", there, all_platforms=True)
    assert copy(there, f"oci:{tmp_path}/back:t", all_platforms=True).descriptor.digest == index.digest
    check_layout(tmp_path / "back", index.digest)


@pytest.mark.parametrize("kind", ["docker", "oci", "oci-archive", "dir"])
def test_skopeo_reads_what_we_write(tmp_path: Path, registry: RegistryServer, copy: Copy, kind: str) -> None:
    image = make_image()
    write_layout(tmp_path / "made", t=image)
    there = place(kind, tmp_path, registry, "ours")
    copy(f"oci:{tmp_path}/made:t", there)
    assert skopeo_digest(there) == image.digest
    skopeo_copy(there, f"oci:{tmp_path}/theirs:t")
    assert layout_names(tmp_path / "theirs") == {"t": image.digest}
    check_layout(tmp_path / "theirs", image.digest)


@pytest.mark.parametrize("kind", ["docker", "oci", "oci-archive", "dir"])
def test_we_read_what_skopeo_writes(tmp_path: Path, registry: RegistryServer, copy: Copy, kind: str) -> None:
    image = make_image()
    write_layout(tmp_path / "made", t=image)
    there = place(kind, tmp_path, registry, "theirs")
    skopeo_copy(f"oci:{tmp_path}/made:t", there)
    assert copy(there, f"oci:{tmp_path}/back:t").descriptor.digest == image.digest
    check_layout(tmp_path / "back", image.digest)
    assert copy(there, "app:1").descriptor.digest == image.digest


@pytest.mark.parametrize("kind", ["docker", "oci", "dir"])
def test_indexes_to_and_from_skopeo(tmp_path: Path, registry: RegistryServer, copy: Copy, kind: str) -> None:
    index = make_index({"amd64": make_image(), "arm64": make_image(architecture="arm64")})
    write_layout(tmp_path / "made", t=index)
    ours, theirs = place(kind, tmp_path, registry, "ours"), place(kind, tmp_path, registry, "theirs")
    copy(f"oci:{tmp_path}/made:t", ours)
    skopeo_copy(ours, theirs, "--all")
    assert copy(theirs, f"oci:{tmp_path}/back:t").descriptor.digest == index.digest
    check_layout(tmp_path / "back", index.digest)


def _image_ids(tmp_path: Path, source: str) -> list[str]:
    """What skopeo and we make of a docker-archive: the image ID."""
    skopeo_copy(source, f"dir:{tmp_path}/id")
    return [json.loads((tmp_path / "id/manifest.json").read_bytes())["config"]["digest"]]


def test_docker_archives_to_and_from_skopeo(tmp_path: Path, copy: Copy) -> None:
    image = make_image([random_layer("a"), {"b": b"b"}, {"b": b"b"}])
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", f"docker-archive:{tmp_path}/ours.tar:app/x:1")
    assert _image_ids(tmp_path, f"docker-archive:{tmp_path}/ours.tar:app/x:1") == [image.blobs[0].digest]
    # skopeo converts the config, so the IDs differ; what it makes must read back as itself.
    skopeo_copy(f"docker-archive:{tmp_path}/ours.tar", f"docker-archive:{tmp_path}/theirs.tar:app/x:2")
    copy(f"docker-archive:{tmp_path}/theirs.tar:app/x:2", f"oci:{tmp_path}/back:t")
    check_layout(tmp_path / "back", layout_names(tmp_path / "back")["t"])
    listed = json.loads(skopeo("list-tags", f"docker-archive:{tmp_path}/ours.tar"))["Tags"]
    assert listed == ["app/x:1"]


def test_umoci_unpacks_what_we_write(tmp_path: Path, registry: RegistryServer, copy: Copy) -> None:
    need_tool("umoci")
    image = make_image([{"a": b"1", "b": b"2"}, {"b": b"3"}])
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", f"docker://{registry.host}/umoci/x:1")
    copy(f"docker://{registry.host}/umoci/x:1", f"oci:{tmp_path}/layout:new")
    flags = [] if os.geteuid() == 0 else ["--rootless"]
    command = ["umoci", "unpack", *flags, "--image", f"{tmp_path}/layout:new", str(tmp_path / "bundle")]
    subprocess.run(command, check=True, capture_output=True)
    rootfs = tmp_path / "bundle/rootfs"
    assert {p.name: p.read_bytes() for p in rootfs.iterdir()} == {"a": b"1", "b": b"3"}
    # And back: umoci's layout, changed by it, is ours to read.
    subprocess.run(
        ["umoci", "config", "--image", f"{tmp_path}/layout:new", "--tag", "changed", "--config.user", "7"],
        check=True,
        capture_output=True,
    )
    digest = layout_names(tmp_path / "layout")["changed"]
    assert copy(f"oci:{tmp_path}/layout:changed", f"docker://{registry.host}/umoci/x:2").descriptor.digest == digest
    assert registry.config("umoci/x", "2")["config"]["User"] == "7"


def test_docker_schema_2_from_a_registry(tmp_path: Path, registry: RegistryServer, copy: Copy) -> None:
    image = make_image(docker=True)
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", f"docker://{registry.host}/schema2/x:1", preserve_digests=True)
    assert skopeo_digest(f"docker://{registry.host}/schema2/x:1") == image.digest
    assert copy(f"docker://{registry.host}/schema2/x:1", "schema2:1").descriptor.digest == image.digest
    converted = copy(f"docker://{registry.host}/schema2/x:1", f"oci:{tmp_path}/o:t").descriptor.digest
    assert skopeo_digest(f"oci:{tmp_path}/o:t") == converted != image.digest
    result = copy(f"oci:{tmp_path}/o:t", f"docker://{registry.host}/schema2/x:2", format="docker")
    document = registry.manifest("schema2/x", "2")
    assert document["mediaType"] == result.descriptor.media_type == image.top.media_type
    assert document["layers"] == image.document()["layers"]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_recompressed_layers_unpack_the_same(
    tmp_path: Path, registry: RegistryServer, copy: Copy, compression: str
) -> None:
    image = make_image([{"a": b"text " * 50_000}, random_layer("b")])
    write_layout(tmp_path / "made", t=image)
    there = f"docker://{registry.host}/recompressed/x:{compression}"
    copy(f"oci:{tmp_path}/made:t", there, compression=compression, force_compression=True)
    skopeo_copy(there, f"dir:{tmp_path}/d", "--dest-decompress")
    for diff_id in json.loads(image.blobs[0].data)["rootfs"]["diff_ids"]:
        assert hashlib.sha256((tmp_path / "d" / diff_id[7:]).read_bytes()).hexdigest() == diff_id[7:]
    assert registry.manifest("recompressed/x", compression)["config"]["digest"] == image.blobs[0].digest


def test_reading_by_digest(tmp_path: Path, registry: RegistryServer, copy: Copy) -> None:
    image = make_image()
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", f"docker://{registry.host}/by-digest/x@{image.digest}")
    result = copy(f"docker://{registry.host}/by-digest/x@{image.digest}", f"oci:{tmp_path}/o:t")
    assert result.descriptor.digest == image.digest
    copy(f"docker://{registry.host}/by-digest/x@{image.digest}", "kept:1")
    for name in ("kept:1", "kept", image.digest, image.digest[7:19], image.blobs[0].digest[7:19]):
        if name != "kept":
            assert copy(name, f"dir:{tmp_path}/d").descriptor.digest == image.digest


def test_containers_storage(tmp_path: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tool("skopeo")
    need_root()  # without, skopeo wants a user namespace of its own
    image = make_image([{"a": b"1"}])
    write_layout(tmp_path / "made", t=image)
    name = f"containers-storage:[vfs@{tmp_path}/graph+{tmp_path}/run]localhost/app:1"
    copy(f"oci:{tmp_path}/made:t", name)
    copy(name, f"oci:{tmp_path}/back:t")
    digest = layout_names(tmp_path / "back")["t"]
    check_layout(tmp_path / "back", digest)
    manifest = json.loads((tmp_path / "back/blobs" / digest.replace(":", "/")).read_bytes())
    assert manifest["config"]["digest"] == image.blobs[0].digest
    assert not list(tmp_path.glob("pybuild-*"))


def test_docker_daemon_through_the_docker_tool(
    tmp_path: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A stand-in for the docker command keeps the archive that it is told to load, and saves it again."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "docker"
    script.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        f'load) cp "$5" {tmp_path}/loaded.tar;;\n'
        'save) [ "$5" = app:1 ] || { echo "Error: No such image: $5" >&2; exit 1; }\n'
        f'cp {tmp_path}/loaded.tar "$4";;\n'
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    image = make_image()
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", "docker-daemon:app:1")
    copy("docker-daemon:app:1", f"oci:{tmp_path}/back:t")
    check_layout(tmp_path / "back", layout_names(tmp_path / "back")["t"])
    with pytest.raises(Exception, match="No such image: other"):
        copy("docker-daemon:other", f"oci:{tmp_path}/back:t")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="docker is not installed"):
        copy("docker-daemon:app:1", f"oci:{tmp_path}/back:t")
    assert not list(tmp_path.glob("pybuild-*"))


def test_layouts_share_blobs_with_the_store(tmp_path: Path, store: Store, copy: Copy) -> None:
    image: Image = make_image([random_layer("a", 100_000)])
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", "app:1")
    result = copy("app:1", f"oci:{tmp_path}/out:t")
    assert (result.reused_blobs, result.moved_bytes) == (2, 0)
    path = store.blobs.path(result.descriptor.digest)
    assert path is not None
    layer = image.blobs[1].digest.replace(":", "/")
    assert (tmp_path / "out/blobs" / layer).stat().st_ino == (tmp_path / "store/blobs" / layer).stat().st_ino
    check_layout(tmp_path / "out", image.digest)


def test_the_store_is_read_as_a_layout_but_not_written_as_one(tmp_path: Path, store: Store, copy: Copy) -> None:
    image = make_image()
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", "app:1")
    name = next(n for n in layout_names(tmp_path / "store") if n)
    assert copy(f"oci:{tmp_path}/store:{name}", f"oci:{tmp_path}/out:t").descriptor.digest == image.digest
    with pytest.raises(StoreError, match="own store"):
        copy(f"oci:{tmp_path}/made:t", f"oci:{tmp_path}/store:other")
