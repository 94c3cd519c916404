"""`--squash`, `--squash-all`, `--verify-layers`, and `diff`, which says whether trees are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.integration.images.stock import readable_context, stock_base
from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer

ODD = r"""
FROM base:1 AS first
RUN mkdir -p /d/e /gone /file2dir /dir2link/x /twice/a && echo 1 > /d/f && echo 2 > /d/e/g && echo 3 > /gone/h \
 && echo 4 > /file2dir/x && echo 5 > /kept && ln /kept /d/kept-too && echo 6 > /twice/a/old && echo 7 > /twice/b
FROM first
RUN rm -r /gone /d/e && echo new > /d/n && chmod 4711 /d/f && echo a > /a && ln /a /b && mkfifo /p && mkdir -m 1777 /t
RUN rm /a && mkdir /gone && echo back > /gone/again && rm -r /dir2link && ln -s /d /dir2link && rm -r /twice
RUN mkdir -p /twice/a && echo fresh > /twice/a/new && rm -r /file2dir && echo now-a-file > /file2dir && chown 7:8 /kept
RUN echo temporary > /tmp-file
RUN rm /tmp-file && mkdir -p /d/e/deep && echo z > /d/e/deep/z
COPY late /late
LABEL done=1
"""


def build_all(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    context = readable_context(pybuild, write_context(tmp_path / "context", ODD, {"late": "late"}))
    pybuild.build(context, "-t", "plain:1", "--verify-layers")
    pybuild.build(context, "-t", "first:1", "--target", "first")
    pybuild.build(context, "-t", "squashed:1", "--squash", "--verify-layers")
    pybuild.build(context, "-t", "all:1", "--squash-all", "--verify-layers")


def layers(pybuild: Pybuild, name: str) -> list[str]:
    return [d["digest"] for d in pybuild.run("inspect", name).json()["Layers"]]


def test_squashed_trees_are_the_same(pybuild_each: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    images = pybuild_each
    build_all(images, busybox_layout, tmp_path)
    assert [len(layers(images, n)) for n in ("plain:1", "squashed:1", "all:1")] == [8, 2, 1]
    assert layers(images, "squashed:1")[0] == layers(images, "base:1")[0]
    for name in ("squashed:1", "all:1"):
        found = images.run("diff", "plain:1", name, "--times", "--json").json()
        # Overlayfs has broken no link: but a chown of one name of two copies up that name alone.
        assert found["files"] == [], found["files"]
        config = {c["field"] for c in found["config"]}
        assert all(f.startswith("history[") for f in config), config
        history = images.run("history", name, "--json").json()
        assert sum(not row["empty_layer"] for row in history) == len(layers(images, name))
        assert len(history) == len(images.run("history", "plain:1", "--json").json())
    # Unpacking is a second opinion on the whiteouts.
    if images.account is None:
        for name in ("plain", "squashed", "all"):
            images.unpack(f"{name}:1", tmp_path / name)
        for other in ("squashed", "all"):
            assert images.run("diff", tmp_path / "plain", tmp_path / other, "--times", "-q").status == 0


def test_what_differs_and_what_is_found_again(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    images = pybuild
    build_all(images, busybox_layout, tmp_path)
    before = images.run("inspect", "squashed:1", "--format", "{{.Digest}}").text
    images.build(tmp_path / "context", "-t", "again:1", "--squash")
    assert images.run("inspect", "again:1", "--format", "{{.Digest}}").text == before
    only_labels = write_context(tmp_path / "labels", "FROM base:1\nLABEL a=b\n")
    images.build(only_labels, "-t", "labels:1", "--squash")
    assert layers(images, "labels:1") == layers(images, "base:1")

    found = images.run("diff", "first:1", "plain:1", "--json", "--exit-code", check=False)
    assert found.status == 1
    files = {f["path"]: f for f in json.loads(found.stdout)["files"]}
    assert files["d/n"]["change"] == "added"
    assert files["d/e/g"]["change"] == "removed"
    assert [f["field"] for f in files["d/f"]["fields"]] == ["mode"]
    assert {f["field"] for f in files["file2dir"]["fields"]} == {"kind"}
    assert {"field": "owner", "old": "0:0", "new": "7:8"} in files["kept"]["fields"]
    lines = images.run("diff", "first:1", "plain:1").text.splitlines()
    assert any(line.split("|")[0].strip() == "d/f" and "0644 → 4711" in line for line in lines)
    assert "config.Labels.done | none → 1" in images.run("diff", "first:1", "plain:1").text
    assert images.run("diff", "plain:1", "plain:1", "-q").status == 0


def test_diff_of_directories_and_layers(pybuild: Pybuild, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for side, text in ((one, "same"), (two, "other")):
        (side / "sub").mkdir(parents=True)
        (side / "sub" / "file").write_text(text[:4].ljust(5))
        (side / "equal").write_text("x")
    os.setxattr(two / "equal", "user.note", b"\x01")
    (two / os.fsdecode(b"odd\n\xff")).write_text("")
    text = pybuild.run("diff", one, two).text
    assert "content" in text
    assert "xattr user.note none → 01" in text
    assert "odd\\n" in text
    assert len(text.splitlines()) == 4
    (tmp_path / "bad.tar").write_bytes(b"x" * 1024)
    refused = pybuild.run("diff", one, tmp_path / "bad.tar", check=False)
    assert refused.status == 1
    assert "bad.tar" in refused.stderr
    assert pybuild.run("diff", one, "nothing:1", check=False).status == 1


FOLDED = """FROM base:1
RUN echo base-file > /other
COPY data /data
RUN echo between > /between
RUN chown -R 5:6 /data && chmod 600 /data/a
LABEL a=b
RUN echo last > /last
RUN echo changed > /data/b
"""


def test_fold_stores_no_data_twice(pybuild_each: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    pybuild = pybuild_each
    stock_base(pybuild, busybox_layout)
    files = {"data/a": os.urandom(300_000), "data/b": os.urandom(200_000), "data/empty": b""}
    context = readable_context(pybuild, write_context(tmp_path / "context", FOLDED, files))
    epoch = ("--timestamp", "1700000000")
    pybuild.build(context, "-t", "plain:1", *epoch)
    result = pybuild.build(context, "-t", "folded:1", "--fold", "--verify-layers", *epoch)
    assert "folded: 500.0kB" in result.stderr
    plain, folded = (pybuild.run("inspect", name).json() for name in ("plain:1", "folded:1"))
    assert len(plain["Layers"]) == 7
    assert len(folded["Layers"]) == 5
    assert plain["Size"] - folded["Size"] > 490_000
    assert folded["Layers"][:2] == plain["Layers"][:2]
    assert folded["Layers"][-2:] == plain["Layers"][-2:]
    history = [bool(h.get("empty_layer")) for h in folded["History"]]
    assert history.count(False) == 5
    difference = pybuild.run("diff", "plain:1", "folded:1", "--times", "--json").json()
    assert difference["files"] == []
    if pybuild.account is None:
        trees = [pybuild.unpack(name, tmp_path / name.partition(":")[0]) for name in ("plain:1", "folded:1")]
        assert pybuild.run("diff", *trees, "--times", "-q").status == 0
    # Nothing to fold: the very same image.
    write_context(tmp_path / "none", "FROM base:1\nRUN echo a > /a\nRUN echo b > /b\n")
    none = readable_context(pybuild, tmp_path / "none")
    ids = {pybuild.build(none, "-q", *epoch, *flags).text for flags in ((), ("--fold",))}
    assert len(ids) == 1


def test_estargz_layers_are_the_same_tree(
    pybuild: Pybuild, busybox_layout: Path, registry: RegistryServer, tmp_path: Path
) -> None:
    stock_base(pybuild, busybox_layout)
    context = write_context(tmp_path / "context", FOLDED, {"data/a": os.urandom(5 << 20), "data/b": b"b"})
    pybuild.build(context, "-t", "plain:1")
    pybuild.build(context, "-t", "lazy:1", "--compression", "estargz")
    layers = pybuild.run("inspect", "lazy:1").json()["Layers"]
    assert layers[0] == pybuild.run("inspect", "base:1").json()["Layers"][0]
    assert all("containerd.io/snapshot/stargz/toc.digest" in d["annotations"] for d in layers[1:])
    differ = pybuild.run("diff", "plain:1", "lazy:1", "--times", "--json").json()["files"]
    assert {f["path"] for f in differ} == {"stargz.index.json", ".no.prefetch.landmark"}
    # The annotations and the very bytes survive the way over a registry, and back.
    target = f"{registry.host}/lazy:1"
    pybuild.run("push", "--tls-verify=false", "lazy:1", target)
    pybuild.run("rmi", "--all")
    pybuild.run("pull", "--tls-verify=false", target)
    assert pybuild.run("inspect", target).json()["Layers"] == layers
    assert pybuild.unpack(target, tmp_path / "tree").joinpath("data/a").stat().st_size == 5 << 20
    assert pybuild.build(context, "--format", "docker", "--compression", "estargz", check=False).status == 2


def test_forced_compression_reaches_the_base(pybuild: Pybuild, busybox_layout: Path, tmp_path: Path) -> None:
    stock_base(pybuild, busybox_layout)
    context = write_context(tmp_path / "context", "FROM base:1\nRUN echo a > /a\n")
    documents = {}
    for name, flags in (("plain", ()), ("some", ("--compression", "zstd")), ("all", ("--force-compression",))):
        if name == "all":
            flags = ("--compression", "zstd", *flags)
        pybuild.build(context, "-t", f"{name}:1", *flags)
        documents[name] = pybuild.run("inspect", f"{name}:1").json()
    kinds = {n: [d["mediaType"].rpartition("+")[2] for d in doc["Layers"]] for n, doc in documents.items()}
    assert kinds == {"plain": ["gzip", "gzip"], "some": ["gzip", "zstd"], "all": ["zstd", "zstd"]}
    assert documents["all"]["DiffIDs"] == documents["plain"]["DiffIDs"]
    pybuild.unpack("all:1", tmp_path / "tree")  # every digest is checked
    assert pybuild.run("diff", "plain:1", "all:1", "-q").status == 0
