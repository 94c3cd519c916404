"""The distribution-spec's verbs: what pybuild, and other Python programs, ask of a registry.

`RegistryClient` is thread-safe; one serves a whole command, with its connections, tokens and what it
learned of hosts. Pulls try the endpoints that the configuration names, in order; pushes go to the
registry itself. Copying images is `registry.copy`'s business.

Spec: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from layers.errors import ContentError, DigestMismatch, PybuildError, SizeMismatch
from layers.oci import (
    MAX_MANIFEST_BYTES,
    MEDIA_DOCKER_INDEX,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_INDEX,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
)
from layers.values import NamedTuple
from registry.answers import described, json_object, next_link, verified_manifest
from registry.auth import CATALOG_SCOPE, Scope
from registry.blobs import BlobReader
from registry.errors import InvalidReference, NotFoundError, RegistryError, ServerError, redact_url
from registry.hosts import Endpoint, HostConfig, RegistryOptions
from registry.http import Timeouts
from registry.reference import Reference
from registry.retry import CancelCheck, Pacer, RetryPolicy
from registry.transport import RawManifest
from registry.uploads import Progress, Source, Uploader, UploadSession
from registry.wire import Call, RateLimit, Reply, Wire, location_of

if TYPE_CHECKING:
    import hashlib

    from registry.credentials import CredentialStore

MANIFEST_ACCEPT = (MEDIA_OCI_INDEX, MEDIA_OCI_MANIFEST, MEDIA_DOCKER_INDEX, MEDIA_DOCKER_MANIFEST)
MAX_LIST_BYTES = 16 << 20
MAX_LISTS_BYTES = 64 << 20
"""Of all pages of a list: what is asked for is held in memory."""
MAX_LIST_PAGES = 10_000
MAX_TAG_CHARS = 128
_MAX_PARTS = 1000
"""Manifests and blobs that are remembered by whom they were served: for people, of one repository."""
_T = TypeVar("_T")


class PutManifest(NamedTuple):
    """What became of a manifest: its digest, and whether the referrers API took note of its subject."""

    digest: Digest
    subject_handled: bool


class RegistryClient:
    """A registry client. Close it, or use it in a `with`, to end its connections."""

    def __init__(
        self,
        options: RegistryOptions | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        cancelled: CancelCheck | threading.Event | None = None,
        policy: RetryPolicy | None = None,
        timeouts: Timeouts | None = None,
        credentials: CredentialStore | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.hosts = HostConfig(options, os.environ if environ is None else environ)
        self._pacer = pacer or Pacer(cancelled)
        policy = policy or (options.retry if options is not None else None)
        self._wire = Wire(self.hosts, self._pacer, policy=policy, timeouts=timeouts, credentials=credentials)
        self._lock = threading.Lock()
        self._served: dict[str, Endpoint] = {}
        self._parts: dict[str, dict[Endpoint, list[str]]] = {}

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the pooled connections."""
        self._wire.http.close()

    def abort(self) -> None:
        """Break every connection: calls blocked in other threads raise at once."""
        self._wire.http.abort()

    # Manifests

    def get_manifest(self, ref: Reference, accept: Sequence[str] = MANIFEST_ACCEPT) -> RawManifest:
        """Fetch what `ref` names, verified against its digest and the registry's own.

        Raises: NotFoundError, other RegistryErrors, DigestMismatch, SizeMismatch, ConfigError, Cancelled.
        """

        def fetch(endpoint: Endpoint) -> RawManifest:
            call = self._manifest_call("GET", endpoint, ref, accept)
            reply = self._wire.fetch(endpoint, call, limit=MAX_MANIFEST_BYTES)
            found = verified_manifest(ref, reply, endpoint)
            self._note_part(ref, endpoint, f"manifest {found.digest.short}")
            return found

        return self._pull(ref, fetch)

    def head_manifest(
        self, ref: Reference, accept: Sequence[str] = MANIFEST_ACCEPT, *, for_push: bool = False
    ) -> Descriptor | None:
        """The descriptor of what `ref` names, without its bytes; None if there is nothing.

        A registry that refuses HEAD, or tells no digest, is asked for the manifest itself.
        Raises: RegistryError but NotFoundError, Cancelled.
        """

        def head(endpoint: Endpoint) -> Descriptor:
            call = self._manifest_call("HEAD", endpoint, ref, accept, push=for_push)
            try:
                reply = self._wire.fetch(endpoint, call)
            except RegistryError as e:
                if e.status not in {400, 405, 501}:
                    raise
                reply = None
            found = None if reply is None else described(ref, reply)
            if found is None:
                call = call._replace(method="GET")
                reply = self._wire.fetch(endpoint, call, limit=MAX_MANIFEST_BYTES)
                found = verified_manifest(ref, reply, endpoint).descriptor
            return found

        try:
            return head(self._push_endpoint(ref)) if for_push else self._pull(ref, head)
        except NotFoundError:
            return None

    def put_manifest(self, ref: Reference, raw: bytes, media_type: str) -> PutManifest:
        """Store a manifest under the tag of `ref`, or under its own digest.

        A manifest with a `subject` that the registry's referrers API takes no note of is added to the
        fallback tag by `add_referrer`. Raises: RegistryError, DigestMismatch, SizeMismatch, Cancelled.
        """
        if len(raw) > MAX_MANIFEST_BYTES:
            raise SizeMismatch(f"manifest of {len(raw)} bytes is larger than the {MAX_MANIFEST_BYTES} allowed")
        digest = Digest.of(raw)
        if ref.digest is not None:
            hasher = ref.digest.hasher()
            hasher.update(raw)
            if Digest.from_hasher(hasher) != ref.digest:
                raise DigestMismatch(f"the manifest to push is {digest}, not {ref.digest}")
            digest = ref.digest
        target = ref.tag if ref.tag is not None and ref.digest is None else digest
        endpoint = self._push_endpoint(ref)
        call = Call(
            "PUT",
            f"{endpoint.repository}/manifests/{target}",
            f"cannot push manifest {ref}",
            (Scope.repository(endpoint.repository, "pull", "push"),),
            (201, 200, 202),
            {"Content-Type": media_type},
            lambda: (raw,),
            len(raw),
        )
        reply = self._wire.fetch(endpoint, call)
        said = reply.headers.get("Docker-Content-Digest", "")
        if said and said.partition(":")[0] == digest.algorithm and said != digest:
            raise DigestMismatch(f"{endpoint.host} stored {ref} as {said[:80]} instead of {digest}")
        return PutManifest(digest, bool(reply.headers.get("OCI-Subject")))

    def delete_manifest(self, ref: Reference) -> None:
        """Delete the manifest that `ref` names by digest, with every tag on it; a tag is resolved first.

        Raises: NotFoundError, other RegistryErrors, Cancelled.
        """
        if ref.digest is None:
            found = self.head_manifest(ref.with_default_tag(), for_push=True)
            if found is None:
                raise NotFoundError(f"cannot delete {ref}: there is no such manifest", status=404)
            ref = ref.with_digest(found.digest)
        self._delete(ref, f"manifests/{ref.digest}", f"cannot delete {ref}")

    def delete_tag(self, ref: Reference) -> None:
        """Delete a tag and leave its manifest, where the registry can (distribution-spec 1.1).

        Raises: RegistryError with a hint where it cannot; NotFoundError, Cancelled.
        """
        tag = ref.with_default_tag().tag
        if tag is None:
            raise NotFoundError(f"cannot delete the tag of {ref}: it has none", status=404)
        try:
            self._delete(ref, f"manifests/{tag}", f"cannot delete tag {ref}")
        except RegistryError as e:
            if e.status in {400, 405}:
                e.hint = "this registry deletes manifests only, by digest and with all their tags"
            raise

    def delete_blob(self, ref: Reference, digest: Digest) -> None:
        """Delete a blob from a repository. Raises: RegistryError, Cancelled."""
        self._delete(ref, f"blobs/{digest}", f"cannot delete blob {digest} of {ref.repository}")

    # Blobs

    def open_blob(
        self,
        ref: Reference,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        hasher: hashlib._Hash | None = None,
    ) -> BlobReader:
        """A verified, self-resuming stream of a blob; see `BlobReader` for `offset` and `hasher`.

        Foreign layers are read from the descriptor's `urls` once the repository says that it has none.
        Raises: RegistryError, SizeMismatch, Cancelled.
        """
        endpoints = self._blob_endpoints(ref, descriptor.digest)
        what = f"cannot pull blob {descriptor.digest.short} of {ref.repository}"
        pairs = []
        for endpoint in endpoints:
            path = f"{endpoint.repository}/blobs/{descriptor.digest}"
            pairs.append((endpoint, Call("GET", path, what, (Scope.repository(endpoint.repository, "pull"),))))
        for url in descriptor.urls:
            foreign = self._foreign(url)
            if foreign is not None:
                pairs.append((foreign, Call("GET", url, what, ())))

        def served(endpoint: Endpoint, others_useful: bool) -> None:
            if endpoint.repository:
                if not others_useful:
                    self._remember(ref, endpoint)
                self._note_part(ref, endpoint, f"blob {descriptor.digest.short}")

        return BlobReader(self._wire, pairs, descriptor, offset=offset, hasher=hasher, served_by=served)

    def read_range(self, ref: Reference, descriptor: Descriptor, offset: int, size_bytes: int) -> bytes | None:
        """A part of a blob, not verified: that is the caller's. None if the registry knows no ranges.

        Raises: ServerError if the answer is another part; other RegistryErrors, SizeMismatch, Cancelled.
        """
        what = f"cannot pull a part of blob {descriptor.digest.short} of {ref.repository}"
        wanted = f"bytes {offset}-{offset + size_bytes - 1}/"

        def fetch(endpoint: Endpoint) -> bytes | None:
            path = f"{endpoint.repository}/blobs/{descriptor.digest}"
            headers = {"Range": wanted.replace(" ", "=").rstrip("/")}
            call = Call("GET", path, what, (Scope.repository(endpoint.repository, "pull"),), (206,), headers)
            try:
                reply = self._wire.fetch(endpoint, call, limit=size_bytes)
            except ServerError as e:
                if e.status == 200:
                    return None
                raise
            if len(reply.body) != size_bytes or not reply.headers.get("Content-Range", "").startswith(wanted):
                raise ServerError(f"{what}: the answer is another part", url=reply.url)
            return reply.body

        return self._pull(ref.with_digest(descriptor.digest), fetch)

    def has_blob(self, ref: Reference, digest: Digest, *, for_push: bool = True) -> bool:
        """Whether the repository has the blob; a registry that refuses HEAD is asked by GET.

        Raises: RegistryError but NotFoundError, Cancelled.
        """

        def head(endpoint: Endpoint) -> bool:
            actions = ("pull", "push") if for_push else ("pull",)
            call = Call(
                "HEAD",
                f"{endpoint.repository}/blobs/{digest}",
                f"cannot look for blob {digest.short} in {ref.repository}",
                (Scope.repository(endpoint.repository, *actions),),
            )
            try:
                self._wire.open(endpoint, call).discard()
            except RegistryError as e:
                if e.status not in {400, 405, 501}:
                    raise
                self._wire.open(endpoint, call._replace(method="GET")).close()
            return True

        try:
            return head(self._push_endpoint(ref)) if for_push else self._pull(ref, head)
        except NotFoundError:
            return False

    def stat_blob(self, ref: Reference, digest: Digest) -> Descriptor | None:
        """The size of a blob by HEAD, as a descriptor without a media type; None if there is none.

        Raises: ServerError if the registry does not tell the size; RegistryError, Cancelled.
        """

        def head(endpoint: Endpoint) -> Descriptor:
            what = f"cannot look for blob {digest.short} in {ref.repository}"
            scopes = (Scope.repository(endpoint.repository, "pull"),)
            call = Call("HEAD", f"{endpoint.repository}/blobs/{digest}", what, scopes)
            reply = self._wire.fetch(endpoint, call)
            length = reply.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                raise ServerError(f"{what}: the answer has no Content-Length", url=reply.url)
            return Descriptor(media_type="application/octet-stream", digest=digest, size_bytes=int(length[:18]))

        try:
            return self._pull(ref.with_digest(digest), head)
        except NotFoundError:
            return None

    def mount_blob(self, ref: Reference, digest: Digest, from_repository: str) -> bool:
        """Mount a blob from another repository (its path) of the same registry; False if it must be uploaded.

        A registry that will not mount begins an upload instead: it is cancelled.
        Raises: RegistryError, Cancelled.
        """
        endpoint = self._push_endpoint(ref)
        uploader = Uploader(self._wire, endpoint, _no_source, None)
        try:
            location = uploader.mount(digest, from_repository)
        except RegistryError as e:
            if e.status in {400, 401, 403, 404, 405}:
                return False
            raise
        if location is None:
            return True
        self.cancel_upload(UploadSession(endpoint.registry, endpoint.repository, location, 0))
        return False

    def upload_blob(
        self,
        ref: Reference,
        source: Source,
        descriptor: Descriptor | None,
        progress: Progress | None = None,
        *,
        session: UploadSession | None = None,
        save: Callable[[UploadSession | None], None] | None = None,
        chunk_bytes: int | None = None,
        mount_from: str | None = None,
    ) -> Descriptor:
        """Send a blob and return its descriptor.

        `source(offset)` opens its bytes; it is called again after a break. `descriptor` None means
        that digest and size are not known yet. `save` is told each state that another process could
        go on from with `session`, and None at the end. `chunk_bytes` forces PATCHes of that size;
        0 forbids them. `mount_from` is another repository of the registry that may have the blob: if
        so, nothing is sent, and `source` not called. Raises: RegistryError, DigestMismatch, SizeMismatch, Cancelled.
        """
        endpoint = self._push_endpoint(ref)
        uploader = Uploader(
            self._wire,
            endpoint,
            source,
            descriptor,
            progress=progress,
            save=save,
            chunk_bytes=chunk_bytes,
            from_repository=mount_from,
        )
        if session is not None and (session.registry, session.repository) != (endpoint.registry, endpoint.repository):
            session = None
        if session is not None and descriptor is not None and session.digest not in {"", descriptor.digest}:
            session = None
        return uploader.run(session)

    def resume_upload(
        self,
        session: UploadSession,
        source: Source,
        descriptor: Descriptor,
        progress: Progress | None = None,
        *,
        save: Callable[[UploadSession | None], None] | None = None,
    ) -> Descriptor:
        """Go on with an upload of an earlier process; what the registry no longer has is sent again."""
        ref = Reference(session.registry, session.repository)
        return self.upload_blob(ref, source, descriptor, progress, session=session, save=save)

    def cancel_upload(self, session: UploadSession) -> None:
        """Tell the registry to forget an upload; a registry that cannot is no error."""
        ref = Reference(session.registry, session.repository)
        endpoint = self._push_endpoint(ref)
        scopes = (Scope.repository(endpoint.repository, "pull", "push"),)
        call = Call("DELETE", session.location, "cannot cancel an upload", scopes, (202, 204, 200), attempts=1)
        try:
            self._wire.fetch(endpoint, call)
        except RegistryError:
            return

    # Listing

    def list_tags(self, ref: Reference, *, page_size: int | None = None) -> Iterator[str]:
        """The repository's tags in the registry's order, page by page. Raises: RegistryError, Cancelled."""
        what = f"cannot list the tags of {ref.repository}"

        def first(endpoint: Endpoint) -> tuple[Endpoint, Call, Reply]:
            scopes = (Scope.repository(endpoint.repository, "pull"),)
            call = Call("GET", _sized(f"{endpoint.repository}/tags/list", page_size), what, scopes)
            return endpoint, call, self._wire.fetch(endpoint, call, limit=MAX_LIST_BYTES)

        endpoint, call, reply = self._pull(ref, first)
        for tag in self._pages(endpoint, call, reply, "tags"):
            if len(tag) > MAX_TAG_CHARS:
                raise ServerError(f"{what}: one of them has {len(tag)} characters", url=reply.url)
            yield tag

    def catalog(self, registry: str, *, page_size: int | None = None) -> Iterator[str]:
        """The names of a registry's repositories (its own extension). Raises: RegistryError, Cancelled."""
        endpoint = self._push_endpoint(Reference(registry, "catalog"))
        what = f"cannot list the repositories of {registry}"
        call = Call("GET", _sized("_catalog", page_size), what, (CATALOG_SCOPE,))
        reply = self._wire.fetch(endpoint, call, limit=MAX_LIST_BYTES)
        yield from self._pages(endpoint, call, reply, "repositories")

    def referrers(self, ref: Reference, digest: Digest, artifact_type: str | None = None) -> list[Descriptor]:
        """The manifests whose subject is `digest`, by the referrers API or the fallback tag.

        Raises: RegistryError, ImageError, Cancelled.
        """
        found = self._pull(ref, lambda endpoint: self._referrers(endpoint, ref, digest, artifact_type))
        if artifact_type is None:
            return found
        return [d for d in found if d.artifact_type == artifact_type]

    def referrers_api(self, ref: Reference, digest: Digest) -> bool:
        """Whether the registry of `ref` has the referrers API. Raises: RegistryError, Cancelled."""
        return self._referrers_page(self._push_endpoint(ref), ref, digest, None) is not None

    def add_referrer(self, ref: Reference, subject: Digest, referrer: Descriptor) -> None:
        """Add a manifest to the fallback tag of its subject (distribution-spec, Referrers Tag Schema).

        Not atomic: two clients at once may lose an entry, which the spec accepts.
        Raises: RegistryError, ImageError, Cancelled.
        """
        tag_ref = ref.with_tag(fallback_tag(subject))
        try:
            old = self.get_manifest(tag_ref, (MEDIA_OCI_INDEX,))
            entries = list(Index.parse(old.raw, old.media_type).manifests)
        except NotFoundError:
            entries = []
        if all(d.digest != referrer.digest for d in entries):
            index = Index.build([*entries, referrer])
            self.put_manifest(tag_ref, index.raw, index.media_type)

    # Hosts

    def ping(self, registry: str, repository: str = "") -> None:
        """Whether the registry answers, and accepts our credentials.

        Raises: AuthError, NetworkError, other RegistryErrors, Cancelled.
        """
        endpoint = self._push_endpoint(Reference(registry, repository))
        self._wire.fetch(endpoint, Call("GET", "", f"cannot use registry {registry}", ()))

    def check_push(self, ref: Reference) -> None:
        """Find out before a long build whether a push will be allowed: begins an upload and cancels it.

        Raises: AuthError, other RegistryErrors, Cancelled.
        """
        endpoint = self._push_endpoint(ref)
        what = f"cannot push to {ref.repository}"
        scopes = (Scope.repository(endpoint.repository, "pull", "push"),)
        path = f"{endpoint.repository}/blobs/uploads/"
        reply = self._wire.fetch(endpoint, Call("POST", path, what, scopes, (202,), {"Content-Length": "0"}))
        location = location_of(reply, what)
        self.cancel_upload(UploadSession(endpoint.registry, endpoint.repository, location, 0))

    def probe(self, endpoint: Endpoint) -> str:
        """What an endpoint answers, in words, for `registry explain`; a failure is one, too. Raises: Cancelled."""
        try:
            base = self._wire.base(endpoint)
            scopes = (Scope.repository(endpoint.repository, "pull"),)
            self._wire.fetch(endpoint, Call("GET", "", "no", scopes, attempts=1))
        except (RegistryError, ContentError) as e:
            return str(e)
        return f"{base} answers, and accepts us"

    def ratelimit(self, ref: Reference) -> RateLimit | None:
        """The pulls left, by a HEAD, which costs none; None if the registry sets no limit. Raises: RegistryError."""
        self.head_manifest(ref.with_default_tag())
        return self._wire.rate_limits.get(ref.domain)

    def known_ratelimit(self, registry: str) -> RateLimit | None:
        """The pulls left as the registry last told of its own accord; asks nothing."""
        return self._wire.rate_limits.get(registry)

    def known_ratelimits(self) -> dict[str, RateLimit]:
        """The same of every registry that told."""
        return dict(self._wire.rate_limits)

    def resolve_endpoints(self, ref: Reference, *, for_pull: bool) -> list[Endpoint]:
        """The endpoints of `ref` in order. Raises: ConfigError."""
        return self.hosts.resolve_endpoints(ref, for_pull=for_pull)

    def served_by(self, ref: Reference) -> Endpoint | None:
        """The endpoint that last served a pull from the repository."""
        return self._served.get(ref.repository)

    def parts_served(self, ref: Reference) -> dict[Endpoint, tuple[str, ...]]:
        """Which endpoint served which manifests and blobs of the repository, in words; a blob may have had several."""
        with self._lock:
            return {endpoint: tuple(parts) for endpoint, parts in self._parts.get(ref.repository, {}).items()}

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Reply:
        """Any request to `[scheme://]registry/v2/REPOSITORY/…` that no verb covers; answers are bounded as lists are.

        A status of 400 and above is raised. Raises: RegistryError, SizeMismatch, Cancelled.
        """
        domain, mark, path = url.partition("://")[2 if "://" in url else 0].partition("/v2/")
        repository = path.partition("?")[0]
        for verb in ("/manifests/", "/blobs/", "/tags/", "/referrers/"):
            repository = repository.rpartition(verb)[0] or repository
        if not mark:
            raise InvalidReference(f"{redact_url(url)} is not a registry's URL")
        ref = Reference.parse(f"{domain}/{repository.rstrip('/')}")
        endpoint = self._push_endpoint(ref)
        reading = method in {"GET", "HEAD"}
        actions = {"pull"} if reading else {"pull", "push", "delete"} if method == "DELETE" else {"pull", "push"}
        call = Call(
            method,
            path,
            f"{method} {redact_url(url)}",
            (Scope.repository(endpoint.repository, *actions),),
            range(200, 300),
            headers or {},
            None if body is None else lambda: (body,),
            None if body is None else len(body),
        )
        return self._wire.fetch(endpoint, call, limit=MAX_LIST_BYTES)

    # Beneath

    def _push_endpoint(self, ref: Reference) -> Endpoint:
        return self.hosts.resolve_endpoints(ref, for_pull=False)[-1]

    def _pull(self, ref: Reference, ask: Callable[[Endpoint], _T]) -> _T:
        """Ask the endpoints in order until one answers; the last one's error counts, the others' are told."""
        failed: list[str] = []
        endpoints = self.hosts.resolve_endpoints(ref, for_pull=True)
        for endpoint in endpoints:
            try:
                result = ask(endpoint)
            except (RegistryError, ContentError) as e:
                if endpoint is endpoints[-1]:
                    if failed:
                        e.hint = "; ".join(filter(None, (e.hint, "before it: " + "; ".join(failed))))
                    raise
                failed.append(f"{endpoint.host} ({endpoint.origin}): {e}")
                continue
            self._remember(ref, endpoint)
            return result
        raise ServerError(f"no endpoint for {ref}")

    def _remember(self, ref: Reference, endpoint: Endpoint) -> None:
        with self._lock:
            self._served[ref.repository] = endpoint

    def _note_part(self, ref: Reference, endpoint: Endpoint, part: str) -> None:
        with self._lock:
            parts = self._parts.setdefault(ref.repository, {}).setdefault(endpoint, [])
            if part not in parts and len(parts) < _MAX_PARTS:
                parts.append(part)

    def _blob_endpoints(self, ref: Reference, digest: Digest) -> list[Endpoint]:
        """The endpoint that served the manifest first, then the others.

        A blob is content-addressed: mirrors for digests serve it even when the manifest came by tag.
        """
        endpoints = self.hosts.resolve_endpoints(ref.with_digest(digest), for_pull=True)
        served = self._served.get(ref.repository)
        if served is not None and served in endpoints:
            endpoints = [served, *(e for e in endpoints if e != served)]
        return endpoints

    def _foreign(self, url: str) -> Endpoint | None:
        """An endpoint for a foreign layer's URL; https only, since the URL comes from a manifest."""
        if not url.startswith("https://") or not url.isprintable():
            return None
        host = url[len("https://") :].partition("/")[0]
        if "@" in host or not host:
            return None
        return Endpoint(("https",), host, host, "", self.hosts.tls_for(host, insecure=False), "foreign layer")

    def _manifest_call(
        self, method: str, endpoint: Endpoint, ref: Reference, accept: Sequence[str], *, push: bool = False
    ) -> Call:
        actions = ("pull", "push") if push else ("pull",)
        scopes = (Scope.repository(endpoint.repository, *actions),)
        headers = {"Accept": ", ".join(accept)}
        path = f"{endpoint.repository}/manifests/{ref.target}"
        return Call(method, path, f"cannot read {ref}", scopes, (200,), headers)

    def _delete(self, ref: Reference, path: str, what: str) -> None:
        endpoint = self._push_endpoint(ref)
        scopes = (Scope.repository(endpoint.repository, "delete", "pull", "push"),)
        self._wire.fetch(endpoint, Call("DELETE", f"{endpoint.repository}/{path}", what, scopes, (202, 200, 204)))

    def _pages(self, endpoint: Endpoint, call: Call, reply: Reply, key: str) -> Iterator[str]:
        """The names on a page and on those that its Link headers lead to."""
        seen: set[str] = set()
        size = 0
        for _ in range(MAX_LIST_PAGES):
            size += len(reply.body)
            if size > MAX_LISTS_BYTES:
                raise ServerError(f"{call.what}: the pages have more than {MAX_LISTS_BYTES >> 20} MiB", url=reply.url)
            names = json_object(reply, call.what).get(key) or []
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise ServerError(f"{call.what}: the answer has no list of {key}", url=reply.url)
            yield from names
            following = next_link(reply)
            if following is None:
                return
            if following in seen:
                raise ServerError(f"{call.what}: the pages go round in a circle", url=reply.url)
            seen.add(following)
            reply = self._wire.fetch(endpoint, call._replace(path=following), limit=MAX_LIST_BYTES)
        raise ServerError(f"{call.what}: more than {MAX_LIST_PAGES} pages")

    def _referrers(
        self, endpoint: Endpoint, ref: Reference, digest: Digest, artifact_type: str | None
    ) -> list[Descriptor]:
        found: list[Descriptor] = []
        page = self._referrers_page(endpoint, ref, digest, artifact_type)
        if page is None:
            return self._referrers_by_tag(endpoint, ref, digest)
        seen: set[str] = set()
        size = 0
        while page is not None:
            size += len(page.body)
            if size > MAX_LISTS_BYTES:
                raise ServerError(f"the referrers of {digest.short} have more than {MAX_LISTS_BYTES >> 20} MiB")
            found += Index.parse(page.body, MEDIA_OCI_INDEX).manifests
            following = next_link(page)
            if following is None or following in seen or len(seen) > MAX_LIST_PAGES:
                break
            seen.add(following)
            page = self._referrers_page(endpoint, ref, digest, artifact_type, following)
        return found

    def _referrers_page(
        self, endpoint: Endpoint, ref: Reference, digest: Digest, artifact_type: str | None, path: str = ""
    ) -> Reply | None:
        """One page of the API's answer; None where the registry has no such API."""
        if not path:
            path = f"{endpoint.repository}/referrers/{digest}"
            if artifact_type is not None:
                path += "?" + urlencode({"artifactType": artifact_type}, quote_via=quote)
        scopes = (Scope.repository(endpoint.repository, "pull"),)
        headers = {"Accept": MEDIA_OCI_INDEX}
        call = Call("GET", path, f"cannot list the referrers of {ref.repository}@{digest}", scopes, (200,), headers)
        try:
            reply = self._wire.fetch(endpoint, call, limit=MAX_MANIFEST_BYTES)
        except RegistryError as e:
            if e.status in {400, 404, 405, 406, 501}:
                return None
            raise
        # Catch-all front ends answer any path with a page of HTML.
        return reply if reply.headers.get("Content-Type", "").partition(";")[0].strip() == MEDIA_OCI_INDEX else None

    def _referrers_by_tag(self, endpoint: Endpoint, ref: Reference, digest: Digest) -> list[Descriptor]:
        tag_ref = ref.with_tag(fallback_tag(digest))
        call = self._manifest_call("GET", endpoint, tag_ref, (MEDIA_OCI_INDEX,))
        try:
            reply = self._wire.fetch(endpoint, call, limit=MAX_MANIFEST_BYTES)
        except NotFoundError:
            return []
        return list(Index.parse(verified_manifest(tag_ref, reply, endpoint).raw, MEDIA_OCI_INDEX).manifests)


def fallback_tag(digest: Digest) -> str:
    """The tag that lists a subject's referrers where there is no API: algorithm-hex, cut to a tag's length."""
    return f"{digest.algorithm}-{digest.encoded}"[:128]


def _sized(path: str, page_size: int | None) -> str:
    return path if page_size is None else f"{path}?n={page_size}"


def _no_source(offset: int) -> Any:
    raise PybuildError("a mount sends nothing")
