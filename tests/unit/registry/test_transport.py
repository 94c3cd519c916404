"""The grammar of image locations, and the streams that blobs travel through."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.errors import Cancelled, DigestMismatch, ImageError, PybuildError, SizeMismatch
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest
from registry.errors import InvalidReference
from registry.transport import (
    BlobInput,
    RawManifest,
    TransportContext,
    VerifyingStream,
    check_manifest,
    parse_location,
    split_transport,
)
from registry.transports.archive import OciArchiveLocation
from registry.transports.directory import DirLocation
from registry.transports.docker import DockerLocation
from registry.transports.dockerarchive import DockerArchiveLocation
from registry.transports.foreign import ForeignLocation
from registry.transports.oci import OciLocation
from registry.transports.storage import StorageLocation

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        ("docker://debian", DockerLocation, "docker://docker.io/library/debian:latest"),
        ("docker://debian:bookworm", DockerLocation, "docker://docker.io/library/debian:bookworm"),
        ("docker://localhost:5000/a/b:1", DockerLocation, "docker://localhost:5000/a/b:1"),
        (f"docker://h.example/a@sha256:{HEX}", DockerLocation, f"docker://h.example/a@sha256:{HEX}"),
        ("oci:dir", OciLocation, "oci:dir"),
        ("oci:/a/b:tag", OciLocation, "oci:/a/b:tag"),
        ("oci:/a/b:docker.io/library/x:1", OciLocation, "oci:/a/b:docker.io/library/x:1"),
        (f"oci:/a/b@sha256:{HEX}", OciLocation, f"oci:/a/b@sha256:{HEX}"),
        (f"oci:/a/b:@sha256:{HEX}", OciLocation, f"oci:/a/b@sha256:{HEX}"),
        ("oci-archive:f.tar:v1", OciArchiveLocation, "oci-archive:f.tar:v1"),
        ("oci-archive:-", OciArchiveLocation, "oci-archive:-"),
        ("docker-archive:f.tar", DockerArchiveLocation, "docker-archive:f.tar"),
        ("docker-archive:f.tar:a/b:1", DockerArchiveLocation, "docker-archive:f.tar:a/b:1"),
        ("docker-archive:f.tar:@3", DockerArchiveLocation, "docker-archive:f.tar:@3"),
        ("dir:/x:y", DirLocation, "dir:/x:y"),
        ("storage:app:1", StorageLocation, "storage:app:1"),
        (HEX, StorageLocation, f"storage:{HEX}"),
        ("app", StorageLocation, "storage:app"),
        ("registry.example:5000/team/app:1", StorageLocation, "storage:registry.example:5000/team/app:1"),
        ("containers-storage:[overlay@/x]a:1", ForeignLocation, "containers-storage:[overlay@/x]a:1"),
        ("docker-daemon:a:1", ForeignLocation, "docker-daemon:a:1"),
    ],
)
def test_locations(text: str, kind: type, shown: str) -> None:
    location = parse_location(text)
    assert isinstance(location, kind)
    assert str(location) == shown
    assert parse_location(str(location)) == location


def test_a_bare_name_is_of_the_default_transport() -> None:
    assert str(parse_location("h.example/app:1", "docker")) == "docker://h.example/app:1"
    assert isinstance(parse_location("h.example/app:1", "storage"), StorageLocation)
    assert parse_location("docker-archive:x", "docker").transport == "docker-archive"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "oci:",
        "oci::tag",
        "oci:dir:",
        "oci:a\0b",
        "oci:dir@sha256:12",
        "oci-archive:f:@sha256:zz",
        "docker:debian",
        "docker://",
        "docker://UPPER",
        "docker-archive:",
        "docker-archive:f:",
        "docker-archive:f:@x",
        "docker-archive:f:UPPER",
        f"docker-archive:f:a@sha256:{HEX}",
        "dir:",
        "dir:a\0",
        "storage:Bad Name",
        "bad name",
        "containers-storage:--flag",
    ],
)
def test_malformed_locations_are_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        parse_location(text)


def test_an_unknown_transport_lists_the_known_ones() -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_location("ftp://host/x")
    assert "ftp" in caught.value.message
    assert caught.value.hint is not None
    for name in ("docker://", "oci:", "oci-archive:", "docker-archive:", "dir:", "storage:"):
        assert name in caught.value.hint
    with pytest.raises(InvalidReference) as caught:
        parse_location("ostree:Name@/repo")
    assert caught.value.hint is not None
    assert "oci:" in caught.value.hint


def test_the_missing_slashes_of_docker_are_hinted() -> None:
    with pytest.raises(InvalidReference) as caught:
        split_transport("docker:debian:1")
    assert caught.value.hint == "write docker://debian:1"


def test_layouts_load_no_http() -> None:
    code = (
        "import sys; from registry.transport import parse_location, TransportContext; import registry.copy;"
        "parse_location('oci:x:y'); parse_location('dir:x'); parse_location('oci-archive:x:y');"
        "bad = {'requests', 'urllib3', 'http.client', 'tempfile', 'sqlite3', 'zstandard', 'isal'} & set(sys.modules);"
        "assert not bad, bad"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_a_destination_by_digest_is_refused_where_names_are_needed(tmp_path: Path) -> None:
    context = TransportContext(scratch_dir=tmp_path)
    for text in (
        f"oci:{tmp_path}/x@sha256:{HEX}",
        f"oci-archive:{tmp_path}/x.tar:@sha256:{HEX}",
        f"docker-archive:{tmp_path}/x.tar:@0",
        f"docker://h.example/a:1@sha256:{HEX}",
    ):
        with pytest.raises(PybuildError):
            parse_location(text).destination(context)
    assert list(tmp_path.iterdir()) == []


def test_a_context_without_store_or_client_says_so(tmp_path: Path) -> None:
    context = TransportContext()
    with pytest.raises(PybuildError, match="store"):
        parse_location("app").source(context)
    with pytest.raises(PybuildError, match="registries"):
        parse_location("docker://h.example/a").source(context)


class _Bytes(io.BytesIO):
    """A stream that gives less than it is asked for."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._step if size is None or size < 0 else min(size, self._step))


@given(data=st.binary(max_size=300), step=st.integers(1, 70), size=st.integers(1, 90))
def test_right_bytes_pass(data: bytes, step: int, size: int) -> None:
    stream = VerifyingStream(_Bytes(data, step), Descriptor.of(data, "x"))
    assert b"".join(iter(lambda: stream.read(size), b"")) == data
    assert stream.read() == b""


@given(
    data=st.binary(min_size=1, max_size=300),
    step=st.integers(1, 70),
    at=st.integers(0, 299),
)
def test_wrong_bytes_never_pass_whole(data: bytes, step: int, at: int) -> None:
    at %= len(data)
    wrong = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    stream = VerifyingStream(_Bytes(wrong, step), Descriptor.of(data, "x"))
    got = b""
    with pytest.raises(DigestMismatch):
        while chunk := stream.read(50):
            got += chunk
    assert len(got) < len(data)


def test_a_stream_goes_on_from_an_offset() -> None:
    data = b"0123456789"
    descriptor = Descriptor.of(data, "x")
    hasher = descriptor.digest.hasher()
    hasher.update(data[:4])
    stream = VerifyingStream(io.BytesIO(data[4:]), descriptor, offset=4, hasher=hasher)
    assert stream.read() == data[4:]


@pytest.mark.parametrize("data", [b"", b"012345678", b"01234567890"])
def test_wrong_sizes(data: bytes) -> None:
    with pytest.raises(SizeMismatch):
        VerifyingStream(io.BytesIO(data), Descriptor.of(b"0123456789", "x")).read()


def test_an_empty_blob_is_checked_at_once() -> None:
    assert VerifyingStream(io.BytesIO(b""), Descriptor.of(b"", "x")).read() == b""
    with pytest.raises(SizeMismatch):
        VerifyingStream(io.BytesIO(b"x"), Descriptor.of(b"", "x"))


class _Source:
    name = "test"
    host = ""
    synthetic = False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> io.BytesIO:
        return io.BytesIO(self.data[offset:])


def test_a_blob_is_counted_and_cancelled() -> None:
    seen: list[int] = []
    stop = False
    blob = BlobInput(
        Descriptor.of(b"0123456789", "x"),
        _Source(b"0123456789"),  # type: ignore[arg-type]  # no more of a source is needed here
        progress=seen.append,
        cancelled=lambda: stop,
    )
    with blob.open(2) as stream:
        stream.read(3)
        stream.read(3)
    assert seen == [5, 8]
    assert blob.moved_bytes == 6
    with blob.open() as stream:
        stop = True
        with pytest.raises(Cancelled):
            stream.read(1)


def test_manifests_are_bounded_and_verified() -> None:
    raw = b"{}"
    digest = Digest.of(raw)
    assert check_manifest(RawManifest(raw, "x", digest), digest).digest == digest
    with pytest.raises(DigestMismatch):
        check_manifest(RawManifest(b"{ }", "x", digest), None)
    with pytest.raises(DigestMismatch):
        check_manifest(RawManifest(raw, "x", digest), Digest.of(b"other"))
    large = bytes(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ImageError):
        check_manifest(RawManifest(large, "x", Digest.of(large)), None)
