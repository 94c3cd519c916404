"""Limits of an ordinary user whose session has no group of its own: systemd is asked for a scope.

systemd does not run on every machine that runs tests. A program of its name stands in for it, which does to
control groups what `systemd-run --scope` does; the kernel's rules of delegation are the real ones.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.sandbox import cgroup
from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_root

STAND_IN = """#!/bin/sh
echo "$*" > {log}
echo "$XDG_RUNTIME_DIR" >> {log}
case "$*" in *'$'*) echo "a variable would take this one's place" >&2; exit 99;; esac
while test "$1" != --; do shift; done
shift
echo $$ > {scope}/cgroup.procs && exec "$@"
"""


class Session(Pybuild):
    """`pybuild` in a group of the user's session, which is not the user's."""

    group = Path()
    path = ""

    def argv(self, *arguments: str | Path) -> list[str]:
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(self.group), *super().argv(*arguments)]


@pytest.fixture
def session(rootless_user: Account, tmp_path: Path) -> Iterator[Session]:
    need_root()
    unified = next((h for h in cgroup.detect() if h.version == 2), None)
    if unified is None or "hugetlb" not in unified.controllers:
        pytest.skip("no cgroup v2 with a controller here")
    top = Path(unified.mount_point) / f"test-{os.getpid()}"
    scope, group = top / "some.scope", top / "session"
    enabled = (Path(unified.mount_point) / "cgroup.subtree_control").read_text()
    if "hugetlb" not in enabled:
        pytest.skip("the controller is not enabled at the top")
    for path in (top, scope, group):
        path.mkdir()
        (path / "cgroup.procs").chmod(0o644)
    (top / "cgroup.subtree_control").write_text("+hugetlb")
    # As systemd leaves it: the scope is the user's, what is above is not. (That a process may move at all,
    # which systemd does as root, takes the right to write to the common ancestor's list.)
    for path in (scope, *scope.iterdir(), top / "cgroup.procs"):
        os.chown(path, rootless_user.uid, rootless_user.gid)
    place = rootless_user.home / tmp_path.name
    (place / "runtime/systemd").mkdir(parents=True)
    (place / "runtime/systemd/private").touch()
    (place / "log").touch()
    stand_in = place / "systemd-run"
    stand_in.write_text(STAND_IN.format(log=place / "log", scope=scope))
    stand_in.chmod(0o755)
    for path in (place, place / "log"):
        os.chown(path, rootless_user.uid, rootless_user.gid)
    environment = {"PATH": f"{place}:{rootless_user.environ()['PATH']}", "XDG_RUNTIME_DIR": str(place / "runtime")}
    pybuild = Session(place / "store", account=rootless_user, env=environment)
    pybuild.group = group
    yield pybuild
    deadline = time.monotonic() + 10
    for path in (scope / "main", scope, group, top):
        while path.exists() and time.monotonic() < deadline:
            try:
                path.rmdir()
            except OSError:
                time.sleep(0.05)


def test_a_user_gets_a_scope_for_his_limits(session: Session, busybox_base: str) -> None:
    assert session.account
    context = write_context(session.account.home / "c", f"FROM {busybox_base}\nRUN cat /proc/self/cgroup; sleep 2\n")
    process = session.start("build", "--hugetlb-limit=2MB:4m", "--progress=plain", context)
    try:
        scope = session.group.parent / "some.scope"
        found = ""
        deadline = time.monotonic() + 30
        while not found and time.monotonic() < deadline and process.poll() is None:
            for limit in scope.glob("pybuild-*/hugetlb.2MB.max"):
                if (limit.parent / "cgroup.procs").read_text():
                    found = limit.read_text()
            time.sleep(0.02)
        _out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, found) == (0, f"{4 << 20}\n"), err
    log = Path(session.env["PATH"].split(":")[0], "log").read_text()
    assert log.startswith("--user --scope --quiet --collect --property=Delegate=yes -- ")
    assert not list(scope.glob("pybuild-*"))


def test_words_that_look_like_variables(session: Session, busybox_base: str) -> None:
    """systemd-run of late takes them for such."""
    assert session.account
    text = f'FROM {busybox_base}\nARG WORD\nRUN echo "is $WORD"\n'
    context = write_context(session.account.home / "v", text)
    flags = ("--build-arg=WORD=${HOME} \udcff$$", "--hugetlb-limit=2MB:4m", "--progress=plain", "--no-cache")
    assert "is ${HOME} " in session.build(context, *flags).stderr
    assert Path(session.env["PATH"].split(":")[0], "log").read_text().startswith("--user --scope ")


def test_of_a_shell_that_was_not_told(session: Session, busybox_base: str) -> None:
    """cron's jobs and su's shells have no XDG_RUNTIME_DIR; the user's manager may run all the same."""
    assert session.account
    context = write_context(session.account.home / "u", f"FROM {busybox_base}\nRUN true\n")
    runtime = Path(f"/run/user/{session.account.uid}")
    session.env["XDG_RUNTIME_DIR"] = ""
    shutil.copytree(session.root.parent / "runtime", runtime)
    try:
        session.build(context, "--hugetlb-limit=2MB:4m")
    finally:
        shutil.rmtree(runtime)
    assert Path(session.env["PATH"].split(":")[0], "log").read_text().splitlines()[1] == str(runtime)


def test_without_limits_nobody_is_asked(session: Session, busybox_base: str) -> None:
    assert session.account
    context = write_context(session.account.home / "d", f"FROM {busybox_base}\nRUN true\n")
    session.build(context)
    assert not Path(session.env["PATH"].split(":")[0], "log").read_text()
    result = session.build(context, "--hugetlb-limit=2MB:4m", "--no-cache", "--cgroup-manager=cgroupfs", check=False)
    assert result.status == 1 and "no cgroup is delegated" in result.stderr, result.stderr


def test_where_it_does_not_run(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs here")
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, "--cgroup-manager=systemd", check=False)
    assert result.status == 1 and "cgroup manager systemd: " in result.stderr
