"""Images by hand: working containers, as root and as an ordinary user; what a Containerfile of the same steps gives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.build.test_main_job import EXAMPLES
from tests.support.cli import Pybuild
from tests.support.waiting import PATIENCE_S

BASE = "base:1"
EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}


@pytest.fixture
def place(pybuild_each: Pybuild, tmp_path: Path) -> Iterator[Path]:
    """A directory that the user of `pybuild_each` can read; the store has a base of busybox."""
    home = pybuild_each.account.home if pybuild_each.account else tmp_path
    place = home / f"place-{os.getpid()}"
    place.mkdir()
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox")
    shutil.copyfile(busybox, place / "busybox")
    (place / "busybox").chmod(0o755)
    (place / "Containerfile").write_text(
        'FROM scratch\nCOPY busybox /bin/busybox\nRUN ["/bin/busybox", "--install", "-s", "/bin"]\nENV GREETING=hello\n'
    )
    (place / "data").mkdir()
    (place / "data/one").write_text("1\n")
    (place / "data/two").write_text("2\n")
    pybuild_each.build(place, "-t", BASE)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def hand(pybuild_each: Pybuild, place: Path) -> Iterator[Pybuild]:
    """The command line, with no working container left in the end."""
    yield pybuild_each
    for id in pybuild_each.run("containers", "-q").text.split():
        pybuild_each.run("rm", "-f", id)
    assert not [name for name in os.listdir(pybuild_each.root / "containers") if name != "names"]


def begin(hand: Pybuild, *flags: str) -> str:
    return hand.run("from", *flags, BASE).text.strip()


def config_of(hand: Pybuild, image: str) -> Any:
    return hand.run("inspect", "--config", image).json()


def lines_of(hand: Pybuild, container: str) -> list[str]:
    document = hand.run("inspect", container).json()[0]
    return [line["created_by"] for line in document["History"]]


def test_the_example_by_hand_is_the_image_of_its_containerfile(hand: Pybuild, place: Path) -> None:
    example = place / "by-hand"
    shutil.copytree(EXAMPLES / "by-hand", example)
    if hand.account:
        subprocess.run(["chown", "-R", hand.account.name, example], check=True)
    python = str(hand.account.python) if hand.account else sys.executable
    command = ["env", f"PYBUILD={python} -m builder --root {hand.root}", f"BASE={BASE}"]
    command += [*(f"{k}={v}" for k, v in EPOCH.items()), "sh", str(example / "build.sh"), "notes:hand"]
    inner = hand.account.command(command) if hand.account else command
    done = subprocess.run(inner, env=hand.environ(), capture_output=True, text=True, check=False, cwd=place)
    assert done.returncode == 0, done.stderr
    built = hand.build(example, "-q", "--build-arg", f"BASE={BASE}", "-t", "notes:file", env=EPOCH)
    assert done.stdout == built.text
    assert config_of(hand, "notes:hand") == config_of(hand, "notes:file")
    assert "The first page.\nThe second page.\n" in hand.run("run", "--rm", "--network", "host", "notes:hand").text
    assert hand.run("containers", "-q").text == ""


def test_equal_layers_whatever_made_them(hand: Pybuild, place: Path) -> None:
    """Steps that one Containerfile has, given one by one: the images are equal to the byte."""
    (place / "Twin").write_text(
        f"FROM {BASE}\nRUN rm /bin/vi\nWORKDIR /a/b\nCOPY data/* ./\nADD data.tar /t/\nCOPY --chmod=640 data/one x\n"
        'ENV A=1 PATH=/x:$PATH\nENTRYPOINT run this\nRUN ["sh", "-c", "rm one; ln two three"]\n'
    )
    subprocess.run(["tar", "-C", place, "-cf", place / "data.tar", "data"], check=True)
    built = hand.build(place, "-q", "-f", place / "Twin", "-t", "twin:1", env=EPOCH)
    c = begin(hand)
    steps: list[list[str | Path]] = [
        ["run", c, "--", "/bin/sh", "-c", "rm /bin/vi"],
        ["config", "--workingdir", "/a/b", c],
        ["copy", "--contextdir", place, c, "data/*", "./"],
        ["add", "--contextdir", place, c, "data.tar", "/t/"],
        ["copy", "--contextdir", place, "--chmod", "640", c, "data/one", "x"],
        ["config", "-c", "ENV A=1 PATH=/x:$PATH", "--entrypoint", "run this", c],
        ["run", c, "--", "sh", "-c", "rm one; ln two three"],
    ]
    for step in steps:
        hand.run(*step, env=EPOCH)
    assert hand.run("commit", c, "hand:1", env=EPOCH).text == built.text


def test_triggers_are_told_of_and_not_inherited(hand: Pybuild, place: Path) -> None:
    (place / "Containerfile").write_text(f"FROM {BASE}\nONBUILD RUN echo triggered\n")
    hand.build(place, "-t", "trigger:1")
    made = hand.run("from", "--name", "told", "trigger:1")
    assert "ONBUILD" in made.stderr and "echo triggered" in made.stderr
    hand.run("commit", "told", "untold:1")
    assert "OnBuild" not in config_of(hand, "untold:1")["config"]


def test_names_are_the_images_or_ones_own(hand: Pybuild) -> None:
    assert begin(hand) == "base-working-container"
    assert begin(hand) == "base-working-container-1"
    assert hand.run("from", "scratch").text == "working-container\n"
    assert begin(hand, "--name", "mine") == "mine"
    assert hand.run("from", "--name", "mine", BASE, check=False).status == 1
    hand.run("rename", "mine", "yours")
    rows = hand.run("containers", "--json").json()
    assert {row["containername"] for row in rows} == {
        *("base-working-container", "base-working-container-1", "working-container", "yours"),
    }
    assert all(row["builder"] for row in rows)
    assert hand.run("containers", "--filter", "name=yours", "--format", "{{.ImageName}}").text == f"{BASE}\n"
    assert hand.run("ps", "-aq").text == ""


def test_a_failed_command_leaves_the_container_as_it_was(hand: Pybuild) -> None:
    c = begin(hand)
    failed = hand.run("run", c, "--", "sh", "-c", "echo half > /half; exit 7", check=False)
    assert failed.status == 7
    assert "as it was" in failed.stderr
    assert hand.run("run", c, "--", "nosuch", check=False).status == 127
    assert hand.run("diff", c).text == ""
    assert lines_of(hand, c) == []
    assert hand.run("run", c, check=False).status == 125
    assert hand.run("run", "-p", "80:80", c, "--", "true", check=False).status == 125


def test_run_takes_what_a_command_needs(hand: Pybuild, place: Path) -> None:
    c = begin(hand)
    hand.run("config", "--env", "KEPT=1", "--hostname", "byhand", c)
    secret = place / "secret"
    secret.write_text("hush\n")
    secret.chmod(0o644)
    hand.run("run", c, "--", "mkdir", "/tmp")
    result = hand.run(
        *("run", "-i", "--user", "5:5", "--workingdir", "/tmp", "-e", "ONCE=2"),
        *("--mount", f"type=bind,src={place}/data,target=/m", "--mount", "type=cache,target=/cache,mode=0777"),
        *("--mount", f"type=secret,id=s,src={secret},target=/s,mode=0444"),
        *(c, "--", "sh", "-c", "id -u; pwd; echo $KEPT $ONCE; cat /m/one /s; cat; hostname; echo c > /cache/c"),
        stdin=b"typed\n",
    )
    assert result.text == "5\n/tmp\n1 2\n1\nhush\ntyped\nbyhand\n"
    assert "/m" not in hand.run("diff", c).text.split()
    hand.run("run", "-v", f"{place}/data:/v:ro", c, "--", "cat", "/v/two")
    assert "ONCE=2" not in json.dumps(hand.run("inspect", c).json())


def test_copy_takes_paths_of_the_host_images_and_containers(hand: Pybuild, place: Path) -> None:
    c = begin(hand)
    hand.run("copy", c, place / "data/one", "/abs")
    hand.run("copy", c, "data/two", "data/one", "/rel/", cwd=place)
    hand.run("copy", c, "../place", "/up", cwd=place / "data", check=False)
    hand.run("copy", "--exclude", "two", "--chown", "3:4", c, "data", "/some", cwd=place)
    hand.run("copy", "--parents", c, "data/one", "/deep/", cwd=place)
    hand.run("config", "--workingdir", "/w", c)
    hand.run("copy", c, "data/one", cwd=place)
    hand.run("copy", "--from", BASE, c, "/bin/busybox", "/from-image")
    other = begin(hand)
    hand.run("run", other, "--", "sh", "-c", "echo theirs > /file")
    hand.run("copy", "--from", other, c, "/file", "/from-container")
    listing = hand.run("run", c, "--", "sh", "-c", "cat /abs /rel/* /some/one /deep/data/one /w/one /from-container")
    assert listing.text == "1\n1\n2\n1\n1\n1\ntheirs\n"
    assert hand.run("run", c, "--", "stat", "-c", "%u:%g", "/some/one", "/abs").text == "3:4\n0:0\n"
    assert hand.run("run", c, "--", "ls", "/some").text == "one\n"
    missing = hand.run("copy", c, "data/three", "/x", cwd=place, check=False)
    assert missing.status == 1 and "three" in missing.stderr
    # Other names are images': the command that moves those between transports.
    assert hand.run("copy", "nosuch", f"oci:{place}/layout", check=False).status != 0


def test_add_unpacks_archives_and_fetches(hand: Pybuild, place: Path) -> None:
    import functools
    import http.server
    import threading

    subprocess.run(["tar", "-C", place, "-czf", place / "data.tgz", "data"], check=True)
    c = begin(hand)
    hand.run("add", c, "data.tgz", "/here/", cwd=place)
    hand.run("add", "--unpack", "false", c, "data.tgz", "/there/", cwd=place)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/data/one"
            hand.run("add", c, url, "/fetched")
            wrong = hand.run("add", "--checksum", "sha256:" + "0" * 64, c, url, "/never", check=False)
        finally:
            server.shutdown()
            thread.join()
    assert wrong.status != 0
    script = "cat /here/data/one /fetched; ls /there /never"
    result = hand.run("run", c, "--", "sh", "-c", script, check=False)
    assert result.text == "1\n1\n/there:\ndata.tgz\n"
    assert lines_of(hand, c)[0] == "ADD data.tgz /here/ # buildkit"


def test_every_field_of_the_config(hand: Pybuild) -> None:
    c = begin(hand)
    flags = {
        "--author": "somebody", "--cmd": "a 'b c'", "--entrypoint": '["e"]', "--env": "X=$GREETING there",
        "--label": "l=1", "--annotation": "a=1", "--onbuild": "RUN true", "--port": "80/udp",
        "--shell": "/bin/ash -c", "--stop-signal": "SIGINT", "--user": "7", "--volume": "/v", "--workingdir": "/w",
        "--arch": "arm64", "--os": "linux",
        "--variant": "v9", "--os-version": "1.2", "--os-feature": "f", "--created-by": "by me",
        "--history-comment": "a word", "--healthcheck": "CMD check it", "--healthcheck-interval": "5s",
        "--healthcheck-timeout": "2s", "--healthcheck-start-period": "1m", "--healthcheck-start-interval": "3s",
        "--healthcheck-retries": "4",
    }  # fmt: skip
    hand.run("config", *(word for pair in flags.items() for word in pair), c)
    hand.run("commit", c, "all:1")
    document = config_of(hand, "all:1")
    assert document["author"] == "somebody"
    assert (document["architecture"], document["os"], document["variant"]) == ("arm64", "linux", "v9")
    assert (document["os.version"], document["os.features"]) == ("1.2", ["f"])
    assert document["config"] == {
        "Cmd": ["a", "b c"], "ArgsEscaped": True, "Entrypoint": ["e"], "Labels": {"l": "1"}, "OnBuild": ["RUN true"],
        "ExposedPorts": {"80/udp": {}}, "Shell": ["/bin/ash", "-c"], "StopSignal": "SIGINT", "User": "7",
        "Volumes": {"/v": {}}, "WorkingDir": "/w",
        "Env": [*config_of(hand, BASE)["config"]["Env"], "X=hello there"],
        "Healthcheck": {"Test": ["CMD", "check", "it"], "Interval": 5 * 10**9, "Timeout": 2 * 10**9,
                        "StartPeriod": 60 * 10**9, "StartInterval": 3 * 10**9, "Retries": 4},
    }  # fmt: skip
    layered = [line for line in document["history"] if not line.get("empty_layer")]
    assert (layered[-1]["created_by"], layered[-1]["comment"]) == ("by me", "a word")
    manifest = hand.run("manifest", "get", "all:1").json()
    assert manifest["annotations"] == {"a": "1"}


def test_fields_are_removed(hand: Pybuild) -> None:
    c = begin(hand)
    hand.run("config", "-e", "A=1", "-e", "B=2", "-l", "a=1", "-l", "b=2", "-p", "80", "-v", "/v", "--cmd", "x", c)
    hand.run("config", "--healthcheck", "true", "--onbuild", "RUN x", "--user", "5", c)
    before = len(lines_of(hand, c))
    hand.run("config", "-e", "A-", "-l", "a-", "-p", "80-", "-v", "/v-", "--cmd", "", "--healthcheck", "", c)
    hand.run("config", "--onbuild", "-", "--user", "", "-a", "x=y", "-a", "-", c)
    assert len(lines_of(hand, c)) == before
    document = hand.run("inspect", c).json()[0]
    assert document["Annotations"] == {}
    assert document["config"]["Labels"] == {"b": "2"}
    assert [e for e in document["config"]["Env"] if e[0] in "AB"] == ["B=2"]
    assert not {"ExposedPorts", "Volumes", "Cmd", "Healthcheck", "OnBuild", "User"} & set(document["config"])
    hand.run("config", "--label", "-", "--env", "-", "--add-history=false", "--label", "c=3", c)
    document = hand.run("inspect", c).json()[0]
    assert document["config"]["Labels"] == {"c": "3"}
    assert len(lines_of(hand, c)) == before


def test_what_means_nothing_changes_nothing(hand: Pybuild) -> None:
    c = begin(hand)
    before = hand.run("inspect", c).text
    for flags in (
        ["--port", "http"], ["--env", "=x"], ["--label", "x"], ["--cmd", "'x"], ["--cmd", "[1]"],
        ["--onbuild", "FROM x"], ["--stop-signal", "SIGNONE"], ["--healthcheck", "x", "--healthcheck-retries", "x"],
        ["--healthcheck-timeout", "1s"], ["-c", "RUN x"], ["-c", "NOSUCH x"], ["--arch", ""],
        ["--port", "80\nRUN x"], ["--volume", ""],
    ):  # fmt: skip
        failed = hand.run("config", "--label", "good=1", *flags, c, check=False)
        assert failed.status in {1, 2}, flags
        assert failed.stderr.startswith("error: ")
        assert hand.run("inspect", c).text == before
    assert hand.run("config", c, check=False).status == 2


def test_commits(hand: Pybuild, place: Path) -> None:
    c = begin(hand)
    hand.run("run", c, "--", "sh", "-c", "echo 1 > /one")
    id = place / "id"
    if hand.account:
        id = hand.account.home / f"id-{os.getpid()}"
    first = hand.run("commit", "--iidfile", id, "-c", "CMD x", "-a", "me", "-m", "words", c, "first:1")
    assert id.read_text() == first.text.strip()
    id.unlink()
    document = config_of(hand, "first:1")
    assert document["config"]["Cmd"] == ["/bin/sh", "-c", "x"]
    assert document["author"] == "me"
    assert document["history"][-1]["comment"] == "words"
    # A change of a commit is that image's alone.
    hand.run("commit", c, "second:1")
    assert "Cmd" not in config_of(hand, "second:1")["config"]
    home = hand.account.home if hand.account else place
    hand.run("commit", "--omit-history", c, f"oci:{home}/layout:t")
    assert json.loads((home / "layout/index.json").read_bytes())["manifests"]
    shutil.rmtree(home / "layout")
    hand.run("commit", "--squash", "--format", "docker", c, "flat:1")
    flat = config_of(hand, "flat:1")
    assert len(flat["rootfs"]["diff_ids"]) == 1
    assert hand.run("run", "--rm", "--network", "host", "flat:1", "cat", "/one").text == "1\n"
    hand.run("commit", "--rm", c, "last:1")
    assert hand.run("containers", "-q").text == ""
    assert hand.run("run", "--rm", "--network", "host", "last:1", "cat", "/one").text == "1\n"


def test_it_is_built_not_started(hand: Pybuild) -> None:
    c = begin(hand)
    for verb in ("start", "exec", "logs", "stop", "kill", "pause", "wait", "restart", "port"):
        words = [verb, c, "true"] if verb == "exec" else [verb, c]
        failed = hand.run(*words, check=False)
        assert failed.status != 0
        assert "working container" in failed.stderr, verb
    plain = hand.run("create", "--network", "host", "--name", "plain", BASE, "true").text.strip()
    for words in (["config", "--user", "5", plain], ["mount", plain], ["add", plain, "x", "/"]):
        assert hand.run(*words, check=False).status != 0
    hand.run("rm", "plain")


def test_the_tree_is_exported(hand: Pybuild, place: Path) -> None:
    import io
    import tarfile

    c = begin(hand)
    hand.run("copy", c, "data/one", "/one", cwd=place)
    with tarfile.open(fileobj=io.BytesIO(hand.run("export", c).stdout)) as archive:
        names = archive.getnames()
        assert {"one", "bin/busybox"} <= {name.removeprefix("./") for name in names}
    hand.run("commit", "--rm", c, "same:1")
    assert "one" in hand.run("diff", BASE, "same:1", check=False).text


def test_from_scratch(hand: Pybuild, place: Path) -> None:
    c = hand.run("from", "scratch").text.strip()
    hand.run("copy", c, "busybox", "/bin/sh", cwd=place)
    hand.run("run", c, "--", "sh", "-c", "echo $0 > /made")
    hand.run("config", "--entrypoint", '["sh", "-c"]', c)
    hand.run("commit", c, "scratch:1")
    assert hand.run("run", "--rm", "--network", "host", "scratch:1", "echo yes; exit 3", check=False).status == 3
    assert len(config_of(hand, "scratch:1")["rootfs"]["diff_ids"]) == 2


def test_what_a_container_is_built_of_survives_a_prune(hand: Pybuild) -> None:
    c = begin(hand)
    hand.run("run", c, "--", "sh", "-c", "echo kept > /kept")
    hand.run("untag", BASE)
    hand.run("rmi", "--prune", check=False)
    hand.run("prune", "--all", "-f", check=False)
    assert hand.run("run", c, "--", "cat", "/kept").text == "kept\n"
    hand.run("commit", c, "after:1")
    assert hand.run("run", "--rm", "--network", "host", "after:1", "cat", "/kept").text == "kept\n"
    assert "problem" not in hand.run("fsck", check=False).text.lower()


def test_modify_makes_an_image_of_another(hand: Pybuild) -> None:
    hand.run("modify", "--change", "CMD x", "-e", "A=a", BASE, "made:1", "--", "sh", "-c", "echo $A > /made")
    assert hand.run("run", "--rm", "--network", "host", "made:1", "cat", "/made").text == "a\n"
    assert config_of(hand, "made:1")["config"]["Cmd"] == ["/bin/sh", "-c", "x"]
    failed = hand.run("modify", BASE, "never:1", "--", "sh", "-c", "exit 4", check=False)
    assert failed.status == 4
    # Without a command: a shell, which reads what is typed.
    hand.run("modify", BASE, "typed:1", stdin=b"echo typed > /made\n")
    assert hand.run("run", "--rm", "--network", "host", "typed:1", "cat", "/made").text == "typed\n"
    assert hand.run("modify", BASE, check=False).status == 125
    assert hand.run("modify", "-d", BASE, "never:1", "--", "true", check=False).status == 125
    assert "never" not in hand.run("images").text
    assert hand.run("containers", "-q").text == ""


def test_a_terminal_session_is_a_step_whatever_its_status(hand: Pybuild) -> None:
    import pty

    c = begin(hand)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        hand.argv("run", "-it", c, "--", "sh"), stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=hand.environ(),
        cwd=hand.account.home if hand.account else None, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        said = b""
        while not said.rstrip().endswith((b"#", b"[6n")):  # the prompt: the terminal is raw, and theirs
            said += os.read(master, 4096)
        os.write(master, b"tty > /tty; exit 5\n")
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            # Restoring the terminal waits until all is read.
            with contextlib.suppress(OSError):
                if select.select([master], [], [], 0.1)[0]:
                    os.read(master, 4096)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 5, errors
    assert b"its changes are kept" in errors
    assert hand.run("run", c, "--", "cat", "/tty").text.startswith("/dev/pts/")


def test_bases_of_every_transport_and_platform(hand: Pybuild, place: Path) -> None:
    home = hand.account.home if hand.account else place
    for target in (f"oci:{home}/o:t", f"oci-archive:{home}/a.tar:other/name:2", f"docker-archive:{home}/d.tar:third:3"):
        hand.run("copy", f"storage:{BASE}", target)
        assert hand.run("from", target).text.strip() in hand.run("containers").text
    named = {row["imagename"] for row in hand.run("containers", "--json").json()}
    assert {name.rpartition("library/")[2].removeprefix("docker.io/") for name in named} == {
        "o:t",
        "other/name:2",
        "third:3",
    }
    for path in ("o", "a.tar", "d.tar"):
        shutil.rmtree(home / path) if (home / path).is_dir() else (home / path).unlink()
    id = hand.run("images", "-q", BASE).text.split()[0]
    assert hand.run("from", f"storage:{BASE}").status == hand.run("from", id).status == 0
    other = "linux/riscv64"
    absent = hand.run("from", "--pull=never", "--platform", other, BASE, check=False)
    assert absent.status == 1 and "not for linux/riscv64" in absent.stderr
    assert hand.run("from", "--pull=never", "absent:1", check=False).status == 1
    assert hand.run("from", "--pull=perhaps", BASE, check=False).status == 2
    c = hand.run("from", "--platform", other, "scratch").text.strip()
    assert hand.run("inspect", "--format", "{{.architecture}}", c).text == "riscv64\n"
