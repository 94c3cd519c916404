"""Mirroring between real registries and into directories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.client import RegistryClient
from registry.copy import copy_location
from registry.hosts import RegistryOptions
from registry.sync import SyncReport, sync
from registry.syncfile import parse_sync
from registry.transport import TransportContext, parse_location
from tests.integration.registry.commands import CommandLine, cli
from tests.support.images import Image, check_layout, layout_names, make_image, make_index, write_layout
from tests.support.registries import RegistryServer

__all__ = ["cli"]


@pytest.fixture
def context(tmp_path: Path) -> Iterator[TransportContext]:
    with RegistryClient(RegistryOptions(tls_verify=False), environ={}) as client:
        yield TransportContext(client=lambda: client, scratch_dir=tmp_path)


class Mirror:
    """A source repository with some tags, and a way to mirror it."""

    def __init__(self, context: TransportContext, registry: RegistryServer, layout: Path) -> None:
        self.context = context
        self.registry = registry
        self.layout = layout
        self.images: dict[str, Image] = {}

    def put(self, repository: str, **tags: Image) -> None:
        write_layout(self.layout, **tags)
        for tag, image in tags.items():
            copy_location(
                parse_location(f"oci:{self.layout}:{tag}"),
                parse_location(f"docker://{self.registry.host}/{repository}:{tag.replace('_', '.')}"),
                self.context,
            )
            self.images[tag] = image

    def run(self, *entries: Any, **more: Any) -> SyncReport:
        config = parse_sync({"images": list(entries)})
        return sync(config, lambda _: self.context, self.context, **more)


@pytest.fixture
def mirror(tmp_path: Path, context: TransportContext, fresh_registry: RegistryServer) -> Mirror:
    made = Mirror(context, fresh_registry, tmp_path / "made")
    made.put("src/app", v1_0=make_image(), v1_1=make_image(), v2_0_rc=make_image(), other=make_image())
    return made


def tags(registry: RegistryServer, repository: str) -> list[str]:
    status, _, body = registry.request("GET", f"/v2/{repository}/tags/list")
    return sorted(json.loads(body)["tags"] or []) if status == 200 else []


def test_to_a_registry(mirror: Mirror) -> None:
    host = mirror.registry.host
    entry = {"source": f"{host}/src/app", "tags": ["v*"], "exclude": ["*.rc"]}
    dry = mirror.run(entry, destination=f"{host}/mirror", dry_run=True)
    assert dry.planned == tuple(
        f"docker://{host}/src/app:{t} -> docker://{host}/mirror/src/app:{t}" for t in ("v1.0", "v1.1")
    )
    assert tags(mirror.registry, "mirror/src/app") == []
    report = mirror.run(entry, destination=f"{host}/mirror")
    assert report.copied == tuple(f"docker://{host}/mirror/src/app:{t}" for t in ("v1.0", "v1.1"))
    assert (report.unchanged, report.failures) == ((), ())
    assert mirror.registry.manifest("mirror/src/app", "v1.1") == mirror.images["v1_1"].document()
    again = mirror.run(entry, destination=f"{host}/mirror")
    assert (again.copied, len(again.unchanged), again.moved_bytes) == ((), 2, 0)


def test_deletion_follows_the_source(mirror: Mirror) -> None:
    host = mirror.registry.host
    entry = {"source": f"{host}/src/app", "tags": ["v1.*"], "target": f"{host}/copy"}
    mirror.put("copy", stale=make_image(), v0_9=make_image())
    # `alias` has the digest of a tag that stays, which a registry that deletes by digest alone must not lose.
    mirror.put("copy", alias=mirror.images["v1_0"])
    signature = f"sha256-{'a' * 64}.sig"
    mirror.put("copy", **{signature: make_image()})
    assert mirror.run(entry, delete=True, dry_run=True).planned[-3:] == tuple(
        f"delete docker://{host}/copy:{t}" for t in ("alias", "stale", "v0.9")
    )
    report = mirror.run(entry, delete=True)
    assert report.failures == ()
    assert report.deleted == tuple(f"docker://{host}/copy:{t}" for t in ("alias", "stale", "v0.9"))
    assert tags(mirror.registry, "copy") == [signature, "v1.0", "v1.1"]
    assert mirror.registry.manifest("copy", "v1.0") == mirror.images["v1_0"].document()


def test_nothing_is_deleted_when_the_source_is_empty_or_fails(mirror: Mirror) -> None:
    host = mirror.registry.host
    mirror.put("copy", mine=make_image())
    for source in (f"{host}/none", f"{host}/src/app"):
        report = mirror.run({"source": source, "tags": ["zzz*"], "target": f"{host}/copy"}, delete=True)
        assert report.deleted == ()
        assert len(report.failures) == 1
    assert tags(mirror.registry, "copy") == ["mine"]


def test_one_failure_does_not_stop_the_others(mirror: Mirror) -> None:
    host = mirror.registry.host
    report = mirror.run(
        {"source": f"{host}/src/app", "tags": ["v1.0", "missing"], "target": f"{host}/copy"},
        {"source": f"{host}/src/app", "tags": ["other"], "target": f"{host}/copy"},
        delete=True,
    )
    assert [f.what for f in report.failures] == [f"docker://{host}/src/app:missing"]
    assert report.deleted == ()
    assert tags(mirror.registry, "copy") == ["other", "v1.0"]


def test_entries_of_one_target_are_pruned_together(mirror: Mirror) -> None:
    host = mirror.registry.host
    mirror.put("copy", stale=make_image())
    report = mirror.run(
        {"source": f"{host}/src/app", "tags": ["v1.0"], "target": f"{host}/copy", "delete": True},
        {"source": f"{host}/src/app", "tags": ["other"], "target": f"{host}/copy"},
    )
    assert report.deleted == (f"docker://{host}/copy:stale",)
    assert tags(mirror.registry, "copy") == ["other", "v1.0"]


@pytest.mark.parametrize("scoped", [False, True])
def test_to_layouts(mirror: Mirror, tmp_path: Path, scoped: bool) -> None:
    host = mirror.registry.host
    config = parse_sync({"images": [{"source": f"{host}/src/app", "tags": ["v1.*"]}], "scoped": scoped})
    sync(config, lambda _: mirror.context, mirror.context, destination=f"oci:{tmp_path}/out")
    path = tmp_path / "out" / (host.replace(":", "_") if scoped else "") / "src/app"
    assert layout_names(path) == {"v1.0": mirror.images["v1_0"].digest, "v1.1": mirror.images["v1_1"].digest}
    for digest in layout_names(path).values():
        check_layout(path, digest)


def test_to_directories_and_deletion_there(mirror: Mirror, tmp_path: Path) -> None:
    host = mirror.registry.host
    for kind in ("oci", "dir"):
        entry = {"source": f"{host}/src/app", "target": f"{kind}:{tmp_path}/{kind}"}
        assert len(mirror.run(entry).copied) == 4
        (tmp_path / kind / "notes").mkdir()
        report = mirror.run(entry | {"tags": ["v1.0"]}, delete=True)
        assert [d.rpartition("/" if kind == "dir" else ":")[2] for d in report.deleted] == ["other", "v1.1", "v2.0.rc"]
        assert (tmp_path / kind / "notes").exists()
    assert layout_names(tmp_path / "oci") == {"v1.0": mirror.images["v1_0"].digest}
    assert sorted(p.name for p in (tmp_path / "dir").iterdir()) == ["notes", "v1.0"]


def test_platforms(mirror: Mirror) -> None:
    host = mirror.registry.host
    arm = make_image(architecture="arm64")
    index = make_index({"amd64": make_image(), "arm64": arm})
    mirror.put("multi", t=index)
    mirror.run({"source": f"{host}/multi", "target": f"{host}/all"})
    assert mirror.registry.manifest("all", "t") == index.document()
    mirror.run({"source": f"{host}/multi", "target": f"{host}/one", "platform": "linux/arm64"})
    assert mirror.registry.manifest("one", "t") == arm.document()


def test_digests(mirror: Mirror) -> None:
    host = mirror.registry.host
    image = mirror.images["v1_0"]
    mirror.run({"source": f"{host}/src/app@{image.digest}", "target": f"{host}/pinned"})
    assert mirror.registry.manifest("pinned", image.digest) == image.document()


def test_a_file_of_skopeos_as_it_is(cli: CommandLine, password_registry: RegistryServer, tmp_path: Path) -> None:
    """Versions, and the credentials that the file has for its registry; they are told to nobody."""
    host = password_registry.host
    for tag in ("1.9", "1.10", "v1.20.1", "2.0.0-rc1", "latest"):
        write_layout(tmp_path / "made", t=make_image())
        cli("copy", "--dest-creds", "tester:s3cret", f"oci:{tmp_path}/made:t", f"docker://{host}/team/app:{tag}")
    file = tmp_path / "sync.yaml"
    text = f"{host}:\n  images: {{team/app: [1.9]}}\n  images-by-semver: {{team/app: '>=1.10 || >=2.0.0-0'}}\n"
    file.write_text(text + "  tls-verify: false\n  credentials: {username: tester, password: s3cret}\n")
    report = cli("sync", "--json", file, f"dir:{tmp_path}/out").json()
    names = [name.rpartition("/")[2] for name in report["copied"]]
    assert sorted(names) == ["1.10", "1.9", "2.0.0-rc1", "v1.20.1"]
    file.write_text(text + "  credentials: {username: tester, password: wr0ng}\n")
    refused = cli("sync", "--debug", file, f"dir:{tmp_path}/out", status=3)
    assert "the sync file" in refused.err
    assert "wr0ng" not in refused.err + refused.text
    assert cli("sync", "--src-no-creds", file, f"dir:{tmp_path}/out", status=3).err
