"""The OCI image-spec's values: digests, descriptors, platforms, manifests, indexes, configs.

Pure: no I/O, stdlib only. A parsed document keeps the bytes that it came from (`raw`): digests are
computed from those, and fields that we do not know survive. Docker's schema 2 documents parse into
the same types; schema 1 is refused.

Spec: https://github.com/opencontainers/image-spec (descriptor.md, manifest.md, image-index.md, config.md)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping

from layers.errors import ImageError
from layers.sha import sha256
from layers.values import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib
    from typing import Any

MEDIA_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_OCI_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
MEDIA_OCI_EMPTY = "application/vnd.oci.empty.v1+json"
MEDIA_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MEDIA_DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
MEDIA_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
MEDIA_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
MEDIA_DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
MEDIA_DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
MEDIA_DOCKER_FOREIGN_GZIP = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
MEDIA_DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
MEDIA_DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"

MANIFEST_MEDIA_TYPES = frozenset({MEDIA_OCI_MANIFEST, MEDIA_DOCKER_MANIFEST})
INDEX_MEDIA_TYPES = frozenset({MEDIA_OCI_INDEX, MEDIA_DOCKER_INDEX})

MAX_MANIFEST_BYTES = 4 << 20
"""The distribution-spec's recommended ceiling for a manifest."""
MAX_CONFIG_BYTES = 16 << 20

_HEX_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}


class Digest(str):
    """A content digest, `algorithm:hex`, checked once at construction.

    Raises: ImageError for anything but a well-formed sha256, sha384 or sha512 digest.
    Spec: image-spec descriptor.md, Digests.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Digest:
        algorithm, _, digits = value.partition(":") if isinstance(value, str) else ("", "", "")
        # Not by a pattern: compiling that takes longer than all digests of a start.
        if len(digits) != _HEX_DIGITS.get(algorithm) or digits.strip("0123456789abcdef"):
            raise ImageError(f"invalid digest {_shown(value)}: expected sha256:<64 hex digits>")
        return super().__new__(cls, value)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The sha256 digest of `data`."""
        return str.__new__(cls, "sha256:" + sha256(data).hexdigest())

    @classmethod
    def from_hasher(cls, hasher: hashlib._Hash) -> Digest:
        return str.__new__(cls, f"{hasher.name}:{hasher.hexdigest()}")

    @property
    def algorithm(self) -> str:
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """The hex part."""
        return self.partition(":")[2]

    @property
    def short(self) -> str:
        """The first 12 hex digits, for people."""
        return self.encoded[:12]

    def hasher(self) -> hashlib._Hash:
        """A fresh hash object of this digest's algorithm."""
        import hashlib

        return hashlib.new(self.algorithm)


_KNOWN_SYSTEMS = {
    "aix", "android", "darwin", "dragonfly", "freebsd", "hurd", "illumos", "linux", "netbsd", "openbsd", "plan9",
    "solaris", "windows", "zos",
}  # fmt: skip
_KNOWN_ARCHITECTURES = {
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mipsle", "mips64", "mips64le", "ppc", "ppc64", "ppc64le",
    "riscv", "riscv64", "s390", "s390x", "sparc", "sparc64", "wasm",
}  # fmt: skip
_ARCH_ALIASES = {
    "x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "amd64": ("amd64", ""),
    "aarch64": ("arm64", ""), "arm64": ("arm64", ""),
    "armhf": ("arm", "v7"), "armel": ("arm", "v6"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"),
    "i386": ("386", ""), "i486": ("386", ""), "i586": ("386", ""), "i686": ("386", ""), "386": ("386", ""),
    "ppc64el": ("ppc64le", ""),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and CPU, as in an index's descriptors (image-index.md, `platform`)."""

    os: str = "linux"
    architecture: str = "amd64"
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `os/arch[/variant]`, `arch[/variant]` or `os`, normalised as containerd does it.

        The first part may be `os(version+feature...)`, for what Windows asks.
        Raises: ImageError if the text has an empty part or more than three, or one alone that nobody knows.
        """
        exact = re.fullmatch(r"([A-Za-z0-9_.\-]+)\(([A-Za-z0-9_.\-]*)((?:\+[A-Za-z0-9_.\-]+)*)\)(/.*)?", text.strip())
        if exact is not None:
            plain = cls.parse(exact[1] + (exact[4] or ""))
            features = tuple(exact[3].split("+")[1:])
            return cls(plain.os, plain.architecture, plain.variant, exact[2], features)
        parts = text.strip().lower().split("/")
        if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9_.\-]+", p) for p in parts):
            raise ImageError(f"invalid platform {text!r}: expected os/arch[/variant], such as linux/arm64")
        host = cls.host()
        if len(parts) == 1:
            if parts[0] in _KNOWN_SYSTEMS:
                return cls(os=parts[0], architecture=host.architecture, variant=host.variant)
            found = cls._normalised("linux", parts[0], "")
            if found.architecture not in _KNOWN_ARCHITECTURES:
                raise ImageError(f"invalid platform {text!r}: unknown operating system or architecture")
            return found
        if len(parts) == 2 and (parts[0] in _ARCH_ALIASES or parts[0] in {"arm", "riscv64", "s390x", "ppc64le"}):
            return cls._normalised("linux", parts[0], parts[1])
        return cls._normalised(parts[0], parts[1], parts[2] if len(parts) == 3 else "")

    @classmethod
    def _normalised(cls, os_name: str, arch: str, variant: str) -> Platform:
        name, implied = _ARCH_ALIASES.get(arch, (arch, ""))
        variant = variant or implied
        if name == "arm" and variant.isdigit():
            variant = "v" + variant
        if name == "arm" and not variant:
            variant = "v7"
        if (name == "arm64" and variant in {"v8", "8"}) or (name == "amd64" and variant == "v1"):
            variant = ""
        return cls(os="darwin" if os_name == "macos" else os_name, architecture=name, variant=variant)

    @classmethod
    def host(cls) -> Platform:
        """This machine's platform."""
        return cls._normalised("linux", os.uname().machine.lower(), "")

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Platform:
        base = cls._normalised(
            str(doc.get("os") or "linux"), str(doc.get("architecture") or ""), str(doc.get("variant") or "")
        )
        features = _array(doc.get("os.features") or [], "os.features")
        return cls(
            base.os, base.architecture, base.variant, str(doc.get("os.version") or ""), tuple(map(str, features))
        )

    def to_json(self) -> dict[str, Any]:
        doc: dict[str, Any] = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            doc["os.version"] = self.os_version
        if self.os_features:
            doc["os.features"] = list(self.os_features)
        if self.variant:
            doc["variant"] = self.variant
        return doc

    def runs(self, other: Platform) -> bool:
        """Whether an image for `other` runs on this platform: same OS and CPU, and no newer a variant."""
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        builds = [version.split(".")[:3] for version in (self.os_version, other.os_version) if version]
        if self.os == "windows" and len(builds) == 2 and builds[0] != builds[1]:
            return False  # a container of Windows runs on its own build alone
        return self.variant == other.variant or not other.variant or other.variant < (self.variant or "v0")

    def __str__(self) -> str:
        features = "".join([f"+{feature}" for feature in self.os_features])
        exact = f"({self.os_version}{features})" if self.os_version or features else ""
        return "/".join(filter(None, (self.os + exact, self.architecture, self.variant)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A typed pointer to content (descriptor.md)."""

    media_type: str
    digest: Digest
    size_bytes: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str | None = None
    data: str | None = None

    def __hash__(self) -> int:
        return hash((self.digest, self.media_type))

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Descriptor:
        """The descriptor of these bytes."""
        return cls(media_type=media_type, digest=Digest.of(data), size_bytes=len(data))

    @classmethod
    def from_json(cls, doc: Any) -> Descriptor:
        """Raises: ImageError if a required field is missing or malformed."""
        obj = _object(doc, "descriptor")
        size = obj.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
            raise ImageError(f"descriptor has an invalid size {_shown(size)}")
        platform = obj.get("platform")
        return cls(
            media_type=_text(obj.get("mediaType", ""), "mediaType"),
            digest=Digest(obj.get("digest")),  # type: ignore[arg-type]  # it refuses what is no text
            size_bytes=size,
            urls=tuple(_text(u, "urls") for u in _array(obj.get("urls") or [], "urls")),
            annotations=_string_map(obj.get("annotations"), "annotations"),
            platform=Platform.from_json(_object(platform, "platform")) if platform else None,
            artifact_type=_optional_text(obj.get("artifactType"), "artifactType"),
            data=_optional_text(obj.get("data"), "data"),
        )

    def to_json(self) -> dict[str, Any]:
        doc: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size_bytes}
        if self.urls:
            doc["urls"] = list(self.urls)
        if self.annotations:
            doc["annotations"] = dict(self.annotations)
        if self.data is not None:
            doc["data"] = self.data
        if self.platform is not None:
            doc["platform"] = self.platform.to_json()
        if self.artifact_type:
            doc["artifactType"] = self.artifact_type
        return doc


def encode_json(doc: Any) -> bytes:
    """The bytes of a document we make: compact, insertion order kept, non-ASCII as UTF-8.

    What is no character, such as a stray byte of a Containerfile, is U+FFFD, as Go writes it.
    """
    text = json.dumps(doc, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An image manifest (manifest.md), OCI or Docker schema 2. `raw` is authoritative."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Descriptor | None = None
    artifact_type: str | None = None

    @classmethod
    def parse(cls, raw: bytes, media_type: str = "") -> Manifest:
        """Raises: ImageError if the bytes are not a schema 2 or OCI image manifest."""
        doc = _document(raw, MAX_MANIFEST_BYTES, "manifest")
        _require_schema2(doc)
        declared = _text(doc.get("mediaType") or media_type or MEDIA_OCI_MANIFEST, "mediaType")
        if declared in INDEX_MEDIA_TYPES or "manifests" in doc:
            raise ImageError("expected an image manifest, found an index")
        subject = doc.get("subject")
        return cls(
            raw=raw,
            media_type=declared,
            config=Descriptor.from_json(doc.get("config")),
            layers=tuple(Descriptor.from_json(d) for d in _array(doc.get("layers"), "layers")),
            annotations=_string_map(doc.get("annotations"), "annotations"),
            subject=Descriptor.from_json(subject) if subject else None,
            artifact_type=_optional_text(doc.get("artifactType"), "artifactType"),
        )

    @classmethod
    def build(
        cls,
        *,
        config: Descriptor,
        layers: Iterable[Descriptor],
        annotations: Mapping[str, str] | None = None,
        media_type: str = MEDIA_OCI_MANIFEST,
        subject: Descriptor | None = None,
        artifact_type: str | None = None,
    ) -> Manifest:
        """Serialise a new manifest; equal arguments give equal bytes."""
        doc: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type}
        if artifact_type:
            doc["artifactType"] = artifact_type
        doc["config"] = config.to_json()
        doc["layers"] = [d.to_json() for d in layers]
        if subject is not None:
            doc["subject"] = subject.to_json()
        if annotations:
            doc["annotations"] = dict(sorted(annotations.items()))
        return cls.parse(encode_json(doc), media_type)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor.of(self.raw, self.media_type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An image index or Docker manifest list (image-index.md). `raw` is authoritative."""

    raw: bytes
    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @classmethod
    def parse(cls, raw: bytes, media_type: str = "") -> Index:
        """Raises: ImageError if the bytes are not an index or manifest list."""
        doc = _document(raw, MAX_MANIFEST_BYTES, "index")
        _require_schema2(doc)
        return cls(
            raw=raw,
            media_type=_text(doc.get("mediaType") or media_type or MEDIA_OCI_INDEX, "mediaType"),
            manifests=tuple(Descriptor.from_json(d) for d in _array(doc.get("manifests"), "manifests")),
            annotations=_string_map(doc.get("annotations"), "annotations"),
        )

    @classmethod
    def build(
        cls,
        manifests: Iterable[Descriptor],
        *,
        annotations: Mapping[str, str] | None = None,
        media_type: str = MEDIA_OCI_INDEX,
    ) -> Index:
        """Serialise a new index; equal arguments give equal bytes."""
        doc: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "manifests": [d.to_json() for d in manifests],
        }
        if annotations:
            doc["annotations"] = dict(sorted(annotations.items()))
        return cls.parse(encode_json(doc), media_type)

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor.of(self.raw, self.media_type)

    def select(self, platform: Platform) -> Descriptor:
        """The manifest that `platform` runs best: an exact match, else the highest variant it can run.

        Raises: ImageError naming the platforms that there are.
        """
        able = [d for d in self.manifests if d.platform and platform.runs(d.platform)]
        if not able:
            have = ", ".join(sorted({str(d.platform) for d in self.manifests if d.platform})) or "none named"
            raise ImageError(f"no image for platform {platform} in the index (it has: {have})")
        return max(able, key=lambda d: (d.platform == platform, d.platform.variant if d.platform else ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """An image configuration (config.md). `raw` is authoritative; `document` is its parsed form.

    `config` is the execution part (`Env`, `Cmd`, …) under the spec's own keys. Treat both as
    read-only; to change an image, build a new document and `ImageConfig.build` it.
    """

    raw: bytes
    document: Mapping[str, Any]
    platform: Platform
    diff_ids: tuple[Digest, ...]
    history: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: bytes) -> ImageConfig:
        """Raises: ImageError if the bytes are not an image config."""
        doc = _document(raw, MAX_CONFIG_BYTES, "image config")
        rootfs = _object(doc.get("rootfs") or {}, "rootfs")
        if rootfs.get("type", "layers") != "layers":
            raise ImageError(f"unsupported rootfs type {_shown(rootfs.get('type'))} in the image config")
        return cls(
            raw=raw,
            document=doc,
            platform=Platform.from_json(doc),
            diff_ids=tuple(Digest(d) for d in _array(rootfs.get("diff_ids") or [], "diff_ids")),
            history=tuple(_history_entry(h) for h in _array(doc.get("history") or [], "history")),
            config=_execution(doc.get("config")),
        )

    @classmethod
    def build(cls, document: Mapping[str, Any]) -> ImageConfig:
        """Serialise `document`; equal documents in equal order give equal bytes."""
        return cls.parse(encode_json(document))

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor.of(self.raw, MEDIA_OCI_CONFIG)


def parse_manifest(raw: bytes, media_type: str = "") -> Manifest | Index:
    """Parse either kind, by the document's own media type and shape.

    Raises: ImageError, also for Docker schema 1.
    """
    if media_type in {MEDIA_DOCKER_SCHEMA1, MEDIA_DOCKER_SCHEMA1_SIGNED}:
        _require_schema2({"schemaVersion": 1})
    doc = _document(raw, MAX_MANIFEST_BYTES, "manifest")
    declared = _text(doc.get("mediaType") or media_type, "mediaType")
    if declared in INDEX_MEDIA_TYPES or (declared not in MANIFEST_MEDIA_TYPES and "manifests" in doc):
        return Index.parse(raw, media_type)
    return Manifest.parse(raw, media_type)


def chain_id(diff_ids: Iterable[Digest]) -> Digest:
    """The ChainID of a stack of layers (config.md, Layer ChainID).

    Raises: ValueError if the stack is empty.
    """
    result: Digest | None = None
    for diff_id in diff_ids:
        result = diff_id if result is None else Digest.of(f"{result} {diff_id}".encode())
    if result is None:
        raise ValueError("no layers, no chain ID")
    return result


def _document(raw: bytes, limit: int, what: str) -> dict[str, Any]:
    if len(raw) > limit:
        raise ImageError(f"{what} of {len(raw)} bytes is larger than the {limit} allowed")
    try:
        doc = json.loads(raw)
        if b"\\ud" in raw.lower():
            # Half a surrogate pair is no character: nothing could write it, or run with it.
            doc = json.loads(encode_json(doc))
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{what} is not valid JSON: {e}") from e
    return dict(_object(doc, what))


def _require_schema2(doc: Mapping[str, Any]) -> None:
    if doc.get("schemaVersion") == 1:
        raise ImageError(
            "Docker image manifest schema 1 is not supported",
            hint="the image was pushed by a very old Docker; push it again with a current tool",
        )
    if doc.get("schemaVersion") != 2:
        raise ImageError(f"unsupported manifest schemaVersion {_shown(doc.get('schemaVersion'))}")


_LISTS = ("Env", "Cmd", "Entrypoint", "Shell", "OnBuild")
_TEXTS = ("User", "WorkingDir", "StopSignal", "Hostname", "Domainname")
_TABLES = ("Volumes", "ExposedPorts")
_NUMBERS = ("Interval", "Timeout", "StartPeriod", "StartInterval", "Retries")


def _execution(value: Any) -> Mapping[str, Any]:
    """The execution part of an image config: its fields are null, or of the types of config.md and Docker's.

    Checked here once, so that nobody who uses one has to. Raises: ImageError.
    """
    config = _object(value or {}, "config")
    for name in _LISTS:
        for word in _array(config.get(name) or [], f"the config's {name}"):
            _word(word, f"the config's {name}")
    for name in _TEXTS:
        _word(config.get(name) or "", f"the config's {name}")
    for name in _TABLES:
        for key in _object(config.get(name) or {}, f"the config's {name}"):
            _word(key, f"the config's {name}")
    _string_map(config.get("Labels"), "the config's Labels")
    check = _object(config.get("Healthcheck") or {}, "the config's Healthcheck")
    for word in _array(check.get("Test") or [], "the health check's Test"):
        _word(word, "the health check's Test")
    for name, number in (*((name, check.get(name)) for name in _NUMBERS), ("StopTimeout", config.get("StopTimeout"))):
        if number is not None and (type(number) is not int or not -1 << 63 <= number < 1 << 63):
            raise ImageError(f"the config's {name} is not a number: {_shown(number)}")
    return config


def _history_entry(value: Any) -> Mapping[str, Any]:
    entry = _object(value, "history entry")
    for name in ("created", "created_by", "author", "comment"):
        _optional_text(entry.get(name), f"the history's {name}")
    return entry


def _word(value: Any, what: str) -> None:
    """A string that a program can be given. Raises: ImageError."""
    if "\0" in _text(value, what):
        raise ImageError(f"{what} has a NUL in it")


def _shown(value: Any) -> str:
    """A value that makes no sense, short enough to be told."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not a JSON object")
    return value


def _array(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"{what} is not a JSON array")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ImageError(f"{what} is not a string")
    return value


def _optional_text(value: Any, what: str) -> str | None:
    return None if value is None else _text(value, what)


def _string_map(value: Any, what: str) -> dict[str, str]:
    obj = _object(value or {}, what)
    return {k: _text(v, f"{what}[{k[:80]}]") for k, v in obj.items()}
