"""`bake`: several builds of one file, one upon another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context

DOCUMENT = {
    "variable": {"WHO": {"default": "nobody"}},
    "group": {"default": {"targets": ["app", "other"]}},
    "target": {
        "base": {"dockerfile-inline": "FROM scratch\nCOPY shared /\n", "context": "lib"},
        "app": {"contexts": {"base": "target:base"}, "context": "app", "args": {"WHO": "${WHO}"}, "tags": ["app:1"]},
        "other": {"inherits": ["app"], "labels": {"b": "2"}, "tags": ["other:1", "other:2"], "target": "first"},
    },
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_context(tmp_path / "lib", "", {"shared": "shared\n"})
    text = "FROM base AS first\nARG WHO\nLABEL who=$WHO\nFROM first\nCOPY own /\n"
    write_context(tmp_path / "app", text, {"own": "own\n"})
    (tmp_path / "docker-bake.json").write_text(json.dumps(DOCUMENT))
    return tmp_path


def test_targets_build_upon_each_other(pybuild: Pybuild, project: Path) -> None:
    result = pybuild.run("bake", "--metadata-file", "out.json", cwd=project, env={"WHO": "me"})
    assert [line for line in result.stderr.splitlines() if line.startswith("target ")] == [
        "target base", "target app", "target other",
    ]  # fmt: skip
    done = json.loads((project / "out.json").read_bytes())
    assert list(done) == ["base", "app", "other"]
    tree = pybuild.unpack("app:1", project / "tree")
    assert {p.name for p in tree.iterdir()} == {"shared", "own"}
    labels = pybuild.run("inspect", "--config", "other:2").json()["config"]["Labels"]
    assert labels == {"b": "2", "who": "me"}
    # One target alone, changed from outside.
    pybuild.run(
        "bake", "other", "--set", "*.labels.c=3", "--set", "other.tags=changed:1", "--var", "WHO=x", cwd=project
    )
    labels = pybuild.run("inspect", "--config", "changed:1").json()["config"]["Labels"]
    assert labels == {"b": "2", "c": "3", "who": "x"}


def test_what_would_be_built(pybuild: Pybuild, project: Path) -> None:
    printed = pybuild.run("bake", "--print", "app", cwd=project).json()
    assert printed["target"]["app"]["args"] == {"WHO": "nobody"}
    assert printed["group"]["default"]["targets"] == ["base", "app"]
    (project / "printed.json").write_text(json.dumps(printed))
    again = pybuild.run("bake", "-f", "printed.json", "--print", cwd=project).json()
    assert again == printed
    assert "--build-arg WHO=nobody" in pybuild.run("bake", "--dry-run", cwd=project).text
    assert pybuild.run("bake", "--list", cwd=project).text.splitlines() == [
        "app",
        "base",
        "default: app other",
        "other",
    ]
    assert pybuild.run("images", "-q").text == "", "nothing was built"


def test_a_compose_file(pybuild: Pybuild, project: Path) -> None:
    (project / "docker-bake.json").unlink()
    (project / "compose.yaml").write_text(
        "services: {web: {image: 'web:${TAG:-1}', build: {context: lib, dockerfile: D}}}\n"
    )
    (project / "lib" / "D").write_text("FROM scratch\nCOPY shared /\n")
    (project / ".env").write_text("TAG=7\n")
    pybuild.run("bake", cwd=project)
    assert "web" in pybuild.run("images").text
    assert pybuild.run("inspect", "web:7").status == 0


def test_failures(pybuild: Pybuild, project: Path) -> None:
    (project / "app" / "Containerfile").write_text("FROM base\nCOPY missing /\n")
    failed = pybuild.run("bake", cwd=project, check=False)
    assert failed.status == 1
    assert "target app failed" in failed.stderr
    assert pybuild.run("bake", "nothing", cwd=project, check=False).status == 2
    (project / "docker-bake.json").unlink()
    missing = pybuild.run("bake", cwd=project, check=False)
    assert missing.status == 1
    assert "there is no build file here" in missing.stderr


def test_a_file_grants_itself_nothing(pybuild: Pybuild, project: Path) -> None:
    document = {"target": {"default": {"context": "lib", "entitlements": ["security.insecure"], "tags": ["--push"]}}}
    (project / "docker-bake.json").write_text(json.dumps(document))
    refused = pybuild.run("bake", cwd=project, check=False)
    assert refused.status == 2
    assert "--allow security.insecure" in refused.stderr
    shown = pybuild.run("bake", "--dry-run", "--allow", "security.insecure", cwd=project).text
    assert "--allow security.insecure" in shown
    # What looks like a flag of the build is a value still: of a name, a bad one.
    assert "--tag=--push" in shown
    document["target"]["default"] = {"context": "--allow=security.insecure"}
    (project / "docker-bake.json").write_text(json.dumps(document))
    assert "./--allow=security.insecure" in pybuild.run("bake", "--dry-run", cwd=project).text


def test_metadata_is_there_whole_or_not_at_all(pybuild: Pybuild, project: Path) -> None:
    (project / "old.json").write_text("old")
    (project / "app" / "Containerfile").write_text("FROM base\nCOPY missing /\n")
    assert pybuild.run("bake", "--metadata-file", "old.json", cwd=project, check=False).status == 1
    assert (project / "old.json").read_text() == "old"
    assert not list(project.glob("*.part"))
    (project / "app" / "Containerfile").write_text("FROM base AS first\n")
    pybuild.run("bake", "--metadata-file", "old.json", cwd=project)
    assert set(json.loads((project / "old.json").read_text())) == {"base", "app", "other"}


def test_hcl(pybuild: Pybuild, project: Path) -> None:
    (project / "docker-bake.json").unlink()
    (project / "docker-bake.hcl").write_text(
        'variable "TAG" { default = "1" }\ntarget "default" {\n  context = "lib"\n'
        '  dockerfile-inline = "FROM scratch\\nCOPY shared /\\n"\n  tags = ["hcl:${TAG}"]\n}\n'
    )
    pybuild.run("bake", cwd=project, env={"TAG": "9"})
    assert pybuild.run("inspect", "hcl:9").status == 0
