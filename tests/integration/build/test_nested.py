"""Builds inside: in a RUN of pybuild itself, and in podman's containers with and without their defaults."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_root, need_tool

INNER = """
FROM scratch
COPY --chmod=755 busybox /bin/busybox
COPY --chmod=755 busybox /bin/sh
RUN ["/bin/busybox", "mkdir", "-p", "/etc/deep"]
RUN /bin/busybox touch /a && /bin/busybox chown 33:34 /a && /bin/busybox rm -r /etc/deep && echo pid $$ > /pid
RUN /bin/busybox mknod /node c 1 3
"""
PROBE = "RUN /bin/busybox test $(/bin/busybox stat -c %u:%g /a) = 33:34 && /bin/busybox test ! -e /etc/deep\n"


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    need_root()
    busybox = shutil.which("busybox")
    assert busybox
    context = write_context(tmp_path / "inner", INNER + PROBE, {})
    shutil.copyfile(busybox, context / "busybox")
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    return context


def volumes(account: Account, inner: Path) -> list[str]:
    """The machine's own Python and the packages, as every user can read them."""
    places = [(place, place) for place in ("/usr", "/lib", "/lib64") if Path(place).exists()]
    places += [(account.pythonpath, "/pkg"), (str(inner), "/inner")]
    return [f"--volume={source}:{target}:ro" for source, target in places]


COMMAND = (
    "PYTHONPATH=/pkg PATH=/usr/sbin:/usr/bin:/bin exec /usr/bin/python3 -B -m builder --root /store/s build /inner"
)


@pytest.mark.parametrize("user", ["root", "someone"])
def test_in_a_run_of_its_own(
    pybuild: Pybuild, rootless_user: Account, busybox_base: str, inner: Path, tmp_path: Path, user: str
) -> None:
    """With its leave: --security=insecure. As an ordinary user with subordinate ids, too."""
    someone = f"{rootless_user.name}:x:{rootless_user.uid}:{rootless_user.gid}::/tmp:/bin/sh"
    ids = f"{rootless_user.name}:200000:65536"
    text = f"FROM {busybox_base}\nRUN mkdir -p /usr /lib /lib64 /pkg /inner && mkdir -m 1777 /store\n"
    text += f"RUN echo {someone} >> /etc/passwd && echo {ids} > /etc/subuid && echo {ids} > /etc/subgid\n"
    text += f"USER {user if user == 'root' else rootless_user.name}\n"
    # The store's file system must not be an overlay itself, if it is to bear one.
    text += f"RUN --security=insecure --mount=type=tmpfs,target=/store {COMMAND}\n"
    context = write_context(tmp_path / "outer", text)
    log = pybuild.build(
        context, "--allow=security.insecure", *volumes(rootless_user, inner), "--progress=plain", "--no-cache"
    ).stderr
    assert "[6/6] RUN" in log


def test_in_a_run_of_an_ordinary_user(
    pybuild_rootless: Pybuild, rootless_user: Account, busybox_base: str, inner: Path
) -> None:
    """There only one may answer for devices that a sandbox asks for: the outer one does for both."""
    text = f"FROM {busybox_base}\nRUN mkdir -p /usr /lib /lib64 /pkg /inner /store\n"
    text += f"RUN --security=insecure --mount=type=tmpfs,target=/store {COMMAND.replace('exec ', '')} -o /store/out && "
    text += 'test "$(find /store/out/node -size 0)" && cp -r /store/out/node /copied && mknod /own c 1 5\n'
    context = write_context(rootless_user.home / "outer", text)
    # Every session of pytest closes the directory that holds those of all to others.
    own = Path(shutil.copytree(inner, rootless_user.home / "inner", dirs_exist_ok=True))
    flags = ("--allow=security.insecure", *volumes(rootless_user, own), "--progress=plain", "--no-cache")
    log = pybuild_rootless.build(context, *flags, "-t", "outer:1").stderr
    assert "[3/3] RUN" in log, log
    with tarfile.open(fileobj=io.BytesIO(pybuild_rootless.run("export", "outer:1").stdout)) as tar:
        assert tar.getmember("own").ischr() and tar.getmember("copied").isreg()


class Podman:
    """Root's podman, with a store of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        options = [f"--root={place}/root", f"--runroot={place}/run", "--runtime=runc", "--cgroup-manager=cgroupfs"]
        self.command = ["podman", *options, "--events-backend=file"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def podman(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> Iterator[Podman]:
    need_root()
    need_tool("podman", "runc")
    place = Path(tempfile.mkdtemp(prefix="pbtest-", dir="/var/tmp"))  # podman takes 50 characters at most
    tool = Podman(place)
    text = f"FROM {busybox_base}\nRUN mkdir -p /pkg /inner && mkdir -m 1777 /store\n"
    context = write_context(tmp_path / "base", text)
    archive = tmp_path / "base.tar"
    pybuild.build(context, f"--output=type=docker,dest={archive},name=nested:1")
    assert tool.run("load", "-i", str(archive)).returncode == 0
    probe = tool.run("run", "--rm", *LIMITS, "--net=host", "nested:1", "true")
    if probe.returncode:
        pytest.skip(f"podman runs nothing here: {probe.stderr.strip()[-200:]}")
    yield tool
    tool.run("rm", "--all", "--force")
    tool.run("rmi", "--all", "--force")
    shutil.rmtree(tool.place, ignore_errors=True)


LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000")  # podman's own need CAP_SYS_RESOURCE


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (("--privileged",), "root"),
        ((), "subordinate"),
        (("--security-opt=seccomp=unconfined",), "subordinate"),
        (("--tmpfs=/store",), "subordinate"),
        (("--user=1000:1000", "--tmpfs=/store:rw,mode=1777"), "single"),
    ],
    ids=["privileged", "default", "unconfined", "tmpfs", "user"],
)
def test_in_podman(podman: Podman, rootless_user: Account, inner: Path, flags: tuple[str, ...], chosen: str) -> None:
    """Podman's filter leaves user namespaces alone, where all that a build needs is to be had."""
    common = ("run", "--rm", *LIMITS, "--net=host", *flags, *volumes(rootless_user, inner), "nested:1", "sh", "-c")
    done = podman.run(*common, COMMAND)
    assert done.returncode == 0, done.stderr
    doctor = COMMAND.replace("build /inner", "doctor --json")
    assert f'"chosen": "{chosen}"' in podman.run(*common, doctor).stdout
