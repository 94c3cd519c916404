"""oci-archive and docker-archive: reading any tar, writing one, and archives that mean harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layers.errors import BlobNotFound, DigestMismatch, ImageError, PybuildError, SizeMismatch, StoreError
from layers.oci import MAX_MANIFEST_BYTES
from registry.copy import CopyOptions, CopyResult, copy_image, copy_location
from registry.reference import Reference
from registry.transport import TransportContext, parse_location
from registry.transports.archive import OciArchiveDestination, OciArchiveLocation
from registry.transports.dockerarchive import DockerArchiveDestination, DockerArchiveLocation
from registry.transports.oci import OciLocation, OciSource
from registry.transports.tarball import TarReader, TarWriter, tar_header
from tests.support.extract import extract_all
from tests.support.images import (
    Image,
    check_layout,
    layout_names,
    make_image,
    make_index,
    random_layer,
    tar_of,
    write_layout,
)


@pytest.fixture
def context(tmp_path: Path) -> TransportContext:
    (tmp_path / "scratch").mkdir()
    return TransportContext(scratch_dir=tmp_path / "scratch")


def copy(source: str, destination: str, context: TransportContext, **options: Any) -> CopyResult:
    return copy_location(parse_location(source), parse_location(destination), context, options=CopyOptions(**options))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: f.read() for m in tar.getmembers() if (f := tar.extractfile(m)) is not None}


def write_tar(path: Path, files: Mapping[str, bytes], *, links: Mapping[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def read_all(path: Path, scratch: Path) -> dict[str, bytes]:
    reader = TarReader(path, scratch)
    try:
        return {name: reader.open(m).read() for name in reader.members if (m := reader.find(name)) is not None}
    finally:
        reader.close()


# The tar reader


_NAMES = st.text(
    st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=130
).filter(lambda name: name not in {".", ".."})


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(_NAMES, st.binary(max_size=1100), max_size=6),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@example(files={"\x80\n": b""}, format=tarfile.PAX_FORMAT)  # a record ends with one line feed, not with all of them
def test_what_tarfile_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], format: int
) -> None:
    scratch = tmp_path_factory.mktemp("x")
    path = scratch / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo("dir/" + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert read_all(path, scratch) == {"dir/" + name: data for name, data in files.items()}


def test_links_are_resolved_within(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {"real/layer.tar": b"data"},
        links={
            "one/layer.tar": "../real/layer.tar",
            "two/layer.tar": "../one/layer.tar",
            "out": "../../../../../../etc/passwd",
            "loop1": "loop2",
            "loop2": "loop1",
        },
    )
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("hard")
        member.type, member.linkname = tarfile.LNKTYPE, "real/layer.tar"
        tar.addfile(member)
    found = read_all(path, tmp_path)
    assert found == {"real/layer.tar": b"data", "one/layer.tar": b"data", "two/layer.tar": b"data", "hard": b"data"}


def test_names_are_keys_not_paths(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"./x/../index.json": b"1", "/etc/passwd": b"2", "../../up": b"3"})
    assert read_all(path, tmp_path) == {"index.json": b"1", "etc/passwd": b"2", "up": b"3"}


def test_compressed_archives_and_pipes_are_spooled(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", {"x": b"1"})
    zipped = tmp_path / "a.tar.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_all(zipped, tmp_path) == {"x": b"1"}
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["sh", "-c", f"cat {plain} > {fifo}"]):
        assert read_all(fifo, tmp_path) == {"x": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.gz", "fifo"]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8**11 - 1, 8**11, 1 << 40])
def test_headers_say_any_size(size: int) -> None:
    header = tarfile.TarInfo.frombuf(tar_header("blobs/sha256/x", size), "utf-8", "strict")
    assert (header.name, header.size, header.mode, header.isreg()) == ("blobs/sha256/x", size, 0o644, True)


def _truncated(data: bytes) -> bytes:
    return data[: 512 + 10]


def _garbled(data: bytes) -> bytes:
    return data[:1024] + b"x" * 512 + data[1536:]


def _huge_pax(data: bytes) -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 33
    return member.tobuf(tarfile.GNU_FORMAT) + data


def _huge_longname(data: bytes) -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(2 << 20) + data


@pytest.mark.parametrize("damage", [_truncated, _garbled, _huge_pax, _huge_longname, lambda _: b"hello" * 300])
def test_damaged_archives_are_refused(tmp_path: Path, damage: Any) -> None:
    path = write_tar(tmp_path / "a.tar", {"x": bytes(500), "y": b"2"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError):
        read_all(path, tmp_path)


def test_a_negative_base256_size_does_not_loop(tmp_path: Path) -> None:
    header = bytearray(tar_header("x", 0))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(header) * 3)
    with pytest.raises(ImageError):
        read_all(path, tmp_path)


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.transports.tarball._MAX_MEMBERS", 10)
    path = write_tar(tmp_path / "a.tar", {f"f{i}": b"" for i in range(11)})
    with pytest.raises(ImageError, match="more than"):
        read_all(path, tmp_path)


def test_an_archive_that_is_not_there(tmp_path: Path, context: TransportContext) -> None:
    for text in (f"oci-archive:{tmp_path}/none", f"docker-archive:{tmp_path}/none", f"oci-archive:{tmp_path}"):
        with pytest.raises(StoreError, match=str(tmp_path)):
            parse_location(text).source(context)


# Writing


def test_an_abandoned_member_leaves_no_byte(tmp_path: Path) -> None:
    writer = TarWriter(tmp_path / "a.tar", tmp_path)
    writer.write_at(writer.begin(), b"secret" * 1000)
    writer.abandon()
    writer.append("x", b"1")
    writer.commit()
    writer.close()
    data = (tmp_path / "a.tar").read_bytes()
    assert b"secret" not in data
    assert len(data) == 10240
    assert members(tmp_path / "a.tar") == {"x": b"1"}


def test_nothing_is_left_of_a_failed_archive(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    (layout / "blobs" / image.blobs[2].digest.replace(":", "/")).write_bytes(bytes(len(image.blobs[2].data)))
    target = tmp_path / "out"
    target.mkdir()
    (target / "x.tar").write_bytes(b"old")
    for kind in ("oci-archive", "docker-archive"):
        with pytest.raises(DigestMismatch):
            copy(f"oci:{layout}:one", f"{kind}:{target}/x.tar", context)
        assert [p.name for p in target.iterdir()] == ["x.tar"]
        assert (target / "x.tar").read_bytes() == b"old"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path: Path, context: TransportContext) -> None:
    layout = write_layout(tmp_path / "a", one=make_image())
    with pytest.raises(StoreError, match="missing"):
        copy(f"oci:{layout}:one", f"oci-archive:{tmp_path}/missing/x.tar:one", context)


# oci-archive


def test_oci_archive_round_trip(tmp_path: Path, context: TransportContext) -> None:
    index = make_index({"amd64": make_image(), "arm64": make_image(architecture="arm64")})
    layout = write_layout(tmp_path / "a", one=index)
    assert copy(f"oci:{layout}:one", f"oci-archive:{tmp_path}/x.tar:two", context).descriptor.digest == index.digest
    assert copy(f"oci-archive:{tmp_path}/x.tar:two", f"oci:{tmp_path}/b:three", context).copied_blobs == 6
    assert layout_names(tmp_path / "b") == {"three": index.digest}
    check_layout(tmp_path / "b", index.digest)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert {(m.mtime, m.uid, m.gid) for m in tar.getmembers()} == {(0, 0, 0)}
        extract_all(tar, tmp_path / "c")
    check_layout(tmp_path / "c", index.digest)


def test_equal_images_give_equal_archives(tmp_path: Path, context: TransportContext) -> None:
    layout = write_layout(tmp_path / "a", one=make_image([random_layer("x")]))
    for name in ("x", "y"):
        copy_location(
            parse_location(f"oci:{layout}:one"), parse_location(f"oci-archive:{tmp_path}/{name}.tar:t"), context, jobs=1
        )
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()


def test_several_images_in_one_oci_archive(tmp_path: Path) -> None:
    base = random_layer("base")
    images = {"a": make_image([base]), "b": make_image([base, random_layer("b")])}
    layout = write_layout(tmp_path / "l", **images)
    destination = OciArchiveDestination(OciArchiveLocation(tmp_path / "x.tar"), tmp_path)
    for tag in images:
        destination.rename(tag)
        source = OciSource(OciLocation(layout, tag))
        copy_image(source, destination)
        source.close()
    destination.commit()
    destination.close()
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = [m.name for m in tar.getmembers()]
        assert len(names) == len(set(names))
        extract_all(tar, tmp_path / "c")
    assert layout_names(tmp_path / "c") == {tag: image.digest for tag, image in images.items()}
    for image in images.values():
        check_layout(tmp_path / "c", image.digest)


def test_an_oci_archive_without_an_index_is_refused(tmp_path: Path, context: TransportContext) -> None:
    write_tar(tmp_path / "x.tar", {"oci-layout": b"{}"})
    with pytest.raises(ImageError, match="no index"):
        parse_location(f"oci-archive:{tmp_path}/x.tar").source(context)


def test_an_oci_archive_with_a_huge_index_is_refused(tmp_path: Path, context: TransportContext) -> None:
    write_tar(tmp_path / "x.tar", {"index.json": bytes(MAX_MANIFEST_BYTES + 1)})
    with pytest.raises(ImageError, match="larger"):
        parse_location(f"oci-archive:{tmp_path}/x.tar").source(context)


def test_wrong_blobs_in_an_oci_archive_are_found(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    blob = layout / "blobs" / image.blobs[1].digest.replace(":", "/")

    def pack() -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(layout, ".")

    blob.write_bytes(bytes(len(image.blobs[1].data)))
    pack()
    with pytest.raises(DigestMismatch):
        copy(f"oci-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/b", context)
    blob.write_bytes(b"short")
    pack()
    with pytest.raises(SizeMismatch):
        copy(f"oci-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/b", context)
    blob.unlink()
    pack()
    with pytest.raises(BlobNotFound):
        copy(f"oci-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/b", context)


def test_archives_go_through_standard_streams(tmp_path: Path) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    code = (
        "import sys; from pathlib import Path; from registry.copy import copy_location;"
        "from registry.transport import TransportContext, parse_location;"
        f"copy_location(*map(parse_location, sys.argv[1:3]), TransportContext(scratch_dir=Path({str(tmp_path)!r})))"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code]
    for kind in ("oci-archive", "docker-archive"):
        out = subprocess.run([*command, f"oci:{layout}:one", f"{kind}:-"], cwd=root, check=True, capture_output=True)
        into = f"oci:{tmp_path}/b:{kind}"
        subprocess.run([*command, f"{kind}:-", into], cwd=root, check=True, input=out.stdout)
    assert layout_names(tmp_path / "b")["oci-archive"] == image.digest
    check_layout(tmp_path / "b", layout_names(tmp_path / "b")["docker-archive"])


# docker-archive


def _diff_ids(image: Image) -> list[str]:
    found: list[str] = json.loads(image.blobs[0].data)["rootfs"]["diff_ids"]
    return found


def test_docker_archive_as_docker_load_wants_it(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar:team/app:1", context)
    found = members(tmp_path / "x.tar")
    hexes = [d.removeprefix("sha256:") for d in _diff_ids(image)]
    config = image.blobs[0].digest.removeprefix("sha256:") + ".json"
    assert json.loads(found["manifest.json"]) == [
        {"Config": config, "RepoTags": ["team/app:1"], "Layers": [f"{h}.tar" for h in hexes]}
    ]
    assert json.loads(found["repositories"]) == {"team/app": {"1": hexes[-1]}}
    assert found[config] == image.blobs[0].data
    for digest in hexes:
        assert hashlib.sha256(found[f"{digest}.tar"]).hexdigest() == digest


def test_docker_archive_round_trip_keeps_the_image_id(tmp_path: Path, context: TransportContext) -> None:
    image = make_image()
    layout = write_layout(tmp_path / "a", one=image)
    copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar:app", context)
    copy(f"docker-archive:{tmp_path}/x.tar:app:latest", f"oci:{tmp_path}/b:t", context)
    digest = layout_names(tmp_path / "b")["t"]
    check_layout(tmp_path / "b", digest)
    manifest = json.loads((tmp_path / "b/blobs" / digest.replace(":", "/")).read_bytes())
    assert manifest["config"]["digest"] == image.blobs[0].digest
    assert manifest["mediaType"].startswith("application/vnd.oci.")
    assert [d["mediaType"].rpartition("+")[2] for d in manifest["layers"]] == ["gzip", "gzip"]
    assert copy(f"docker-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/b:t", context).descriptor.digest == digest


def test_equal_layers_are_written_once(tmp_path: Path, context: TransportContext) -> None:
    twice = random_layer("x")
    layout = write_layout(tmp_path / "a", one=make_image([twice, random_layer("y"), twice]))
    copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar:app", context)
    with tarfile.open(tmp_path / "x.tar") as tar:
        names = [m.name for m in tar.getmembers()]
    assert len(names) == len(set(names)) == 2 + 3
    layers = json.loads(members(tmp_path / "x.tar")["manifest.json"])[0]["Layers"]
    assert layers[0] == layers[2]
    copy(f"docker-archive:{tmp_path}/x.tar", f"oci:{tmp_path}/b:t", context)


def test_layers_compressed_differently_are_one(tmp_path: Path, context: TransportContext) -> None:
    """Two blobs of one DiffID: the second leaves no trace in the archive."""
    files = random_layer("x", 5000)
    image, other = make_image([files]), make_image([files, random_layer("y", 100)], compress=False)
    layout = write_layout(tmp_path / "a", one=image, two=other)
    destination = DockerArchiveDestination(DockerArchiveLocation(tmp_path / "x.tar"), tmp_path)
    for tag in ("one", "two"):
        destination.rename(Reference.parse(f"app:{tag}"))
        source = OciSource(OciLocation(layout, tag))
        copy_image(source, destination)
        source.close()
    destination.commit()
    destination.close()
    images = json.loads(members(tmp_path / "x.tar")["manifest.json"])
    assert [i["RepoTags"] for i in images] == [["app:one"], ["app:two"]]
    assert images[0]["Layers"] == images[1]["Layers"][:1]
    for tag in ("one", "two"):
        copy(f"docker-archive:{tmp_path}/x.tar:app:{tag}", f"oci:{tmp_path}/b:{tag}", context)


def test_choosing_among_several(tmp_path: Path, context: TransportContext) -> None:
    first, second = make_image([random_layer("1")]), make_image([random_layer("2")])
    files: dict[str, bytes] = {}
    entries = []
    for image, tags in ((first, ["a:1", "localhost:5/b"]), (second, None)):
        files["c" + image.digest[-8:]] = image.blobs[0].data
        files["l" + image.digest[-8:]] = gzip.decompress(image.blobs[1].data)
        entries.append({"Config": "c" + image.digest[-8:], "RepoTags": tags, "Layers": ["l" + image.digest[-8:]]})
    path = write_tar(tmp_path / "x.tar", {**files, "manifest.json": json.dumps(entries).encode()})
    for text, image in (("a:1", first), ("localhost:5/b:latest", first), ("@0", first), ("@1", second)):
        copy(f"docker-archive:{path}:{text}", f"oci:{tmp_path}/b:t", context)
        digest = layout_names(tmp_path / "b")["t"]
        manifest = json.loads((tmp_path / "b/blobs" / digest.replace(":", "/")).read_bytes())
        assert manifest["config"]["digest"] == image.blobs[0].digest
    for text in ("", ":a:2", ":@2"):
        with pytest.raises(ImageError) as caught:
            parse_location(f"docker-archive:{path}{text}").source(context)
        assert caught.value.hint == "there is: docker.io/library/a:1, localhost:5/b:latest"


def test_the_old_layout_with_links(tmp_path: Path, context: TransportContext) -> None:
    layers = [tar_of(random_layer("a")), tar_of(random_layer("b"))]
    diff_ids = [f"sha256:{hashlib.sha256(t).hexdigest()}" for t in layers]
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    manifest = [{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["11/layer.tar", "22/layer.tar"]}]
    path = write_tar(
        tmp_path / "x.tar",
        {
            "c.json": config.encode(),
            "11/layer.tar": layers[0],
            "real.tar": layers[1],
            "manifest.json": json.dumps(manifest).encode(),
        },
        links={"22/layer.tar": "../real.tar"},
    )
    copy(f"docker-archive:{path}", f"dir:{tmp_path}/d", context)
    written = json.loads((tmp_path / "d/manifest.json").read_bytes())
    assert [d["digest"] for d in written["layers"]] == diff_ids


@pytest.mark.parametrize("named", [True, False])
def test_compressed_layers_keep_their_digests(tmp_path: Path, context: TransportContext, named: bool) -> None:
    """Docker 25 and later write blobs as an OCI layout beside manifest.json."""
    image = make_image([random_layer("a")])
    layer = image.blobs[1]
    name = f"blobs/sha256/{layer.digest[7:]}" if named else "some/layer.tar"
    manifest = [{"Config": "blobs/sha256/config", "RepoTags": None, "Layers": [name]}]
    path = write_tar(
        tmp_path / "x.tar",
        {"blobs/sha256/config": image.blobs[0].data, name: layer.data, "manifest.json": json.dumps(manifest).encode()},
    )
    copy(f"docker-archive:{path}", f"oci:{tmp_path}/b:t", context)
    digest = layout_names(tmp_path / "b")["t"]
    check_layout(tmp_path / "b", digest)
    written = json.loads((tmp_path / "b/blobs" / digest.replace(":", "/")).read_bytes())
    assert [d["digest"] for d in written["layers"]] == [layer.digest]


def _archive(tmp_path: Path, manifest: Any, **files: bytes) -> Path:
    body = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return write_tar(tmp_path / "x.tar", {"manifest.json": body, **files})


_CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{'1' * 64}"]}}
).encode()


@pytest.mark.parametrize(
    ("manifest", "files"),
    [
        (b"[", {}),
        (b"[" * 5000, {}),
        ({}, {}),
        ([1], {}),
        ([], {}),
        ([{}], {}),
        ([{"Config": 7, "Layers": []}], {}),
        ([{"Config": "../../etc/passwd", "Layers": []}], {}),
        ([{"Config": "c", "Layers": {}}], {"c": _CONFIG}),
        ([{"Config": "c", "Layers": []}], {"c": _CONFIG}),
        ([{"Config": "c", "Layers": ["missing"]}], {"c": _CONFIG}),
        ([{"Config": "c", "Layers": [None]}], {"c": _CONFIG}),
        ([{"Config": "c", "Layers": ["/etc/passwd"]}], {"c": _CONFIG}),
        ([{"Config": "c", "Layers": []}], {"c": b"not json"}),
        ([{"Config": "c", "Layers": ["l"]}], {"c": _CONFIG, "l": b"BZh91AY" + bytes(20)}),
        ([{"Config": "c", "RepoTags": 7, "Layers": []}, {"RepoTags": [[]]}], {"c": _CONFIG}),
    ],
)
def test_malformed_docker_archives(
    tmp_path: Path, context: TransportContext, manifest: Any, files: dict[str, bytes]
) -> None:
    path = _archive(tmp_path, manifest, **files)
    with pytest.raises(PybuildError):
        parse_location(f"docker-archive:{path}").source(context)


def test_a_layer_that_is_not_its_diff_id_is_refused(tmp_path: Path, context: TransportContext) -> None:
    path = _archive(tmp_path, [{"Config": "c", "Layers": ["l"]}], c=_CONFIG, l=tar_of(random_layer("x")))
    with pytest.raises(DigestMismatch):
        copy(f"docker-archive:{path}", f"oci:{tmp_path}/b", context)


def test_layers_that_unpack_to_something_else_are_not_archived(tmp_path: Path, context: TransportContext) -> None:
    image, other = make_image([random_layer("x")]), make_image([random_layer("y")])
    manifest = image.document() | {"layers": other.document()["layers"]}
    top = image.top._replace(data=json.dumps(manifest).encode())
    layout = write_layout(tmp_path / "a", one=Image(top, (*image.blobs, *other.blobs)))
    with pytest.raises(ImageError, match="DiffID"):
        copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar", context)
    assert not (tmp_path / "x.tar").exists()


def test_an_index_is_narrowed_or_refused(tmp_path: Path, context: TransportContext) -> None:
    images = {"amd64": make_image(), "arm64": make_image(architecture="arm64")}
    layout = write_layout(tmp_path / "a", one=make_index(images))
    with pytest.raises(ImageError, match="one platform"):
        copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar", context, all_platforms=True)
    copy(f"oci:{layout}:one", f"docker-archive:{tmp_path}/x.tar", context)
    (config,) = [json.loads(v) for k, v in members(tmp_path / "x.tar").items() if len(k) == 69 and k.endswith("json")]
    assert config["architecture"] == {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
