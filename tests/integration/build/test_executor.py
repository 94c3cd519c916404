"""kaniko's command lines, run for real."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.oracles import skopeo_inspect
from tests.support.registries import RegistryServer


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base} AS unused\nRUN false\nFROM {busybox_base}\nARG WHO\nRUN echo $WHO > /who\nCOPY file /\n"
    )
    folder = write_context(tmp_path / "context", text, {"file": "content\n"})
    (folder / "Containerfile").rename(folder / "Dockerfile")
    return folder


@pytest.mark.registry
def test_a_pipelines_command_line(pybuild: Pybuild, registry: RegistryServer, context: Path, tmp_path: Path) -> None:
    name = f"{registry.host}/executor/{tmp_path.name.lower()}"
    words = [
        "executor", f"--context=dir://{context}", "--dockerfile=Dockerfile", f"--destination={name}:1",
        f"--destination={name}:2", "--cache=true", f"--cache-repo={name}/steps", "--build-arg=WHO",
        f"--digest-file={tmp_path / 'digest'}", f"--image-name-with-digest-file={tmp_path / 'name'}",
        f"--image-name-tag-with-digest-file={tmp_path / 'tags'}", "--snapshot-mode=redo", "--label=a=b",
        "--insecure",
    ]  # fmt: skip
    result = pybuild.run(*words, env={"WHO": "me"})
    assert "+ pybuild build -t" in result.stderr
    assert "--snapshot-mode has no effect" in result.stderr
    digest = (tmp_path / "digest").read_text()
    assert (tmp_path / "name").read_text() == f"{name}@{digest}\n" * 2
    assert (tmp_path / "tags").read_text() == f"{name}:1@{digest}\n{name}:2@{digest}\n"
    for tag in ("1", "2"):
        found = skopeo_inspect(f"{name}:{tag}")
        assert found["Digest"] == digest
        assert found["Labels"] == {"a": "b"}
    # Another machine takes the steps from the cache.
    other = Pybuild(tmp_path / "other")
    again = other.run(*words, "--no-push-cache", env={"WHO": "me"})
    assert "CACHED" in again.stderr
    assert (tmp_path / "digest").read_text() == digest
    other.run("pull", f"{name}:1")
    assert (other.unpack(f"{name}:1", tmp_path / "tree") / "who").read_text() == "me\n"


def test_a_tar_as_context_and_archives_as_results(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    archive = tmp_path / "context.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(context, ".")
    common = ["executor", "--no-push", "--single-snapshot", "--reproducible", "--build-arg", "WHO=x"]
    pybuild.run(
        *common, "--context", f"tar://{archive}", "--destination", "app:1", "--tar-path", tmp_path / "out.tar",
        "--oci-layout-path", tmp_path / "layout",
    )  # fmt: skip
    with tarfile.open(tmp_path / "out.tar") as tar:
        manifest = json.load(tar.extractfile("manifest.json") or io.BytesIO())
    assert manifest[0]["RepoTags"] == ["app:1"]
    index = json.loads((tmp_path / "layout" / "index.json").read_bytes())
    # The same by way of stdin, in another store.
    other = Pybuild(tmp_path / "other")
    other.run(
        *common, "--context", "tar://stdin", "--oci-layout-path", tmp_path / "second", stdin=archive.read_bytes()
    )  # fmt: skip
    second = json.loads((tmp_path / "second" / "index.json").read_bytes())
    assert second["manifests"][0]["digest"] == index["manifests"][0]["digest"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith("pybuild-executor-")]


def test_what_is_refused(pybuild: Pybuild, context: Path) -> None:
    result = pybuild.run("executor", "--context", "s3://bucket/context.tar.gz", "--no-push", check=False)
    assert result.status == 2
    assert "fetch the tar" in result.stderr
    failed = pybuild.run("executor", "--context", context, "--target", "unused", "--no-push", check=False)
    assert failed.status == 1
