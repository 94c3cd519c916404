"""A secret's value in a layer, the config or a log: the image is neither named nor sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context

pytestmark = pytest.mark.registry
VALUE = "hunter2/correct+horse"
MOUNT = "RUN --mount=type=secret,id=key"

LEAKS = {
    "a file": f"{MOUNT} cp /run/secrets/key /leaked",
    "a part of a file": f"{MOUNT} (head -c 5000000 /dev/zero; cat /run/secrets/key; echo after) > /leaked",
    "base64": f"{MOUNT} (printf x; cat /run/secrets/key; echo more) | base64 -w0 > /leaked",
    "a link": f'{MOUNT} ln -s "$(cat /run/secrets/key)" /leaked',
    "the output": f"{MOUNT} cat /run/secrets/key",
    "history": "ARG TOKEN\nRUN echo $TOKEN > /dev/null",
    "environment": "ARG TOKEN\nENV TOKEN=$TOKEN\nRUN true",
}


def context_of(tmp_path: Path, base: str, line: str) -> Path:
    folder = write_context(tmp_path / "context", f"FROM {base}\n{line}\n")
    (tmp_path / "key").write_text(VALUE)
    return folder


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_refused(pybuild: Pybuild, busybox_base: str, tmp_path: Path, leak: str) -> None:
    context = context_of(tmp_path, busybox_base, LEAKS[leak])
    flags = (
        "--secret",
        f"id=key,src={tmp_path}/key",
        "--build-arg",
        f"TOKEN={VALUE}",
        "-t",
        "leaky:1",
        "--secret-gate",
    )
    result = pybuild.build(context, *flags, check=False)
    assert result.status == 1, leak
    assert "'key'" in result.stderr
    assert VALUE not in result.stderr.partition("error: ")[2]
    assert "leaky" not in pybuild.run("images").text
    # Found in the cache the second time, and refused again; but for a log, which is not kept.
    again = pybuild.build(context, *flags, check=False)
    assert again.status == (0 if leak == "the output" else 1)
    pybuild.build(context, *flags, "--secret-gate=false")
    assert "leaky" in pybuild.run("images").text


def test_a_clean_build_passes(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    line = f"{MOUNT} wc -c /run/secrets/key > /size; head -c 30000000 /dev/urandom > /noise"
    context = context_of(tmp_path, busybox_base, line)
    pybuild.build(context, "--secret", f"id=key,src={tmp_path}/key", "-t", "clean:1", "--secret-gate")
    pybuild.build(context, "--secret", f"id=key,src={tmp_path}/key", "-t", "clean:2", "--secret-gate")


def test_the_layer_and_file_are_named(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = context_of(tmp_path, busybox_base, LEAKS["a file"])
    result = pybuild.build(context, "--secret-gate", "--secret", f"id=key,src={tmp_path}/key", check=False)
    assert "/leaked" in result.stderr
    assert "layer sha256:" in result.stderr
