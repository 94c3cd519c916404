"""images, tag, rmi, inspect, history, save, load, import, export, mount, du, prune, fsck: as a user calls them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.integration.images.stock import readable_context, stock_base
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool


@pytest.fixture
def stocked(pybuild_each: Pybuild, busybox_layout: Path, tmp_path: Path) -> Pybuild:
    """A store with `base:1`, `app:1` (two layers more, a label) and one image without a name."""
    return stock(pybuild_each, busybox_layout, tmp_path)


def stock(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> Pybuild:
    stock_base(pybuild, busybox_layout)
    context = write_context(
        tmp_path / "context",
        "FROM base:1\nLABEL role=app tier=2\nRUN echo ran > /ran; ln /ran /hard; mkdir -m 1777 /t\nCOPY file /file\n",
        {"file": "hello"},
    )
    context = readable_context(pybuild, context)
    pybuild.build(context, "-t", "app:1")
    pybuild.build(context, "--label", "role=nameless")
    return pybuild


def names_in(pybuild: Pybuild) -> set[str]:
    return {f"{i['name']}:{i['tag']}" for i in pybuild.run("images", "--json").json()}


def test_images_filters_and_formats(stocked: Pybuild) -> None:
    def listed(*flags: str) -> list[str]:
        return stocked.run("images", "--format", "{{.Repository}}:{{.Tag}}", *flags).text.split()

    assert listed() == ["app:1", "base:1", "<none>:<none>"]
    assert listed("-f", "dangling=true") == ["<none>:<none>"]
    assert listed("-f", "label=role=app") == ["app:1"]
    assert listed("-f", "label=role", "-f", "dangling=false") == ["app:1"]
    assert listed("-f", "label=role=app", "-f", "label=tier=3") == []
    assert listed("-f", "reference=a*:1") == ["app:1"]
    assert listed("-f", "before=app:1") == ["base:1"]
    assert listed("-f", "until=1h") == ["base:1"]
    assert listed("app") == ["app:1"]
    assert listed("no-such") == []
    table = stocked.run("images", "app", "--format", "table {{.Tag}}\t{{.Labels.role}}").text.splitlines()
    assert [line.split() for line in table] == [["TAG", "ROLE"], ["1", "app"]]
    ids = stocked.run("images", "-q", "--no-trunc").text.split()
    assert all(len(id) == len("sha256:") + 64 for id in ids)
    refused = stocked.run("images", "-f", "size=3", check=False)
    assert refused.status == 2
    assert "unknown filter" in refused.stderr


def test_inspect_and_history(stocked: Pybuild) -> None:
    assert stocked.run("inspect", "app:1", "--format", "{{json .Config.Labels}}").json() == {"role": "app", "tier": "2"}
    several = stocked.run("inspect", "app:1", "base:1").json()
    assert [len(document["Layers"]) for document in several] == [3, 1]
    rows = stocked.run("history", "app:1", "--json").json()
    assert [bool(row["size"]) for row in rows][:2] == [True, True]
    assert "COPY file /file" in rows[0]["created_by"]
    digests = stocked.run("history", "-q", "app:1").text.split()
    assert [d for d in digests if d != "<empty>"] == [d["digest"] for d in reversed(several[0]["Layers"])]


def test_image_tree_shows_whose_layers_they_are(stocked: Pybuild) -> None:
    tree = stocked.run("image", "tree", "app:1", "--json").json()[0]["layers"]
    assert [layer["digest"] for layer in tree] == [
        d["digest"] for d in stocked.run("inspect", "app:1").json()["Layers"]
    ]
    assert tree[0]["tops"] == ["base:1"]
    assert "app:1" in tree[2]["tops"]
    assert tree[1]["tops"] == []
    assert "└── " in stocked.run("image", "tree", "app:1").text


def test_tag_untag_rmi(stocked: Pybuild) -> None:
    stocked.run("tag", "app:1", "other:2", "third")
    assert {"other:2", "third:latest"} <= names_in(stocked)
    stocked.run("untag", "other:2")
    assert "other:2" not in names_in(stocked)
    stocked.run("rmi", "--prune")
    assert "<none>:<none>" not in names_in(stocked)
    id = stocked.run("images", "app", "-q", "--no-trunc").text.strip()
    stocked.run("rmi", id)
    assert names_in(stocked) == {"base:1"}
    assert stocked.run("rmi", "app:1", check=False).status == 1
    assert stocked.run("rmi", "-f", "app:1").status == 0
    stocked.run("rmi", "--all")
    assert names_in(stocked) == set()


@pytest.mark.parametrize("format", ["docker-archive", "oci-archive", "oci-dir"])
def test_save_and_load_several(stocked: Pybuild, tmp_path: Path, format: str) -> None:
    place = (stocked.account.home if stocked.account else tmp_path) / f"saved-{format}-{os.getpid()}"
    stocked.run("tag", "app:1", "app:two")
    before = {i["id"]: f"{i['name']}:{i['tag']}" for i in stocked.run("images", "--json").json() if i["tag"] != "two"}
    stocked.run("save", "--format", format, "-o", place, "app:1", "base:1", "app:two")
    stocked.run("rmi", "--all")
    loaded = stocked.run("load", "-i", place).text.splitlines()
    assert sorted(loaded) == ["Loaded image: app:1", "Loaded image: app:two", "Loaded image: base:1"]
    after = {i["id"]: f"{i['name']}:{i['tag']}" for i in stocked.run("images", "--json").json() if i["tag"] != "two"}
    assert after == {id: name for id, name in before.items() if not name.startswith("<")}


def test_save_and_load_through_pipes(stocked: Pybuild) -> None:
    archive = stocked.run("save", "app:1").stdout
    nameless = stocked.run("images", "-f", "dangling=true", "-q", "--no-trunc").text.strip()
    without_a_name = stocked.run("save", "--format", "oci-archive", nameless).stdout
    stocked.run("rmi", "--all")
    assert stocked.run("load", stdin=archive).text == "Loaded image: app:1\n"
    assert stocked.run("load", stdin=without_a_name).text == f"Loaded image ID: {nameless}\n"
    import gzip

    stocked.run("rmi", "--all")
    assert stocked.run("load", stdin=gzip.compress(archive, 1)).text == "Loaded image: app:1\n"


def test_load_refuses_what_is_no_archive(pybuild: Pybuild, tmp_path: Path) -> None:
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode="w").close()
    for data in (b"", b"hello", empty.getvalue()):
        (tmp_path / "x").write_bytes(data)
        refused = pybuild.run("load", "-i", tmp_path / "x", check=False)
        assert refused.status == 1
        assert refused.stderr.count("error:") == 1
    assert names_in(pybuild) == set()


def test_export_and_import_give_the_same_tree(stocked: Pybuild) -> None:
    tar = stocked.run("export", "app:1").stdout
    assert tar == stocked.run("export", "app:1").stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = {m.name.rstrip("/"): m for m in archive}
    assert members["t"].mode == 0o1777
    assert members["ran"].islnk() or members["hard"].islnk()
    assert {m.uid for m in members.values()} == {0}
    changes = ["-c", 'CMD ["/bin/sh", "-c", "cat /file"]', "-c", "ENV A=1 B=2", "-c", "ENV C=${A}x", "-c", "USER 7"]
    id = stocked.run("import", "-m", "by hand", *changes, "-", "imported:1", stdin=tar).text.strip()
    document = stocked.run("inspect", "imported:1").json()
    assert document["Id"] == id
    assert document["Config"]["Env"][-3:] == ["A=1", "B=2", "C=1x"]
    assert document["Config"]["User"] == "7"
    assert document["Config"]["Cmd"] == ["/bin/sh", "-c", "cat /file"]
    assert document["History"][0]["comment"] == "by hand"
    assert stocked.run("export", "imported:1").stdout == tar


def test_import_is_reproducible_and_refuses_nonsense(pybuild: Pybuild) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("file"))
    ids = {
        pybuild.run("import", "--timestamp", "7", "-", stdin=out.getvalue()).text,
        pybuild.run("import", "-", stdin=out.getvalue(), env={"SOURCE_DATE_EPOCH": "7"}).text,
    }
    assert len(ids) == 1
    for data, words in ((b"", "empty"), (b"x" * 600, "invalid tar"), (out.getvalue()[:700], "cut short")):
        refused = pybuild.run("import", "-", "bad:1", stdin=data, check=False)
        assert refused.status == 1
        assert words in refused.stderr
    for change in ("RUN true", "COPY a b", "EXPOSE nonsense", "ENV A=1\nRUN x", ""):
        assert pybuild.run("import", "-c", change, "-", stdin=out.getvalue(), check=False).status in {1, 2}
    assert names_in(pybuild) == {"<none>:<none>"}


def test_umoci_reads_what_was_saved(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    need_tool("umoci")
    stock(pybuild, busybox_layout, tmp_path)
    pybuild.run("save", "--format", "oci-dir", "-o", tmp_path / "layout", "app:1")
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path}/layout:app:1", tmp_path / "bundle"], check=True, capture_output=True
    )
    assert (tmp_path / "bundle/rootfs/file").read_text() == "hello"
    assert os.stat(tmp_path / "bundle/rootfs/ran").st_nlink == 2


def test_image_mount(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock(pybuild, busybox_layout, tmp_path)
    path = Path(pybuild.run("image", "mount", "app:1").text.strip())
    try:
        assert (path / "file").read_text() == "hello"
        with pytest.raises(OSError, match="Read-only"):
            (path / "new").write_text("x")
        assert pybuild.run("image", "mount", "app:1").text.strip() == str(path)
        assert pybuild.run("image", "mount", "--json").json()[0]["path"] == str(path)
        # One layer: a bind mount, which os.path.ismount does not see.
        alone = Path(pybuild.run("image", "mount", "base:1").text.strip())
        assert (alone / "bin").exists()
        pybuild.run("rmi", "--all")
        pybuild.run("prune", "--all", "--force")
        assert (path / "file").read_text() == "hello"
    finally:
        pybuild.run("image", "unmount", "--all")
    assert pybuild.run("image", "mount").text == ""
    pybuild.run("prune", "--all", "--force")
    assert not list((pybuild.root / "snapshots").iterdir())
    assert pybuild.run("image", "unmount", "app:1", check=False).status == 1


def test_unshare_keeps_mounts_of_an_ordinary_user(
    pybuild_rootless: Pybuild, busybox_layout: Path, tmp_path: Path
) -> None:
    stock_base(pybuild_rootless, busybox_layout)
    refused = pybuild_rootless.run("image", "mount", "base:1", check=False)
    assert refused.status == 2
    assert "unshare" in refused.stderr
    python = str(pybuild_rootless.account.python) if pybuild_rootless.account else "python3"
    script = f'cd "$({python} -m builder image mount base:1)" && ls && {python} -m builder image unmount base:1'
    assert "bin" in pybuild_rootless.run("unshare", "--", "sh", "-c", f"({script}) 2>&1; id -u").text.split()


def allocated(root: Path) -> int:
    done = subprocess.run(["du", "-s", "--block-size=1", root], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def test_du_is_what_du_says(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock(pybuild, busybox_layout, tmp_path)
    # SQLite's two files beside the database exist only while somebody has it open: be that somebody.
    import sqlite3

    holder = sqlite3.connect(pybuild.root / "store.db")
    holder.execute("SELECT 1 FROM meta").fetchall()
    try:
        report = pybuild.run("du", "--json").json()
        lease = 16384  # the lease of the command itself, and its directory entries
        assert abs(report["total"] - allocated(pybuild.root)) <= lease
    finally:
        holder.close()
    assert report["total"] == report["other"] + sum(item["bytes"] for item in report["items"])
    images = {i["name"]: i for i in report["images"]}
    assert images["app:1"]["shared_bytes"] >= images["base:1"]["shared_bytes"] > 1 << 19
    before = allocated(pybuild.root)
    freed = pybuild.run("prune", "--all", "--force", "--json").json()["bytes"]
    assert freed >= report["reclaimable"] > 0
    assert before - allocated(pybuild.root) >= freed


def test_prune_by_age_size_and_labels(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock(pybuild, busybox_layout, tmp_path)

    def prune(*flags: str) -> dict[str, object]:
        done: dict[str, object] = pybuild.run("prune", "--force", "--json", *flags).json()
        return done

    refused = pybuild.run("prune", check=False)
    assert refused.status == 2
    assert "--force" in refused.stderr
    assert prune("--filter", "until=1h", "--all") == {
        "images": [],
        "records": 0,
        "blobs": 0,
        "downloads": 0,
        "snapshots": 0,
        "bytes": 0,
    }
    assert prune("--keep-storage", "1g", "--filter", "label=role=other")["records"] == 0
    assert len(names_in(pybuild)) == 3
    assert len(prune("--filter", "label=role=nameless", "--keep-duration", "0s")["images"]) == 1  # type: ignore[arg-type]
    context = tmp_path / "context"
    assert "CACHED" in pybuild.build(context, "-t", "app:1", "--progress", "plain").stderr
    assert prune("--keep-storage", "0")["records"] != 0
    assert names_in(pybuild) == {"app:1", "base:1"}
    time.sleep(0.01)
    assert pybuild.run("fsck", "--json").json()["clean"]
    assert pybuild.unpack("app:1", tmp_path / "tree").joinpath("file").read_text() == "hello"


def test_fsck_compares_trees_with_layers(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    text = (
        "FROM base:1\nRUN echo a > /a && ln /a /b && mkdir /d && echo x > /d/x && chown 7:8 /d/x\n"
        "RUN rm -r /d && mkdir /d && chmod 4711 /a && ln -s a /l && mkfifo /p\nCOPY f /f\n"
    )
    context = write_context(tmp_path / "context", text, {"f": "content"})
    pybuild.build(context, "-t", "made:1", "--timestamp", "1700000000", "--squash")
    pybuild.build(context, "-t", "lazy:1", "--compression", "estargz")
    assert pybuild.run("fsck", "--snapshots", "--json").json()["problems"] == []
    files = list(pybuild.root.glob("snapshots/*/fs/f"))
    assert files
    for file in files:
        file.write_text("Content")
    assert pybuild.run("fsck", "--json").json()["clean"], "the fast check reads no trees"
    found = pybuild.run("fsck", "--snapshots", check=False)
    assert found.status == 1
    assert "/f has another content" in found.stdout.decode()
    pybuild.run("fsck", "--snapshots", "--repair")
    assert pybuild.run("fsck", "--snapshots", "--json").json()["problems"] == []
    assert not list(pybuild.root.glob("snapshots/*/fs/f"))
    # What was removed is made again.
    pybuild.build(context, "-t", "again:1")
    assert pybuild.run("run", "--rm", "again:1", "cat", "/f").text == "content"


def test_fsck_finds_and_repairs_a_flipped_bit(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock(pybuild, busybox_layout, tmp_path)
    digest = pybuild.run("inspect", "app:1").json()["Layers"][-1]["digest"]
    blob = pybuild.root / "blobs" / digest.replace(":", "/")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(data)
    found = pybuild.run("fsck", check=False)
    assert found.status == 1
    assert digest in found.text
    assert "fsck --repair" in found.stderr
    repaired = pybuild.run("fsck", "--repair", "--json").json()
    assert {p["kind"] for p in repaired["problems"]} >= {"blob", "name"}
    assert json.loads(pybuild.run("fsck", "--json").stdout)["problems"] == []
    assert names_in(pybuild) == {"base:1"}
    pybuild.build(tmp_path / "context", "-t", "app:1")
    assert pybuild.run("fsck", "--json").json()["clean"]


def test_a_quota_is_kept_before_something_is_written(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock(pybuild, busybox_layout, tmp_path)
    pybuild.run("rmi", "--prune")
    write_context(tmp_path / "big", "FROM base:1\nCOPY data /data\n", {"data": os.urandom(20 << 20)})
    pybuild.build(tmp_path / "big", "-t", "big:1")
    pybuild.run("rmi", "big:1")
    full = allocated(pybuild.root)
    assert full > 40 << 20  # the cache keeps the files and the layer
    quota = {"PYBUILD_GC_KEEP": "30m"}
    pybuild.build(tmp_path / "context", "-t", "app:1", env={"PYBUILD_GC_KEEP": "1g"})
    assert allocated(pybuild.root) > 40 << 20
    pybuild.build(tmp_path / "context", "-t", "app:1", env=quota)
    assert allocated(pybuild.root) < 30 << 20
    refused = pybuild.build(tmp_path / "context", env={"PYBUILD_GC_KEEP": "much"}, check=False)
    assert refused.status == 2
    assert "PYBUILD_GC_KEEP" in refused.stderr
