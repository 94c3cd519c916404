"""The command line's contract: commands, flags and outputs that scripts rely on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.machine import CHECKOUT
from tests.support.oracles import skopeo_inspect
from tests.support.registries import RegistryServer

ID = re.compile(r"sha256:[0-9a-f]{64}\n")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A context that needs no base and no sandbox."""
    return write_context(tmp_path / "context", "FROM scratch\nCOPY file /\nLABEL a=1\n", {"file": "content\n"})


def config_of(pybuild: Pybuild, name: str, tmp_path: Path) -> dict[str, object]:
    """The image config, by way of a layout that pybuild writes."""
    layout = tmp_path / f"config-{len(list(tmp_path.iterdir()))}"
    pybuild.run("push", name, f"oci:{layout}:t")
    manifest = json.loads((layout / "index.json").read_bytes())["manifests"][0]
    document = json.loads((layout / "blobs" / manifest["digest"].replace(":", "/")).read_bytes())
    config: dict[str, object] = json.loads(
        (layout / "blobs" / document["config"]["digest"].replace(":", "/")).read_bytes()
    )
    return config


def test_flags_without_a_verb_mean_build(pybuild: Pybuild, context: Path) -> None:
    result = pybuild.run("-f", context / "Containerfile", "-t", "app:1", ".", cwd=context)
    assert ID.fullmatch(result.text), "stdout carries the image id alone"
    assert "app" in pybuild.run("images").text


def test_the_containerfile_is_found_in_the_context(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context, "-t", "a:1")
    (context / "Containerfile").rename(context / "Dockerfile")
    pybuild.build(context, "-t", "b:1")
    (context / "Dockerfile").unlink()
    missing = pybuild.build(context, "-t", "c:1", check=False)
    assert missing.status != 0
    assert "Containerfile" in missing.stderr


def test_a_containerfile_on_stdin(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    result = pybuild.build(context, "-t", "stdin:1", "-f", "-", stdin=b"FROM scratch\nCOPY file /other\n")
    assert ID.fullmatch(result.text)
    root = pybuild.unpack("stdin:1", tmp_path / "root")
    assert (root / "other").read_text() == "content\n"


def test_quiet_prints_the_image_id_alone(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    iidfile = tmp_path / "iid"
    result = pybuild.build(context, "--quiet", "-t", "app:1", "--iidfile", iidfile)
    assert ID.fullmatch(result.text)
    assert result.stderr == ""
    assert iidfile.read_text() == result.text.strip()


def test_rawjson_is_json(pybuild: Pybuild, context: Path) -> None:
    result = pybuild.build(context, "--progress=rawjson")
    records = [json.loads(line) for line in result.stderr.splitlines()]
    names = [vertex["name"] for record in records for vertex in record.get("vertexes", ())]
    assert any("COPY file /" in name for name in names)


def test_several_tags_name_one_image(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context, "-t", "one:1", "-t", "two:2")
    for name in ("one:1", "two:2"):
        assert (pybuild.unpack(name, tmp_path / name) / "file").exists()


def test_target_label_and_build_arg(pybuild: Pybuild, tmp_path: Path) -> None:
    text = "FROM scratch AS first\nARG WHO=nobody\nLABEL who=$WHO\nFROM scratch AS second\nLABEL second=yes\n"
    context = write_context(tmp_path / "c", text)
    flags = ["--target", "first", "--build-arg", "WHO=me", "--label", "extra=1"]
    pybuild.build(context, "-t", "t:1", *flags)
    config = config_of(pybuild, "t:1", tmp_path)["config"]
    assert isinstance(config, dict)
    assert config["Labels"] == {"who": "me", "extra": "1"}
    wrong = pybuild.build(context, "--target", "frist", check=False)
    assert wrong.status != 0
    assert "first" in wrong.stderr, "the nearest stage is named"


def test_no_cache_runs_every_step(pybuild: Pybuild, context: Path) -> None:
    pybuild.build(context, "-t", "a:1")
    assert "CACHED" in pybuild.build(context, "-t", "a:1").stderr
    assert "CACHED" not in pybuild.build(context, "-t", "a:1", "--no-cache").stderr


@pytest.mark.parametrize(
    ("change", "hit"),
    [
        ("nothing", True),
        ("mtime", True),
        ("content", False),
        ("mode", False),
        ("name", False),
        ("unrelated", True),
        ("used-arg", False),
        ("unused-arg", True),
    ],
)
def test_what_the_key_depends_on(change: str, hit: bool, pybuild: Pybuild, tmp_path: Path) -> None:
    text = "FROM scratch\nARG USED=1\nCOPY dir/ /dir/\nLABEL used=$USED\nCOPY --chmod=640 dir/f /$USED/\n"
    context = write_context(tmp_path / "c", text, {"dir/f": "one", "elsewhere": "x"})
    flags = ["-t", "key:1"]
    pybuild.build(context, *flags)
    file = context / "dir/f"
    if change == "mtime":
        file.touch()
    elif change == "content":
        file.write_text("two")
    elif change == "mode":
        file.chmod(0o600)
    elif change == "name":
        file.rename(context / "dir/g")
        (context / "Containerfile").write_text(text.replace("dir/f", "dir/g"))
    elif change == "unrelated":
        (context / "elsewhere").write_text("y")
    elif change == "used-arg":
        flags += ["--build-arg", "USED=2"]
    elif change == "unused-arg":
        flags += ["--build-arg", "UNUSED=2"]
    again = pybuild.build(context, *flags, check=change != "unused-arg")
    copies = re.findall(r"^#(\d+) \[.*\] COPY", again.stderr, re.M)
    cached = [number for number in copies if f"#{number} CACHED" in again.stderr]
    assert (cached == copies) is hit, again.stderr


@pytest.mark.parametrize(
    "destination",
    ["oci:{}/layout:tag", "oci-archive:{}/a.tar:tag", "docker-archive:{}/d.tar:name:tag", "dir:{}/dir"],
)
def test_every_local_transport_there_and_back(
    destination: str, pybuild: Pybuild, context: Path, tmp_path: Path
) -> None:
    pybuild.build(context, "-t", "app:1")
    where = destination.format(tmp_path)
    pybuild.run("push", "app:1", where)
    root = pybuild.unpack(where, tmp_path / "root")
    assert (root / "file").read_text() == "content\n"
    other = Pybuild(tmp_path / "other-store")
    other.run("pull", where)
    assert other.run("images").text.strip()


def test_copy_between_transports_keeps_the_digest(
    pybuild: Pybuild, context: Path, registry: RegistryServer, tmp_path: Path
) -> None:
    pybuild.build(context, "-t", "app:1")
    pybuild.run("push", "app:1", f"docker://{registry.host}/contract/copy:1")
    pybuild.run("copy", f"docker://{registry.host}/contract/copy:1", f"oci:{tmp_path}/l:x")
    pybuild.run("copy", f"oci:{tmp_path}/l:x", f"docker://{registry.host}/contract/copy:2")
    first, second = (skopeo_inspect(f"{registry.host}/contract/copy:{tag}")["Digest"] for tag in "12")
    assert first == second


def test_tls_is_asked_for_unless_told_otherwise(
    pybuild: Pybuild, context: Path, tls_registry: tuple[RegistryServer, Path], tmp_path: Path
) -> None:
    server, authority = tls_registry
    pybuild.build(context, "-t", "app:1")
    target = f"docker://{server.host}/tls/app:1"
    refused = pybuild.run("push", "app:1", target, "--tls-verify=true", check=False)
    assert refused.status != 0
    assert "certificate" in refused.stderr.lower()
    pybuild.run("push", "app:1", target, "--tls-verify=false")
    certs = tmp_path / "certs"
    certs.mkdir()
    (certs / "ca.crt").write_bytes(authority.read_bytes())
    pybuild.run("pull", target, "--tls-verify=true", "--cert-dir", certs)
    pybuild.run("copy", target, f"oci:{tmp_path}/l:x", "--src-tls-verify=false")
    pybuild.run("copy", f"oci:{tmp_path}/l:x", target, "--dest-tls-verify=false")


def test_credentials_of_login_are_used(
    pybuild: Pybuild, context: Path, password_registry: RegistryServer, tmp_path: Path
) -> None:
    pybuild.build(context, "-t", "app:1")
    target = f"{password_registry.host}/private/app:1"
    empty = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    refused = pybuild.run("push", "app:1", target, check=False, env=empty)
    assert refused.status != 0
    assert "unauthorized" in refused.stderr.lower() or "401" in refused.stderr
    auth = tmp_path / "auth.json"
    auth.write_text(json.dumps({"auths": {password_registry.host: {"auth": "dGVzdGVyOnMzY3JldA=="}}}))
    pybuild.run("push", "app:1", target, env={**empty, "REGISTRY_AUTH_FILE": str(auth)})
    docker = tmp_path / ".docker"
    docker.mkdir()
    auth.rename(docker / "config.json")
    pybuild.run("pull", target, env=empty)
    pybuild.run("pull", target, "--creds", "tester:s3cret", env={**empty, "HOME": "/nonexistent"})


def test_two_stores_do_not_mix(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context, "-t", "app:1")
    assert "app" not in Pybuild(tmp_path / "other").run("images").text


def test_the_store_is_named_by_the_environment_too(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    pybuild.build(context, "-t", "app:1")
    argv = [word for word in pybuild.argv("images") if word not in {"--root", str(pybuild.root)}]
    environ = pybuild.environ({"PYBUILD_ROOT": str(pybuild.root)})
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    assert "app" in done.stdout


def test_version_and_help_go_to_stdout(pybuild: Pybuild) -> None:
    assert re.fullmatch(r"pybuild \d+\.\d+\.\d+\n", pybuild.run("--version").text)
    for arguments in (["--help"], ["build", "--help"], ["push", "--help"]):
        result = pybuild.run(*arguments)
        assert "usage:" in result.text
        assert result.stderr == ""


def test_the_readmes_library_example_runs(context: Path, tmp_path: Path) -> None:
    readme = (CHECKOUT / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert "/var/lib/pybuild" in code
    script = code.replace("/var/lib/pybuild", str(tmp_path / "library-store"))
    environ = Pybuild(tmp_path).environ()
    done = subprocess.run([sys.executable, "-c", script], cwd=context, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ID.fullmatch(done.stdout)
    assert done.stderr == "", "a library prints nothing"


def test_progress_can_go_to_a_file(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        result = pybuild.build(context, "--logfile", log)
        assert ID.fullmatch(result.text)
        assert result.stderr == ""
    assert log.read_text().count("COPY file /") == 2, "the second build's is appended"
    refused = pybuild.build(context, "--logfile", tmp_path / "no" / "log", check=False)
    assert refused.status == 2
    assert "cannot write the log" in refused.stderr
