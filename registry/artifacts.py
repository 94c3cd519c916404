"""Artifacts: files pushed, pulled and attached as OCI manifests; the one importer of oras.

oras builds the manifests, annotations and archives; every byte travels over our own client, since
oras' transport checks no digest, holds blobs in memory and keeps one token for all hosts (measured:
see the README). `OrasRegistry` is also for users with code written for oras: it is an
`oras.provider.Registry`. Import this module only where an artifact is wanted: it costs 0.2 s.

Spec: image-spec manifest.md, Guidelines for Artifact Usage; distribution-spec, Listing Referrers
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import oras.container
import oras.defaults
import oras.oci
import oras.provider
import oras.utils
import requests

from layers.apply import apply_layer
from layers.errors import PybuildError
from layers.oci import (
    INDEX_MEDIA_TYPES,
    MEDIA_OCI_EMPTY,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    Manifest,
    encode_json,
)
from registry.client import RegistryClient
from registry.errors import NotFoundError, RegistryError
from registry.reference import Reference

TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
DEFAULT_ARTIFACT_TYPE = "application/vnd.unknown.artifact.v1"
DEFAULT_FILE_TYPE = "application/octet-stream"
MAX_TREE_NODES = 10_000
_READ_BYTES = 1 << 18


class ArtifactError(PybuildError):
    """A file to push is missing, or an artifact to pull names files that must not be written."""


class ArtifactFile(NamedTuple):
    """A file or directory to push. A directory becomes a reproducible tar.gz, unpacked again by a pull."""

    path: Path
    media_type: str = ""
    title: str = ""


class ReferrerNode(NamedTuple):
    """A manifest with those that refer to it."""

    descriptor: Descriptor
    referrers: tuple[ReferrerNode, ...]


def push_artifact(
    client: RegistryClient,
    ref: Reference,
    files: Sequence[ArtifactFile],
    *,
    artifact_type: str = DEFAULT_ARTIFACT_TYPE,
    annotations: Mapping[str, str] | None = None,
    subject: Descriptor | None = None,
) -> Descriptor:
    """Push files as one artifact under the tag of `ref`, or by digest alone if it has none.

    Raises: ArtifactError, RegistryError, Cancelled.
    """
    registry = OrasRegistry(client, artifact_type=artifact_type, by_digest=ref.tag is None)
    with _staged(files) as staged:
        registry.titles = [title for _, title in staged]
        try:
            registry.push(
                registry.container_of(ref),
                files=[text for text, _ in staged],
                manifest_annotations=dict(sorted((annotations or {}).items())),
                subject=None
                if subject is None
                else oras.oci.Subject(subject.media_type, str(subject.digest), subject.size_bytes),
                disable_path_validation=True,
                quiet=True,
            )
        except OSError as e:
            raise ArtifactError(f"cannot read {e.filename or 'a file'}: {e.strerror or e}") from e
    assert registry.pushed is not None
    return registry.pushed


def attach(
    client: RegistryClient,
    subject: Reference,
    files: Sequence[ArtifactFile],
    *,
    artifact_type: str = DEFAULT_ARTIFACT_TYPE,
    annotations: Mapping[str, str] | None = None,
) -> Descriptor:
    """Push files as an artifact that refers to what `subject` names.

    Where the registry has no referrers API, the fallback tag lists it. Raises: NotFoundError if there
    is no such subject; ArtifactError, RegistryError, Cancelled.
    """
    described = client.head_manifest(subject.with_default_tag(), for_push=True)
    if described is None:
        raise NotFoundError(f"cannot attach to {subject}: there is no such image", status=404)
    target = subject.without_target()
    return push_artifact(client, target, files, artifact_type=artifact_type, annotations=annotations, subject=described)


def pull_artifact(
    client: RegistryClient, ref: Reference, directory: Path, *, media_types: Sequence[str] = (), overwrite: bool = True
) -> list[Path]:
    """Write an artifact's files into `directory`, which is made if missing; returns their paths.

    Names are confined to the directory, symlinks in it not followed; a blob without a title is named
    by its digest. Files appear whole or not at all. `media_types` restricts which blobs are pulled.
    Raises: ArtifactError, LayerError, RegistryError, DigestMismatch, Cancelled.
    """
    fetched = client.get_manifest(ref.with_default_tag())
    if fetched.media_type in INDEX_MEDIA_TYPES:
        raise ArtifactError(f"{ref} is an index, not an artifact", hint="name one of its manifests by digest")
    manifest = Manifest.parse(fetched.raw, fetched.media_type)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for layer in manifest.layers:
        if layer.digest == oras.defaults.blank_config_hash and layer.media_type == MEDIA_OCI_EMPTY:
            continue
        if media_types and layer.media_type not in media_types:
            continue
        path = directory / safe_name(layer.annotations.get(TITLE) or str(layer.digest))
        if not overwrite and os.path.lexists(path):
            continue
        if _is_packed(layer):
            parent = _open_parent(directory, path.relative_to(directory).parts)
            try:
                with io.BufferedReader(client.open_blob(ref, layer)) as reader:
                    apply_layer(reader, Path(f"/proc/self/fd/{parent}"), whiteouts="keep", keep_owners=False)
            finally:
                os.close(parent)
        else:
            _write(client, ref, layer, directory, path)
        written.append(path)
    return written


def tree(client: RegistryClient, ref: Reference, artifact_type: str | None = None) -> ReferrerNode:
    """What `ref` names, with its referrers, theirs, and so on.

    Raises: NotFoundError, RegistryError; ArtifactError for a tree of more than MAX_TREE_NODES; Cancelled.
    """
    root = client.head_manifest(ref.with_default_tag())
    if root is None:
        raise NotFoundError(f"there is no {ref}", status=404)
    count = 0

    def node(descriptor: Descriptor, above: frozenset[Digest]) -> ReferrerNode:
        nonlocal count
        count += 1
        if count > MAX_TREE_NODES or len(above) > 100:
            raise ArtifactError(f"{ref} has more referrers than can be listed")
        # A subject is a digest, so an honest tree has no circle; a fallback tag's list may claim one.
        found = [] if descriptor.digest in above else client.referrers(ref, descriptor.digest, artifact_type)
        return ReferrerNode(descriptor, tuple(node(d, above | {descriptor.digest}) for d in found))

    return node(root, frozenset())


def safe_name(title: str) -> Path:
    """A relative path for a blob's title. Raises: ArtifactError for one that would lead elsewhere."""
    parts = title.split("/")
    usable = title.isprintable() and len(title) <= 4096 and "\\" not in title
    if not usable or any(p in {"", ".", ".."} or len(p.encode()) > 255 for p in parts):
        raise ArtifactError(f"the artifact names a file {title[:100]!r}, which is not a plain relative path")
    return Path(*parts)


class OrasRegistry(oras.provider.Registry):  # type: ignore[misc]  # oras is untyped
    """oras' registry object over our client: credentials, tokens, retries and checks are ours.

    `pushed` is the descriptor of the last manifest pushed. oras' `login`, `tls_verify` and `insecure`
    have no say here: the client's own options do.
    """

    def __init__(
        self,
        client: RegistryClient,
        hostname: str | None = None,
        *,
        artifact_type: str | None = None,
        by_digest: bool = False,
    ) -> None:
        super().__init__(hostname=hostname)
        self.auth = _OurAuth()
        self.client = client
        self.titles: list[str] = []
        self.pushed: Descriptor | None = None
        self._artifact_type = artifact_type
        self._by_digest = by_digest

    def container_of(self, ref: Reference) -> oras.container.Container:
        """oras' form of a reference, without oras' parsing: that takes localhost/x for Docker Hub's."""
        container = oras.container.Container(ref.path, registry=ref.domain)
        container.registry = ref.domain
        container.namespace, _, container.repository = ref.path.rpartition("/")
        container.tag = ref.tag or oras.defaults.default_tag
        container.digest = ref.digest
        return container

    def get_container(self, name: Any) -> oras.container.Container:
        if isinstance(name, oras.container.Container):
            return name
        text = str(name)
        if self.hostname and not text.startswith(self.hostname + "/"):
            text = f"{self.hostname}/{text}"
        return self.container_of(Reference.parse(text))

    def upload_blob(
        self,
        blob: str,
        container: Any,
        layer: dict[str, Any],
        do_chunked: bool = False,
        chunk_size: int = oras.defaults.default_chunksize,
    ) -> requests.Response:
        ref = self._ref(container)
        described = Descriptor(media_type=layer["mediaType"], digest=Digest(layer["digest"]), size_bytes=layer["size"])
        if not self.client.has_blob(ref, described.digest):
            path = os.path.abspath(blob)

            def source(offset: int) -> Any:
                f = open(path, "rb")  # noqa: SIM115  the uploader closes it
                f.seek(offset)
                return f

            self.client.upload_blob(ref, source, described, chunk_bytes=chunk_size if do_chunked else None)
        return _response(201, described.digest)

    def download_blob(self, container: Any, digest: str, outfile: str) -> str:
        ref = self._ref(container)
        described = self.client.stat_blob(ref, Digest(digest))
        if described is None:
            raise NotFoundError(f"{ref.repository} has no blob {digest}", status=404)
        path = Path(os.path.abspath(outfile))
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.client, ref, described, path.parent, path)
        return outfile

    def get_manifest(
        self,
        container: Any,
        allowed_media_type: list[str] | None = None,
        validation_schema: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        accept = tuple(allowed_media_type or oras.defaults.default_manifest_accepted_media_types)
        fetched = self.client.get_manifest(self._ref(container), accept)
        response = _response(200, fetched.digest, fetched.raw)
        manifest: dict[str, Any] = response.json()
        if validation_schema:
            oras.provider.jsonschema.validate(manifest, schema=validation_schema)
        return manifest

    def upload_manifest(self, manifest: dict[str, Any], container: Any) -> requests.Response:
        document = self._completed(manifest)
        raw = encode_json(document)
        ref = self._ref(container)
        if self._by_digest:
            ref = ref.with_digest(Digest.of(raw))
        media_type = document.get("mediaType") or MEDIA_OCI_MANIFEST
        result = self.client.put_manifest(ref, raw, media_type)
        self.pushed = Descriptor(
            media_type=media_type,
            digest=result.digest,
            size_bytes=len(raw),
            artifact_type=document.get("artifactType") or document["config"]["mediaType"],
            annotations=document.get("annotations") or {},
        )
        subject = document.get("subject")
        if subject and not result.subject_handled:
            self.client.add_referrer(ref, Digest(subject["digest"]), self.pushed)
        return _response(201, result.digest)

    def pull(
        self,
        target: str,
        config_path: str | None = None,
        allowed_media_type: list[str] | None = None,
        overwrite: bool = True,
        outdir: str | None = None,
    ) -> list[str]:
        """Like oras', but confined: its unpacking follows the links of a hostile archive."""
        self.auth.load_configs(target, [config_path] if config_path else None)
        directory = Path(outdir or tempfile.mkdtemp(prefix="artifact-"))
        ref = self._ref(self.get_container(target))
        found = pull_artifact(self.client, ref, directory, media_types=allowed_media_type or (), overwrite=overwrite)
        return [str(path) for path in found]

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: dict[str, Any] | bytes | None = None,
        headers: dict[str, Any] | None = None,
        json: dict[str, Any] | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """Any other request of oras', as ours. A refusal is an answer here, as oras expects it."""
        if isinstance(data, dict):
            raise TypeError("form data has no place in the distribution protocol")
        body = encode_json(json) if json is not None else data
        try:
            reply = self.client.request(method, url, headers={k: str(v) for k, v in (headers or {}).items()}, body=body)
        except RegistryError as e:
            if e.status is None:
                raise
            return _response(e.status, None, encode_json({"errors": [{"code": c, "message": str(e)} for c in e.codes]}))
        response = _response(reply.status, None, reply.body)
        response.headers.update(reply.headers)
        response.url = reply.url
        return response

    def _completed(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """oras' manifest in image-spec 1.1's form: the artifact's type, the empty config, our titles."""
        document = dict(manifest)
        if self._artifact_type:
            document = {"schemaVersion": 2, "mediaType": document.get("mediaType"), "artifactType": self._artifact_type}
            document |= {k: v for k, v in manifest.items() if k not in document}
            if document["config"]["digest"] == oras.defaults.blank_config_hash:
                document["config"] = {**document["config"], "mediaType": MEDIA_OCI_EMPTY}
        if self.titles:
            layers = []
            for layer, title in zip(document["layers"], self.titles, strict=True):
                annotations = {**layer.get("annotations", {}), TITLE: title}
                if layer["mediaType"] == oras.defaults.default_blob_dir_media_type:
                    annotations[UNPACK] = "true"
                layers.append({**layer, "annotations": annotations})
            document["layers"] = layers
        if not document.get("annotations"):
            document.pop("annotations", None)
        return document

    def _ref(self, container: Any) -> Reference:
        found = self.get_container(container)
        ref = Reference.parse(f"{found.registry}/{found.api_prefix}")
        return ref.with_digest(found.digest) if found.digest else ref.with_tag(found.tag)


class _OurAuth:
    """Stands where oras looks for its own authentication: the client has done all of it."""

    def load_configs(self, container: Any, configs: list[str] | None = None) -> None:
        if configs:
            raise ArtifactError("credentials are configured on the client: RegistryOptions(authfile=…)")

    def logout(self, hostname: str) -> None:
        raise ArtifactError("log out with `pybuild logout`, or registry.credentials.CredentialStore.erase")


@contextlib.contextmanager
def _staged(files: Sequence[ArtifactFile]) -> Iterator[list[tuple[str, str]]]:
    """oras' `path:type` texts with the titles: directories packed, a path with a colon (none there may) as a link."""
    with tempfile.TemporaryDirectory(prefix="artifact-") as scratch:
        staged = []
        for number, file in enumerate(files):
            path = os.path.abspath(file.path)
            if not os.path.exists(path):
                raise ArtifactError(f"cannot push {file.path}: no such file")
            title = file.title or os.path.basename(path)
            safe_name(title)
            media_type = file.media_type or DEFAULT_FILE_TYPE
            if os.path.isdir(path):
                # oras itself would leave a directory in /tmp, and after an error its archive, too.
                media_type = file.media_type or oras.defaults.default_blob_dir_media_type
                try:
                    path = oras.utils.make_targz(path, os.path.join(scratch, str(number)))
                except OSError as e:
                    raise ArtifactError(f"cannot read {e.filename or file.path}: {e.strerror or e}") from e
            elif ":" in path:
                link = os.path.join(scratch, str(number))
                os.symlink(path, link)
                path = link
            staged.append((f"{path}:{media_type}", title))
        yield staged


def _is_packed(layer: Descriptor) -> bool:
    """Whether a blob is a directory's archive: by oras' annotation, or as oras-py tells it, by its type."""
    marked = layer.annotations.get(UNPACK)
    if marked is not None:
        return marked == "true"
    title = layer.annotations.get(TITLE, "")
    packed = layer.media_type == oras.defaults.default_blob_dir_media_type
    return packed and bool(title) and not title.endswith((".tar.gz", ".tgz"))


def _write(client: RegistryClient, ref: Reference, descriptor: Descriptor, directory: Path, path: Path) -> None:
    """Write a verified blob to `path` below `directory`, atomically, following no symlink below it."""
    parent = _open_parent(directory, path.relative_to(directory).parts)
    temporary = f".artifact-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o666, dir_fd=parent)
        try:
            with open(fd, "wb") as out, client.open_blob(ref, descriptor) as reader:
                while data := reader.read(_READ_BYTES):
                    out.write(data)
            os.rename(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            os.unlink(temporary, dir_fd=parent)
            raise
    except OSError as e:
        raise ArtifactError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        os.close(parent)


def _open_parent(directory: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of the directory that `parts` lies in, made if missing, reached without symlinks."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    current = os.open(directory, flags)
    try:
        for part in parts[:-1]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, dir_fd=current)
            try:
                following = os.open(part, flags | os.O_NOFOLLOW, dir_fd=current)
            except OSError as e:
                if e.errno in {errno.ELOOP, errno.ENOTDIR}:
                    raise ArtifactError(f"{'/'.join(parts)}: {part} is not a directory of {directory}") from e
                raise
            os.close(current)
            current = following
    except BaseException:
        os.close(current)
        raise
    return current


def _response(status: int, digest: str | None, body: bytes = b"") -> requests.Response:
    response = requests.Response()
    response.status_code = status
    response._content = body
    if digest:
        response.headers["Docker-Content-Digest"] = digest
    return response
