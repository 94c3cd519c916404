"""What a copy costs in requests, bytes and memory, and what is left of one that is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layers.errors import DigestMismatch
from layers.store import Store
from registry.client import RegistryClient
from registry.copy import CopyOptions, CopyResult, copy_location
from registry.hosts import RegistryOptions
from registry.reference import Reference
from registry.serve import serving
from registry.transport import TransportContext, parse_location
from tests.integration.registry.servers import Exchange, Fault, FaultProxy
from tests.support.images import Blob, Image, check_layout, make_image, make_index, random_layer, write_layout
from tests.support.machine import CHECKOUT
from tests.support.registries import RegistryServer
from tests.support.waiting import PATIENCE_S, until

Copy = Callable[..., CopyResult]
MIB = 1 << 20

PROGRAM = """
import json, sys
from pathlib import Path
from layers.store import Store
from registry.client import RegistryClient
from registry.copy import copy_location
from registry.hosts import RegistryOptions
from registry.transport import TransportContext, parse_location

source, destination, scratch = sys.argv[1:4]
client = RegistryClient(RegistryOptions(tls_verify=False), environ={})
context = TransportContext(
    store=lambda: Store.open(Path(scratch) / "store"),
    client=lambda: client,
    scratch_dir=Path(scratch),
    uploads_dir=Path(scratch) / "uploads",
)
result = copy_location(parse_location(source), parse_location(destination), context)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"moved": result.moved_bytes, "peak_kib": peak, "digest": result.descriptor.digest}))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[Copy]:
    store = Store.open(tmp_path / "store")
    with RegistryClient(RegistryOptions(tls_verify=False), environ={}) as client:
        context = TransportContext(store=lambda: store, client=lambda: client, scratch_dir=tmp_path)

        def run(source: str, destination: str, **options: Any) -> CopyResult:
            return copy_location(
                parse_location(source), parse_location(destination), context, options=CopyOptions(**options)
            )

        yield run
    store.close()


def program(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, arguments)]


def run_program(*arguments: str | Path) -> dict[str, Any]:
    done = subprocess.run(program(*arguments), cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Since:
    """The requests that a registry saw since this was made."""

    def __init__(self, registry: RegistryServer) -> None:
        self._registry = registry
        self._before = len(registry.requests_seen())

    def __call__(self) -> list[str]:
        return [r for r in self._registry.requests_seen()[self._before :] if r.split()[1] != "/v2/"]

    def count(self, method: str) -> int:
        return sum(r.startswith(method + " ") for r in self())


def test_nothing_to_send_costs_no_blob(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    image = make_image([random_layer(str(i)) for i in range(8)])
    write_layout(tmp_path / "made", t=image)
    there = f"docker://{fresh_registry.host}/x:1"
    copy(f"oci:{tmp_path}/made:t", there)
    since = Since(fresh_registry)
    assert copy(f"oci:{tmp_path}/made:t", there).present_blobs == 9
    assert [r.split()[0] for r in since()] == ["HEAD"]
    since = Since(fresh_registry)
    copy(f"oci:{tmp_path}/made:t", f"docker://{fresh_registry.host}/x:2")
    assert (since.count("HEAD"), since.count("POST"), since.count("PUT")) == (1 + 9, 0, 1)
    since = Since(fresh_registry)
    copy(there, f"docker://{fresh_registry.host}/x:2")
    assert sorted(r.split()[0] for r in since()) == ["GET", "HEAD"]


def test_a_fresh_push_asks_once_per_blob(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    image = make_image([random_layer(str(i)) for i in range(4)])
    write_layout(tmp_path / "made", t=image)
    since = Since(fresh_registry)
    copy(f"oci:{tmp_path}/made:t", f"docker://{fresh_registry.host}/x:1")
    assert (since.count("HEAD"), since.count("POST"), since.count("PUT")) == (1 + 5, 5, 5 + 1)


def test_blobs_are_mounted_within_a_registry(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    image = make_image([random_layer("a", 100_000)])
    write_layout(tmp_path / "made", t=image)
    copy(f"oci:{tmp_path}/made:t", f"docker://{fresh_registry.host}/one/x:1")
    since = Since(fresh_registry)
    result = copy(f"docker://{fresh_registry.host}/one/x:1", f"docker://{fresh_registry.host}/two/y:1")
    assert (result.reused_blobs, result.moved_bytes) == (2, 0)
    assert not [r for r in since() if r.startswith("GET") and "/blobs/" in r]
    assert fresh_registry.manifest("two/y", "1") == image.document()


def test_a_base_that_was_pulled_is_mounted_at_the_push(
    tmp_path: Path, fresh_registry: RegistryServer, copy: Copy
) -> None:
    base = random_layer("base", 100_000)
    write_layout(tmp_path / "made", base=make_image([base]), app=make_image([base, random_layer("app")]))
    copy(f"oci:{tmp_path}/made:base", f"docker://{fresh_registry.host}/team/base:1")
    copy(f"docker://{fresh_registry.host}/team/base:1", f"storage:{fresh_registry.host}/team/base:1")
    copy(f"oci:{tmp_path}/made:app", "app:1")
    result = copy("app:1", f"docker://{fresh_registry.host}/team/app:1")
    assert (result.reused_blobs, result.copied_blobs) == (1, 2)


def test_a_repeated_pull_fetches_no_blob(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    shared = random_layer("shared", 50_000)
    write_layout(tmp_path / "made", a=make_image([shared]), b=make_image([shared, random_layer("b")]))
    for tag in "ab":
        copy(f"oci:{tmp_path}/made:{tag}", f"docker://{fresh_registry.host}/x:{tag}")
    copy(f"docker://{fresh_registry.host}/x:a", "x:a")
    assert copy(f"docker://{fresh_registry.host}/x:b", "x:b").copied_blobs == 2
    since = Since(fresh_registry)
    assert copy(f"docker://{fresh_registry.host}/x:b", "x:b").moved_bytes == 0
    assert [r.split()[0] for r in since()] == ["GET"]


def test_instances_that_are_there_are_not_looked_into(
    tmp_path: Path, fresh_registry: RegistryServer, copy: Copy
) -> None:
    amd, arm = make_image(), make_image(architecture="arm64")
    write_layout(tmp_path / "made", amd=amd, both=make_index({"amd64": amd, "arm64": arm}))
    copy(f"oci:{tmp_path}/made:amd", f"docker://{fresh_registry.host}/x:amd")
    since = Since(fresh_registry)
    copy(f"oci:{tmp_path}/made:both", f"docker://{fresh_registry.host}/x:both")
    assert not [r for r in since() for b in amd.blobs if b.digest in r]
    assert since.count("PUT") == 3 + 2


def test_an_artifact_is_listed_with_its_subject(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    """docker-registry 2.8 has no referrers API: the fallback tag must name what was copied."""
    image = make_image()
    document = make_image([{"sbom": b"{}"}], compress=False)
    manifest = document.document() | {"artifactType": "application/x.sbom", "subject": image.top.descriptor()}
    artifact = Image(document.top._replace(data=json.dumps(manifest).encode()), document.blobs)
    write_layout(tmp_path / "made", image=image, sbom=artifact)
    copy(f"oci:{tmp_path}/made:image", f"docker://{fresh_registry.host}/x:1")
    copy(f"oci:{tmp_path}/made:sbom", f"docker://{fresh_registry.host}/x@{artifact.digest}")
    listed = fresh_registry.manifest("x", image.digest.replace(":", "-"))["manifests"]
    assert [(d["digest"], d["artifactType"]) for d in listed] == [(artifact.digest, "application/x.sbom")]


def test_a_wrong_blob_never_gets_into_the_registry(tmp_path: Path, fresh_registry: RegistryServer, copy: Copy) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "made", t=image)
    bad = image.blobs[1]
    (layout / "blobs" / bad.digest.replace(":", "/")).write_bytes(bytes(len(bad.data)))
    with pytest.raises(DigestMismatch):
        copy(f"oci:{layout}:t", f"docker://{fresh_registry.host}/x:1")
    with pytest.raises(KeyError):
        fresh_registry.manifest("x", "1")
    with pytest.raises(KeyError):
        fresh_registry.blob("x", bad.digest)


# Large blobs


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Image]:
    """A layout with one layer of 200 MiB that does not compress; only its manifest and config stay in memory."""
    path = tmp_path_factory.mktemp("large")
    image = make_image([])
    data = os.urandom(MIB)
    hasher = hashlib.sha256()
    write_layout(path, t=image)
    with (path / "blobs/sha256/part").open("wb") as f:
        for i in range(200):
            chunk = i.to_bytes(8, "big") + data[8:]
            hasher.update(chunk)
            f.write(chunk)
    digest = "sha256:" + hasher.hexdigest()
    (path / "blobs/sha256/part").rename(path / "blobs" / digest.replace(":", "/"))
    document = image.document()
    document["layers"] = [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": 200 * MIB}
    ]
    top = Blob(json.dumps(document).encode(), image.top.media_type)
    whole = Image(top, image.blobs)
    write_layout(path, t=whole)
    return path, whole


def _layer(image: Image) -> str:
    digest: str = image.document()["layers"][0]["digest"]
    return digest


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """SIGKILL the process once `ready`; fails if it ends by itself."""
    until(lambda: ready() or process.poll() is not None)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["storage", "oci"])
def test_a_killed_pull_goes_on(
    tmp_path: Path, registry: RegistryServer, copy: Copy, large: tuple[Path, Image], kind: str
) -> None:
    layout, image = large
    copy(f"oci:{layout}:t", f"docker://{registry.host}/large/pull:1")
    target = f"storage:large/{kind}:1" if kind == "storage" else f"oci:{tmp_path}/out:t"
    ingests = tmp_path / ("store/ingest" if kind == "storage" else "out/.pybuild-ingest")

    def partly() -> bool:
        try:
            return any(p.stat().st_size > 120 * MIB for p in ingests.iterdir())
        except OSError:
            return False

    def stop(exchange: Exchange) -> Fault | None:
        return Fault(stall_after=150 * MIB) if exchange.path.endswith(_layer(image)) else None

    with FaultProxy(f"127.0.0.1:{registry.port}", stop) as proxy:
        there = f"docker://{proxy.host}/large/pull:1"
        with subprocess.Popen(program(there, target, tmp_path), cwd=CHECKOUT) as process:
            kill_when(process, partly)
        proxy.rule = lambda exchange: None
        result = run_program(there, target, tmp_path)
    assert result["digest"] == image.digest
    assert result["moved"] <= 81 * MIB
    if kind == "oci":
        check_layout(tmp_path / "out", image.digest)
    assert list(ingests.iterdir() if ingests.exists() else []) == []


@pytest.mark.slow
def test_a_killed_push_goes_on(
    tmp_path: Path, fresh_registry: RegistryServer, copy: Copy, large: tuple[Path, Image]
) -> None:
    """docker-registry 2.8 forgets an upload that broke within a request, so the kill comes between two."""
    layout, image = large
    uploads = tmp_path / "uploads"
    killed, stopped = threading.Event(), threading.Event()

    def hold(exchange: Exchange) -> Fault | None:
        if exchange.method == "PATCH" and exchange.headers["content-range"].startswith(f"{128 * MIB}-"):
            stopped.set()
            killed.wait(PATIENCE_S)
        return None

    def held() -> bool:
        # Not before the proxy holds the third piece: a part of it must not reach the registry later.
        saved = any(json.loads(p.read_bytes())["offset"] >= 128 * MIB for p in uploads.glob("*.json"))
        return saved and stopped.is_set()

    with FaultProxy(f"127.0.0.1:{fresh_registry.port}", hold) as proxy:
        there = f"docker://{proxy.host}/large/push:1"
        with subprocess.Popen(program(f"oci:{layout}:t", there, tmp_path), cwd=CHECKOUT) as process:
            kill_when(process, held)
        assert [p.stat().st_mode & 0o777 for p in uploads.glob("*.json")] == [0o600]
        proxy.rule = lambda exchange: None
        before = proxy.up_bytes
        result = run_program(f"oci:{layout}:t", there, tmp_path)
        # Before the held request goes on: what the dead process had sent is still on its way.
        sent = proxy.up_bytes - before
        killed.set()
    assert result["moved"] == (200 - 128) * MIB
    assert sent < (200 - 128) * MIB + 10_000
    assert list(uploads.iterdir()) == []
    check_layout_in_registry(fresh_registry, image)


@pytest.mark.slow
def test_a_push_killed_anywhere_goes_on_where_the_registry_can(tmp_path: Path, large: tuple[Path, Image]) -> None:
    """Ours keeps what has come of a broken request, as distribution 3 does: what was on its way is lost, no more."""
    layout, image = large
    passed = 180 * MIB

    def stop(exchange: Exchange) -> Fault | None:
        first, _, last = exchange.headers.get("content-range", "0-0").partition("-")
        return Fault(stall_request_at=passed - int(first)) if int(first) < passed <= int(last) else None

    with Store.open(tmp_path / "served") as store, serving(store) as server, FaultProxy(server.host, stop) as proxy:
        there = f"docker://{proxy.host}/large/push:1"
        with subprocess.Popen(program(f"oci:{layout}:t", there, tmp_path), cwd=CHECKOUT) as process:
            kill_when(process, lambda: proxy.up_bytes >= passed)
        until(lambda: any(p.stat().st_size == passed for p in (tmp_path / "served/ingest").iterdir()))
        proxy.rule = lambda exchange: None
        before = proxy.up_bytes
        result = run_program(f"oci:{layout}:t", there, tmp_path)
        assert result["moved"] <= 40 * MIB
        assert proxy.up_bytes - before <= 40 * MIB
        with RegistryClient(RegistryOptions(tls_verify=False), environ={}) as client:
            assert client.get_manifest(Reference.parse(f"{server.host}/large/push:1")).digest == image.digest


def check_layout_in_registry(registry: RegistryServer, image: Image) -> None:
    assert registry.manifest("large/push", "1") == image.document()
    registry.blob("large/push", _layer(image))


@pytest.mark.slow
def test_a_forgotten_session_begins_anew(
    tmp_path: Path, fresh_registry: RegistryServer, large: tuple[Path, Image]
) -> None:
    layout, image = large
    there = f"docker://{fresh_registry.host}/large/push:1"
    uploads = tmp_path / "uploads"
    with subprocess.Popen(program(f"oci:{layout}:t", there, tmp_path), cwd=CHECKOUT) as process:
        kill_when(process, lambda: any(uploads.glob("*.json")))
    for path in fresh_registry.storage.glob("docker/registry/v2/repositories/large/push/_uploads/*/*"):
        if path.is_file():
            path.unlink()
    assert run_program(f"oci:{layout}:t", there, tmp_path)["digest"] == image.digest
    assert list(uploads.iterdir()) == []
    check_layout_in_registry(fresh_registry, image)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, registry: RegistryServer, large: tuple[Path, Image]) -> None:
    layout, _ = large
    for source, destination in (
        (f"oci:{layout}:t", f"docker://{registry.host}/large/memory:1"),
        (f"docker://{registry.host}/large/memory:1", "storage:large/memory:1"),
        ("storage:large/memory:1", f"oci-archive:{tmp_path}/x.tar:t"),
        (f"oci-archive:{tmp_path}/x.tar:t", f"dir:{tmp_path}/d"),
    ):
        result = run_program(source, destination, tmp_path)
        assert result["moved"] > 200 * MIB
        assert result["peak_kib"] < 100 * 1024, (source, destination)
