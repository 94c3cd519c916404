"""The flags of `build` as a request: other spellings, and what can only be so."""

from __future__ import annotations

from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path

import pytest

from builder.cli import build
from builder.cli.buildrequest import make_request
from builder.errors import UsageError
from builder.plan.request import BuildRequest
from layers.oci import Platform


def request_of(tmp_path: Path, *words: str) -> BuildRequest:
    (tmp_path / "Containerfile").write_text("FROM scratch\n")
    parser = ArgumentParser()
    build.configure("build", parser)
    with ExitStack() as stack:
        return make_request(parser.parse_args([*words, str(tmp_path)]), stack)


@pytest.mark.parametrize(
    ("words", "platform"),
    [
        (["--arch=arm64"], "linux/arm64"),
        (["--arch", "arm", "--variant", "v6"], "linux/arm/v6"),
        (["--os=windows", "--arch=amd64"], "windows/amd64"),
        (["--os=linux"], str(Platform.host())),
    ],
)
def test_a_platform_in_parts(tmp_path: Path, words: list[str], platform: str) -> None:
    assert list(map(str, request_of(tmp_path, *words).platforms)) == [platform]


def test_parts_and_a_whole_platform_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="go with no --platform"):
        request_of(tmp_path, "--arch=arm64", "--platform=linux/amd64")


def test_scripts_for_docker_and_buildah(tmp_path: Path) -> None:
    said = request_of(tmp_path, "--rm=true", "--force-rm=false", "--provenance=false", "--sbom=false", "--net=none")
    assert said.run.network == "none"
    assert request_of(tmp_path, "--force-rm=true", "-q").platforms == ()


def test_a_timeline_has_a_form(tmp_path: Path) -> None:
    for name in ("x.svg", "x.HTML", "x.json"):
        assert request_of(tmp_path, "--timeline", name).tags == ()
    with pytest.raises(UsageError, match=r"--timeline x\.png"):
        request_of(tmp_path, "--timeline=x.png")


@pytest.mark.parametrize("words", [["--rm=false"], ["--provenance=mode=max"], ["--sbom=true"], ["--sbom"]])
def test_what_others_can_and_pybuild_cannot(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        request_of(tmp_path, *words, "--quiet")
    assert words[0].partition("=")[0] in str(caught.value) and caught.value.hint
