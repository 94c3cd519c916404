"""Device nodes are the same in every tier: in base images, of RUN, through copies, archives, containers and outputs."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers.ownership import ATTRIBUTE
from tests.integration.build.test_single_id import SingleId
from tests.integration.build.test_unprivileged import EPOCH
from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_mounts
from tests.support.registries import RegistryServer

pytestmark = [pytest.mark.root, pytest.mark.rootless]

BASE = """
FROM {base}
ADD nodes.tar /
RUN ln /srv/null /srv/linked
"""

STEPS = """
FROM {base} AS tool
RUN touch /srv/null && chmod 600 /srv/disk && chown 7:8 /srv/disk && mv /srv/tty /srv/moved && rm /srv/gone
RUN mkdir -m 2775 /made && chown 0:50 /made && umask 026 && mknod -m 620 /made/tty c 5 1 && \\
    mknod /made/disk b 259 9 && ln /made/disk /made/second && \\
    mv /made/tty /made/renamed && chown 33:34 /made/disk && mknod /made/pipe p && \\
    mknod /made/gone c 1 5 && rm /made/gone && mknod /made/full c 1 7
RUN rm -r /srv/deep && mkdir /srv/deep && mknod /srv/deep/null c 1 3 && rm /made/full && mkdir /made/full
FROM {base}
COPY --from=tool / /whole
COPY --from=tool /made /srv/null /copied/
COPY --from=tool --chown=5:6 --chmod=640 /made/disk /one
COPY --link --from=tool /made /linked
ADD nodes.tar /added
COPY nodes.tar /
RUN cp /bin/busybox /programs && chown -R 9:10 /copied && rm /srv/gone && chmod 666 /added/srv/disk
"""


def nodes() -> bytes:
    """An archive of devices, as /dev of a base image has them, and elsewhere."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind, device, mode, owner in (
            ("dev", tarfile.DIRTYPE, (0, 0), 0o755, (0, 0)),
            ("dev/null", tarfile.CHRTYPE, (1, 3), 0o666, (0, 0)),
            ("dev/sda", tarfile.BLKTYPE, (8, 0), 0o660, (0, 6)),
            ("srv", tarfile.DIRTYPE, (0, 0), 0o755, (0, 0)),
            ("srv/deep", tarfile.DIRTYPE, (0, 0), 0o755, (0, 0)),
            ("srv/deep/zero", tarfile.CHRTYPE, (1, 5), 0o600, (0, 0)),
            ("srv/disk", tarfile.BLKTYPE, (8, 1), 0o4640, (3, 4)),
            ("srv/gone", tarfile.CHRTYPE, (1, 8), 0o444, (0, 0)),
            ("srv/null", tarfile.CHRTYPE, (1, 3), 0o666, (0, 0)),
            ("srv/tty", tarfile.CHRTYPE, (5, 0), 0o620, (1, 5)),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.mtime = kind, mode, 1_600_000_000
            (entry.devmajor, entry.devminor), (entry.uid, entry.gid) = device, owner
            tar.addfile(entry)
    return stream.getvalue()


def devices(tar: bytes) -> dict[str, tuple[object, ...]]:
    """The devices of an archive, and those that link to them."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for entry in archive:
            number = (entry.devmajor, entry.devminor)
            if entry.ischr() or entry.isblk():
                found[entry.name] = (entry.ischr(), *number, entry.mode, entry.uid, entry.gid)
            elif entry.islnk() and entry.linkname in found:
                found[entry.name] = found[entry.linkname]
    return found


@pytest.fixture
def base(pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path) -> str:
    """A base image with devices, in the registry."""
    name = f"{registry.host}/base/devices:{os.getpid()}"
    context = write_context(tmp_path / "base", BASE.format(base=busybox_base), {"nodes.tar": nodes()})
    pybuild.build(context, "--push", "-t", name, env=EPOCH)
    return name


@pytest.fixture
def single(rootless_user: Account) -> Iterator[SingleId]:
    need_mounts()
    root = rootless_user.home / "store-single-devices"
    yield SingleId(root, account=rootless_user)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Pybuild:
    """An ordinary user's."""
    found: Pybuild = request.getfixturevalue(request.param)
    return found


users = pytest.mark.parametrize("user", ["pybuild_rootless", "single"], indirect=True)


@users
@pytest.mark.parametrize("flags", [(), ("--squash",), ("--storage-driver=native",)], ids=" ".join)
def test_the_same_image_as_a_root_build(
    pybuild: Pybuild, user: Pybuild, base: str, rootless_user: Account, flags: tuple[str, ...]
) -> None:
    context = write_context(rootless_user.home / "same", STEPS.format(base=base), {"nodes.tar": nodes()})
    (context / "nodes.tar").chmod(0o644)
    arguments = ("-q", *flags, "-t", "made:1")
    found = user.build(context, "--verify-layers", *arguments, env=EPOCH).text
    assert found == pybuild.build(context, *arguments, env=EPOCH).text
    assert user.run("fsck", "--snapshots", "--json").json()["clean"]
    tars = [tool.run("export", "made:1").stdout for tool in (user, pybuild)]
    assert devices(tars[0]) == devices(tars[1])
    wanted = {"whole/dev/sda": (False, 8, 0, 0o660, 0, 6), "whole/made/second": (False, 259, 9, 0o640, 33, 34)}
    wanted |= {"copied/renamed": (True, 5, 1, 0o620, 9, 10), "one": (False, 259, 9, 0o640, 5, 6)}
    wanted |= {"added/srv/disk": (False, 8, 1, 0o666, 3, 4), "whole/srv/moved": (True, 5, 0, 0o620, 1, 5)}
    assert wanted.items() <= devices(tars[0]).items()


@users
def test_outputs(user: Pybuild, base: str, rootless_user: Account) -> None:
    """What leaves the store as a tar has devices; on the user's own disk files with the attribute stand for them."""
    context = write_context(rootless_user.home / "out", f"FROM {base}\nRUN mknod /made c 4 5 && chown 3:4 /made\n")
    target, tar, unpacked = (rootless_user.home / name for name in ("local", "tree.tar", "unpacked"))
    try:
        user.build(context, "-t", "made:1", "-o", f"type=tar,dest={tar}", "-o", "type=image")
        assert devices(tar.read_bytes())["made"] == (True, 4, 5, 0o644, 3, 4)
        user.build(context, "-o", f"type=local,dest={target}")
        assert user.run("unpack", "made:1", unpacked).stderr.count(ATTRIBUTE) == 1
        for place in (target, unpacked):
            assert os.getxattr(place / "made", ATTRIBUTE).endswith(b":c:4:5") and (place / "made").is_file()
            assert os.getxattr(place / "srv/disk", ATTRIBUTE).endswith(b":b:8:1")
        # And back.
        again = write_context(rootless_user.home / "again", "FROM scratch\nCOPY local /\n")
        shutil.rmtree(again / "local", ignore_errors=True)
        os.rename(target, again / "local")
        tar.unlink()
        user.build(again, "-o", f"type=tar,dest={tar}")
        assert devices(tar.read_bytes())["made"][:3] == (True, 4, 5)
    finally:
        for name in ("local", "unpacked", "again"):
            shutil.rmtree(rootless_user.home / name, ignore_errors=True)
        tar.unlink(missing_ok=True)


@users
def test_what_was_written_to_one_is_not_its(user: Pybuild, base: str, rootless_user: Account) -> None:
    """debootstrap's chroot writes to its /dev/null: that remains a device, in the layer and in a copy."""
    text = f"FROM {base} AS tool\nRUN mknod /null c 1 3 && echo words > /null\nRUN echo more >> /null\n"
    context = write_context(rootless_user.home / "written", f"{text}FROM {base}\nCOPY --from=tool /null /copied\n")
    tar = rootless_user.home / "written.tar"
    for target, name in (("tool", "null"), ("", "copied")):
        user.build(context, f"--target={target}", "-o", f"type=tar,dest={tar}")
        assert devices(tar.read_bytes())[name] == (True, 1, 3, 0o644, 0, 0)
        tar.unlink()


@users
def test_containers(user: Pybuild, base: str, rootless_user: Account) -> None:
    user.run("run", "-d", "--name", "c", "--network", "host", base, "sh", "-c", "mknod /one c 1 3; sleep 1000")
    out = rootless_user.home / "copied-out"
    try:
        user.run("exec", "c", "sh", "-ec", "until test -e /one; do sleep 0.02; done; mknod /two b 8 2; ln /two /three")
        assert user.run("exec", "-u", "7:8", "c", "mknod", "/tmp/x", "c", "1", "3", check=False).status == 1
        assert {"A /one", "A /two"} <= set(user.run("diff", "c").text.splitlines())
        wanted = {"one": (True, 1, 3), "two": (False, 8, 2), "three": (False, 8, 2), "srv/null": (True, 1, 3)}

        def has(tar: bytes) -> None:
            assert {name: row[:3] for name, row in devices(tar).items() if name in wanted} == wanted

        has(user.run("export", "c").stdout)
        assert devices(user.run("cp", "c:/two", "-").stdout)["two"][:3] == (False, 8, 2)
        user.run("cp", "-a", "c:/two", out)
        assert os.getxattr(out, ATTRIBUTE).endswith(b":b:8:2")
        assert user.run("cp", "c:/two", rootless_user.home / "unprivileged").status == 0
        assert not (rootless_user.home / "unprivileged").exists()
        user.run("commit", "c", "committed:1")
        has(user.run("export", "committed:1").stdout)
    finally:
        user.run("rm", "-f", "c")
        out.unlink(missing_ok=True)


def test_who_may_not(pybuild_rootless: Pybuild, base: str, rootless_user: Account) -> None:
    context = write_context(rootless_user.home / "refused", f"FROM {base}\nRUN mknod /x c 1 3\n")
    result = pybuild_rootless.build(context, "--cap-drop=MKNOD", check=False)
    assert result.status == 1 and "Operation not permitted" in result.stderr
