"""Outputs, caches and plans of an ordinary user, whose snapshots belong to subordinate ids."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context

pytestmark = [pytest.mark.registry, pytest.mark.rootless]


@pytest.fixture
def place(rootless_user: Account) -> Iterator[Path]:
    folder = rootless_user.home / "graph"
    folder.mkdir()
    shutil.chown(folder, rootless_user.uid, rootless_user.gid)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_an_ordinary_users_cache_and_outputs(
    pybuild_rootless: Pybuild, rootless_user: Account, busybox_base: str, place: Path
) -> None:
    text = (
        f"FROM {busybox_base}\nCOPY --chown=33:34 file /file\n"
        "RUN --mount=type=cache,target=/c,id=c touch /c/kept && chown 5:6 /c/kept && cp -p /file /copy; rm /bin/true\n"
    )
    context = write_context(place / "context", text, {"file": "text\n"})
    flags = ("--cache-to", f"type=local,dest={place}/cache,mode=max", "--cache-mounts")
    outputs = ("-o", f"type=tar,dest={place}/root.tar", "-o", f"type=local,dest={place}/root")
    pybuild_rootless.build(context, "-t", "mine:1", *flags, *outputs)
    with tarfile.open(place / "root.tar") as tar:
        owners = {m.name: (m.uid, m.gid) for m in tar}
    assert owners["copy"] == (33, 34)
    assert "bin/true" not in owners
    assert (place / "root/copy").read_text() == "text\n"
    other = Pybuild(place / "other", account=rootless_user)
    meta = place / "meta.json"
    other.build(context, "--cache-from", f"type=local,src={place}/cache", "--cache-mounts", "--metadata-file", meta)
    assert json.loads(meta.read_text())["pybuild.steps"]["executed"] == 0
    (mount,) = [p for p in (other.root / "cachemounts").iterdir() if p.is_dir()]
    assert (mount / "kept").exists()
    (context / "file").write_text("other\n")
    assert "file /file" in other.run("plan", context).text
    assert other.run("cache", "audit", context, check=False).status == 0


def test_every_command_finds_the_store_where_the_user_has_it(
    rootless_user: Account, busybox_base: str, place: Path
) -> None:
    """Neither --root nor PYBUILD_ROOT says where it is, and in the user namespace everybody is root."""
    context = write_context(place / "context", f"FROM {busybox_base}\nRUN echo one > /one\n")
    environ = rootless_user.environ({"XDG_DATA_HOME": str(place / "data"), "PYBUILD_CONFIG": ""})
    environ.pop("PYBUILD_ROOT", None)
    for words in (
        ("build", "-t", "mine:1", str(context)),
        ("fsck", "--snapshots"),
        ("cache", "audit", str(context)),
        ("bundle", "mine:1", str(place / "bundle")),
        ("flatten", "mine:1", "-t", "flat:1"),
        ("run", "--rm", "--network", "none", "flat:1", "cat", "/one"),
        ("save", "-o", str(place / "s.tar"), "mine:1"),
        ("prune", "--force"),
    ):
        command = [str(rootless_user.python), "-m", "builder", *words]
        done = subprocess.run(
            rootless_user.command(command), env=environ, cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
    assert (place / "data/pybuild/index.json").exists()
