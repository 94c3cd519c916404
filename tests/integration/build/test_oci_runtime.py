"""RUN by an OCI runtime: the same image as without, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.build.test_single_id import SingleId
from tests.integration.build.test_unprivileged import EVERYTHING, digest, running
from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_root, need_tool

RUNC = ("--isolation=oci", "--runtime=runc")


@pytest.fixture(autouse=True)
def _runc() -> None:
    need_tool("runc")


def test_runc_makes_the_same_image(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", EVERYTHING.format(base=busybox_base), {"file": "of the context\n"})
    found = digest(pybuild, context, *RUNC)
    assert found == digest(Pybuild(tmp_path / "other"), context)


def test_the_runtime_makes_the_sandbox(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    script = "grep -E 'CapEff|Seccomp:' /proc/self/status; echo links: $(ls /sys/class/net); ulimit -n; mount | head -1"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN --network=none {script}; id\n")
    log = pybuild.build(context, *RUNC, "--progress=plain", "--ulimit=nofile=77", "--cap-drop=CHOWN").stderr
    for words in ("00000000a80425fa", "Seccomp:\t2", "links: lo", " 77\n", " on / type overlay"):
        assert words in log, words


def test_a_step_that_takes_too_long(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    mark = f"36{os.getpid()}.75"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN sleep {mark} & trap '' TERM; sleep {mark}\n")
    result = pybuild.build(context, *RUNC, "--timeout=4s", check=False)
    assert (result.status, "it ran longer than 4 s" in result.stderr) == (137, True), result.stderr
    assert not running(f"sleep {mark}")
    assert not list(pybuild.root.glob("snapshots/*/bundle-*"))


def test_limits_hold_and_are_told(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN a=x; while true; do a=$a$a; done\n")
    result = pybuild.build(context, *RUNC, "--memory=32m", "--memory-swap=32m", check=False)
    assert (result.status, "killed: out of memory (limit 32 MiB)" in result.stderr) == (137, True), result.stderr
    bomb = "for i in 1 2 3 4 5 6 7 8 9; do sleep 100 & done; echo all"
    context = write_context(tmp_path / "d", f"FROM {busybox_base}\nRUN {bomb}\n")
    result = pybuild.build(context, *RUNC, "--pids-limit=6", check=False)
    assert result.status != 0 and "fork" in result.stderr


def test_a_command_that_is_not_there(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f'FROM {busybox_base}\nRUN ["nope"]\n')
    result = pybuild.build(context, *RUNC, check=False)
    assert (result.status, "nope" in result.stderr) == (127, True), result.stderr


def test_the_runtimes_own_words_are_told(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, *RUNC, "--ulimit=nofile=10:1099511627776", check=False)
    assert result.status == 1 and "runtime: " in result.stderr and "rlimit" in result.stderr, result.stderr
    assert not list(pybuild.root.glob("snapshots/*/bundle-*"))


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (("--runtime=no-such-runtime",), 1, "no-such-runtime is not installed"),
        (("--isolation=chroot", "--runtime=runc"), 2, "exclude each other"),
        ((*RUNC, "--network=private"), 1, "cannot be had with isolation oci"),
    ],
)
def test_what_cannot_be_is_refused(
    pybuild: Pybuild, busybox_base: str, tmp_path: Path, flags: tuple[str, ...], status: int, words: str
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, *flags, check=False)
    assert (result.status, words in result.stderr) == (status, True), result.stderr


def test_an_ordinary_users_image_is_the_same(
    pybuild: Pybuild, pybuild_rootless: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    """In his user namespace, of which the container needs no other."""
    assert pybuild_rootless.account
    text = EVERYTHING.format(base=busybox_base).replace(" && mknod /device c 1 3", "")
    context = write_context(pybuild_rootless.account.home / "c", text, {"file": "of the context\n"})
    found = digest(pybuild_rootless, context, *RUNC)
    assert found == digest(pybuild, context)
    result = pybuild_rootless.build(context, *RUNC, "--memory=32m", "--no-cache", check=False)
    assert result.status == 1 and "limit" in result.stderr, result.stderr


def test_a_user_with_a_single_id_may_not(rootless_user: Account, busybox_base: str) -> None:
    """No runtime answers for the ids that are missing."""
    context = write_context(rootless_user.home / "single", f"FROM {busybox_base}\nRUN true\n")
    result = SingleId(rootless_user.home / "store-oci", account=rootless_user).build(context, *RUNC, check=False)
    assert result.status == 1 and "needs subordinate ids" in result.stderr, result.stderr


class OneHierarchy(Pybuild):
    """`pybuild` where no second kind of cgroup is mounted: crun refuses to work with two."""

    def argv(self, *arguments: str | Path) -> list[str]:
        script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
        return ["unshare", "-m", "sh", "-c", script, "sh", *super().argv(*arguments)]


def test_crun_makes_the_same_image(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    need_root()
    need_tool("crun")
    context = write_context(tmp_path / "c", EVERYTHING.format(base=busybox_base), {"file": "of the context\n"})
    crun = OneHierarchy(tmp_path / "other")
    found = digest(crun, context, "--isolation=oci", "--runtime=crun")
    assert found == digest(pybuild, context)
    context = write_context(tmp_path / "d", f"FROM {busybox_base}\nRUN a=x; while true; do a=$a$a; done\n")
    result = crun.build(context, "--runtime=crun", "--memory=32m", "--memory-swap=32m", check=False)
    assert (result.status, "killed: out of memory (limit 32 MiB)" in result.stderr) == (137, True), result.stderr
