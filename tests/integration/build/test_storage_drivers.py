"""The same Containerfile gives the same layers, however snapshots are mounted and RUN is isolated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.build.test_unprivileged import EVERYTHING, digest
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool

MORE = """
RUN mkdir -p /old/deep && echo x > /old/deep/file && mkdir /kept && echo y > /kept/file && ln -s /kept /alias
RUN rm -rf /old && mkdir /old && echo z > /old/new && mv /kept/file /kept/renamed && rm /alias && mkdir /alias
RUN mkdir -p /fresh/er && chmod 1770 /fresh && chown 7:8 /fresh/er && rm -rf /var /srv; mkdir -p /var
"""


def need_fuse() -> None:
    need_tool("fuse-overlayfs")
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse here")


@pytest.fixture
def reference(busybox_base: str, tmp_path: Path) -> tuple[Path, str]:
    context = write_context(tmp_path / "c", EVERYTHING.format(base=busybox_base) + MORE, {"file": "of the context\n"})
    return context, digest(Pybuild(tmp_path / "reference"), context, "--storage-driver=overlay")


@pytest.mark.parametrize(
    "flags",
    [
        ("--storage-driver=fuse-overlayfs",),
        ("--storage-driver=native",),
        ("--isolation=chroot",),
        ("--isolation=oci", "--runtime=runc"),
        ("--isolation=oci", "--runtime=runc", "--storage-driver=fuse-overlayfs"),
    ],
    ids=lambda flags: " ".join(flag.partition("=")[2] for flag in flags),
)
def test_every_way_makes_the_same_image(
    reference: tuple[Path, str], pybuild: Pybuild, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    if "fuse" in " ".join(flags):
        need_fuse()
    if "--runtime=runc" in flags:
        need_tool("runc")
    context, found = reference
    assert digest(Pybuild(tmp_path / "other"), context, *flags) == found


@pytest.mark.parametrize("driver", ["overlay", "fuse-overlayfs", "native"])
def test_an_ordinary_users_too(reference: tuple[Path, str], pybuild_rootless: Pybuild, driver: str) -> None:
    if driver == "fuse-overlayfs":
        need_fuse()
        if Path("/dev/fuse").stat().st_mode & 0o006 != 0o006:
            pytest.skip("/dev/fuse is not open to all here")
    assert pybuild_rootless.account
    context, found = reference
    mine = write_context(pybuild_rootless.account.home / "c", (context / "Containerfile").read_text())
    shutil.copy(context / "file", mine)
    assert digest(pybuild_rootless, mine, f"--storage-driver={driver}") == found


def test_the_kernel_and_the_program_share_snapshots(busybox_base: str, tmp_path: Path) -> None:
    """What one made the other finds in the cache, and builds upon."""
    need_fuse()
    store = Pybuild(tmp_path / "store")
    text = f"FROM {busybox_base}\nRUN mkdir /d && touch /d/a /d/b && rm -rf /tmp\nRUN rm -rf /d && mkdir -p /d /tmp\n"
    first = digest(store, write_context(tmp_path / "c", text), "--storage-driver=fuse-overlayfs")
    text += "RUN ls -A /d /tmp > /seen && test $(wc -w < /seen) = 2 && touch /d/c\n"
    second = store.build(write_context(tmp_path / "d", text), "--storage-driver=overlay", "--progress=plain")
    assert second.stderr.count("CACHED") == 3
    text += "RUN test $(ls /d) = c && rm /d/c\nRUN test -z $(ls -A /d)\n"
    third = store.build(write_context(tmp_path / "e", text), "--storage-driver=fuse-overlayfs", "--progress=plain")
    assert third.stderr.count("CACHED") == 4
    assert first != second.text.strip() != third.text.strip()


def test_a_driver_that_is_not_to_be_had(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    need_fuse()
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    hidden = Hidden(tmp_path / "store")
    result = hidden.build(context, "--storage-driver=fuse-overlayfs", check=False)
    assert result.status == 1 and "/dev/fuse is not to be had here" in result.stderr, result.stderr


class Hidden(Pybuild):
    """`pybuild` where the program cannot be executed."""

    def argv(self, *arguments: str | Path) -> list[str]:
        hide = "mount -t tmpfs none /mnt && touch /mnt/none && mount --bind /mnt/none /usr/bin/fuse-overlayfs"
        return ["unshare", "-m", "sh", "-ec", f'{hide}; exec "$@"', "sh", *super().argv(*arguments)]


OVER_AND_BESIDE = """
FROM {base}
RUN mkdir -p /app/old/kept /gone/f && echo x > /app/old/a && echo y > /gone/f/lower
RUN rm -r /gone /app/old/a
COPY tree /app
COPY tree /gone
COPY --chown=7:8 --chmod=2750 tree /new/deep
COPY tree/sub tree/top /two/
COPY tree/* /many/
RUN find /app /gone /new /two /many | sort > /seen && test ! -e /gone/f/lower && test $(cat /app/old/a) = new
COPY tree/sub /app/old
"""


def test_new_directories_are_written_beneath_the_overlay(
    pybuild: Pybuild, pybuild_rootless: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    """To the same effect as by the driver that has no overlay: over, in and beside what was there and is gone."""
    text = OVER_AND_BESIDE.format(base=busybox_base)
    files = {"tree/top": "t", "tree/sub/deep/f": "f", "tree/sub/x": "x", "tree/old/a": "new", "tree/f/own": "o"}
    found = set()
    assert pybuild_rootless.account
    for tool, place in ((pybuild, tmp_path), (pybuild_rootless, pybuild_rootless.account.home)):
        context = write_context(place / "over", text, {**files, **{f"tree/sub/deep/{n}": str(n) for n in range(70)}})
        tree = context / "tree"
        for first, second in (("top", "sub/linked"), ("sub/x", "also-x"), ("sub/deep/f", "sub/y"), ("f/own", "z")):
            os.link(tree / first, tree / second)
        (tree / "sub/link").symlink_to("deep/f")
        found |= {digest(tool, context, f"--storage-driver={driver}") for driver in ("overlay", "native")}
    assert len(found) == 1
    assert pybuild.run("fsck", "--snapshots", "--json").json()["clean"]
