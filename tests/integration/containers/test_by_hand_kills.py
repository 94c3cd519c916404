"""Working containers whose commands are killed in the middle, used by two at once, or mounted."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild
from tests.support.waiting import PATIENCE_S, until

NAME = "work"
POINTS = ("byhand.before-commit", "byhand.after-commit", "byhand.before-settings")


@pytest.fixture
def hand(pybuild: Pybuild, tmp_path: Path) -> Iterator[Pybuild]:
    """The command line with a working container; nothing of it is left when it is removed."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox")
    shutil.copyfile(busybox, tmp_path / "sh")
    (tmp_path / "sh").chmod(0o755)
    pybuild.run("from", "--name", NAME, "scratch")
    pybuild.run("copy", NAME, tmp_path / "sh", "/bin/sh")
    yield pybuild
    pybuild.run("rm", "-f", NAME)
    pybuild.run("prune", "--all", "-f")
    assert snapshots(pybuild) == []
    assert os.listdir(pybuild.root / "snapshots") == []
    assert os.listdir(pybuild.root / "containers") == ["names"]
    assert os.listdir(pybuild.root / "containers/names") == []


UNTIL_OPEN = "until test -e /gate/open; do sleep 0.05; done"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A directory to mount at /gate: what waits `UNTIL_OPEN` goes on when the test makes the file `open` in it."""
    path = tmp_path / "gate"
    path.mkdir()
    return path


def snapshots(hand: Pybuild) -> list[str]:
    with sqlite3.connect(hand.root / "store.db") as database:
        return [str(row[0]) for row in database.execute("SELECT id FROM snapshots")]


def steps(hand: Pybuild) -> list[str]:
    return [line["created_by"] for line in hand.run("inspect", NAME).json()[0]["History"]]


def test_a_command_that_is_killed_with_pybuild_leaves_nothing(hand: Pybuild) -> None:
    process = hand.start("run", NAME, "--", "sh", "-c", "echo half > /half; echo on; exec sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"on\n"
    process.kill()
    process.communicate()
    assert hand.run("diff", NAME).text.split() == ["A", "/bin", "A", "/bin/sh"]
    hand.run("run", NAME, "--", "sh", "-c", "test ! -e /half")


def test_an_interrupt_ends_the_command_and_keeps_the_container(hand: Pybuild) -> None:
    process = hand.start("run", NAME, "--", "sh", "-c", "echo on; exec sleep 1000")
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert len(steps(hand)) == 1


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("verb", ["run", "copy", "config"])
def test_a_step_is_made_whole_or_not_at_all(hand: Pybuild, tmp_path: Path, verb: str, point: str) -> None:
    command: dict[str, list[str | Path]] = {
        "run": ["run", NAME, "--", "sh", "-c", "echo new > /new"],
        "copy": ["copy", NAME, tmp_path / "sh", "/new"],
        "config": ["config", "--workingdir", "/new", "--env", "A=1", "--workingdir", "/new/er", NAME],
    }
    killed = hand.run(*command[verb], env={"PYBUILD_FAULT": point}, check=False)
    assert killed.status == -signal.SIGKILL
    made = "/new" in hand.run("diff", NAME).text
    document = hand.run("inspect", NAME).json()[0]
    assert made == (point != "byhand.before-commit")
    assert len(document["History"]) == (1 if not made else 4 if verb == "config" else 2)
    if verb == "config":
        assert ("A=1" in document["config"].get("Env", [])) == made
    hand.run(*command[verb])
    hand.run("run", NAME, "--", "sh", "-c", "test -e /new")
    hand.run("commit", NAME, "made:1")
    hand.run("rmi", "made:1")


@pytest.mark.parametrize("point", ["byhand.directory", "byhand.named", "byhand.removed"])
def test_what_was_half_made_or_half_removed_is_swept(hand: Pybuild, point: str) -> None:
    verb = ["rm", NAME] if point == "byhand.removed" else ["from", "--name", "half", "scratch"]
    assert hand.run(*verb, env={"PYBUILD_FAULT": point}, check=False).status == -signal.SIGKILL
    assert hand.run("containers", "--format", "{{.ContainerName}}").text.split() == (
        [NAME] if verb[0] == "from" else []
    )
    assert hand.run("from", "--name", verb[1] if verb[0] == "rm" else "half", "scratch").status == 0
    if verb[0] == "from":
        hand.run("rm", "half")


def test_a_killed_commit_leaves_the_container(hand: Pybuild) -> None:
    for point in ("store.publish.before-commit", "store.publish.before-index"):
        killed = hand.run("commit", NAME, "killed:1", env={"PYBUILD_FAULT": point}, check=False)
        assert killed.status == -signal.SIGKILL
    hand.run("commit", "--rm", NAME, "whole:1")
    assert hand.run("run", "--rm", "--network", "host", "whole:1", "sh", "-c", "exit 3", check=False).status == 3
    hand.run("rmi", "whole:1", "killed:1", check=False)
    hand.run("from", "--name", NAME, "scratch")


def test_two_shells_take_turns(hand: Pybuild, gate: Path) -> None:
    """The second waits, and says so; both steps are in the image."""
    first = hand.start("run", "-v", f"{gate}:/gate", NAME, "--", "sh", "-c", f"echo on; {UNTIL_OPEN}; echo 1 > /first")
    assert first.stdout is not None
    first.stdout.readline()
    second = hand.start("run", NAME, "--", "sh", "-c", "cat /first; echo 2 > /second")
    assert second.stderr is not None
    assert f"waiting for another pybuild that works on {NAME}" in second.stderr.readline().decode()
    (gate / "open").touch()
    assert second.communicate()[0] == b"1\n"
    first.communicate()
    assert first.returncode == second.returncode == 0
    assert hand.run("diff", NAME).text.count("A /first\nA /second\n") == 1


def test_many_at_once_lose_nothing(hand: Pybuild) -> None:
    processes = [hand.start("config", "--env", f"V{n}={n}", NAME) for n in range(6)]
    processes += [hand.start("run", NAME, "--", "sh", "-c", f"echo {n} > /f{n}") for n in range(3)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    document = hand.run("inspect", NAME).json()[0]
    assert {f"V{n}={n}" for n in range(6)} <= set(document["config"]["Env"])
    assert all(f"A /f{n}\n" in hand.run("diff", NAME).text for n in range(3))
    assert len(document["History"]) == 10


def test_a_damaged_one_is_told_of_and_can_be_removed(hand: Pybuild) -> None:
    id = hand.run("containers", "-q", "--no-trunc").text.strip()
    settings = hand.root / "containers" / id / "settings.json"
    for text in ("{", "[]", ""):
        settings.write_text(text)
        for words in (["run", NAME, "--", "true"], ["config", "--user", "1", NAME], ["commit", NAME], ["rm", NAME]):
            failed = hand.run(*words, check=False)
            assert failed.status in {1, 125}
            assert "rm -f" in failed.stderr
        assert hand.run("containers", "-q").text == ""
    hand.run("rm", "-f", NAME)


def test_one_in_use_is_not_removed(hand: Pybuild, gate: Path) -> None:
    process = hand.start("run", "-v", f"{gate}:/gate", NAME, "--", "sh", "-c", f"echo on; {UNTIL_OPEN}")
    assert process.stdout is not None
    process.stdout.readline()
    refused = hand.run("rm", NAME, check=False)
    assert refused.status == 1
    assert "in use" in refused.stderr
    (gate / "open").touch()
    process.communicate()


def test_a_restart_of_the_machine_loses_nothing(hand: Pybuild) -> None:
    """Of a working container and of another, on an image whose snapshots no barrier covered."""
    hand.run("commit", NAME, "base:1")
    c = hand.run("from", "base:1").text.strip()
    fresh = hand.run("from", "base:1").text.strip()
    hand.run("run", c, "--", "sh", "-c", "echo 1 > /one")
    hand.run("create", "--network", "host", "--name", "plain", "base:1", "sh", "-c", "exit 3")
    for boot in ("first", "second"):
        with sqlite3.connect(hand.root / "store.db") as database:
            database.execute("UPDATE meta SET value=? WHERE key='boot'", (boot,))
        assert hand.run("diff", c).text == "A /one\n"
        assert hand.run("start", "-a", "plain", check=False).status == 3
        hand.run("run", fresh, "--", "sh", "-c", "true")
    hand.run("commit", c, "after:1")
    hand.run("run", "--rm", "--network", "host", "after:1", "sh", "-c", "read x < /one; test $x = 1")
    hand.run("rm", c, fresh, "plain")
    hand.run("rmi", "base:1", "after:1")


# Mounts


def test_what_is_changed_in_a_mount_is_a_layer(hand: Pybuild) -> None:
    place = Path(hand.run("mount", NAME).text.strip())
    (place / "by-host").write_text("host\n")
    assert hand.run("mount").text == f"{NAME} {place}\n"
    assert hand.run("diff", NAME).text == "A /bin\nA /bin/sh\nA /by-host\n"
    # A step sees it, and the mount shows the step.
    hand.run("run", NAME, "--", "sh", "-c", "read x < /by-host; echo $x > /by-run")
    assert (place / "by-run").read_text() == "host\n"
    os.unlink(place / "by-host")
    hand.run("commit", NAME, "mounted:1")
    assert (place / "by-run").exists()
    hand.run("umount", NAME)
    assert not place.exists()
    assert hand.run("umount", NAME, check=False).status == 2
    assert hand.run("diff", NAME).text == "A /bin\nA /bin/sh\nA /by-run\n"
    assert steps(hand)[1::2] == ["changes made in a mount"] * 2
    hand.run("mount", NAME)
    hand.run("unmount", "--all")
    assert len(steps(hand)) == 4
    hand.run("rmi", "mounted:1")


def test_a_mount_in_use_is_left_alone(hand: Pybuild) -> None:
    place = Path(hand.run("mount", NAME).text.strip())
    with subprocess.Popen(["sleep", "100"], cwd=place) as process:
        try:
            refused = hand.run("run", NAME, "--", "sh", "-c", "true", check=False)
            assert refused.status == 125
            assert "in use" in refused.stderr or "using" in refused.stderr
            assert hand.run("rm", NAME, check=False).status == 1
        finally:
            process.kill()
    hand.run("run", NAME, "--", "sh", "-c", "true")
    hand.run("unmount", NAME)


def test_a_mount_survives_a_killed_step_and_goes_with_the_container(hand: Pybuild) -> None:
    place = Path(hand.run("mount", NAME).text.strip())
    (place / "kept").write_text("kept\n")
    for point in POINTS:
        hand.run("run", NAME, "--", "sh", "-c", "true", env={"PYBUILD_FAULT": point}, check=False)
        assert "A /kept\n" in hand.run("diff", NAME).text
    hand.run("mount", NAME)
    assert (place / "kept").read_text() == "kept\n"
    hand.run("rm", NAME)
    assert not place.exists()
    hand.run("from", "--name", NAME, "scratch")


def test_an_ordinary_user_mounts_in_the_namespace_of_unshare(pybuild_rootless: Pybuild) -> None:
    hand = pybuild_rootless
    hand.run("from", "--name", NAME, "scratch")
    refused = hand.run("mount", NAME, check=False)
    assert refused.status == 2
    assert "pybuild unshare" in refused.stderr
    account = hand.account
    assert account is not None
    pybuild = f"{account.python} -m builder --root {hand.root}"
    script = f"set -e; m=$({pybuild} mount {NAME}); echo x > $m/f; chown 5:6 $m/f; touch {account.home}/mounted; "
    waiting = f"while [ ! -e {account.home}/go ]; do sleep 0.1; done; {pybuild} umount {NAME}"
    process = hand.start("unshare", "sh", "-c", script + waiting)
    try:
        until(lambda: (account.home / "mounted").exists() or process.poll() is not None)
        elsewhere = hand.run("config", "--workingdir", "/x", NAME, check=False)
        assert elsewhere.status == 1
        assert "another mount namespace" in elsewhere.stderr
        assert hand.run("rm", NAME, check=False).status == 1
    finally:
        (account.home / "go").touch()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert hand.run("diff", NAME).text == "A /f\n"
    hand.run("copy", NAME, account.home / "go", "/g")
    hand.run("commit", "--rm", NAME, "made:1")
    for name in ("mounted", "go"):
        (account.home / name).unlink()
