"""What a caller asks of a build: every input, explicit. Nothing below reads the environment.

`builder.cli` fills it from flags and the environment, a library caller by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from builder.frontend.source import SourceFile
from layers.oci import Platform
from layers.values import NamedTuple, dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from builder.frontend.language import RunMount
    from builder.plan.sourcepolicy import SourcePolicy

    PullPolicy = Literal["always", "missing", "never", "newer"]
    NetworkMode = Literal["default", "none", "host", "private"]


class SecretSource(NamedTuple):
    """Where the value of a secret comes from: a file, or the value itself (from an environment variable)."""

    path: Path | None = None
    value: bytes | None = None

    def __repr__(self) -> str:
        return f"SecretSource(path={self.path!r}, value={'***' if self.value is not None else None})"


class Output(NamedTuple):
    """One place for what was built, besides the store.

    `type` is registry, docker-daemon, oci, docker (archives; a directory with `tar` False), tar or local
    (the root file system), squashfs (the same as an image file), or image (the store alone). `dest` is a path,
    "-" for `stdout_fd`; `name`
    the image's name there (the request's tags, if None).
    """

    type: Literal["registry", "docker-daemon", "oci", "docker", "tar", "local", "squashfs", "image"]
    dest: str | None = None
    name: str | None = None
    tar: bool = True
    by_digest: bool = False
    """To a registry without a tag, to be put into an index later."""
    compression: Literal["gzip", "zstd", "none"] | None = None


class CacheRef(NamedTuple):
    """Where a cache is read from or written to: a registry's name, a directory, or the image itself.

    `mode` min keeps the steps of the result alone, max all of them. `ignore_error`: a cache that cannot be
    written or read is a warning.
    """

    type: Literal["registry", "local", "inline"]
    ref: str = ""
    mode: Literal["min", "max"] = "min"
    ignore_error: bool = False


class Annotation(NamedTuple):
    """An annotation for one level of an image: its manifests, their entries in the index, or the index.

    `platform` names one of several manifests; None is each.
    """

    key: str
    value: str
    level: Literal["manifest", "manifest-descriptor", "index"] = "manifest"
    platform: Platform | None = None


class ResourceLimits(NamedTuple):
    """Limits for every RUN; None leaves the host's. Sizes in bytes, CPU time in microseconds."""

    memory_bytes: int | None = None
    memory_swap_bytes: int | None = None
    cpu_shares: int | None = None
    cpu_period_us: int | None = None
    cpu_quota_us: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    pids: int | None = None
    io: tuple[tuple[str, str, int], ...] | None = None
    """(rbps, wbps, riops or wiops; device; limit) each."""
    hugetlb: tuple[tuple[str, int], ...] | None = None
    """(page size such as 2MB, bytes) each."""
    cgroup_parent: str | None = None
    """The group beneath which those of the limits are made; it is made, if need be, and removed again."""


_NO_LIMITS = ResourceLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `build` flags change about every RUN."""

    network: NetworkMode = "default"
    add_hosts: tuple[tuple[str, str], ...] = ()
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    ulimits: tuple[tuple[str, int, int], ...] = ()
    shm_size_bytes: int | None = None
    volumes: tuple[str, ...] = ()
    mounts: tuple[RunMount, ...] = ()
    """As if each RUN had them as its own `--mount`."""
    host_mounts: tuple[tuple[str, str], ...] = ()
    """(directory or file of the host, target), read-only, for what this machine lets every RUN see.

    It is no part of a step's key.
    """
    isolation: str = "auto"
    timeout_s: float | None = None
    limits: ResourceLimits = _NO_LIMITS
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    no_hosts: bool = False
    """RUN sees the image's own /etc/hosts."""
    devices: tuple[str, ...] = ()
    """Nodes of the host, each HOST or HOST:PATH."""
    cdi_devices: tuple[str, ...] = ()
    """Names of CDI devices that every RUN has."""
    cdi_directories: tuple[str, ...] = ("/etc/cdi", "/var/run/cdi")
    shared: tuple[str, ...] = ()
    """Namespaces that RUN shares with the host: pid, ipc, uts, cgroup."""
    runtime: str | None = None
    """Of isolation "oci": the runtime's name or path; None takes the first that is installed."""
    storage_driver: Literal["auto", "overlay", "fuse-overlayfs", "native"] = "auto"
    """How the store's snapshots are mounted; "auto" takes the first of them that works."""


_DEFAULT_RUN = RunOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One build. `context` is a directory, or None where there is none (`-f -` with no context).

    `contexts` maps a name to a directory or an image (`docker-image://…`, `oci-layout://…`).
    `cache_mounts` lets the contents of cache mounts travel with `cache_to` and `cache_from`, up to that size
    and unless unused for that long; `cache_ttl_s` is the age from which a step's result is not used.
    `platforms` empty means the host's. `source_date_epoch` is in seconds. `environ` is what programs
    and downloads on the host's side see of an environment: PATH, proxies, certificates.
    """

    containerfile: SourceFile
    context: Path | None
    contexts: Mapping[str, str] = field(default_factory=dict)
    ignore_file: Path | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    base: str | None = None
    """Takes the place of the first FROM's image."""
    platforms: tuple[Platform, ...] = ()
    tags: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Of every manifest."""
    annotations_at: tuple[Annotation, ...] = ()
    """Of one level, or of one platform's manifest."""
    env: Mapping[str, str] = field(default_factory=dict)
    unset_env: tuple[str, ...] = ()
    unset_labels: tuple[str, ...] = ()
    inherit_labels: bool = True
    """Whether the base image's labels are the image's, too."""
    no_cache: bool = False
    no_cache_filter: tuple[str, ...] = ()
    pull: PullPolicy = "missing"
    secrets: Mapping[str, SecretSource] = field(default_factory=dict)
    ssh: Mapping[str, Path] = field(default_factory=dict)
    allow: frozenset[str] = frozenset()
    run: RunOptions = _DEFAULT_RUN
    format: Literal["oci", "docker"] = "oci"
    compression: Literal["gzip", "zstd", "none", "estargz", "zstd:chunked"] = "gzip"
    compression_level: int | None = None
    force_compression: bool = False
    squash: bool = False
    """All new layers as one."""
    squash_all: bool = False
    """The whole image as one layer."""
    fold: bool = False
    """Layers that repeat the data of another of the same build become one with it."""
    verify_layers: bool = False
    """Read each new layer back and compare it with the tree."""
    omit_history: bool = False
    source_date_epoch: int | None = None
    rewrite_timestamp: bool = True
    """No file of a new layer is newer than `source_date_epoch`."""
    jobs: int = 0
    outputs: tuple[Output, ...] = ()
    cache_from: tuple[CacheRef, ...] = ()
    cache_to: tuple[CacheRef, ...] = ()
    cache_mounts: bool = False
    cache_mounts_max_bytes: int = 2 << 30
    cache_mounts_max_age_s: float = 30 * 86400.0
    cache_ttl_s: float | None = None
    capsule: Path | None = None
    """Where a failing RUN leaves what is needed to look into it, and to go on from it, elsewhere."""
    secret_gate: bool = False
    additional_stores: tuple[Path, ...] = ()
    """Stores and layouts, read only, whose images are found before a registry is asked."""
    source_policy: SourcePolicy | None = None
    """Which images, downloads and repositories may be used, and what stands in for them."""
    environ: Mapping[str, str] = field(default_factory=dict)
