"""Copies over a connection that fails: they succeed, or leave nothing torn and say one clear thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layers.errors import DigestMismatch, PybuildError
from layers.store import Store
from registry.client import RegistryClient
from registry.copy import CopyResult, copy_location
from registry.errors import NotFoundError, ServerError
from registry.hosts import RegistryOptions
from registry.retry import RetryPolicy
from registry.transport import TransportContext, parse_location
from tests.integration.registry.servers import Exchange, Fault, FaultProxy, Rule
from tests.support.images import Image, check_layout, layout_names, make_image, random_layer, write_layout
from tests.support.registries import RegistryServer

Run = Callable[[str, str], CopyResult]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def run(tmp_path: Path, store: Store) -> Iterator[Run]:
    policy = RetryPolicy(attempts=3, base_s=0.01, cap_s=0.02)
    with RegistryClient(RegistryOptions(tls_verify=False), environ={}, policy=policy) as client:
        context = TransportContext(store=lambda: store, client=lambda: client, scratch_dir=tmp_path)
        yield lambda a, b: copy_location(parse_location(a), parse_location(b), context)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    made = make_image([random_layer("a", 400_000), random_layer("b", 300_000)])
    write_layout(tmp_path / "made", t=made)
    return made


@pytest.fixture
def proxy(fresh_registry: RegistryServer, image: Image, tmp_path: Path, run: Run) -> Iterator[FaultProxy]:
    """In front of a registry that has the image as `x:1`."""
    with FaultProxy(f"127.0.0.1:{fresh_registry.port}") as made:
        run(f"oci:{tmp_path}/made:t", f"docker://{made.host}/x:1")
        yield made


def on_blobs(fault: Fault, times: int = 1) -> Rule:
    """The fault for the first GETs of each layer."""
    return lambda e: fault if e.method == "GET" and "/blobs/" in e.path and e.number < times else None


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_response_at=150_000),
        Fault(end_response_at=150_000),
        Fault(cut_response_at=0),
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=500),
        Fault(status=429, headers={"Retry-After": "0"}),
    ],
)
@pytest.mark.parametrize("target", ["storage:y:1", "oci:{}/out:t", "oci-archive:{}/out.tar:t", "docker://{host}/y:1"])
def test_passing_faults_are_ridden_out(
    tmp_path: Path, proxy: FaultProxy, run: Run, image: Image, fault: Fault, target: str
) -> None:
    proxy.rule = on_blobs(fault)
    target = target.replace("{}", str(tmp_path)).replace("{host}", proxy.host)
    # Not `x`'s own repository: a mount would move nothing.
    source = f"docker://{proxy.host.replace('127.0.0.1', 'localhost')}/x:1"
    assert run(source, target).descriptor.digest == image.digest
    if target.startswith("oci:"):
        check_layout(tmp_path / "out", image.digest)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(corrupt_at=100_000), DigestMismatch),
        (Fault(status=404), NotFoundError),
        (Fault(status=500), ServerError),
        (Fault(end_response_at=1000), PybuildError),
    ],
)
def test_lasting_faults_leave_nothing_torn(
    tmp_path: Path, proxy: FaultProxy, run: Run, store: Store, image: Image, fault: Fault, error: type[PybuildError]
) -> None:
    layer = image.blobs[1].digest
    proxy.rule = lambda e: fault if e.method == "GET" and layer in e.path else None
    for target in ("storage:y:1", f"oci:{tmp_path}/out:t", f"oci-archive:{tmp_path}/out.tar:t", f"dir:{tmp_path}/d"):
        with pytest.raises(error):
            run(f"docker://{proxy.host}/x:1", target)
    assert store.names.list() == []
    assert all(info.digest != layer for info in store.blobs.walk())
    assert layout_names(tmp_path / "out") == {}
    assert not (tmp_path / "out.tar").exists()
    assert not (tmp_path / "d/manifest.json").exists()
    proxy.rule = lambda e: None
    for target in ("storage:y:1", f"oci:{tmp_path}/out:t", f"oci-archive:{tmp_path}/out.tar:t", f"dir:{tmp_path}/d"):
        assert run(f"docker://{proxy.host}/x:1", target).descriptor.digest == image.digest


def test_a_push_that_breaks_is_sent_again(tmp_path: Path, proxy: FaultProxy, run: Run, image: Image) -> None:
    proxy.rule = lambda e: (
        Fault(cut_request_at=100_000)
        if e.method in {"PUT", "PATCH"} and "/uploads/" in e.path and int(e.headers["content-length"]) > 200_000
        and sum(x.method == e.method and "/uploads/" in x.path for x in proxy.log) <= 2
        else None
    )  # fmt: skip
    assert run(f"oci:{tmp_path}/made:t", f"docker://{proxy.host}/z:1").descriptor.digest == image.digest
    proxy.rule = lambda e: None
    run(f"docker://{proxy.host}/z:1", f"oci:{tmp_path}/back:t")
    check_layout(tmp_path / "back", image.digest)


def test_a_registry_without_mounts_gets_the_blobs(tmp_path: Path, proxy: FaultProxy, run: Run, image: Image) -> None:
    def refuse(e: Exchange) -> Fault | None:
        return Fault(status=405) if e.method == "POST" and "mount=" in e.path else None

    proxy.rule = refuse
    result = run(f"docker://{proxy.host}/x:1", f"docker://{proxy.host}/other:1")
    assert (result.descriptor.digest, result.copied_blobs) == (image.digest, 3)


def test_a_wrong_manifest_is_refused(proxy: FaultProxy, run: Run, store: Store) -> None:
    proxy.rule = lambda e: Fault(corrupt_at=30) if e.method == "GET" and "/manifests/" in e.path else None
    with pytest.raises(DigestMismatch):
        run(f"docker://{proxy.host}/x:1", "storage:y:1")
    assert store.names.list() == []
