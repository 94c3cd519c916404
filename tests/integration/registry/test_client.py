"""The client against a real docker-registry: every verb, every kind of authentication, TLS, mirrors."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.errors import DigestMismatch, SizeMismatch
from layers.oci import (
    MEDIA_DOCKER_CONFIG,
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_INDEX,
    MEDIA_OCI_LAYER_GZIP,
    Descriptor,
    Digest,
    Index,
    Manifest,
    Platform,
)
from registry.client import RegistryClient, fallback_tag
from registry.credentials import Credential
from registry.errors import AuthError, NetworkError, NotFoundError, RegistryError
from registry.hosts import RegistryOptions
from registry.reference import Reference
from registry.retry import RetryPolicy
from registry.uploads import UploadSession
from tests.integration.registry.servers import (
    FaultProxy,
    ForwardProxy,
    RunningRegistry,
    TlsFiles,
    TokenServer,
    docker_registry,
    get,
    needs_htpasswd,
    needs_registry,
)
from tests.support.ports import free_port

pytestmark = [needs_registry, pytest.mark.registry]

FAST = RetryPolicy(attempts=4, base_s=0.01, cap_s=0.05)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with docker_registry(tmp_path_factory.mktemp("plain")) as running:
        yield running


def client(tmp_path: Path, env: dict[str, str] | None = None, **options: object) -> RegistryClient:
    conf = tmp_path / "empty-registries.conf"
    conf.touch()
    environ = {"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(conf), **(env or {})}
    return RegistryClient(RegistryOptions(**options), environ=environ, policy=FAST)  # type: ignore[arg-type]


def push(api: RegistryClient, ref: Reference, data: bytes, media_type: str = MEDIA_OCI_LAYER_GZIP) -> Descriptor:
    return api.upload_blob(ref, lambda offset: io.BytesIO(data[offset:]), Descriptor.of(data, media_type))


def push_image(api: RegistryClient, ref: Reference, *, subject: Descriptor | None = None, salt: str = "") -> Manifest:
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers"}, "salt": salt}).encode()
    image = Manifest.build(
        config=push(api, ref, config, MEDIA_OCI_CONFIG),
        layers=[push(api, ref, b"layer" + salt.encode())],
        subject=subject,
        artifact_type="application/x-test" if subject else None,
    )
    target = ref if subject is None else ref.with_digest(image.descriptor.digest)
    api.put_manifest(target, image.raw, image.media_type)
    return image


def test_blobs(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/blobs:1")
        data = os.urandom(3_000_000)
        digest = Digest.of(data)
        assert not api.has_blob(ref, digest)
        seen: list[int] = []
        described = api.upload_blob(
            ref, lambda o: io.BytesIO(data[o:]), Descriptor.of(data, MEDIA_OCI_LAYER_GZIP), seen.append
        )
        assert described.digest == digest and seen[-1] == len(data) and seen == sorted(seen)
        assert api.has_blob(ref, digest) and api.has_blob(ref, digest, for_push=False)
        assert api.open_blob(ref, described).read() == data
        assert api.open_blob(ref, described, offset=2_999_999).read() == data[-1:]
        assert api.open_blob(ref, described, offset=len(data)).read() == b""
        hasher = digest.hasher()
        hasher.update(data[:1000])
        assert io.BufferedReader(api.open_blob(ref, described, 1000, hasher=hasher)).read() == data[1000:]
        api.delete_blob(ref, digest)
        assert not api.has_blob(ref, digest)


def test_empty_blob(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/empty")
        described = push(api, ref, b"")
        assert api.open_blob(ref, described).read() == b""


def test_a_source_may_be_an_iterable_a_file_or_of_unknown_digest(plain: RunningRegistry, tmp_path: Path) -> None:
    data = os.urandom(20_000_000)
    (tmp_path / "blob").write_bytes(data)
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/unknown")
        found = api.upload_blob(ref, lambda o: iter([data[o : o + 7], data[o + 7 :]]), None)
        assert (found.digest, found.size_bytes) == (Digest.of(data), len(data))
        ref = Reference.parse(f"{plain.host}/verbs/file")

        def opened(offset: int) -> io.BufferedReader:
            f = (tmp_path / "blob").open("rb")
            f.seek(offset)
            return f

        api.upload_blob(ref, opened, found)
        assert api.open_blob(ref, found).read() == data
        assert api.upload_blob(Reference.parse(f"{plain.host}/verbs/nothing"), lambda o: iter(()), None).size_bytes == 0


def test_chunked_upload_and_a_session_of_another_process(plain: RunningRegistry, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    ref = Reference.parse(f"{plain.host}/verbs/chunked")
    states: list[UploadSession | None] = []

    class Died(Exception):
        pass

    def save(session: UploadSession | None) -> None:
        states.append(session)
        if session is not None and session.offset >= 3_000_000:
            raise Died

    with client(tmp_path) as api, pytest.raises(Died):
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, save=save, chunk_bytes=1_500_000)
    last = states[-1]
    assert last is not None and last.offset == 3_000_000
    opened: list[int] = []

    def counted(offset: int) -> io.BytesIO:
        opened.append(offset)
        return io.BytesIO(data[offset:])

    finished: list[UploadSession | None] = []
    with client(tmp_path) as api:
        api.resume_upload(UploadSession.from_json(last.to_json()), counted, described, save=finished.append)
        assert api.open_blob(ref, described).read() == data
    assert min(opened) == 3_000_000 and finished[-1] is None


def test_a_lost_session_is_begun_anew(plain: RunningRegistry, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    lost = UploadSession(
        plain.host, "verbs/lost", f"http://{plain.host}/v2/verbs/lost/blobs/uploads/nope?_state=x", 5, described.digest
    )
    with client(tmp_path) as api:
        api.resume_upload(lost, lambda o: io.BytesIO(data[o:]), described)
        assert api.has_blob(Reference.parse(f"{plain.host}/verbs/lost"), described.digest)


def test_a_session_leads_nowhere_else(plain: RunningRegistry, tmp_path: Path) -> None:
    """A saved session is data: one of another registry or repository is not followed."""
    data = b"x" * 1000
    described = Descriptor.of(data, MEDIA_OCI_LAYER_GZIP)
    foreign = UploadSession("other.example", "verbs/x", "http://127.0.0.1:1/steal", 5, described.digest)
    ref = Reference.parse(f"{plain.host}/verbs/own")
    with client(tmp_path) as api:
        api.upload_blob(ref, lambda o: io.BytesIO(data[o:]), described, session=foreign)
        assert api.has_blob(ref, described.digest)


def test_a_source_that_lies_about_itself(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/liar")
        promised = Descriptor.of(b"a" * 100_000, MEDIA_OCI_LAYER_GZIP)
        with pytest.raises(SizeMismatch, match="ended 99999 bytes"):
            api.upload_blob(ref, lambda o: io.BytesIO(b"a"), promised)
        with pytest.raises(DigestMismatch):
            api.upload_blob(ref, lambda o: io.BytesIO(b"b" * 100_000), promised)
        with pytest.raises(OSError, match="disk"):
            api.upload_blob(ref, broken_disk, promised)
        assert not api.has_blob(ref, promised.digest)


def broken_disk(offset: int) -> Iterator[bytes]:
    yield b"a"
    raise OSError("the disk is gone")


def test_mount(plain: RunningRegistry, tmp_path: Path) -> None:
    data = os.urandom(1000)
    with client(tmp_path) as api:
        first, second = (Reference.parse(f"{plain.host}/mount/{n}") for n in ("first", "second"))
        described = push(api, first, data)
        assert api.mount_blob(second, described.digest, "mount/first")
        assert api.has_blob(second, described.digest)
        assert not api.mount_blob(second, Digest.of(b"nobody has this"), "mount/first")
        third = Reference.parse(f"{plain.host}/mount/third")
        api.upload_blob(third, no_source, described, mount_from="mount/first")
        assert api.has_blob(third, described.digest)
        other = os.urandom(1000)
        fresh = Descriptor.of(other, MEDIA_OCI_LAYER_GZIP)
        api.upload_blob(third, lambda o: io.BytesIO(other[o:]), fresh, mount_from="mount/first")
        assert api.has_blob(third, fresh.digest)
    uploads = plain.storage / "docker/registry/v2/repositories/mount/second/_uploads"
    # docker-registry leaves the hash states of a cancelled upload behind, but not its data.
    assert not list(uploads.glob("*/startedat"))


def no_source(offset: int) -> io.BytesIO:
    raise AssertionError("a mounted blob was read")


def test_manifests(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/manifests:v1")
        assert api.head_manifest(ref) is None
        with pytest.raises(NotFoundError, match="MANIFEST_UNKNOWN") as caught:
            api.get_manifest(ref)
        assert caught.value.exit_code == 4 and caught.value.codes == ("MANIFEST_UNKNOWN",)
        image = push_image(api, ref)
        found = api.get_manifest(ref)
        assert (found.raw, found.media_type, found.digest) == (image.raw, image.media_type, image.descriptor.digest)
        assert api.head_manifest(ref) == image.descriptor == found.descriptor
        by_digest = ref.with_digest(found.digest)
        assert api.get_manifest(by_digest).raw == image.raw
        index = Index.build([image.descriptor])
        api.put_manifest(ref.with_tag("all"), index.raw, index.media_type)
        assert api.get_manifest(ref.with_tag("all")).media_type == MEDIA_OCI_INDEX
        assert sorted(api.list_tags(ref)) == ["all", "v1"]
        with pytest.raises(DigestMismatch):
            api.put_manifest(ref.with_digest(Digest.of(b"")), image.raw, image.media_type)
        api.delete_manifest(ref)
        assert api.head_manifest(ref) is None and api.head_manifest(by_digest) is None
        with pytest.raises(NotFoundError):
            api.delete_manifest(ref)


def test_docker_schema_2(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/docker:1")
        image = Manifest.build(
            config=push(api, ref, b'{"rootfs":{}}', MEDIA_DOCKER_CONFIG),
            layers=[push(api, ref, b"docker layer", MEDIA_DOCKER_LAYER_GZIP)],
            media_type=MEDIA_DOCKER_MANIFEST,
        )
        api.put_manifest(ref, image.raw, image.media_type)
        assert api.get_manifest(ref).media_type == MEDIA_DOCKER_MANIFEST


def test_listing_by_pages(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/pages/many")
        image = push_image(api, ref.with_tag("t0"))
        for n in range(1, 9):
            api.put_manifest(ref.with_tag(f"t{n}"), image.raw, image.media_type)
        assert sorted(api.list_tags(ref)) == [f"t{n}" for n in range(9)]
        # docker-registry 2.8 ignores n for tags; for the catalog it gives Link headers.
        for n in range(3):
            push_image(api, Reference.parse(f"{plain.host}/pages/repo{n}:x"))
        names = list(api.catalog(plain.host, page_size=2))
        assert {"pages/many", "pages/repo0", "pages/repo1", "pages/repo2"} <= set(names)
        assert len(names) == len(set(names))
        with pytest.raises(NotFoundError):
            list(api.list_tags(Reference.parse(f"{plain.host}/no/such")))


def test_referrers_by_the_fallback_tag(plain: RunningRegistry, tmp_path: Path) -> None:
    """docker-registry 2.8 has no referrers API."""
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/refs/app:1")
        image = push_image(api, ref)
        subject = image.descriptor.digest
        assert api.referrers(ref, subject) == [] and not api.referrers_api(ref, subject)
        attached = []
        for salt in "ab":
            artifact = push_image(api, ref, subject=image.descriptor, salt=salt)
            described = Descriptor(
                media_type=artifact.media_type,
                digest=artifact.descriptor.digest,
                size_bytes=len(artifact.raw),
                artifact_type="application/x-test",
            )
            api.add_referrer(ref, subject, described)
            api.add_referrer(ref, subject, described)
            attached.append(described)
        assert [d.digest for d in api.referrers(ref, subject)] == [d.digest for d in attached]
        assert len(api.referrers(ref, subject, "application/x-test")) == 2
        assert api.referrers(ref, subject, "application/x-other") == []
        assert fallback_tag(subject) in set(api.list_tags(ref))


def test_delete_disabled_is_explained(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "r", delete=False) as running, client(tmp_path) as api:
        ref = Reference.parse(f"{running.host}/a/b:1")
        push_image(api, ref)
        with pytest.raises(RegistryError, match=r"405.*UNSUPPORTED") as caught:
            api.delete_manifest(ref)
        assert caught.value.hint


def test_no_registry_there(tmp_path: Path) -> None:
    with client(tmp_path) as api, pytest.raises(NetworkError, match="refused") as caught:
        api.get_manifest(Reference.parse(f"127.0.0.1:{free_port()}/a:b"))
    assert caught.value.exit_code == 6


def test_threads_share_a_client(plain: RunningRegistry, tmp_path: Path) -> None:
    ref = Reference.parse(f"{plain.host}/verbs/threads")
    blobs = [os.urandom(300_000) for _ in range(12)]
    failures: list[Exception] = []
    with client(tmp_path) as api:

        def work(data: bytes) -> None:
            try:
                described = push(api, ref, data)
                assert api.open_blob(ref, described).read() == data
            except Exception as e:  # noqa: BLE001  a thread's failure is the test's
                failures.append(e)

        threads = [threading.Thread(target=work, args=(data,)) for data in blobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []


@needs_htpasswd
def test_basic_auth(tmp_path: Path) -> None:
    with docker_registry(tmp_path / "r", htpasswd={"me": "s3cret:x"}) as running:
        ref = Reference.parse(f"{running.host}/a/b:1")
        with client(tmp_path) as api, pytest.raises(AuthError, match="401") as anonymous:
            api.get_manifest(ref)
        assert anonymous.value.exit_code == 3 and f"login {running.host}" in str(anonymous.value.hint)
        with client(tmp_path, creds=Credential("me", "wrong", origin="--creds")) as api:
            with pytest.raises(AuthError) as wrong:
                api.ping(running.host)
            assert "--creds" in str(wrong.value.hint) and "wrong" not in str(wrong.value)
        with client(tmp_path, creds=Credential("me", "s3cret:x")) as api:
            api.ping(running.host)
            push_image(api, ref)
        auth = base64.b64encode(b"me:s3cret:x").decode()
        for env_name, file_name in (("DOCKER_CONFIG", "config.json"), ("XDG_RUNTIME_DIR", "containers/auth.json")):
            path = tmp_path / env_name / file_name
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"auths": {running.host: {"auth": auth}}}))
            with client(tmp_path, {env_name: str(tmp_path / env_name)}) as api:
                assert api.head_manifest(ref) is not None
        with client(tmp_path, {env_name: str(tmp_path / env_name)}, anonymous=True) as api, pytest.raises(AuthError):
            api.head_manifest(ref)


def test_token_auth(tmp_path: Path) -> None:
    with (
        TokenServer({"me": "pw"}, anonymous_pull=True) as tokens,
        docker_registry(tmp_path / "r", token=tokens) as running,
    ):
        ref = Reference.parse(f"{running.host}/a/b:1")
        with client(tmp_path, creds=Credential("me", "pw")) as api:
            image = push_image(api, ref)
            asked = len(tokens.seen)
            assert asked == 1, tokens.seen
            other = Reference.parse(f"{running.host}/c/d:1")
            assert api.mount_blob(other, image.config.digest, "a/b")
            assert any(len(scopes) == 2 for _, _, scopes in tokens.seen)
            api.delete_manifest(ref)
        with client(tmp_path, creds=Credential("me", "nope")) as api, pytest.raises(AuthError, match="refused"):
            push_image(api, ref)
        with client(tmp_path) as api:
            assert api.head_manifest(ref) is None
            with pytest.raises(AuthError, match=r"401|403"):
                push_image(api, ref)


def test_identity_token_and_a_server_without_get(tmp_path: Path) -> None:
    with (
        TokenServer({"me": "pw"}, allow_get=False) as tokens,
        docker_registry(tmp_path / "r", token=tokens) as running,
    ):
        ref = Reference.parse(f"{running.host}/a/b:1")
        with client(tmp_path, creds=Credential(identity_token="identity-me")) as api:
            push_image(api, ref)
            assert [m for m, _, _ in tokens.seen] == ["POST"]
        with client(tmp_path, creds=Credential("me", "pw")) as api:
            assert api.head_manifest(ref) is not None


def test_tokens_that_end_are_renewed(tmp_path: Path) -> None:
    with (
        TokenServer({"me": "pw"}, lifetime_s=4) as tokens,
        docker_registry(tmp_path / "r", token=tokens) as running,
        client(tmp_path, creds=Credential("me", "pw")) as api,
    ):
        ref = Reference.parse(f"{running.host}/a/b:1")
        push_image(api, ref)
        first = len(tokens.seen)
        threading.Event().wait(4.2)
        assert api.head_manifest(ref) is not None
        assert len(tokens.seen) > first


def test_private_ca_and_client_certificates(tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "tls")
    with docker_registry(tmp_path / "r", tls=tls.server, client_ca=tls.ca) as running:
        ref = Reference.parse(f"{running.host}/a/b:1")
        certs = tmp_path / ".config/containers/certs.d" / running.host
        certs.mkdir(parents=True)
        (certs / "ca.crt").write_bytes(tls.ca.read_bytes())
        with client(tmp_path) as api, pytest.raises(NetworkError):
            api.head_manifest(ref)
        (certs / "client.cert").write_bytes(tls.client[0].read_bytes())
        (certs / "client.key").write_bytes(tls.client[1].read_bytes())
        with client(tmp_path) as api:
            push_image(api, ref)
            assert api.resolve_endpoints(ref, for_pull=True)[0].schemes == ("https",)


def test_trust(tmp_path: Path) -> None:
    tls = TlsFiles(tmp_path / "tls")
    with docker_registry(tmp_path / "r", tls=tls.server) as running:
        ref = Reference.parse(f"{running.host}/a/b:1")
        with client(tmp_path, tls_verify=True) as api, pytest.raises(NetworkError, match="not trusted") as caught:
            api.head_manifest(ref)
        assert not caught.value.retryable and "certs.d" in str(caught.value.hint)
        with client(tmp_path, tls_verify=False) as api:
            push_image(api, ref)
        with client(tmp_path, {"SSL_CERT_FILE": str(tls.ca)}, tls_verify=True) as api:
            assert api.head_manifest(ref) is not None
        with client(tmp_path, ca_file=str(tls.ca), tls_verify=True) as api:
            assert api.head_manifest(ref) is not None
        # Docker trusts what is on this machine.
        with client(tmp_path) as api:
            assert api.head_manifest(ref) is not None


def test_plain_http_where_tls_is_wanted(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path, tls_verify=True) as api, pytest.raises(NetworkError, match="does not speak TLS") as caught:
        api.head_manifest(Reference.parse(f"{plain.host}/a:b"))
    assert "--tls-verify=false" in str(caught.value.hint)


def test_mirrors_are_tried_in_order_and_the_primary_last(tmp_path: Path) -> None:
    with (
        docker_registry(tmp_path / "up") as upstream,
        docker_registry(tmp_path / "mirror", proxy_of=f"http://{upstream.host}") as mirror,
    ):
        with client(tmp_path) as api:
            ref = Reference.parse(f"{upstream.host}/team/app:1")
            image = push_image(api, ref)
        conf = tmp_path / "registries.conf"
        conf.write_text(
            f'[[registry]]\nlocation = "{upstream.host}"\n'
            f'[[registry.mirror]]\nlocation = "127.0.0.1:{free_port()}"\n'
            f'[[registry.mirror]]\nlocation = "{mirror.host}"\n'
        )
        with client(tmp_path, registries_conf=str(conf)) as api:
            assert api.get_manifest(ref).raw == image.raw
            served = api.served_by(ref)
            assert served is not None and served.host == mirror.host and served.origin == f"{conf}:5"
            assert api.open_blob(ref, image.layers[0]).read() == b"layer"
            # What no mirror has comes from the registry itself; what nobody has is not found, and says who was asked.
            with pytest.raises(NotFoundError) as caught:
                api.get_manifest(ref.with_tag("none"))
            assert "refused" in str(caught.value.hint) and mirror.host in str(caught.value.hint)
            push_image(api, ref.with_tag("2"), salt="pushed")
        tags = json.loads(get(f"http://{upstream.host}/v2/team/app/tags/list"))["tags"]
        assert sorted(tags) == ["1", "2"]


def test_proxies(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        push_image(api, Reference.parse(f"{plain.host}/proxied/app:1"))
    ref = Reference.parse("registry.test/proxied/app:1")
    tls = TlsFiles(tmp_path / "tls")
    with docker_registry(tmp_path / "tlsreg", tls=tls.server) as secure:
        with client(tmp_path, ca_file=str(tls.ca)) as api:
            push_image(api, Reference.parse(f"{secure.host}/proxied/app:1"))
        ways = {"registry.test": plain.host, "registry.test:443": secure.host}
        with ForwardProxy(ways, password="u:sesame") as proxy:
            env = {"HTTPS_PROXY": f"http://u:sesame@{proxy.host}", "http_proxy": f"http://u:sesame@{proxy.host}"}
            with client(tmp_path, env, ca_file=str(tls.ca)) as api:
                assert api.head_manifest(ref) is not None
            assert proxy.seen == [("CONNECT", "registry.test:443")]
            del ways["registry.test:443"]
            with client(tmp_path, env, tls_verify=False) as api:
                assert api.get_manifest(ref).raw
            assert ("GET", "http://registry.test/v2/proxied/app/manifests/1") in proxy.seen
            asked = len(proxy.seen)
            with client(tmp_path, {**env, "NO_PROXY": "127.0.0.0/8"}) as api:
                assert api.head_manifest(Reference.parse(f"{plain.host}/proxied/app:1")) is not None
            assert len(proxy.seen) == asked
            wrong = {"HTTPS_PROXY": f"http://u:wrong-sesame@{proxy.host}"}
            with client(tmp_path, wrong) as api, pytest.raises(NetworkError) as caught:
                api.head_manifest(ref)
            shown = "".join(traceback.format_exception(caught.value))
            assert proxy.host in shown and "sesame" not in shown


def test_connections_are_reused(plain: RunningRegistry, tmp_path: Path) -> None:
    with FaultProxy(plain.host) as proxy, client(tmp_path) as api:
        ref = Reference.parse(f"{proxy.host}/verbs/pooled:1")
        image = push_image(api, ref)
        for _ in range(5):
            assert api.get_manifest(ref).raw == image.raw
            assert api.open_blob(ref, image.layers[0]).read() == b"layer"
            assert api.head_manifest(ref.with_tag("none")) is None
        assert len(proxy.log) > 15 and proxy.connections == 1


def test_platform_choice_of_an_index(plain: RunningRegistry, tmp_path: Path) -> None:
    with client(tmp_path) as api:
        ref = Reference.parse(f"{plain.host}/verbs/index:1")
        image = push_image(api, ref)
        entry = Descriptor(
            media_type=image.media_type,
            digest=image.descriptor.digest,
            size_bytes=len(image.raw),
            platform=Platform.parse("linux/arm64"),
        )
        index = Index.build([entry])
        api.put_manifest(ref, index.raw, index.media_type)
        fetched = Index.parse(api.get_manifest(ref).raw)
        assert fetched.select(Platform.parse("linux/arm64")).digest == image.descriptor.digest
