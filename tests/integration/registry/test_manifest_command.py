"""`pybuild manifest`: indexes made of images from several places, changed, and pushed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.registry.commands import CommandLine, cli, put
from tests.support.images import OCI_INDEX, Image, check_layout, layout_names, make_image, make_index
from tests.support.registries import RegistryServer

__all__ = ["cli"]


@pytest.fixture
def images() -> dict[str, Image]:
    return {a: make_image([{"f": a.encode()}], architecture=a) for a in ("amd64", "arm64", "s390x")}


def test_digests_built_elsewhere_are_merged(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer, images: dict[str, Image]
) -> None:
    there = f"docker://{fresh_registry.host}/merge"
    for name, image in images.items():
        put(cli, tmp_path, image, f"{there}/{name}:1")
    members = [f"{there}/{n}@{i.digest}" for n, i in images.items()]
    before = len(fresh_registry.requests_seen())
    digest = cli("manifest", "create", f"{there}/all:1", *members, "--annotation", "a=b", "-q").text
    # Mounted from the repositories where they were built: no blob was uploaded.
    assert not [
        r for r in fresh_registry.requests_seen()[before:] if r.startswith(("PATCH", "PUT /v2/merge/all/blobs"))
    ]
    document = fresh_registry.manifest("merge/all", "1")
    assert document["annotations"] == {"a": "b"}
    assert [(e["digest"], e["platform"]["architecture"]) for e in document["manifests"]] == [
        (i.digest, n) for n, i in images.items()
    ]
    raw = cli("manifest", "get", f"{there}/all:1").out
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == digest
    assert json.loads(raw) == document
    told = cli("inspect", f"{there}/all:1", "--platform", "linux/arm64").json()
    assert (told["Digest"], told["Index"]["Digest"]) == (images["arm64"].digest, digest)
    assert told["Index"]["Platforms"] == [f"linux/{name}" for name in images]
    assert cli("inspect", f"{there}/arm64:1").json()["Index"] is None
    narrowed = cli("manifest", "get", f"{there}/all:1", "--platform", "linux/arm64").out
    assert narrowed == images["arm64"].top.data


def test_an_index_in_a_registry_grows_and_shrinks(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer, images: dict[str, Image]
) -> None:
    there = f"docker://{fresh_registry.host}/grow:1"
    index = make_index({n: images[n] for n in ("amd64", "arm64")})
    put(cli, tmp_path, index, there)
    put(cli, tmp_path, images["s390x"], "extra:1")
    cli("manifest", "add", there, "storage:extra:1", "--variant", "z15", "--os-features", "x", "--annotation", "k=v")
    added = fresh_registry.manifest("grow", "1")["manifests"][2]
    assert added["platform"] == {"os": "linux", "architecture": "s390x", "variant": "z15", "os.features": ["x"]}
    assert added["annotations"] == {"k": "v"}
    cli("manifest", "annotate", there, "linux/arm64", "--variant", "v9", "--os-version", "7")
    assert fresh_registry.manifest("grow", "1")["manifests"][1]["platform"] == {
        "os": "linux", "architecture": "arm64", "variant": "v9", "os.version": "7",
    }  # fmt: skip
    # A platform as users write it names an entry that says more.
    cli("manifest", "annotate", there, "linux/arm64/v9", "--os-version", "6")
    assert fresh_registry.manifest("grow", "1")["manifests"][1]["platform"]["os.version"] == "6"
    cli("manifest", "annotate", there, "--index", "--annotation", "whole=yes")
    assert fresh_registry.manifest("grow", "1")["annotations"] == {"whole": "yes"}
    put(cli, tmp_path, images["arm64"], f"docker://{fresh_registry.host}/arm:1")
    # An image stands for its entry, in a registry or in the store; one that has none is told as such.
    cli("manifest", "annotate", there, f"docker://{fresh_registry.host}/arm:1", "--os-version", "8")
    cli("manifest", "annotate", there, "extra:1", "--variant", "z16")
    changed = [e["platform"] for e in fresh_registry.manifest("grow", "1")["manifests"]]
    assert (changed[1]["os.version"], changed[2]["variant"]) == ("8", "z16")
    put(cli, tmp_path, make_image(), "other:1")
    for absent in ("other:1", "nothing:1", f"docker://{fresh_registry.host}/nothing:1"):
        cli("manifest", "annotate", there, absent, "--variant", "x", status=None if ":/" in absent else 1)
    assert [e["platform"] for e in fresh_registry.manifest("grow", "1")["manifests"]] == changed
    cli("manifest", "remove", there, images["amd64"].digest, images["s390x"].digest[7:20])
    assert [e["digest"] for e in fresh_registry.manifest("grow", "1")["manifests"]] == [images["arm64"].digest]
    missing = cli("manifest", "remove", there, "linux/ppc64le", status=1)
    assert "no entry 'linux/ppc64le'" in missing.err
    assert "it has linux(8)/arm64/v9" in missing.err


def test_a_list_of_the_store_is_pushed_whole(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer, images: dict[str, Image]
) -> None:
    put(cli, tmp_path, images["amd64"], "a:1")
    put(cli, tmp_path, images["arm64"], f"docker://{fresh_registry.host}/b:1")
    cli("manifest", "create", "list:1", "a:1")
    cli("manifest", "create", "list:1", "a:1", status=1)
    cli("manifest", "create", "--amend", "list:1", f"docker://{fresh_registry.host}/b:1")
    assert cli("manifest", "exists", "list:1").out == b""
    digest = cli("manifest", "push", "list:1", f"docker://{fresh_registry.host}/list:2", "--digestfile", tmp_path / "d")
    assert (tmp_path / "d").read_text() == digest.text
    found = fresh_registry.manifest("list", "2")
    assert [e["platform"]["architecture"] for e in found["manifests"]] == ["amd64", "arm64"]
    cli("manifest", "push", "--rm", "list:1", f"oci:{tmp_path}/out:t")
    check_layout(tmp_path / "out", layout_names(tmp_path / "out")["t"])
    cli("manifest", "exists", "list:1", status=1)
    cli("manifest", "exists", f"docker://{fresh_registry.host}/list:9", status=1)


def test_platforms_are_filtered_with_their_attestations(
    cli: CommandLine, tmp_path: Path, images: dict[str, Image]
) -> None:
    index = make_index(images)
    document = index.document()
    attestation = make_image([{"a": b"1"}], architecture="unknown")
    document["manifests"].append(
        attestation.top.descriptor(
            platform={"os": "unknown", "architecture": "unknown"},
            annotations={"vnd.docker.reference.digest": images["arm64"].digest},
        )
    )
    document["keep"] = {"me": 1}
    top = index.top._replace(data=json.dumps(document).encode())
    whole = Image(top, (*index.blobs, attestation.top, *attestation.blobs))
    put(cli, tmp_path, whole, f"oci:{tmp_path}/whole:t")
    cli("manifest", "create", f"oci:{tmp_path}/some:t", f"oci:{tmp_path}/whole:t", "--platform", "linux/arm64")
    some = json.loads(cli("manifest", "get", f"oci:{tmp_path}/some:t").out)
    assert [e["digest"] for e in some["manifests"]] == [images["arm64"].digest, attestation.digest]
    cli("copy", f"oci:{tmp_path}/whole:t", f"oci:{tmp_path}/two:t", "--platform", "linux/amd64,linux/s390x")
    two = json.loads(cli("manifest", "get", f"oci:{tmp_path}/two:t").out)
    assert [e["digest"] for e in two["manifests"]] == [images["amd64"].digest, images["s390x"].digest]
    # Fields that nobody knows survive; an entry takes its attestation with it.
    cli("manifest", "remove", f"oci:{tmp_path}/whole:t", "linux/arm64")
    left = json.loads(cli("manifest", "get", f"oci:{tmp_path}/whole:t").out)
    assert left["keep"] == {"me": 1}
    assert attestation.digest not in [e["digest"] for e in left["manifests"]]


def test_nested_indexes_and_artifacts(cli: CommandLine, tmp_path: Path, images: dict[str, Image]) -> None:
    inner = make_index({"arm64": images["arm64"]})
    put(cli, tmp_path, inner, f"oci:{tmp_path}/l:inner")
    cli("manifest", "create", f"oci:{tmp_path}/l:outer", f"oci:{tmp_path}/l:inner", "--nested")
    outer = json.loads(cli("manifest", "get", f"oci:{tmp_path}/l:outer").out)
    assert [(e["digest"], e["mediaType"]) for e in outer["manifests"]] == [(inner.digest, OCI_INDEX)]
    check_layout(tmp_path / "l", layout_names(tmp_path / "l")["outer"])


def test_docker_lists(cli: CommandLine, tmp_path: Path) -> None:
    image = make_image(docker=True)
    put(cli, tmp_path, image, f"dir:{tmp_path}/d")
    cli("manifest", "create", "--format", "docker", "dl:1", f"dir:{tmp_path}/d")
    document = json.loads(cli("manifest", "inspect", "dl:1").out)
    assert document["mediaType"] == "application/vnd.docker.distribution.manifest.list.v2+json"
    assert [e["digest"] for e in document["manifests"]] == [image.digest]
    refused = cli("manifest", "annotate", "dl:1", "--index", "--annotation", "a=b", status=1)
    assert "has no annotations" in refused.err


def test_put_and_get_are_inverse(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer, images: dict[str, Image]
) -> None:
    there = f"docker://{fresh_registry.host}/put"
    put(cli, tmp_path, images["amd64"], f"{there}:1")
    raw = cli("manifest", "get", f"{there}:1").out
    assert cli("manifest", "put", f"{there}:2", stdin=raw).text == images["amd64"].digest
    (tmp_path / "m.json").write_bytes(raw)
    cli("manifest", "put", f"{there}:3", tmp_path / "m.json")
    assert cli("tags", "ls", f"{there}").text.split() == ["1", "2", "3"]
    broken = cli("manifest", "put", f"{there}:4", stdin=b"{}", status=1)
    assert "schemaVersion" in broken.err


def test_flags_of_other_actions_are_refused(cli: CommandLine) -> None:
    refused = cli("manifest", "get", "x:1", "--amend", status=2)
    assert "--amend is not a flag of `manifest get`" in refused.err
    assert "wrong number of names" in cli("manifest", "add", "x:1", status=2).err


def test_skopeo_reads_what_was_merged(
    cli: CommandLine, tmp_path: Path, fresh_registry: RegistryServer, images: dict[str, Image]
) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    there = f"docker://{fresh_registry.host}/merged:1"
    for name, image in images.items():
        put(cli, tmp_path, image, f"storage:part-{name}:1")
    cli("manifest", "create", there, *(f"part-{name}:1" for name in images))
    target = f"oci:{tmp_path}/skopeo:t"
    subprocess.run([skopeo, "copy", "--all", "--src-tls-verify=false", there, target], check=True, capture_output=True)
    check_layout(tmp_path / "skopeo", layout_names(tmp_path / "skopeo")["t"])
    assert layout_names(tmp_path / "skopeo")["t"] == cli("digest", there).text
