"""Artifacts through a real registry: push, pull, attach, the tree, and hostile ones."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.errors import DigestMismatch, LayerError
from layers.oci import MEDIA_OCI_EMPTY, MEDIA_OCI_LAYER_GZIP, Descriptor, Manifest
from registry.artifacts import (
    TITLE,
    ArtifactError,
    ArtifactFile,
    OrasRegistry,
    attach,
    pull_artifact,
    push_artifact,
    tree,
)
from registry.client import RegistryClient
from registry.errors import NotFoundError
from registry.reference import Reference
from tests.integration.registry.servers import Fault, FaultProxy, RunningRegistry, docker_registry, needs_registry

pytestmark = [needs_registry, pytest.mark.registry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("artifacts")) as running:
        yield running


@pytest.fixture
def api(tmp_path: Path) -> Iterator[RegistryClient]:
    (tmp_path / "r.conf").touch()
    with RegistryClient(
        environ={"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "r.conf")}
    ) as made:
        yield made


def test_push_and_pull(
    plain: RunningRegistry, api: RegistryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "in/d:ir/sub").mkdir(parents=True)
    (tmp_path / "in/d:ir/sub/deep").write_text("deep")
    (tmp_path / "in/a.txt").write_text("hello")
    (tmp_path / "in/c:olon").write_text("colon")
    ref = Reference.parse(f"{plain.host}/art/files:v1")
    files = [
        ArtifactFile(tmp_path / "in/a.txt", "text/plain"),
        ArtifactFile(tmp_path / "in/d:ir"),
        ArtifactFile(tmp_path / "in/c:olon", title="named/else where"),
    ]
    pushed = push_artifact(api, ref, files, artifact_type="application/x-notes", annotations={"b": "2", "a": "1"})
    again = push_artifact(api, ref, files, artifact_type="application/x-notes", annotations={"a": "1", "b": "2"})
    assert pushed == again
    manifest = Manifest.parse(api.get_manifest(ref).raw)
    assert manifest.descriptor.digest == pushed.digest
    assert (manifest.artifact_type, manifest.config.media_type) == ("application/x-notes", MEDIA_OCI_EMPTY)
    assert dict(manifest.annotations) == {"a": "1", "b": "2"}
    assert [layer.media_type for layer in manifest.layers] == [
        "text/plain",
        MEDIA_OCI_LAYER_GZIP,
        "application/octet-stream",
    ]
    out = tmp_path / "out"
    written = pull_artifact(api, ref, out)
    assert written == [out / "a.txt", out / "d:ir", out / "named/else where"]
    assert (out / "a.txt").read_text() == "hello" and (out / "d:ir/sub/deep").read_text() == "deep"
    assert (out / "named/else where").read_text() == "colon"
    assert sorted(p.name for p in out.iterdir()) == ["a.txt", "d:ir", "named"]
    (out / "a.txt").write_text("mine")
    assert pull_artifact(api, ref, out, media_types=["text/plain"], overwrite=False) == []
    assert (out / "a.txt").read_text() == "mine"
    pull_artifact(api, ref, out, media_types=["text/plain"])
    assert (out / "a.txt").read_text() == "hello"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_attach_and_tree(plain: RunningRegistry, api: RegistryClient, tmp_path: Path) -> None:
    (tmp_path / "sbom.json").write_text("{}")
    ref = Reference.parse(f"{plain.host}/art/subject:v1")
    with pytest.raises(NotFoundError, match="no such image"):
        attach(api, ref, [ArtifactFile(tmp_path / "sbom.json")])
    subject = push_artifact(api, ref, [ArtifactFile(tmp_path / "sbom.json")])
    sbom = attach(api, ref, [ArtifactFile(tmp_path / "sbom.json")], artifact_type="application/x-sbom")
    signature = attach(
        api,
        ref.with_digest(sbom.digest),
        [ArtifactFile(tmp_path / "sbom.json")],
        artifact_type="application/x-signature",
    )
    note = attach(api, ref, [ArtifactFile(tmp_path / "sbom.json")], artifact_type="application/x-note")
    assert [d.digest for d in api.referrers(ref, subject.digest)] == [sbom.digest, note.digest]
    assert [d.artifact_type for d in api.referrers(ref, subject.digest, "application/x-sbom")] == ["application/x-sbom"]
    top = tree(api, ref)
    assert [(n.descriptor.digest, len(n.referrers)) for n in top.referrers] == [(sbom.digest, 1), (note.digest, 0)]
    assert top.referrers[0].referrers[0].descriptor.digest == signature.digest
    assert Manifest.parse(api.get_manifest(ref.with_digest(sbom.digest)).raw).subject is not None
    # Nothing was tagged but the subject and the lists.
    assert sum(1 for t in api.list_tags(ref) if not t.startswith("sha256-")) == 1


def test_code_written_for_oras_runs_on_our_transport(
    plain: RunningRegistry, api: RegistryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.txt").write_text("from oras code")
    registry = OrasRegistry(api)
    target = f"{plain.host}/art/oras:v1"
    response = registry.push(target, files=["f.txt:text/plain"], quiet=True)
    assert response.status_code == 201
    assert registry.get_manifest(target)["layers"][0]["annotations"][TITLE] == "f.txt"
    assert registry.get_tags(target) == ["v1"]
    assert [Path(p).read_text() for p in registry.pull(target, outdir=str(tmp_path / "o"))] == ["from oras code"]
    digest = registry.get_manifest(target)["layers"][0]["digest"]
    assert Path(registry.download_blob(target, digest, str(tmp_path / "x/y"))).read_text() == "from oras code"
    assert registry.get_blob(registry.get_container(target), digest).content == b"from oras code"
    assert registry.delete_tag(registry.get_container(target), "v1")
    with pytest.raises(NotFoundError):
        registry.get_manifest(target)


def hostile(api: RegistryClient, ref: Reference, data: bytes, media_type: str, title: str) -> None:
    config = api.upload_blob(ref, lambda o: io.BytesIO(b"{}"[o:]), Descriptor.of(b"{}", MEDIA_OCI_EMPTY))
    described = Descriptor.of(data, media_type)
    api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described)
    layer = Descriptor(media_type=media_type, digest=described.digest, size_bytes=len(data), annotations={TITLE: title})
    manifest = Manifest.build(config=config, layers=[layer])
    api.put_manifest(ref, manifest.raw, manifest.media_type)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("title", ["../escaped", "/tmp/escaped", "a/../../escaped"])
def test_titles_cannot_escape(plain: RunningRegistry, api: RegistryClient, tmp_path: Path, title: str) -> None:
    ref = Reference.parse(f"{plain.host}/art/hostile:1")
    hostile(api, ref, b"x", "text/plain", title)
    with pytest.raises(ArtifactError, match="plain relative path"):
        pull_artifact(api, ref, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


def test_links_in_the_way_are_not_followed(plain: RunningRegistry, api: RegistryClient, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path / "outside")
    (tmp_path / "out/file").symlink_to(tmp_path / "outside/file")
    ref = Reference.parse(f"{plain.host}/art/hostile:2")
    hostile(api, ref, b"x", "text/plain", "link/f")
    with pytest.raises(ArtifactError, match="not a directory"):
        pull_artifact(api, ref, tmp_path / "out")
    hostile(api, ref, b"x", "text/plain", "file")
    pull_artifact(api, ref, tmp_path / "out")
    assert not (tmp_path / "out/file").is_symlink() and list((tmp_path / "outside").iterdir()) == []


def test_archives_cannot_escape(plain: RunningRegistry, api: RegistryClient, tmp_path: Path) -> None:
    link = tarfile.TarInfo("dir/link")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    ref = Reference.parse(f"{plain.host}/art/hostile:3")
    for members in (
        [(tarfile.TarInfo("../escaped"), b"x")],
        [(tarfile.TarInfo("/escaped-root"), b"x")],
        [(link, b""), (tarfile.TarInfo("dir/link/escaped"), b"x")],
    ):
        hostile(api, ref, archive(*members), MEDIA_OCI_LAYER_GZIP, "dir")
        out = tmp_path / "out"
        try:
            pull_artifact(api, ref, out)
        except LayerError:
            pass
        assert not (tmp_path / "escaped").exists() and not Path("/escaped-root").exists()


def test_wrong_bytes_leave_no_file(plain: RunningRegistry, api: RegistryClient, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    ref = Reference.parse(f"{plain.host}/art/torn:1")
    push_artifact(api, ref, [ArtifactFile(tmp_path / "f", "text/plain")])
    with (
        FaultProxy(
            plain.host, lambda e: Fault(corrupt_at=5) if e.method == "GET" and "/blobs/" in e.path else None
        ) as proxy,
        pytest.raises(DigestMismatch),
    ):
        pull_artifact(api, Reference.parse(f"{proxy.host}/art/torn:1"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
