"""The command line within this process: as fast as a function call, with a store and a home of its own."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builder.cli.main import main
from tests.support.images import Image, write_layout


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode().strip()

    def json(self) -> Any:
        return json.loads(self.out)


class CommandLine:
    """`cli("tags", "ls", …)`; the status must be `status`, None for any."""

    def __init__(self, root: Path, capture: pytest.CaptureFixture[bytes], patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._capture = capture
        self._patch = patch

    def __call__(self, *arguments: str | Path, status: int | None = 0, stdin: bytes | None = None) -> Done:
        if stdin is not None:
            self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(stdin))))
        self._capture.readouterr()
        found = main([str(a) for a in (arguments[0], "--root", self.root, *arguments[1:])])
        sys.stdout.flush()
        captured = self._capture.readouterr()
        done = Done(found, captured.out, captured.err.decode())
        assert "internal error" not in done.err, done.err
        assert status is None or found == status, f"{arguments}: {found}\n{done.err}"
        return done


@pytest.fixture
def cli(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[CommandLine]:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", "/dev/null")
    yield CommandLine(tmp_path / "store", capsysbinary, monkeypatch)


def put(cli: CommandLine, directory: Path, image: Image, name: str) -> str:
    """Bring an image to a place; its digest."""
    layout = write_layout(directory / f"layout-{image.digest[7:19]}", t=image)
    digest = cli("copy", "--all", f"oci:{layout}:t", name).text
    assert digest == image.digest
    return digest
