"""A large COPY at an image's end goes into its layer without being made on the disk: its time alone tells."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context

EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}
FILES = {f"tree/d{n % 20}/f{n}": f"content {n}\n" * (n % 7) for n in range(600)}


def large_context(folder: Path, containerfile: str, files: Mapping[str, str | bytes] = FILES) -> Path:
    """Files enough to be packed; some of them merged with what the base has, some links, some modes."""
    context = write_context(folder, containerfile, files)
    (context / "tree/d1/link").symlink_to("../d2/f2")
    os.link(context / "tree/d3/f3", context / "tree/d4/hard")
    (context / "tree/d5/f5").chmod(0o4755)
    (context / "tree/d6").chmod(0o1775)
    return context


def image_id(pybuild: Pybuild, context: Path, *arguments: str) -> str:
    return pybuild.build(context, "-q", "-t", "packed:1", *arguments, env=EPOCH).text.strip()


def packed(pybuild: Pybuild) -> int:
    """How many snapshots are there by their layers alone."""
    database = sqlite3.connect(pybuild.root / "store.db")
    try:
        (count,) = database.execute("SELECT count(*) FROM snapshots WHERE dir LIKE 'packed-%'").fetchone()
        return int(count)
    finally:
        database.close()


BASE = "RUN mkdir -p /srv/d1/d /srv/d7 && echo old > /srv/d7/f7 && ln -s srv /link && chmod 711 /srv/d7\n"


def test_packed_and_made_are_the_same(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    pybuild = pybuild_each
    text = f"FROM {busybox_base}\n{BASE}COPY --chown=7:8 tree /link/\n"
    context = large_context(context_dir(pybuild, tmp_path) / "c", text)
    first = image_id(pybuild, context)
    assert packed(pybuild) == 1
    # The tree is needed to be held against the layer.
    assert image_id(pybuild, context, "--no-cache", "--verify-layers") == first
    assert packed(pybuild) == 1
    assert image_id(pybuild, context, "--no-cache") == first
    (context / "tree/d9/f9").write_text("changed")
    changed = image_id(pybuild, context)
    assert changed != first
    assert packed(pybuild) == 3
    # Whoever builds on top has the files.
    above = text + (
        "RUN [ $(find /srv -type f | wc -l) = 601 ] && [ $(cat /srv/d9/f9) = changed ] && [ -d /srv/d1/d ]"
        " && [ $(stat -c %u:%g:%a /srv/d5/f5) = 7:8:4755 ] && [ /srv/d3/f3 -ef /srv/d4/hard ]\n"
    )
    (context / "Containerfile").write_text(above)
    pybuild.build(context, "-t", "above:1", env=EPOCH)
    assert packed(pybuild) == 2
    pybuild.run("fsck", "--snapshots")
    (context / "Containerfile").write_text(text)
    assert image_id(pybuild, context) == changed


def test_from_a_stage_and_onto_nothing(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = f"FROM {busybox_base} AS made\nCOPY tree /tree\nRUN mkfifo /tree/d0/fifo; rm /tree/d0/fifo\n"
    text += "FROM scratch\nCOPY --from=made /tree /a/b/\n"
    context = large_context(tmp_path / "c", text)
    first = image_id(pybuild, context)
    assert packed(pybuild) == 1
    for flags in (["--verify-layers"], ["--storage-driver", "native"]):
        other = Pybuild(tmp_path / f"store{flags[0]}")
        assert image_id(other, context, *flags) == first
        assert packed(other) == 0


def test_what_only_a_copy_can_tell_is_copied(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = large_context(tmp_path / "c", f"FROM {busybox_base}\nCOPY tree /tree\n")
    os.setxattr(context / "tree/d8/f8", "user.note", b"kept")
    first = image_id(pybuild, context)
    assert packed(pybuild) == 0
    assert image_id(pybuild, context, "--no-cache", "--verify-layers") == first
    (context / "tree/d8/.wh.f8").write_text("")
    refused = pybuild.build(context, check=False)
    assert refused.status == 1
    assert "the prefix .wh. marks deletions" in refused.stderr
    (context / "tree/d8/.wh.f8").unlink()
    # Not the last of its stage, or small.
    (context / "Containerfile").write_text(f"FROM {busybox_base}\nCOPY tree /tree\nCOPY tree/d1 /d1\n")
    os.removexattr(context / "tree/d8/f8", "user.note")
    image_id(pybuild, context)
    assert packed(pybuild) == 0


def test_its_time_is_told(pybuild: Pybuild, tmp_path: Path) -> None:
    context = large_context(tmp_path / "c", "FROM scratch\nCOPY tree /tree\n")
    chart, meta = tmp_path / "t.svg", tmp_path / "meta.json"
    image_id(pybuild, context, "--timeline", str(chart), "--metadata-file", str(meta))
    assert packed(pybuild) == 1
    (step,) = json.loads(meta.read_text())["pybuild.steps"]["list"]
    assert step["phases"]["pack"] > 0
    assert re.search(r"\bpack [0-9.]+ s", chart.read_text())


@pytest.mark.parametrize("compression", ["zstd", "estargz", "zstd:chunked", "uncompressed"])
def test_in_every_format(pybuild: Pybuild, compression: str, tmp_path: Path) -> None:
    """The cached step's layer in another one is made of its files."""
    context = large_context(tmp_path / "c", "FROM scratch\nCOPY tree /tree\n")
    image_id(pybuild, context)
    assert packed(pybuild) == 1
    again = image_id(pybuild, context, "--compression", compression)
    assert packed(pybuild) == 0
    assert image_id(pybuild, context, "--no-cache", "--compression", compression) == again
    assert packed(pybuild) == 1
    pybuild.run("validate", "packed:1")


def test_trees_that_are_asked_for_later(pybuild: Pybuild, tmp_path: Path) -> None:
    context = large_context(tmp_path / "c", "FROM scratch\nCOPY tree /tree\n")
    first = image_id(pybuild, context)
    pybuild.run("prune", "--force")
    pybuild.run("fsck", "--snapshots")
    assert image_id(pybuild, context) == first
    assert packed(pybuild) == 1
    squashed = pybuild.build(context, "-q", "--squash", env=EPOCH).text.strip()
    assert squashed == first, "one layer of one layer"
    assert packed(pybuild) == 0
    archive = pybuild.build(context, "-o", "type=tar,dest=-", env=EPOCH).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert len([name for name in tar.getnames() if "/f" in name]) == 600
    # With nothing but the layer, the files are made at once where they are what is asked for.
    pybuild.build(context, "--no-cache", "-o", f"type=local,dest={tmp_path / 'out'}", env=EPOCH)
    assert (tmp_path / "out/tree/d9/f9").read_text() == FILES["tree/d9/f9"]
    assert packed(pybuild) == 0
    pybuild.run("rmi", "packed:1")
    pybuild.run("prune", "--all", "--force")
    pybuild.run("fsck")


@pytest.mark.parametrize("point", ["store.fill.before-row", "store.fill.after-row"])
def test_killed_while_it_is_unpacked(pybuild: Pybuild, busybox_base: str, point: str, tmp_path: Path) -> None:
    text = f"FROM {busybox_base}\nCOPY tree /tree\n"
    context = large_context(tmp_path / "c", text)
    first = image_id(pybuild, context)
    (context / "Containerfile").write_text(text + "RUN [ $(find /tree -type f | wc -l) = 601 ]\n")
    killed = pybuild.build(context, check=False, env={**EPOCH, "PYBUILD_FAULT": point})
    assert killed.status == -signal.SIGKILL
    pybuild.build(context, env=EPOCH)
    pybuild.run("fsck", "--snapshots")
    (context / "Containerfile").write_text(text)
    assert image_id(pybuild, context) == first


def test_a_damaged_layer_is_made_again(pybuild: Pybuild, tmp_path: Path) -> None:
    context = large_context(tmp_path / "c", "FROM scratch\nCOPY tree /tree\n")
    first = image_id(pybuild, context)
    (largest,) = sorted((pybuild.root / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)[-1:]
    largest.write_bytes(b"torn")
    found = pybuild.run("fsck", check=False)
    assert found.status != 0
    pybuild.run("fsck", "--repair")
    assert packed(pybuild) == 0
    assert image_id(pybuild, context) == first
    pybuild.run("fsck")
