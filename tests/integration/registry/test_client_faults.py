"""The client behind a proxy that breaks things: each fault ends in success or in one clear error.

The registry is docker-registry; `FaultProxy` stands before it. No fault may leave wrong bytes
unnoticed, loop for ever, or be retried where nothing will change.
"""

from __future__ import annotations

import io
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.errors import Cancelled, DigestMismatch, PybuildError, SizeMismatch
from layers.oci import MAX_MANIFEST_BYTES, MEDIA_OCI_LAYER_GZIP, MEDIA_OCI_MANIFEST, Descriptor, Digest, Manifest
from registry.client import RegistryClient
from registry.credentials import Credential
from registry.errors import AuthError, NetworkError, RateLimitError, RegistryError, ServerError
from registry.hosts import RegistryOptions
from registry.http import Timeouts
from registry.reference import Reference
from registry.retry import RetryPolicy
from tests.integration.registry.servers import (
    Exchange,
    Fault,
    FaultProxy,
    Rule,
    RunningRegistry,
    TokenServer,
    docker_registry,
    needs_registry,
)

pytestmark = [needs_registry, pytest.mark.registry]

FAST = RetryPolicy(attempts=4, base_s=0.01, cap_s=0.05, max_retry_after_s=3)
PATIENT = Timeouts()
SHORT = Timeouts(read_s=2.0, stall_s=2.0, stall_bytes=1 << 10)
"""For servers that fall silent; a machine that is busy may be, too, so that retries are not counted with these."""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("upstream")) as running:
        yield running


@pytest.fixture
def conf(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "r.conf").touch()
    return {"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "r.conf")}


def client(conf: dict[str, str], timeouts: Timeouts = PATIENT, **options: object) -> RegistryClient:
    return RegistryClient(RegistryOptions(**options), environ=conf, policy=FAST, timeouts=timeouts)  # type: ignore[arg-type]


def pushed(upstream: RunningRegistry, conf: dict[str, str], name: str, data: bytes) -> Descriptor:
    with client(conf) as api:
        ref = Reference.parse(f"{upstream.host}/{name}")
        return api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), Descriptor.of(data, MEDIA_OCI_LAYER_GZIP))


def on(method: str, part: str, fault: Fault, *, first: int = 1) -> Rule:
    """Inject `fault` into the first `first` requests of that method whose path holds `part`."""
    counted = {"n": 0}

    def rule(exchange: Exchange) -> Fault | None:
        if exchange.method != method or part not in exchange.path:
            return None
        counted["n"] += 1
        return fault if counted["n"] <= first else None

    return rule


DATA = os.urandom(2_000_000)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_response_at=0),
        Fault(cut_response_at=700_001),
        Fault(end_response_at=900_000),
        Fault(stall_after=500_000),
        Fault(status=500),
        Fault(status=502, body=b"<html>bad gateway</html>"),
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(status=408),
    ],
    ids=["reset-0", "reset", "truncated", "stalled", "500", "502", "503", "429", "408"],
)
def test_a_pull_survives(upstream: RunningRegistry, conf: dict[str, str], fault: Fault) -> None:
    described = pushed(upstream, conf, "faults/pull", DATA)
    timeouts = SHORT if fault.stall_after else PATIENT
    with FaultProxy(upstream.host, on("GET", "/blobs/", fault, first=2)) as proxy, client(conf, timeouts) as api:
        assert api.open_blob(Reference.parse(f"{proxy.host}/faults/pull"), described).read() == DATA
        assert proxy.count("GET", "/blobs/") == 3


def test_a_broken_pull_moves_only_the_rest(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/rest", DATA)
    with (
        FaultProxy(upstream.host, on("GET", "/blobs/", Fault(end_response_at=1_500_000))) as proxy,
        client(conf) as api,
    ):
        assert api.open_blob(Reference.parse(f"{proxy.host}/faults/rest"), described).read() == DATA
        ranges = [e.headers.get("range") for e in proxy.log if "/blobs/" in e.path]
        assert ranges == [None, "bytes=1500000-"]


def test_a_server_that_ignores_range(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/norange", DATA)

    def rule(exchange: Exchange) -> Fault | None:
        if "/blobs/" not in exchange.path:
            return None
        return Fault(drop_request_headers=("range",), cut_response_at=900_000 if exchange.number == 0 else None)

    with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/norange")
        assert api.open_blob(ref, described).read() == DATA
        assert api.open_blob(ref, described, offset=1_234_567).read() == DATA[1_234_567:]


def test_a_wrong_content_range_is_refused(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/badrange", DATA)
    rule = on("GET", "/blobs/", Fault(set_headers={"content-range": "bytes 0-9/2000000"}))
    with (
        FaultProxy(upstream.host, rule) as proxy,
        client(conf) as api,
        pytest.raises(ServerError, match="bytes from 5"),
    ):
        api.open_blob(Reference.parse(f"{proxy.host}/faults/badrange"), described, offset=5).read()


@pytest.mark.parametrize("position", [0, 1_000_000, 1_999_999])
def test_wrong_bytes_are_never_passed_off(upstream: RunningRegistry, conf: dict[str, str], position: int) -> None:
    described = pushed(upstream, conf, "faults/corrupt", DATA)
    rule = on("GET", "/blobs/", Fault(corrupt_at=position), first=99)
    with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
        reader = api.open_blob(Reference.parse(f"{proxy.host}/faults/corrupt"), described)
        got = b""
        with pytest.raises(DigestMismatch, match=described.digest):
            while data := reader.read(100_000):
                got += data
        assert len(got) < len(DATA)


def test_a_blob_of_another_size(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/size", DATA)
    with client(conf) as api:
        ref = Reference.parse(f"{upstream.host}/faults/size")
        for size in (len(DATA) - 1, len(DATA) + 1):
            wrong = Descriptor(media_type="x/y", digest=described.digest, size_bytes=size)
            with pytest.raises(SizeMismatch, match="promised"):
                api.open_blob(ref, wrong).read()


def test_a_pull_that_never_works_ends_with_the_cause(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/never", DATA)
    for fault, kind, match in (
        (Fault(cut_response_at=0), NetworkError, "reset|closed|ended"),
        (Fault(status=503), ServerError, "HTTP 503"),
        (Fault(stall_after=10), NetworkError, "time"),
    ):
        timeouts = SHORT if fault.stall_after else PATIENT
        with FaultProxy(upstream.host, on("GET", "/blobs/", fault, first=99)) as proxy, client(conf, timeouts) as api:
            with pytest.raises(kind, match=match):
                api.open_blob(Reference.parse(f"{proxy.host}/faults/never"), described).read()
            assert proxy.count("GET", "/blobs/") == FAST.attempts


def test_slow_loris(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    """Bytes that trickle in under every socket timeout still end in an error, not in a day's wait."""
    described = pushed(upstream, conf, "faults/loris", DATA)
    rule = on("GET", "/blobs/", Fault(drip_s=0.05), first=99)
    with (
        FaultProxy(upstream.host, rule) as proxy,
        client(conf, SHORT) as api,
        pytest.raises(NetworkError, match="stalled"),
    ):
        api.open_blob(Reference.parse(f"{proxy.host}/faults/loris"), described).read()


def test_slow_loris_in_the_headers(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    timeouts = Timeouts(read_s=10, answer_s=2.0)
    ref = Reference.parse(f"{upstream.host}/faults/loris:1")
    with client(conf) as api:
        image = Manifest.build(config=pushed(upstream, conf, "faults/loris", b"{}"), layers=[])
        api.put_manifest(ref, image.raw, image.media_type)
    rule = on("GET", "/manifests/", Fault(drip_head_s=0.1), first=FAST.attempts + 1)
    with FaultProxy(upstream.host, rule) as proxy, client(conf, timeouts) as api:
        ref = ref._replace(domain=proxy.host)
        with pytest.raises(NetworkError, match="no answer within the time"):
            api.get_manifest(ref)
        # The next attempt meets it once more, and then connections that are as good as new.
        assert api.get_manifest(ref).raw == image.raw


def test_manifests_survive_and_are_verified(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    config = pushed(upstream, conf, "faults/m", b"{}")
    image = Manifest.build(config=config, layers=[])
    with client(conf) as api:
        api.put_manifest(Reference.parse(f"{upstream.host}/faults/m:1"), image.raw, image.media_type)
    for fault in (Fault(cut_response_at=5), Fault(end_response_at=20), Fault(status=500)):
        with FaultProxy(upstream.host, on("GET", "/manifests/", fault, first=2)) as proxy, client(conf) as api:
            assert api.get_manifest(Reference.parse(f"{proxy.host}/faults/m:1")).raw == image.raw
    with FaultProxy(upstream.host, on("GET", "/manifests/", Fault(corrupt_at=30))) as proxy, client(conf) as api:
        with pytest.raises(DigestMismatch, match="wrong content"):
            api.get_manifest(Reference.parse(f"{proxy.host}/faults/m:1"))
        fault = Fault(corrupt_at=30, drop_headers=("docker-content-digest",))
        proxy.rule = on("GET", "/manifests/", fault)
        with pytest.raises(DigestMismatch):
            api.get_manifest(Reference.parse(f"{proxy.host}/faults/m").with_digest(image.descriptor.digest))


def test_an_oversized_manifest_is_not_read(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    big = Fault(status=200, headers={"Content-Type": MEDIA_OCI_MANIFEST}, body=b" " * (MAX_MANIFEST_BYTES + 1))
    endless = Fault(status=200, headers={"Content-Type": MEDIA_OCI_MANIFEST, "Content-Length": "99999999999"})
    for fault in (big, endless):
        with (
            FaultProxy(upstream.host, on("GET", "/manifests/", fault)) as proxy,
            client(conf) as api,
            pytest.raises(SizeMismatch, match="larger than the 4194304"),
        ):
            api.get_manifest(Reference.parse(f"{proxy.host}/faults/m:1"))


@pytest.mark.parametrize(
    ("fault", "kind", "exit_code"),
    [
        (Fault(status=400), RegistryError, 1),
        (Fault(status=403, body=b'{"errors":[{"code":"DENIED","message":"no\\u001b[2J way"}]}'), AuthError, 3),
        (Fault(status=418), RegistryError, 1),
        (Fault(status=501), ServerError, 7),
        (Fault(status=429, headers={"Retry-After": "9999"}), RateLimitError, 5),
    ],
)
def test_what_will_not_change_is_asked_once(
    upstream: RunningRegistry, conf: dict[str, str], fault: Fault, kind: type[PybuildError], exit_code: int
) -> None:
    with FaultProxy(upstream.host, on("GET", "/manifests/", fault, first=99)) as proxy, client(conf) as api:
        with pytest.raises(kind) as caught:
            api.get_manifest(Reference.parse(f"{proxy.host}/faults/m:1"))
        assert proxy.count("GET", "/manifests/") == 1
        assert caught.value.exit_code == exit_code and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "part", "fault"),
    [
        ("PUT", "/uploads/", Fault(cut_request_at=900_000)),
        ("PUT", "/uploads/", Fault(status=500)),
        ("PUT", "/uploads/", Fault(status=429, headers={"Retry-After": "0"})),
        ("POST", "/uploads/", Fault(status=503)),
        ("POST", "/uploads/", Fault(cut_response_at=0)),
        ("HEAD", "/blobs/", Fault(status=502)),
    ],
)
def test_a_push_survives(upstream: RunningRegistry, conf: dict[str, str], method: str, part: str, fault: Fault) -> None:
    data = os.urandom(1_800_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    with FaultProxy(upstream.host, on(method, part, fault, first=2)) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/push")
        assert not api.has_blob(ref, described.digest)
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described)
    with client(conf) as api:
        assert api.open_blob(Reference.parse(f"{upstream.host}/faults/push"), described).read() == data


@pytest.mark.parametrize("fault", [Fault(cut_request_at=300_000), Fault(status=500), Fault(status=404)])
def test_a_chunked_push_survives(upstream: RunningRegistry, conf: dict[str, str], fault: Fault) -> None:
    data = os.urandom(1_800_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    with FaultProxy(upstream.host, on("PATCH", "/uploads/", fault, first=2)) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/chunks")
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, chunk_bytes=500_000)
    with client(conf) as api:
        assert api.open_blob(Reference.parse(f"{upstream.host}/faults/chunks"), described).read() == data


def test_a_push_that_never_works(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    data = os.urandom(200_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    rule = on("PUT", "/uploads/", Fault(status=507), first=99)
    with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
        with pytest.raises(ServerError, match="507"):
            api.upload_blob(Reference.parse(f"{proxy.host}/faults/no"), lambda o: io.BytesIO(data[o:]), described)
        assert proxy.count("PUT") == 1


def test_no_head(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/nohead", DATA)
    image = Manifest.build(config=described, layers=[])
    with client(conf) as api:
        api.put_manifest(Reference.parse(f"{upstream.host}/faults/nohead:1"), image.raw, image.media_type)
    with FaultProxy(upstream.host, on("HEAD", "", Fault(status=405), first=99)) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/nohead:1")
        assert api.has_blob(ref, described.digest)
        assert not api.has_blob(ref, Digest.of(b"no"))
        assert api.head_manifest(ref) == image.descriptor
        assert api.head_manifest(ref.with_tag("none")) is None


def test_no_mount(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/mountfrom", DATA)

    def rule(exchange: Exchange) -> Fault | None:
        return Fault(status=405) if "mount=" in exchange.path else None

    with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/mountto")
        assert not api.mount_blob(ref, described.digest, "faults/mountfrom")
        api.upload_blob(ref, lambda o: io.BytesIO(DATA[o:]), described, mount_from="faults/mountfrom")
        assert api.has_blob(ref, described.digest)


def test_odd_locations(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    data = os.urandom(10_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)

    def attempt(location: str) -> None:
        rule = on("POST", "/uploads/", Fault(status=202, headers={"Location": location} if location else {}))
        with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
            api.upload_blob(Reference.parse(f"{proxy.host}/faults/odd"), lambda o: io.BytesIO(data[o:]), described)

    for location, complaint in (
        ("", "no Location"),
        ("http://[bad", "unusable Location"),
        ("http://h:99999999/x", "unusable Location"),
        ("ftp://h/x", "unusable Location"),
    ):
        with pytest.raises(RegistryError, match=complaint):
            attempt(location)

    seen: list[str] = []

    def relative(exchange: Exchange) -> Fault | None:
        if exchange.method == "POST":
            seen.append("POST")
            return Fault(set_headers={"location": locations.pop(0)})
        return None

    # A relative one that keeps its own query is resolved against the request.
    import urllib.request

    request = urllib.request.Request(f"http://{upstream.host}/v2/faults/odd/blobs/uploads/", method="POST")
    with urllib.request.urlopen(request) as answer:
        real = answer.headers["Location"]
    locations = [real.partition(upstream.host)[2]]
    with FaultProxy(upstream.host, relative) as proxy, client(conf) as api:
        api.upload_blob(Reference.parse(f"{proxy.host}/faults/odd"), lambda o: io.BytesIO(data[o:]), described)
        assert api.has_blob(Reference.parse(f"{proxy.host}/faults/odd"), described.digest)
        assert seen == ["POST"]


def test_redirects(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/redirect", DATA)
    path = f"/v2/faults/redirect/blobs/{described.digest}"
    with FaultProxy(upstream.host) as storage:
        to_storage = Fault(status=307, headers={"Location": f"http://{storage.host}{path}?signature=sesame"})
        with FaultProxy(upstream.host, on("GET", "/blobs/", to_storage, first=99)) as proxy, client(conf) as api:
            ref = Reference.parse(f"{proxy.host}/faults/redirect")
            assert api.open_blob(ref, described).read() == DATA
            assert api.open_blob(ref, described, offset=7).read() == DATA[7:]
            assert storage.log[-1].headers["range"] == "bytes=7-"
            storage.rule = on("GET", "/blobs/", Fault(status=403), first=99)
            with pytest.raises(AuthError) as caught:
                api.open_blob(ref, described).read()
            assert "sesame" not in str(caught.value) + caught.value.url
    with FaultProxy(upstream.host) as proxy, client(conf) as api:
        loop = Fault(status=302, headers={"Location": f"http://{proxy.host}{path}"})
        proxy.rule = on("GET", "/blobs/", loop, first=999)
        with pytest.raises(ServerError, match="redirects"):
            api.open_blob(Reference.parse(f"{proxy.host}/faults/redirect"), described).read()
        assert proxy.count("GET", "/blobs/") == 11


def test_authorization_stays_with_its_host(tmp_path: Path, conf: dict[str, str]) -> None:
    with (
        TokenServer({"me": "pw"}) as tokens,
        docker_registry(tmp_path / "auth", token=tokens) as guarded,
        docker_registry(tmp_path / "storage") as open_storage,
    ):
        with client(conf, creds=Credential("me", "pw")) as api:
            ref = Reference.parse(f"{guarded.host}/a/b")
            described = api.upload_blob(ref, lambda o: io.BytesIO(DATA[o:]), Descriptor.of(DATA, MEDIA_OCI_LAYER_GZIP))
        pushed(open_storage, conf, "a/b", DATA)
        with FaultProxy(open_storage.host) as storage:
            location = f"http://{storage.host}/v2/a/b/blobs/{described.digest}"

            def rule(exchange: Exchange) -> Fault | None:
                if exchange.method == "GET" and "/blobs/" in exchange.path and "authorization" in exchange.headers:
                    return Fault(status=307, headers={"Location": location})
                return None

            with FaultProxy(guarded.host, rule) as proxy, client(conf, creds=Credential("me", "pw")) as api:
                assert api.open_blob(Reference.parse(f"{proxy.host}/a/b"), described).read() == DATA
                assert any("authorization" in e.headers for e in proxy.log)
            assert storage.log and all("authorization" not in e.headers for e in storage.log)


def test_a_401_in_the_middle_of_a_transfer(tmp_path: Path, conf: dict[str, str]) -> None:
    """The connection breaks, and by then the token has been revoked."""
    with (
        TokenServer({"me": "pw"}) as tokens,
        docker_registry(tmp_path / "auth", token=tokens) as guarded,
        client(conf, creds=Credential("me", "pw")) as direct,
    ):
        described = direct.upload_blob(
            Reference.parse(f"{guarded.host}/a/b"),
            lambda o: io.BytesIO(DATA[o:]),
            Descriptor.of(DATA, MEDIA_OCI_LAYER_GZIP),
        )
        revoked = {"n": 0}

        def rule(exchange: Exchange) -> Fault | None:
            if exchange.method != "GET" or "/blobs/" not in exchange.path or "authorization" not in exchange.headers:
                return None
            revoked["n"] += 1
            if revoked["n"] == 1:
                return Fault(cut_response_at=1_000_000)
            if revoked["n"] == 2:
                challenge = f'Bearer realm="{tokens.url}/token",service="{tokens.service}",error="invalid_token"'
                return Fault(status=401, headers={"WWW-Authenticate": challenge})
            return None

        with FaultProxy(guarded.host, rule) as proxy, client(conf, creds=Credential("me", "pw")) as api:
            asked = len(tokens.seen)
            assert api.open_blob(Reference.parse(f"{proxy.host}/a/b"), described).read() == DATA
            assert len(tokens.seen) == asked + 2


def test_a_token_that_ends_between_the_requests_of_a_push(tmp_path: Path, conf: dict[str, str]) -> None:
    data = os.urandom(300_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    with TokenServer({"me": "pw"}) as tokens, docker_registry(tmp_path / "auth", token=tokens) as guarded:
        challenge = f'Bearer realm="{tokens.url}/token",service="{tokens.service}",error="invalid_token"'
        ended = Fault(status=401, headers={"WWW-Authenticate": challenge})
        for method, chunks in (("PUT", 0), ("PATCH", 100_000)):
            rule = on(method, "/uploads/", ended)
            with FaultProxy(guarded.host, rule) as proxy, client(conf, creds=Credential("me", "pw")) as api:
                ref = Reference.parse(f"{proxy.host}/a/{method.lower()}")
                api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, chunk_bytes=chunks)
                assert api.open_blob(ref, described).read() == data
                assert proxy.count("POST") == 1


def test_a_registry_that_never_accepts_a_token(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    with TokenServer({}, anonymous_pull=True) as tokens:
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}/token",service="x"'}
        rule = on("GET", "", Fault(status=401, headers=challenge), first=999)
        with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
            with pytest.raises(AuthError, match="401"):
                api.get_manifest(Reference.parse(f"{proxy.host}/a/b:1"))
            assert proxy.count("GET", "/manifests/") <= 3


def test_memory_stays_flat(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    size = 192 << 20
    block = os.urandom(1 << 20)
    with client(conf) as api:
        ref = Reference.parse(f"{upstream.host}/faults/big")
        digest = Digest.of(b"")
        hasher = digest.hasher()
        for _ in range(size >> 20):
            hasher.update(block)
        described = Descriptor(media_type="x/y", digest=Digest.from_hasher(hasher), size_bytes=size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        api.upload_blob(ref, lambda o: (block for _ in range(o >> 20, size >> 20)), described)
        reader = api.open_blob(ref, described)
        while reader.read(1 << 20):
            pass
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10


def test_cancelling_ends_a_blocked_transfer(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/cancel", DATA)
    stop = threading.Event()
    patient = Timeouts(read_s=3600, stall_s=3600)
    api = RegistryClient(environ=conf, policy=FAST, timeouts=patient, cancelled=stop)
    with FaultProxy(upstream.host, on("GET", "/blobs/", Fault(stall_after=1000), first=99)) as proxy, api:
        reader = api.open_blob(Reference.parse(f"{proxy.host}/faults/cancel"), described)

        timer = threading.Timer(0.5, stop.set)
        timer.start()
        with pytest.raises(Cancelled):
            reader.read()
        timer.join()
        assert not proxy.stalled_out, "it ended when the server did"


def test_abort_ends_a_blocked_transfer(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    described = pushed(upstream, conf, "faults/abort", DATA)
    api = RegistryClient(environ=conf, policy=RetryPolicy(attempts=1), timeouts=Timeouts(read_s=3600, stall_s=3600))
    with FaultProxy(upstream.host, on("GET", "/blobs/", Fault(stall_after=1000), first=99)) as proxy, api:
        reader = api.open_blob(Reference.parse(f"{proxy.host}/faults/abort"), described)
        timer = threading.Timer(0.5, api.abort)
        timer.start()
        with pytest.raises(NetworkError):
            reader.read()
        timer.join()
        assert not proxy.stalled_out, "it ended when the server did"


def test_the_answer_to_the_closing_put_is_lost(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    """What arrived is not sent again."""
    data = os.urandom(500_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    rule = on("PUT", "/uploads/", Fault(cut_answer=True))
    with FaultProxy(upstream.host, rule) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/lostanswer")
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described)
        assert proxy.count("PUT", "/uploads/") == 1 and proxy.up_bytes == len(data)


def test_check_push(tmp_path: Path, conf: dict[str, str], upstream: RunningRegistry) -> None:
    with TokenServer({"me": "pw"}) as tokens, docker_registry(tmp_path / "auth", token=tokens) as guarded:
        ref = Reference.parse(f"{guarded.host}/a/b")
        with client(conf) as api, pytest.raises(AuthError, match="cannot push to"):
            api.check_push(ref)
        with client(conf, creds=Credential("me", "pw")) as api:
            api.check_push(ref)
            endpoint = api.resolve_endpoints(ref, for_pull=True)[0]
            assert api.probe(endpoint) == f"http://{guarded.host} answers, and accepts us"
        with client(conf, creds=Credential("me", "no")) as api:
            assert "refused" in api.probe(endpoint)


def test_nothing_secret_is_shown(upstream: RunningRegistry, conf: dict[str, str]) -> None:
    """Not even by the chained tracebacks of --debug."""
    import traceback

    described = pushed(upstream, conf, "faults/secret", DATA)
    secret = "http://127.0.0.1:1/storage?X-Signature=sesame"
    rule = on("GET", "/blobs/", Fault(status=307, headers={"Location": secret}), first=99)
    with (
        FaultProxy(upstream.host, rule) as proxy,
        client(conf, creds=Credential("me", "hunter2")) as api,
        pytest.raises(NetworkError) as caught,
    ):
        api.open_blob(Reference.parse(f"{proxy.host}/faults/secret"), described).read()
    shown = "".join(traceback.format_exception(caught.value))
    assert "sesame" not in shown and "hunter2" not in shown and "refused" in shown


def too_large(limit: int, fault: Fault) -> Rule:
    """A proxy that lets no larger body through."""
    return lambda e: fault if int(e.headers.get("content-length", "0")) > limit else None


@pytest.mark.parametrize(
    ("limit", "fault", "chunks"),
    [
        (4 << 20, Fault(status=413), None),
        (1 << 20, Fault(status=413, headers={"Connection": "close"}), None),
        (1 << 20, Fault(status=413), 3 << 20),
        (4 << 20, Fault(cut_request_at=100_000), None),
        (1 << 20, Fault(status=502), None),
    ],
)
def test_what_is_too_large_for_a_proxy_goes_in_pieces(
    upstream: RunningRegistry, conf: dict[str, str], limit: int, fault: Fault, chunks: int | None
) -> None:
    data = os.urandom(9 << 20)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    with FaultProxy(upstream.host, too_large(limit, fault)) as proxy, client(conf) as api:
        ref = Reference.parse(f"{proxy.host}/faults/large-{limit}")
        if fault.status == 502:
            # A gateway that cannot is not told apart from one that will not: one smaller size is tried, no more.
            with pytest.raises(ServerError):
                api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described)
            return
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, chunk_bytes=chunks)
        sent = [int(e.headers["content-length"]) for e in proxy.log if e.method == "PATCH"]
        assert len(sent) >= 3
        assert sent[-1] <= limit
        assert api.open_blob(Reference.parse(f"{upstream.host}/faults/large-{limit}"), described).read() == data


def test_pieces_are_not_tried_where_they_were_ruled_out_or_do_not_help(
    upstream: RunningRegistry, conf: dict[str, str]
) -> None:
    data = os.urandom(3 << 20)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    for limit, chunks, patches in ((0, 0, 0), (1000, None, 1)):
        with FaultProxy(upstream.host, too_large(limit, Fault(status=413))) as proxy, client(conf) as api:
            ref = Reference.parse(f"{proxy.host}/faults/never")
            with pytest.raises(RegistryError, match="413"):
                api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, chunk_bytes=chunks)
            assert proxy.count("PATCH") == patches
