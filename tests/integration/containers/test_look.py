"""Looking at containers and changing them while they live: figures, processes, events, limits, files, volumes."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.containers.boxes import IMAGE, box, root_box, start, status_of
from tests.support.cli import Pybuild
from tests.support.waiting import until

__all__ = ["box", "root_box"]

BUSY = "while :; do :; done"


def entries(data: bytes) -> dict[str, tarfile.TarInfo]:
    """A tar's entries by name."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_figures_and_processes(box: Pybuild) -> None:
    start(box, "--name", "busy", IMAGE, "sh", "-c", BUSY)

    def figures() -> dict[str, Any]:
        return box.run("stats", "--no-stream", "--format", "json", "busy").json()  # type: ignore[no-any-return]

    until(lambda: figures()["cpu_ns"] > 0)
    until(lambda: float(figures()["CPUPerc"].rstrip("%")) > 5)
    row = figures()
    assert row["memory_bytes"] > 0
    assert row["PIDs"] >= 1
    table = box.run("stats", "--no-stream").text.splitlines()
    assert table[0].split()[0] == "CONTAINER"
    assert table[1].split()[1] == "busy"
    lines = box.run("top", "busy").text.splitlines()
    assert lines[1].split()[:3] == ["0", "1", "0"]
    assert lines[1].endswith(BUSY)
    assert box.run("top", "busy", "pid,comm").text.splitlines()[1].split() == ["1", "sh"]
    assert box.run("top", "busy", "nosuch", check=False).status == 2
    box.run("stop", "-t", "0", "busy")
    assert box.run("stats", "--no-stream").text.count("\n") == 1
    assert box.run("top", "busy", check=False).status == 1


def test_events_are_kept_and_filtered(box: Pybuild) -> None:
    begin = str(time.time_ns() // 10**9)
    start(box, "--name", "first", "--label", "tier=web", IMAGE, "sh", "-c", "sleep 100")
    box.run("kill", "-s", "KILL", "first")
    box.run("wait", "first")
    box.run("rm", "first")
    box.run("volume", "create", "kept")
    words = ("events", "--since", begin, "--until", "0s", "--format", "{{.Type}} {{.Action}}")
    lines = box.run(*words).text.splitlines()
    assert [line for line in lines if line.startswith("container")] == [
        f"container {action}" for action in ("create", "start", "kill", "die", "destroy")
    ]
    assert lines[-1] == "volume create"
    assert box.run(*words, "-f", "event=die", "-f", "label=tier=web").text == "container die\n"
    assert box.run(*words, "-f", "container=other").text == ""
    event = box.run("events", "--since", begin, "--until", "0s", "-f", "event=die", "--format", "json").json()
    assert event["Actor"]["Attributes"]["exitCode"] == "137"
    assert box.run("events", "-f", "nosuch=1", check=False).status == 2


def test_events_are_followed(box: Pybuild) -> None:
    run = ("run", "--rm", "--network", "host")
    box.run(*run, "--name", "before", IMAGE, "true")
    watch = ("--since", "1h", "-f", "event=start", "--format", "{{.Actor.Attributes.name}}")
    watcher = box.start("events", *watch, "--until", "2100-01-01")
    assert watcher.stdout is not None
    try:
        assert watcher.stdout.readline() == b"before\n"  # it watches by now, and goes on with what comes
        box.run("run", "--rm", "--name", "seen", "--network", "host", IMAGE, "true")
        assert watcher.stdout.readline() == b"seen\n"
    finally:
        watcher.kill()
        watcher.communicate()


def test_limits_are_changed_at_once(root_box: Pybuild) -> None:
    start(root_box, "--name", "bound", "-m", "64m", IMAGE, "sh", "-c", "sleep 100")

    def limit() -> object:
        row = root_box.run("stats", "--no-stream", "--format", "json", "bound").json()
        return row["memory_limit_bytes"]

    assert limit() == 64 << 20
    assert root_box.run("update", "-m", "128m", "bound").text == "bound\n"
    assert limit() == 128 << 20
    root_box.run("update", "-m", "32m", "--pids-limit", "5", "bound")
    assert limit() == 32 << 20
    # The output is not theirs: `exec` waits for its end.
    bomb = "for i in 1 2 3 4 5 6 7 8; do sleep 100 > /dev/null 2>&1 & done"
    fork = root_box.run("exec", "bound", "sh", "-c", bomb, check=False)
    assert "fork" in fork.stderr
    root_box.run("restart", "-t", "0", "bound")
    assert limit() == 32 << 20
    assert root_box.run("update", "bound", check=False).status == 2


def test_a_policy_is_changed_at_once(box: Pybuild) -> None:
    start(box, "--name", "again", "--restart", "always", IMAGE, "sh", "-c", "echo began; sleep 0.2")
    until(lambda: box.run("logs", "again").text.count("began") > 1)
    box.run("update", "--restart", "no", "again")
    until(lambda: status_of(box, "again") == "exited 0")


def test_a_paused_container_stands_still(root_box: Pybuild) -> None:
    start(root_box, "--name", "still", IMAGE, "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
    until(lambda: root_box.run("logs", "still").text)
    root_box.run("pause", "still")
    assert status_of(root_box, "still") == "paused 0"

    def log() -> str:
        return root_box.run("logs", "still").text

    until(lambda: log() == log())  # what had been said is written, and no more comes
    said = log()
    time.sleep(0.5)
    assert log() == said
    refused = root_box.run("exec", "still", "true", check=False)
    assert refused.status == 125
    assert "paused" in refused.stderr
    assert root_box.run("pause", "still", check=False).status == 1
    root_box.run("unpause", "still")
    until(lambda: root_box.run("logs", "still").text != said)
    root_box.run("pause", "still")
    root_box.run("stop", "-t", "1", "still")
    assert status_of(root_box, "still").startswith("exited")


def test_what_needs_a_group_says_so_where_there_is_none(box: Pybuild) -> None:
    if box.account is None:
        return  # root has groups: see the tests above
    start(box, "--name", "free", IMAGE, "sleep", "100")
    for words in (("pause", "free"), ("update", "-m", "64m", "free")):
        result = box.run(*words, check=False)
        assert result.status == 1
        assert "group" in result.stderr
        assert "hint: " in result.stderr
    assert status_of(box, "free") == "running 0"


@pytest.mark.parametrize("running", [True, False], ids=["running", "created"])
def test_files_go_in_and_out(box: Pybuild, tmp_path: Path, running: bool) -> None:
    words = ("--name", "files", "-v", "vol:/vol", IMAGE, "sh", "-c", "sleep 100")
    if running:
        start(box, *words)
    else:
        box.run("create", "--network", "host", *words)
    home = box.account.home if box.account else tmp_path
    tree = home / f"tree-{os.getpid()}-{running}"
    (tree / "deep").mkdir(parents=True)
    (tree / "file").write_text("in\n")
    (tree / "file").chmod(0o750)
    (tree / "deep" / "link").symlink_to("../file")
    tree.chmod(0o755)
    if box.account:
        for path in (tree, tree / "deep", tree / "file"):
            os.chown(path, box.account.uid, box.account.gid)
    box.run("cp", tree / "file", "files:/srv")
    box.run("cp", tree / "file", "files:/srv/renamed")
    box.run("cp", tree, "files:/tree")
    box.run("cp", f"{tree}/.", "files:/srv")
    box.run("cp", tree / "file", "files:/vol/kept")
    for pair in (("files:/nosuch", "."), ("files:/srv", tree / "file"), (tree / "file", "files:/no/where"),
                  (tree, "files:/srv/file"), (tree / "absent", "files:/srv")):  # fmt: skip
        refused = box.run("cp", *pair, check=False)
        assert refused.status == 1
        assert refused.stderr.startswith("error: ")
    found = entries(box.run("cp", "files:/srv", "-").stdout)
    assert found["srv/file"].mode == 0o750
    assert (found["srv/file"].uid, found["srv/index.html"].uid) == (0, 33)
    assert found["srv/deep/link"].linkname == "../file"
    assert {"srv", "srv/renamed"} <= set(found)
    assert "file" in entries(box.run("cp", "files:/srv/.", "-").stdout)
    assert set(entries(box.run("cp", "files:/vol/kept", "-").stdout)) == {"kept"}
    target = tree / "out"
    box.run("cp", "files:/tree", target)
    box.run("cp", "files:/tree", target)  # into what is there now
    assert (target / "tree" / "file").read_text() == "in\n"
    assert (target / "deep" / "link").readlink() == Path("../file")
    box.run("cp", "-L", "files:/tree/deep/link", tree / "followed")
    assert (tree / "followed").read_text() == "in\n"
    box.run("cp", "-", "files:/tmp", stdin=_tar("made/by/tar", b"data"))
    assert entries(box.run("cp", "files:/tmp/made", "-").stdout)["made/by/tar"].size == 4
    assert box.run("cp", "-", "files:/tmp", stdin=b"no tar at all", check=False).status == 1
    if not running:
        box.run("start", "files")
    assert box.run("exec", "files", "cat", "/srv/renamed", "/vol/kept", "/tmp/made/by/tar").text == "in\nin\ndata"


def _tar(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize("running", [True, False], ids=["running", "ended"])
def test_a_hostile_tree_leads_nowhere(root_box: Pybuild, tmp_path: Path, running: bool) -> None:
    script = (
        "ln -s /etc/outside /srv/up; ln -s /etc /srv/etc; ln -s ../../../../../../../../etc /srv/far; "
        "mkdir /srv/tree /srv/tree/dir; echo x > /srv/tree/dir/file; cp /bin/busybox /srv/tree/suid; "
        "chmod 4755 /srv/tree/suid; mknod /srv/tree/disk b 8 0; mkfifo /srv/tree/fifo; ln -s /root /srv/tree/out; "
    )
    start(root_box, "--name", "bad", IMAGE, "sh", "-c", script + ("sleep 100" if running else ""))
    if running:
        until(lambda: "out" in root_box.run("exec", "bad", "ls", "/srv/tree", check=False).text)
    else:
        root_box.run("wait", "bad")
    secret = tmp_path / "secret"
    secret.write_text("host\n")
    # Through links in the tree nothing of the host's is reached, neither read nor written.
    root_box.run("cp", secret, "bad:/srv/etc/planted")
    assert not Path("/etc/planted").exists()
    assert "etc/planted" in entries(root_box.run("cp", "bad:/etc", "-").stdout)
    root_box.run("cp", secret, "bad:/srv/far/planted2")
    assert not Path("/etc/planted2").exists()
    assert root_box.run("cp", "bad:/srv/far/shadow", "-", check=False).status == 1
    target = tmp_path / "out"
    root_box.run("cp", "bad:/srv/tree", target)
    assert (target / "suid").stat().st_mode & 0o7777 == 0o755
    assert not (target / "disk").exists()
    assert (target / "out").is_symlink()
    # What was a directory becomes a link to the host's root: a second copy must not go through it.
    victim = tmp_path / "victim"
    victim.mkdir()
    (target / "dir" / "file").unlink()
    (target / "dir").rmdir()
    (target / "dir").symlink_to(victim)
    root_box.run("cp", "bad:/srv/tree/.", target, check=False)
    assert not (victim / "file").exists()


def test_a_container_is_exported(box: Pybuild) -> None:
    start(box, "--name", "whole", "-v", "vol:/vol", IMAGE, "sh", "-c", "echo made > /made; rm /bin/vi; sleep 100")
    until(lambda: "D /bin/vi" in box.run("diff", "whole").text)
    for _ in range(2):
        found = entries(box.run("export", "whole").stdout)
        assert found["made"].size == 5
        assert "bin/vi" not in found
        assert found["bin/ls"].linkname == "/bin/busybox"
        assert found["srv/index.html"].uid == 33
        box.run("stop", "-t", "0", "whole")


def test_volumes_are_listed_and_removed(box: Pybuild) -> None:
    assert box.run("volume", "create", "--label", "a=b", "one").text == "one\n"
    nameless = box.run("volume", "create").text.strip()
    assert len(nameless) == 64
    box.run("create", "--name", "user", "-v", "used:/data", IMAGE)
    assert box.run("volume", "ls", "-q", "--filter", "dangling=true").text.split() == sorted([nameless, "one"])
    assert box.run("volume", "ls", "-q", "--filter", "label=a=b").text == "one\n"
    assert box.run("volume", "inspect", "--format", "{{.Labels.a}}", "one").text == "b\n"
    refused = box.run("volume", "rm", "used", check=False)
    assert refused.status == 1
    assert "in use" in refused.stderr
    assert box.run("volume", "prune", "-f").text == f"{nameless}\n"
    assert box.run("volume", "prune", "-f", "--all").text == "one\n"
    box.run("rm", "user")
    assert box.run("volume", "rm", "used").text == "used\n"
    assert box.run("volume", "rm", "used", check=False).status == 1
    assert box.run("volume", "rm", "-f", "used").status == 0
    assert box.run("volume", "prune", check=False).status == 2  # nobody can be asked


def test_what_does_not_run_is_pruned(box: Pybuild) -> None:
    box.run("create", "--name", "labelled", "--label", "keep", IMAGE)
    box.run("create", "--name", "plain", IMAGE)
    start(box, "--name", "runs", IMAGE, "sleep", "100")
    assert box.run("container", "prune", "-f", "--filter", "until=1h").text == ""
    assert box.run("container", "prune", "-f", "--filter", "label=keep").text.count("\n") == 1
    assert box.run("container", "prune", "-f").text.count("\n") == 1
    assert box.run("ps", "-a", "--format", "{{.Names}}").text == "runs\n"


def test_a_diff_shows_names_of_any_bytes(box: Pybuild) -> None:
    """On a strict stdout, too; and no name is two lines."""
    box.run("run", "--name", "odd", "--network", "host", IMAGE, "sh", "-c", r"touch /$(printf 'a\377b') '/two\lines'")
    box.run("run", "--name", "lines", "--network", "host", IMAGE, "sh", "-c", "touch '/x\nA y'")
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    assert box.run("diff", "odd", env=strict).text == "A /a\\xffb\nA /two\\lines\n"
    assert box.run("diff", "lines", env=strict).text == "A /x\\nA y\n"
