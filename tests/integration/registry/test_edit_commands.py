"""`mutate`, `append`, `rebase`, `flatten`: images changed in a registry, with little moved and nothing lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.registry.commands import CommandLine, cli, put
from tests.support.images import Blob, Image, make_image, make_index, tar_of, write_layout
from tests.support.machine import need_mounts
from tests.support.registries import RegistryServer

__all__ = ["cli"]


def with_config(image: Image, change: dict[str, Any], **top: Any) -> Image:
    """The image with other execution parameters (and other top-level fields of the config)."""
    old = image.document()["config"]
    config = json.loads(next(b for b in image.blobs if b.digest == old["digest"]).data)
    config["config"] = {**config["config"], **change}
    config |= top
    blob = Blob(json.dumps(config).encode(), old["mediaType"])
    document = {**image.document(), "config": blob.descriptor()}
    manifest = Blob(json.dumps(document).encode(), image.top.media_type)
    return Image(manifest, (blob, *(b for b in image.blobs if b.digest != old["digest"])))


def stacked(base: Image, *layers: dict[str, bytes], change: dict[str, Any] | None = None) -> Image:
    """An image built upon another."""
    own = make_image(layers)
    mine, below = own.document(), base.document()
    configs = [
        json.loads(next(b for b in i.blobs if b.digest == i.document()["config"]["digest"]).data) for i in (base, own)
    ]
    config = configs[0] | {"history": configs[0]["history"] + configs[1]["history"]}
    config["rootfs"] = {
        "type": "layers",
        "diff_ids": configs[0]["rootfs"]["diff_ids"] + configs[1]["rootfs"]["diff_ids"],
    }
    config["config"] = {**configs[0]["config"], **(change or {})}
    blob = Blob(json.dumps(config).encode(), mine["config"]["mediaType"])
    document = {**mine, "config": blob.descriptor(), "layers": below["layers"] + mine["layers"], "x-unknown": [1]}
    parts = [b for i in (base, own) for b in i.blobs if b.digest != i.document()["config"]["digest"]]
    return Image(Blob(json.dumps(document).encode(), own.top.media_type), (blob, *parts))


def test_mutate_changes_what_it_is_told(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    image = with_config(
        make_image(annotations={"old": "1", "gone": "2"}), {"Env": ["A=b", "C=d"], "Labels": {"x": "y"}}
    )
    there = f"docker://{fresh_registry.host}/mutate"
    put(cli, tmp_path, image, f"{there}:1")
    before = len(fresh_registry.requests_seen())
    cli(
        "mutate", f"{there}:1", "-t", f"{there}:2", "-a", "new=3", "--unsetannotation", "gone", "-l", "k=v",
        "--unsetlabel", "x", "-e", "E=f", "--unsetenv", "C", "--entrypoint", '["/bin/a","b c"]', "--user", "5:6",
        "--workdir", "/w", "--exposed-ports", "80,53/udp", "--volume", "/v", "--stop-signal", "SIGINT",
        "--author", "me", "--timestamp", "86400", "--set-platform", "linux/arm/v7",
    )  # fmt: skip
    requests = fresh_registry.requests_seen()[before:]
    assert len([r for r in requests if r.startswith("PUT") and "/blobs/" in r]) == 1, "only the config is new"
    config = fresh_registry.config("mutate", "2")
    assert config["config"] == {
        "Env": ["A=b", "E=f"], "Labels": {"k": "v"}, "Entrypoint": ["/bin/a", "b c"], "User": "5:6", "WorkingDir": "/w",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Volumes": {"/v": {}}, "StopSignal": "SIGINT",
    }  # fmt: skip
    assert (config["architecture"], config["variant"], config["author"]) == ("arm", "v7", "me")
    assert config["created"] == "1970-01-02T00:00:00Z"
    document = fresh_registry.manifest("mutate", "2")
    assert document["annotations"] == {"old": "1", "new": "3"}
    assert document["layers"] == image.document()["layers"]
    # Without a target the result is there by its digest; the tag is not moved.
    digest = cli("mutate", f"{there}:1", "--cmd", "sh -c 'a b'").text
    assert fresh_registry.config("mutate", digest)["config"]["Cmd"] == ["sh", "-c", "a b"]
    assert cli("digest", f"{there}:1").text == image.digest
    assert cli("mutate", f"{there}:1").text == image.digest, "nothing changed"


def test_mutate_rewrites_layers(cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer) -> None:
    image = make_image([{"keep": b"1"}, {"etc/secret": b"2", "etc/kept": b"3"}])
    there = f"docker://{fresh_registry.host}/rewritten"
    put(cli, tmp_path, image, f"{there}:1")
    flags = ("--timestamp", "0", "--rewrite-timestamp", "--strip-file", "/etc/secret")
    cli("mutate", f"{there}:1", "-t", f"{there}:2", *flags)
    cli("validate", f"{there}:2")
    cli("unpack", f"{there}:2", str(tmp_path / "tree"))
    assert sorted(p.name for p in (tmp_path / "tree").rglob("*")) == ["etc", "keep", "kept"]
    assert (tmp_path / "tree/keep").stat().st_mtime == 0
    assert fresh_registry.config("rewritten", "2")["created"] == "1970-01-01T00:00:00Z"
    cli("mutate", f"{there}:1", "--rewrite-timestamp", status=2)


def test_mutate_edits_every_image_of_an_index(cli: CommandLine, tmp_path: Path) -> None:
    index = make_index({a: make_image([{"f": a.encode()}], architecture=a) for a in ("amd64", "arm64")})
    put(cli, tmp_path, index, f"oci:{tmp_path}/l:t")
    cli("mutate", f"oci:{tmp_path}/l:t", "-t", f"oci:{tmp_path}/l:u", "-l", "a=b")
    for arch in ("amd64", "arm64"):
        found = cli("inspect", f"oci:{tmp_path}/l:u", "--platform", f"linux/{arch}", "--config").json()
        assert found["config"]["Labels"] == {"a": "b"}
        assert found["architecture"] == arch
    cli("mutate", f"oci:{tmp_path}/l:t", "-t", f"oci:{tmp_path}/l:v", "-l", "a=b", "--platform", "linux/arm64")
    assert "layers" in json.loads(cli("manifest", "get", f"oci:{tmp_path}/l:v").out)
    assert cli("mutate", f"oci:{tmp_path}/l:t", "-l", "a=b", status=2).err.startswith("error: where should")


@pytest.mark.parametrize("form", ["tar", "gz", "xz", "directory", "stdin"])
def test_append_takes_layers_of_any_kind(cli: CommandLine, tmp_path: Path, form: str) -> None:
    plain = tar_of({"new/file": b"content"})
    path = tmp_path / "layer"
    stdin = None
    if form == "directory":
        (path / "new").mkdir(parents=True)
        (path / "new/file").write_bytes(b"content")
    elif form == "stdin":
        stdin = plain
    elif form == "xz":
        import lzma

        path.write_bytes(lzma.compress(plain))
    else:
        path.write_bytes(gzip.compress(plain) if form == "gz" else plain)
    base = make_image([{"base": b"1"}])
    put(cli, tmp_path, base, f"oci:{tmp_path}/l:base")
    cli("append", f"oci:{tmp_path}/l:base", "-f", "-" if stdin else path, "-t", f"oci:{tmp_path}/l:new", stdin=stdin)
    document = json.loads(cli("manifest", "get", f"oci:{tmp_path}/l:new").out)
    config = cli("inspect", f"oci:{tmp_path}/l:new", "--config").json()
    assert document["layers"][0] == base.document()["layers"][0]
    blob = (tmp_path / "l/blobs" / document["layers"][1]["digest"].replace(":", "/")).read_bytes()
    unpacked = gzip.decompress(blob)
    assert f"sha256:{hashlib.sha256(unpacked).hexdigest()}" == config["rootfs"]["diff_ids"][1]
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
        member = tar.extractfile("new/file")
        assert member is not None
        assert member.read() == b"content"
    if form == "gz":
        assert blob == path.read_bytes(), "a compressed layer is taken byte for byte"
    assert len(config["history"]) == 2
    assert cli("validate", f"oci:{tmp_path}/l:new").text.endswith("all is right")


def test_append_to_nothing_and_what_is_no_layer(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a tar" * 200)
    refused = cli("append", "-f", tmp_path / "x", "-t", f"oci:{tmp_path}/l:t", status=1)
    assert "is not a tar archive" in refused.err
    (tmp_path / "y.tar").write_bytes(tar_of({"a": b"b"}))
    cli("append", "-f", tmp_path / "y.tar", "-t", f"oci:{tmp_path}/l:t", "--platform", "linux/arm64")
    assert (
        cli("inspect", f"oci:{tmp_path}/l:t", "--config", "--platform", "linux/arm64").json()["architecture"] == "arm64"
    )
    docker = make_image([{"f": b"1"}], docker=True)
    layout = write_layout(tmp_path / "docker", t=docker)
    cli("append", f"oci:{layout}:t", "-f", tmp_path / "y.tar", "-t", f"dir:{tmp_path}/dir")
    document = json.loads((tmp_path / "dir/manifest.json").read_bytes())
    assert [e["mediaType"] for e in document["layers"]] == ["application/vnd.docker.image.rootfs.diff.tar.gzip"] * 2


def test_rebase_follows_the_new_base_and_keeps_the_own(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer
) -> None:
    old = with_config(make_image([{"os": b"1"}, {"lib": b"1"}]), {"Env": ["PATH=/bin", "V=1", "GONE=1"], "User": "a"})
    new = with_config(make_image([{"os": b"2"}]), {"Env": ["PATH=/bin:/usr/bin", "V=2", "ADDED=1"], "User": "b"})
    app = stacked(old, {"app": b"x"}, change={"Env": ["PATH=/bin", "V=mine", "GONE=1", "OWN=1"], "Cmd": ["/app"]})
    host = f"docker://{fresh_registry.host}"
    for name, image in (("base:1", old), ("base:2", new), ("app:1", app)):
        put(cli, tmp_path, image, f"{host}/{name}")
    cli(
        "rebase", f"{host}/app:1", "--old-base", f"{host}/base:1", "--new-base", f"{host}/base:2", "-t", f"{host}/app:2"
    )
    document, config = fresh_registry.manifest("app", "2"), fresh_registry.config("app", "2")
    assert [e["digest"] for e in document["layers"]] == [
        new.document()["layers"][0]["digest"], app.document()["layers"][2]["digest"],
    ]  # fmt: skip
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == 2
    assert config["config"]["Env"] == ["PATH=/bin:/usr/bin", "V=mine", "OWN=1", "ADDED=1"]
    assert (config["config"]["User"], config["config"]["Cmd"]) == ("b", ["/app"])
    assert document["x-unknown"] == [1]
    assert document["annotations"] == {
        "org.opencontainers.image.base.name": f"{fresh_registry.host}/base:2",
        "org.opencontainers.image.base.digest": new.digest,
    }
    assert cli("validate", f"{host}/app:2").text.endswith("all is right")
    # The annotations that it left are enough for the next time.
    assert "is still" in cli("rebase", "--check", f"{host}/app:2").text
    cli("copy", f"{host}/base:1", f"{host}/base:2")
    assert cli("rebase", "--check", "--json", f"{host}/app:2", status=1).json()["now"] == old.digest
    again = cli("rebase", f"{host}/app:2", "-t", f"{host}/app:3").text
    assert fresh_registry.manifest("app", again)["layers"] == app.document()["layers"]
    stranger = make_image()
    put(cli, tmp_path, stranger, f"{host}/stranger:1")
    wrong = cli(
        "rebase", f"{host}/stranger:1", "--old-base", f"{host}/base:1", "--new-base", f"{host}/base:2", status=1
    )
    assert "is not built upon" in wrong.err


def test_flatten_leaves_what_the_layers_come_to(cli: CommandLine, tmp_path: Path) -> None:
    need_mounts()
    image = make_image([{"a": b"1", "d/b": b"1"}, {"a": b"2", "d/.wh.b": b"", "c": b"3"}])
    put(cli, tmp_path, image, f"oci:{tmp_path}/l:t")
    cli("flatten", f"oci:{tmp_path}/l:t", "-t", f"oci:{tmp_path}/l:flat", "--timestamp", "0")
    document = json.loads(cli("manifest", "get", f"oci:{tmp_path}/l:flat").out)
    (layer,) = document["layers"]
    with tarfile.open(tmp_path / "l/blobs" / layer["digest"].replace(":", "/")) as tar:
        found = {m.name.rstrip("/"): m for m in tar}
        assert sorted(found) == ["a", "c", "d"]
        data = tar.extractfile("a")
        assert data is not None
        assert data.read() == b"2"
        assert all(m.mtime == 0 for m in found.values())
    assert cli("validate", f"oci:{tmp_path}/l:flat").text.endswith("all is right")
    config = cli("inspect", f"oci:{tmp_path}/l:flat", "--config").json()
    assert config["config"]["Env"] == ["A=b"]
    assert len(config["history"]) == 1
