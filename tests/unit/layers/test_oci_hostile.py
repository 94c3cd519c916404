"""Documents of hostile registries: each field of another type is one ImageError, before anybody uses it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layers.errors import ImageError
from layers.oci import MEDIA_OCI_CONFIG, MEDIA_OCI_LAYER, Descriptor, Digest, ImageConfig, parse_manifest

BLOB = {"mediaType": MEDIA_OCI_LAYER, "digest": Digest.of(b"x"), "size": 1}

EXECUTION: list[dict[str, Any]] = [
    {"Env": "A=b"},
    {"Env": [1]},
    {"Env": [None]},
    {"Env": ["A=a\0b"]},
    {"Cmd": "/bin/sh"},
    {"Entrypoint": ["/a", "b\0c"]},
    {"Shell": 5},
    {"OnBuild": {"a": 1}},
    {"User": 1},
    {"User": "a\0b"},
    {"WorkingDir": ["/"]},
    {"StopSignal": 9},
    {"Volumes": ["/a"]},
    {"Volumes": {"/a\0b": {}}},
    {"ExposedPorts": ["80/tcp"]},
    {"Labels": {"a": 1}},
    {"Labels": ["a"]},
    {"Healthcheck": [1]},
    {"Healthcheck": {"Test": "x"}},
    {"Healthcheck": {"Test": [None]}},
    {"Healthcheck": {"Interval": "5s"}},
    {"Healthcheck": {"Interval": 10**40}},
    {"Healthcheck": {"Retries": True}},
    {"StopTimeout": 1.5},
]


def config(**more: Any) -> bytes:
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}, **more}).encode()


@pytest.mark.parametrize("execution", EXECUTION, ids=json.dumps)
def test_the_execution_part_has_its_types(execution: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        ImageConfig.parse(config(config=execution))
    nothing = dict.fromkeys(execution)
    assert ImageConfig.parse(config(config=nothing)).config == nothing


@pytest.mark.parametrize(
    "more",
    [
        {"history": [{"created_by": 5}]},
        {"history": [{"created": 7}]},
        {"history": [{"comment": []}]},
        {"history": ["x"]},
        {"os.features": 5},
        {"rootfs": {"type": "x" * 10**6}},
        {"rootfs": {"diff_ids": ["sha256:" + "x" * 10**6]}},
        {"config": [1]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_config_has_its_types(more: dict[str, Any]) -> None:
    with pytest.raises(ImageError) as caught:
        ImageConfig.parse(config(**more))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "more",
    [
        {"mediaType": ["x"]},
        {"mediaType": {"a": 1}},
        {"artifactType": ["x"]},
        {"layers": [{**BLOB, "size": 1 << 63}]},
        {"layers": [{**BLOB, "size": 10**4000}]},
        {"layers": [{**BLOB, "size": "1"}]},
        {"layers": [{**BLOB, "urls": 5}]},
        {"layers": [{**BLOB, "data": 5}]},
        {"layers": [{**BLOB, "artifactType": {}, "digest": ["x"]}]},
        {"layers": [{**BLOB, "artifactType": [1]}]},
        {"layers": [{**BLOB, "annotations": {"a": 1}}]},
        {"layers": [{**BLOB, "platform": {"os.features": 5}}]},
        {"layers": {"0": BLOB}},
        {"schemaVersion": "x" * 10**6},
    ],
    ids=lambda more: json.dumps(more)[:60],
)
def test_a_manifest_has_its_types(more: dict[str, Any]) -> None:
    document = {"schemaVersion": 2, "config": {**BLOB, "mediaType": MEDIA_OCI_CONFIG}, "layers": [BLOB], **more}
    with pytest.raises(ImageError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert len(caught.value.message) < 300


def test_the_largest_size_is_one_that_the_store_can_hold() -> None:
    assert Descriptor.from_json({**BLOB, "size": (1 << 63) - 1}).size_bytes == (1 << 63) - 1


def test_depth_is_an_error() -> None:
    with pytest.raises(ImageError):
        parse_manifest(b"[" * 1_000_000)
