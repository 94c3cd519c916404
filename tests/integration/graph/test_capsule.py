"""Failure capsules: a failing RUN in a file, looked into and gone on from with another store."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base} AS tools\nRUN echo tool > /tool\n"
        f"FROM {busybox_base}\nENV NAME=value\nARG LEVEL=7\nWORKDIR /place\nCOPY src .\n"
        "COPY --from=tools /tool /tool\nRUN echo first > /first && rm /bin/true\nUSER 7:8\n"
        "RUN --mount=type=secret,id=s,uid=7 \\\n"
        "  echo partly > /tmp/made; echo said so; cat /run/secrets/s > /dev/null; exit 3\n"
    )
    (tmp_path / "secret").write_text("hidden-value")
    return write_context(tmp_path / "context", text, {"src": "text\n"})


@pytest.fixture
def other(tmp_path: Path) -> Pybuild:
    """Another machine: a store that has nothing."""
    return Pybuild(tmp_path / "other")


def fail(pybuild: Pybuild, context: Path, capsule: Path, *flags: str) -> str:
    secret = ("--secret", f"id=s,src={context.parent}/secret")
    result = pybuild.build(context, f"--on-error=capsule={capsule}", *secret, *flags, check=False)
    assert result.status == 3, result.stderr
    return result.stderr


def snapshots(pybuild: Pybuild) -> set[str]:
    return {p.name for p in (pybuild.root / "snapshots").iterdir()}


def test_a_capsule_shows_files_and_environment_elsewhere(
    pybuild: Pybuild, other: Pybuild, context: Path, tmp_path: Path
) -> None:
    capsule = tmp_path / "capsule.tar"
    assert "pybuild shell" in fail(pybuild, context, capsule)
    script = "echo [$NAME] [$LEVEL] [$PWD] [$(id -u):$(id -g)] $(cat src /tool /first /tmp/made); test ! -e /bin/true"
    shown = other.run("shell", capsule, "sh", "-c", script)
    assert shown.text == "[value] [7] [/place] [7:8] text tool first partly\n"
    assert "exit 3" in shown.stderr, "the instruction"
    assert "said so" in shown.stderr, "its output"
    assert "Containerfile:11: " in shown.stderr
    assert other.run("images").text.count("\n") <= 1, "no name stays in the store"
    assert b"partly" in other.run("shell", capsule, stdin=b"cat /tmp/made\n").stdout
    told = other.run("shell", "--info", "--json", capsule).json()
    assert told["exit_status"] == 3
    assert told["line"] == 11
    assert told["end_line"] == 12
    assert told["mounts"] == ["type=secret,target=s"]
    assert told["containerfile"] == (context / "Containerfile").read_text()
    assert b"hidden-value" not in capsule.read_bytes()


def test_the_mended_step_is_where_the_build_goes_on(
    pybuild: Pybuild, other: Pybuild, context: Path, tmp_path: Path
) -> None:
    capsule, meta = tmp_path / "capsule.tar", tmp_path / "meta.json"
    fail(pybuild, context, capsule)
    path = context / "Containerfile"
    path.write_text(path.read_text().replace("exit 3", "exit 0"))
    flags = ("--cache-from", f"type=local,src={capsule}", "--secret", f"id=s,src={tmp_path}/secret")
    other.build(context, *flags, "-t", "app:1", "--metadata-file", meta)
    steps: list[dict[str, Any]] = json.loads(meta.read_text())["pybuild.steps"]["list"]
    (ran,) = [s["name"] for s in steps if not s["cached"]]
    assert "exit 0" in ran, "all steps before it come from the capsule"
    root = other.unpack("app:1", tmp_path / "root")
    assert [(root / name).read_text() for name in ("first", "tool", "tmp/made", "place/src")] == [
        "first\n",
        "tool\n",
        "partly\n",
        "text\n",
    ]


def test_other_tools_read_a_capsule(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    capsule = tmp_path / "capsule.tar"
    fail(pybuild, context, capsule)
    done = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{capsule}:capsule"], capture_output=True, check=True
    )
    config = json.loads(done.stdout)["config"]
    assert "NAME=value" in config["Env"]
    assert config["User"] == "7:8"
    assert "exit 3" in config["Cmd"][-1]


def test_the_failed_steps_snapshot_does_not_stay(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    fail(pybuild, context, tmp_path / "one.tar")
    before = snapshots(pybuild)
    fail(pybuild, context, tmp_path / "two.tar")
    assert snapshots(pybuild) == before


def test_a_secret_does_not_leave_in_a_capsule(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    path = context / "Containerfile"
    path.write_text(path.read_text().replace("/dev/null", "/tmp/leaked"))
    capsule = tmp_path / "capsule.tar"
    words = fail(pybuild, context, capsule)
    assert "secret 's' in /tmp/leaked" in words
    assert "hidden-value" not in words
    assert not capsule.exists()


def test_a_capsule_that_cannot_be_written_hides_no_failure(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    words = fail(pybuild, context, tmp_path / "missing" / "capsule.tar")
    assert "exit code: 3" in words
    assert "no capsule could be made" in words
    assert not list(tmp_path.glob("**/.capsule*"))


@pytest.mark.parametrize(
    ("file", "complaint"),
    [("missing.tar", "no capsule"), ("text", "no tar"), ("context", "no capsule"), ("image.tar", "no capsule of")],
)
def test_what_is_no_capsule_is_told(
    pybuild: Pybuild, registry: RegistryServer, context: Path, tmp_path: Path, file: str, complaint: str
) -> None:
    (tmp_path / "text").write_text("no capsule " * 100)
    if file == "image.tar":
        plain = write_context(tmp_path / "plain", "FROM scratch\nWORKDIR /x\n")
        pybuild.build(plain, "-o", f"type=oci,dest={tmp_path}/{file},name=x:capsule")
    result = pybuild.run("shell", tmp_path / file, check=False)
    assert result.status != 0
    assert complaint in result.stderr.replace("not a tar", "no tar"), result.stderr


@pytest.mark.rootless
def test_an_ordinary_user(pybuild_rootless: Pybuild, busybox_base: str) -> None:
    account = pybuild_rootless.account
    assert account is not None
    place = write_context(account.home / "capsules", f"FROM {busybox_base}\nRUN echo left > /left; exit 5\n")
    capsule = place / "capsule.tar"
    place.chmod(0o777)
    result = pybuild_rootless.build(place, f"--on-error=capsule={capsule}", check=False)
    assert result.status == 5, result.stderr
    assert pybuild_rootless.run("shell", capsule, "cat", "/left").text == "left\n"


def test_an_image_of_the_store(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "image", f'FROM {busybox_base}\nENTRYPOINT ["/bin/false"]\nENV A=b\n')
    pybuild.build(context, "-t", "plain:1")
    assert pybuild.run("shell", "plain:1", stdin=b"echo $A; exit 4\n", check=False).status == 4


@pytest.mark.parametrize("value", ["nothing", "capsule=", "shell=x"])
def test_wrong_values_are_refused(pybuild: Pybuild, context: Path, value: str) -> None:
    result = pybuild.build(context, f"--on-error={value}", check=False)
    assert result.status == 2
    assert "--on-error" in result.stderr
