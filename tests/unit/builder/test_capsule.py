"""Capsules of strangers: what they say of the failed step is taken, or one error."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from builder.capsule import FIELD, IMAGE_NAME, read_capsule
from layers.errors import ImageError
from registry.transport import TransportContext
from tests.support.images import make_image, write_layout

FAILED: dict[str, Any] = {
    **dict.fromkeys(("step", "message", "output", "file", "containerfile", "platform"), "text"),
    "command": ["false"], "exit_status": 1, "line": 1, "end_line": 1,
}  # fmt: skip


def read(directory: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_layout(directory / "layout", **{IMAGE_NAME: make_image()})
    with tarfile.open(directory / "capsule.tar", "w") as tar:
        tar.add(layout, ".")
    monkeypatch.setattr("registry.transport.read_blob", lambda *_: config.encode())
    read_capsule(directory / "capsule.tar", TransportContext(scratch_dir=directory))


def test_a_capsule_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, json.dumps({FIELD: FAILED}), monkeypatch)


@pytest.mark.parametrize(
    "config",
    [
        "{", "[" * 100_000, "[]", json.dumps({FIELD: []}), json.dumps({FIELD: {**FAILED, "line": float("inf")}}),
        json.dumps({FIELD: {**FAILED, "exit_status": "x"}}), json.dumps({FIELD: {**FAILED, "command": 1}}),
        json.dumps({FIELD: {}}), f'{{"{FIELD}": {{"line": {"9" * 5000}}}}}',
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_error(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError):
        read(tmp_path, config, monkeypatch)
