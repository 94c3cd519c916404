"""Registries that count pulls: a build asks no more than it must, and tells how many are left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.registry.servers import Exchange, Fault, FaultProxy
from tests.support.cli import Pybuild, write_context
from tests.support.images import make_image, make_index, write_layout
from tests.support.registries import RegistryServer

LIMITS = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "7;w=21600"}


def counted(exchange: Exchange) -> Fault | None:
    return Fault(set_headers=LIMITS) if "/manifests/" in exchange.path else None


@pytest.mark.registry
@pytest.mark.parametrize("kind", ["image", "index"])
def test_an_unchanged_base_costs_no_pull(pybuild: Pybuild, registry: RegistryServer, tmp_path: Path, kind: str) -> None:
    image = make_image([{"file": b"1"}])
    top = image if kind == "image" else make_index({"amd64": image, "arm64": make_image()})
    layout = write_layout(tmp_path / "base", t=top)
    repository = f"pull-limits/{kind}"
    pybuild.run("copy", "-q", "--all", f"oci:{layout}:t", f"docker://{registry.host}/{repository}:1")
    with FaultProxy(registry.host, counted) as proxy:
        context = write_context(tmp_path / "context", f"FROM {proxy.host}/{repository}:1\nCOPY new /\n", {"new": "n"})
        meta = tmp_path / "meta.json"
        for pulls in (2 if kind == "index" else 1, 0):
            proxy.log.clear()
            done = pybuild.build(context, "--pull=always", "--summary", "--metadata-file", meta)
            gets = [e for e in proxy.log if "/manifests/" in e.path and e.method == "GET"]
            assert len(gets) == pulls
            assert proxy.count("HEAD", "/manifests/") == 1
            assert f"{proxy.host}: 7 of 100 pulls left" in done.stderr
            left = json.loads(meta.read_text())["pybuild.pulls_left"][proxy.host]
            assert (left["limit"], left["remaining"], left["window_s"]) == (100, 7, 21600)
        # Without being told to look for a newer one, nothing is asked at all.
        proxy.log.clear()
        pybuild.build(context)
        assert proxy.log == []
    # A tag that has moved is seen.
    moved = write_layout(tmp_path / "moved", t=make_image([{"file": b"2"}]))
    pybuild.run("copy", "-q", f"oci:{moved}:t", f"docker://{registry.host}/{repository}:1")
    with FaultProxy(registry.host, counted) as proxy:
        context = write_context(tmp_path / "again", f"FROM {proxy.host}/{repository}:1\nCOPY new /\n", {"new": "n"})
        pybuild.build(context, "--pull=always", "-o", str(tmp_path / "out"))
        assert (tmp_path / "out/file").read_bytes() == b"2"
