"""The client's verbs against canned answers: what no docker-registry of the day says."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import responses

from layers.errors import DigestMismatch, SizeMismatch
from layers.oci import MEDIA_OCI_INDEX, MEDIA_OCI_LAYER, MEDIA_OCI_MANIFEST, Descriptor, Digest, Index, Manifest
from registry.client import RegistryClient, fallback_tag
from registry.credentials import Credential, CredentialStore
from registry.errors import (
    AuthError,
    InvalidReference,
    NotFoundError,
    RateLimitError,
    RegistryError,
    ServerError,
)
from registry.hosts import RegistryOptions
from registry.reference import Reference
from registry.retry import Pacer, RetryPolicy

H = "https://h.x"
REF = Reference.parse("h.x/a/b:v1")
CONFIG = Descriptor.of(b"{}", "application/vnd.oci.empty.v1+json")
IMAGE = Manifest.build(config=CONFIG, layers=[])
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=True) as mock:
        yield mock


class Waits(list[float]):
    """Records sleeps rather than sleeping."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def api(tmp_path: Path, waits: Waits) -> Iterator[RegistryClient]:
    with make(tmp_path, waits) as client:
        yield client


def make(tmp_path: Path, waits: Waits, conf: str = "", **options: Any) -> RegistryClient:
    path = tmp_path / "r.conf"
    path.write_text(conf)
    return RegistryClient(
        RegistryOptions(**options),
        environ={"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(path)},
        policy=RetryPolicy(attempts=4, base_s=1, cap_s=8, max_retry_after_s=60),
        pacer=Pacer(sleep=waits, jitter=lambda: 1.0),
    )


def errors(code: str, message: str = "told") -> str:
    return json.dumps({"errors": [{"code": code, "message": message, "detail": {"secret": "x"}}]})


def manifest_headers(raw: bytes = IMAGE.raw) -> dict[str, str]:
    return {"Docker-Content-Digest": Digest.of(raw), "Content-Type": MEDIA_OCI_MANIFEST}


# Manifests


def test_accept_and_no_credentials_by_default(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    found = api.get_manifest(REF)
    assert (found.raw, found.media_type) == (IMAGE.raw, MEDIA_OCI_MANIFEST)
    sent = mocked.calls[0].request.headers
    assert "Authorization" not in sent and MEDIA_OCI_INDEX in sent["Accept"] and "docker.distribution" in sent["Accept"]
    assert sent["User-Agent"].startswith("pybuild/")


def test_a_generic_content_type_gives_way_to_the_documents_own(
    mocked: responses.RequestsMock, api: RegistryClient
) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=JSON)
    assert api.get_manifest(REF).media_type == MEDIA_OCI_MANIFEST


def test_an_empty_manifest(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=b"", headers={"Content-Type": MEDIA_OCI_MANIFEST})
    with pytest.raises(ServerError, match="is empty"):
        api.get_manifest(REF)


def test_an_unknown_digest_algorithm_promises_nothing(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    headers = {**manifest_headers(), "Docker-Content-Digest": "blake3:abc"}
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=headers)
    assert api.get_manifest(REF).digest == IMAGE.descriptor.digest


def test_sha512(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    digest = "sha512:" + hashlib.sha512(IMAGE.raw).hexdigest()
    mocked.get(f"{H}/v2/a/b/manifests/{digest}", body=IMAGE.raw, headers=JSON)
    assert api.get_manifest(REF.with_digest(digest)).digest == digest
    mocked.put(f"{H}/v2/a/b/manifests/{digest}", status=201)
    assert api.put_manifest(REF.with_digest(digest), IMAGE.raw, MEDIA_OCI_MANIFEST).digest == digest


def test_a_lying_digest_header(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    headers = {**manifest_headers(), "Docker-Content-Digest": Digest.of(b"other")}
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=headers)
    with pytest.raises(DigestMismatch, match=r"from h\.x"):
        api.get_manifest(REF)
    mocked.put(f"{H}/v2/a/b/manifests/v1", status=201, headers=headers)
    with pytest.raises(DigestMismatch, match="stored"):
        api.put_manifest(REF, IMAGE.raw, MEDIA_OCI_MANIFEST)


def test_head_without_a_digest_asks_for_the_manifest(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.head(f"{H}/v2/a/b/manifests/v1", headers=JSON)
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    assert api.head_manifest(REF) == IMAGE.descriptor


def test_subject_handled(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.put(f"{H}/v2/a/b/manifests/v1", status=201, headers={"OCI-Subject": CONFIG.digest})
    assert api.put_manifest(REF, IMAGE.raw, MEDIA_OCI_MANIFEST).subject_handled


def test_a_manifest_too_large_to_push(api: RegistryClient) -> None:
    with pytest.raises(SizeMismatch, match="larger"):
        api.put_manifest(REF, b" " * (5 << 20), MEDIA_OCI_MANIFEST)


# Errors and retries


def test_error_documents_are_told_without_their_details(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=404, body=errors("MANIFEST_UNKNOWN", "no\x1b[2J such"), headers=JSON)
    with pytest.raises(NotFoundError) as caught:
        api.get_manifest(REF)
    assert "MANIFEST_UNKNOWN: no [2J such" in str(caught.value) and "secret" not in str(caught.value)
    assert (caught.value.status, caught.value.url) == (404, f"{H}/v2/a/b/manifests/v1")


@pytest.mark.parametrize(
    "body", ["", "<html>", "[]", '{"errors": 5}', '{"errors": [5, {"code": 7}]}', "[" * 5000, "x" * 100_000]
)
def test_odd_error_bodies(mocked: responses.RequestsMock, api: RegistryClient, body: str) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=400, body=body)
    with pytest.raises(RegistryError, match="HTTP 400") as caught:
        api.get_manifest(REF)
    assert len(str(caught.value)) < 600


def test_back_off_grows(mocked: responses.RequestsMock, api: RegistryClient, waits: Waits) -> None:
    for status in (500, 502, 504):
        mocked.get(f"{H}/v2/a/b/manifests/v1", status=status)
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    assert api.get_manifest(REF).raw == IMAGE.raw
    assert round(sum(waits), 3) == 1 + 2 + 4


def test_retry_after_is_kept(mocked: responses.RequestsMock, api: RegistryClient, waits: Waits) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=429, headers={"Retry-After": "30"})
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    api.get_manifest(REF)
    assert round(sum(waits), 3) == 30


def test_a_long_retry_after_is_told_at_once(mocked: responses.RequestsMock, api: RegistryClient, waits: Waits) -> None:
    headers = {"Retry-After": "3600", "ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=429, headers=headers, body=errors("TOOMANYREQUESTS"))
    with pytest.raises(RateLimitError) as caught:
        api.get_manifest(REF)
    assert caught.value.retry_after_s == 3600 and not waits and "0 of 100 pulls left" in str(caught.value.hint)


def test_rate_limit_headers(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    headers = {**manifest_headers(), "ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}
    mocked.head(f"{H}/v2/a/b/manifests/v1", headers={**headers, "Content-Length": "5"})
    limit = api.ratelimit(REF)
    assert limit == api.known_ratelimit("h.x")
    assert limit is not None and (limit.limit, limit.remaining, limit.window_s) == (100, 76, 21600)


def test_absurd_rate_limit_headers(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    headers = {**manifest_headers(), "ratelimit-remaining": f"{'9' * 5000};w={'9' * 5000}", "Content-Length": "5"}
    mocked.head(f"{H}/v2/a/b/manifests/v1", headers=headers)
    limit = api.ratelimit(REF)
    assert limit is not None and (limit.limit, limit.remaining, limit.window_s) == (0, 0, 0)


def test_no_rate_limit(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.head(f"{H}/v2/a/b/manifests/v1", status=404)
    assert api.ratelimit(REF) is None


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("Max retries exceeded with url: /v2/x?sig=sesame"),
        requests.exceptions.ReadTimeout("sesame"),
        requests.exceptions.ChunkedEncodingError("sesame"),
    ],
)
def test_errors_of_requests_are_never_quoted(
    mocked: responses.RequestsMock, api: RegistryClient, error: Exception
) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=error)
    with pytest.raises(RegistryError) as caught:
        api.get_manifest(REF)
    assert "sesame" not in str(caught.value) and caught.value.exit_code == 6


# Authentication


def test_tokens_are_asked_once_and_for_what_the_registry_wants(
    mocked: responses.RequestsMock, tmp_path: Path, waits: Waits
) -> None:
    challenge = {"WWW-Authenticate": 'Bearer realm="https://auth.x/t",service="s",scope="repository:real/name:pull"'}
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers=challenge)
    mocked.get("https://auth.x/t", json={"token": "tok"})
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    with make(tmp_path, waits, creds=Credential("me", "pw")) as api:
        api.get_manifest(REF)
    asked = mocked.calls[1].request
    assert "scope=repository%3Aa%2Fb%3Apull&scope=repository%3Areal%2Fname%3Apull" in str(asked.url)
    assert asked.headers["Authorization"].startswith("Basic ")
    assert mocked.calls[2].request.headers["Authorization"] == "Bearer tok"


def test_credentials_given_for_a_registry_do_not_go_to_its_mirrors(
    mocked: responses.RequestsMock, tmp_path: Path, waits: Waits
) -> None:
    conf = '[[registry]]\nlocation = "h.x"\n[[registry.mirror]]\nlocation = "m.x"\n'
    basic = {"WWW-Authenticate": "Basic realm=x"}
    mocked.get("https://m.x/v2/a/b/manifests/v1", status=401, headers=basic)
    mocked.get("https://m.x/v2/a/b/manifests/v1", status=401, headers=basic)
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers=basic)
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    with make(tmp_path, waits, conf, creds=Credential("me", "pw")) as api:
        api.get_manifest(REF)
    by_host = [(str(c.request.url)[8:11], "Authorization" in c.request.headers) for c in mocked.calls]
    assert ("m.x", True) not in by_host and by_host[-1] == ("h.x", True)


def test_a_token_server_that_stumbles(mocked: responses.RequestsMock, api: RegistryClient, waits: Waits) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers={"WWW-Authenticate": 'Bearer realm="https://auth.x/t"'})
    mocked.get("https://auth.x/t", status=503)
    mocked.get("https://auth.x/t", json={"token": "tok"})
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    api.get_manifest(REF)
    assert sum(waits) > 0


def test_a_password_is_not_carried_along_a_token_servers_redirect(
    mocked: responses.RequestsMock, tmp_path: Path, waits: Waits
) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers={"WWW-Authenticate": 'Bearer realm="https://auth.x/t"'})
    mocked.get("https://auth.x/t", status=302, headers={"Location": "https://evil.x/t"})
    with make(tmp_path, waits, creds=Credential("me", "pw")) as api, pytest.raises(RegistryError, match="302"):
        api.get_manifest(REF)


def test_a_401_without_a_challenge(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401)
    with pytest.raises(AuthError, match="401") as caught:
        api.get_manifest(REF)
    assert "pybuild login h.x" in str(caught.value.hint)


def test_a_helper_is_asked_again_once_its_answer_has_ended(
    mocked: responses.RequestsMock, tmp_path: Path, waits: Waits
) -> None:
    class Store(CredentialStore):
        asked = 0

        def find(self, registry: str, repository: str = "") -> Credential | None:
            self.asked += 1
            return Credential("AWS", f"password-{self.asked}")

    basic = {"WWW-Authenticate": "Basic realm=x"}
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers=basic)
    mocked.get(f"{H}/v2/a/b/manifests/v1", status=401, headers=basic)
    mocked.get(f"{H}/v2/a/b/manifests/v1", body=IMAGE.raw, headers=manifest_headers())
    (tmp_path / "r.conf").touch()
    environ = {"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "r.conf")}
    with RegistryClient(environ=environ, credentials=Store({}), pacer=Pacer(sleep=waits)) as api:
        api.get_manifest(REF)
    sent = [c.request.headers.get("Authorization") for c in mocked.calls]
    assert sent == [None, Credential("AWS", "password-1").basic, Credential("AWS", "password-2").basic]


# Redirects and locations


def test_https_never_leads_to_http(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/blobs/{CONFIG.digest}", status=307, headers={"Location": "http://storage.x/b?sig=sesame"})
    with pytest.raises(ServerError, match="from https to http") as caught:
        api.open_blob(REF, CONFIG)
    assert "sesame" not in str(caught.value)


def test_an_upload_location_of_the_same_host_is_upgraded_to_https(
    mocked: responses.RequestsMock, api: RegistryClient
) -> None:
    """As registries behind a TLS proxy that they do not know of send it."""
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "http://h.x/up?_state=s"})
    mocked.put(f"{H}/up", status=201)
    api.upload_blob(REF, lambda o: iter([b"{}"]), CONFIG)
    assert str(mocked.calls[1].request.url).startswith(f"{H}/up?_state=s&digest=sha256")


def test_an_upload_location_elsewhere_is_not_plain_http(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "http://storage.x/up?_state=sesame"})
    with pytest.raises(ServerError, match="from https to http") as caught:
        api.upload_blob(REF, lambda o: iter([b"{}"]), CONFIG)
    assert "sesame" not in str(caught.value)


def test_a_redirected_put_is_sent_again(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.put(f"{H}/v2/a/b/manifests/v1", status=307, headers={"Location": f"{H}/other"})
    mocked.put(f"{H}/other", status=201)
    api.put_manifest(REF, IMAGE.raw, MEDIA_OCI_MANIFEST)
    mocked.put(f"{H}/v2/a/b/manifests/v2", status=302, headers={"Location": f"{H}/other"})
    with pytest.raises(ServerError, match="302"):
        api.put_manifest(REF.with_tag("v2"), IMAGE.raw, MEDIA_OCI_MANIFEST)


# Uploads


def test_chunks_no_smaller_than_the_registry_wants(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    data = bytes(range(100))
    described = Descriptor.of(data, MEDIA_OCI_LAYER)
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up", "OCI-Chunk-Min-Length": "60"})
    mocked.patch(f"{H}/up", status=202, headers={"Location": "/up2", "Range": "0-59"})
    mocked.patch(f"{H}/up2", status=202, headers={"Location": "/up3", "Range": "0-99"})
    mocked.put(f"{H}/up3", status=201)
    api.upload_blob(REF, lambda o: iter([data[o:]]), described, chunk_bytes=10)
    ranges = [c.request.headers["Content-Range"] for c in mocked.calls if c.request.method == "PATCH"]
    assert ranges == ["0-59", "60-99"]


def test_a_minimum_that_would_fill_the_memory_is_refused(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    headers = {"Location": "/up", "OCI-Chunk-Min-Length": "99999999999999"}
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers=headers)
    with pytest.raises(ServerError, match="pieces"):
        api.upload_blob(REF, lambda o: iter([b"x"]), None)


def test_a_registry_without_chunks_gets_one_put(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    data = b"x" * 50
    described = Descriptor.of(data, MEDIA_OCI_LAYER)
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up"})
    mocked.patch(f"{H}/up", status=405)
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/again"})
    mocked.put(f"{H}/again", status=201)
    api.upload_blob(REF, lambda o: iter([data[o:]]), described, chunk_bytes=10)


def test_an_interrupted_put_goes_on_where_the_registry_stands(
    mocked: responses.RequestsMock, api: RegistryClient
) -> None:
    """As distribution 3 and others answer: a status request knows what arrived."""
    data = bytes(range(200))
    described = Descriptor.of(data, MEDIA_OCI_LAYER)
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up"})
    mocked.put(f"{H}/up", body=requests.ConnectionError(ConnectionResetError(104, "reset")))
    mocked.get(f"{H}/up", status=204, headers={"Location": "/now", "Range": "0-149"})
    mocked.patch(f"{H}/now", status=202, headers={"Location": "/then", "Range": "0-199"})
    mocked.put(f"{H}/then", status=201)
    seen: list[int] = []
    api.upload_blob(REF, lambda o: iter([data[o:]]), described, seen.append)
    assert seen[-1] == 200
    patch = next(c.request for c in mocked.calls if c.request.method == "PATCH")
    assert patch.headers["Content-Range"] == "150-199" and patch.headers["Content-Length"] == "50"
    assert patch.body is not None and b"".join(patch.body) == data[150:]  # type: ignore[arg-type]


def test_a_registry_that_forgets_is_not_fed_for_ever(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    data = bytes(200)
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up"})
    mocked.put(f"{H}/up", body=requests.ConnectionError(ConnectionResetError(104, "reset")))
    mocked.get(f"{H}/up", status=204, headers={"Location": "/up", "Range": "0-149"})
    mocked.patch(f"{H}/up", status=202, headers={"Location": "/up", "Range": "0-199"})
    with pytest.raises(RegistryError, match="reset"):
        api.upload_blob(REF, lambda o: iter([data[o:]]), Descriptor.of(data, MEDIA_OCI_LAYER))
    assert sum(1 for c in mocked.calls if c.request.method == "PUT") == 4


def test_a_digest_that_the_registry_disputes(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up"})
    mocked.put(f"{H}/up", status=400, body=errors("DIGEST_INVALID"))
    with pytest.raises(DigestMismatch, match="another digest"):
        api.upload_blob(REF, lambda o: iter([b"{}"]), CONFIG)


def test_a_chunk_that_half_arrived(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.post(f"{H}/v2/a/b/blobs/uploads/", status=202, headers={"Location": "/up"})
    mocked.patch(f"{H}/up", status=202, headers={"Location": "/up", "Range": "0-3"})
    with pytest.raises(ServerError, match="4 bytes after 5"):
        api.upload_blob(REF, lambda o: iter([b"12345"]), None)


# Blobs


def test_foreign_layers_come_from_their_urls(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    data = b"windows base"
    layer = Descriptor(
        media_type=MEDIA_OCI_LAYER,
        digest=Digest.of(data),
        size_bytes=len(data),
        urls=("http://plain.x/refused", "https://user@evil.x/refused", "https://cdn.x/layer"),
    )
    mocked.get(f"{H}/v2/a/b/blobs/{layer.digest}", status=404)
    mocked.get("https://cdn.x/layer", body=data)
    assert api.open_blob(REF, layer).read() == data


def test_a_blob_moves_to_the_next_endpoint(mocked: responses.RequestsMock, tmp_path: Path, waits: Waits) -> None:
    data = b"layer bytes"
    layer = Descriptor.of(data, MEDIA_OCI_LAYER)
    conf = '[[registry]]\nlocation = "h.x"\n[[registry.mirror]]\nlocation = "m.x/p"\n'
    mocked.get(f"https://m.x/v2/p/a/b/blobs/{layer.digest}", body="wrong length", auto_calculate_content_length=True)
    mocked.get(f"{H}/v2/a/b/blobs/{layer.digest}", body=data)
    with make(tmp_path, waits, conf) as api:
        assert api.open_blob(REF, layer).read() == data
        served = api.served_by(REF)
        assert served is not None and served.host == "h.x"


def test_stat_blob(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.head(f"{H}/v2/a/b/blobs/{CONFIG.digest}", headers={"Content-Length": "2"})
    mocked.head(f"{H}/v2/a/b/blobs/{Digest.of(b'x')}", status=404)
    found = api.stat_blob(REF, CONFIG.digest)
    assert found is not None and found.size_bytes == 2
    assert api.stat_blob(REF, Digest.of(b"x")) is None


# Lists


def test_pages(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(
        f"{H}/v2/a/b/tags/list?n=2",
        json={"tags": ["1", "2"]},
        headers={"Link": '</v2/a/b/tags/list?last=2&n=2>; rel="next"'},
    )
    mocked.get(
        f"{H}/v2/a/b/tags/list?last=2&n=2",
        json={"tags": ["3"]},
        headers={"Link": f'<{H}/prev>; rel="prev", <{H}/v2/a/b/tags/list?last=3>; rel=next'},
    )
    mocked.get(f"{H}/v2/a/b/tags/list?last=3", json={"tags": None})
    assert list(api.list_tags(REF, page_size=2)) == ["1", "2", "3"]


def test_pages_without_end(
    mocked: responses.RequestsMock, api: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.client.MAX_LISTS_BYTES", 5000)
    count = itertools.count()

    def page(_request: object) -> tuple[int, dict[str, str], str]:
        number = next(count)
        return (
            200,
            {"Link": f'</v2/a/b/tags/list?last={number}>; rel="next"'},
            json.dumps({"tags": [f"t{number}"] * 50}),
        )

    mocked.add_callback(responses.GET, f"{H}/v2/a/b/tags/list", callback=page)
    with pytest.raises(ServerError, match="the pages have more"):
        list(api.list_tags(REF))
    assert next(count) < 50


def test_pages_in_a_circle(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    for _ in range(2):
        mocked.get(f"{H}/v2/_catalog", json={"repositories": ["a"]}, headers={"Link": '</v2/_catalog>; rel="next"'})
    with pytest.raises(ServerError, match="circle"):
        list(api.catalog("h.x"))


@pytest.mark.parametrize("body", ["[]", "{", '{"tags": "x"}', '{"tags": [1]}', '{"tags": ["%s"]}' % ("9" * 5000)])
def test_lists_that_are_none(mocked: responses.RequestsMock, api: RegistryClient, body: str) -> None:
    mocked.get(f"{H}/v2/a/b/tags/list", body=body)
    with pytest.raises(ServerError, match="cannot list the tags"):
        list(api.list_tags(REF))


def entry(name: str, kind: str) -> Descriptor:
    return Descriptor(media_type=MEDIA_OCI_MANIFEST, digest=Digest.of(name.encode()), size_bytes=3, artifact_type=kind)


def test_referrers_api_with_pages_and_a_filter_that_was_ignored(
    mocked: responses.RequestsMock, api: RegistryClient
) -> None:
    subject = IMAGE.descriptor.digest
    first, second = Index.build([entry("1", "x"), entry("2", "y")]), Index.build([entry("3", "x")])
    headers = {"Content-Type": MEDIA_OCI_INDEX, "Link": '</v2/a/b/referrers/next>; rel="next"'}
    mocked.get(f"{H}/v2/a/b/referrers/{subject}?artifactType=x", body=first.raw, headers=headers)
    mocked.get(f"{H}/v2/a/b/referrers/next", body=second.raw, headers={"Content-Type": MEDIA_OCI_INDEX + "; charset=x"})
    assert [d.digest for d in api.referrers(REF, subject, "x")] == [Digest.of(b"1"), Digest.of(b"3")]


def test_a_page_of_html_is_no_referrers_api(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    subject = IMAGE.descriptor.digest
    mocked.get(f"{H}/v2/a/b/referrers/{subject}", body="<html>", headers={"Content-Type": "text/html"})
    listed = Index.build([entry("1", "x")])
    mocked.get(f"{H}/v2/a/b/manifests/{fallback_tag(subject)}", body=listed.raw, headers=JSON)
    assert len(api.referrers(REF, subject)) == 1


def test_fallback_tag_of_a_long_digest_is_still_a_tag() -> None:
    assert len(fallback_tag(Digest("sha512:" + "a" * 128))) == 128
    assert fallback_tag(Digest.of(b"")).startswith("sha256-e3b0c442")


# Others


def test_request(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.get(f"{H}/v2/a/b/blobs/x?y=1", body="hello")
    assert api.request("GET", "h.x/v2/a/b/blobs/x?y=1").body == b"hello"
    with pytest.raises(InvalidReference):
        api.request("GET", "https://h.x/other")


def test_delete_of_a_tag_where_it_cannot_be(mocked: responses.RequestsMock, api: RegistryClient) -> None:
    mocked.delete(f"{H}/v2/a/b/manifests/v1", status=400, body=errors("DIGEST_INVALID"))
    with pytest.raises(RegistryError) as caught:
        api.delete_tag(REF)
    assert "by digest" in str(caught.value.hint)
    mocked.delete(f"{H}/v2/a/b/manifests/v2", status=202)
    api.delete_tag(REF.with_tag("v2"))
