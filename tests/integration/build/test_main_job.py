"""The whole path, as root and as an ordinary user: pull a base, build, push; others use what was pushed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.support.cli import Pybuild, write_context
from tests.support.machine import CHECKOUT
from tests.support.oracles import pushed_to_bundle, runc_run, skopeo_inspect
from tests.support.registries import RegistryServer

EXAMPLES = CHECKOUT / "Containerfile.examples"


def example(name: str, where: Path) -> Path:
    """A copy of an example, where any user can read it."""
    target = where / name
    shutil.copytree(EXAMPLES / name, target)
    return target


def context_dir(pybuild: Pybuild, tmp_path: Path) -> Path:
    """A folder that the user of `pybuild` can read."""
    if pybuild.account is None:
        return tmp_path
    where = pybuild.account.home / tmp_path.name
    where.mkdir()
    return where


def test_site_is_built_pushed_and_run(
    pybuild_each: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    pybuild = pybuild_each
    site = example("site", context_dir(pybuild, tmp_path))
    arguments: list[str | Path] = [
        "-f",
        site / "Containerfile",
        "-t",
        "site:1",
        "--build-arg",
        f"BASE={busybox_base}",
        site,
    ]
    first = pybuild.run(*arguments)
    who = "rootless" if pybuild.account else "root"
    target = f"{registry.host}/main-job/{who}:1"
    pybuild.run("push", "site:1", target)

    inspected = skopeo_inspect(target)
    assert inspected["Labels"]["org.opencontainers.image.title"] == "site"
    config = skopeo_inspect(target, config=True)
    assert config["config"]["User"] == "www-data"
    assert config["config"]["ExposedPorts"] == {"8080/tcp": {}}
    bundle = pushed_to_bundle(target, tmp_path)
    output = runc_run(bundle)
    assert output.startswith("user 33, root /srv/site\n")
    assert "<h1>Welcome</h1>" in output

    # The base came from the registry by its layers' digests, and is in the image unchanged.
    base_layers = registry.manifest("base/busybox", "1")["layers"]
    layers = registry.manifest(f"main-job/{who}", "1")["layers"]
    assert layers[: len(base_layers)] == base_layers
    assert len(layers) > len(base_layers)

    # A second build runs no step and gives the same image.
    second = pybuild.run(*arguments)
    ran = re.findall(r"^#\d+ (DONE .*|CACHED)$", second.stderr, re.M)
    assert "#" in first.stderr
    assert not re.search(r"^#\d+ \d+\.\d{3} ", second.stderr, re.M), "a step of the cached build printed something"
    assert ran.count("CACHED") >= 8, second.stderr


def test_a_second_push_sends_no_blob(
    pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN echo once > /file\n")
    pybuild.build(context, "-t", "twice:1")
    target = f"{registry.host}/push-twice/app:1"
    pybuild.run("push", "twice:1", target)
    before = len(registry.requests_seen())
    pybuild.run("push", "twice:1", target)
    seen = [line for line in registry.requests_seen()[before:] if "/v2/push-twice/" in line]  # others push there, too
    assert seen
    assert not [line for line in seen if line.startswith(("POST ", "PATCH ")) or "/blobs/uploads/" in line], seen


def test_a_blob_of_the_base_is_mounted_not_sent(
    pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nLABEL a=b\n")
    pybuild.build(context, "-t", "mounted:1")
    pybuild.run("push", "mounted:1", f"{registry.host}/mounted/app:1")
    layer = registry.manifest("base/busybox", "1")["layers"][0]["digest"]
    seen = [line for line in registry.requests_seen() if "/v2/mounted/app/" in line]  # other tests push there, too
    assert [line for line in seen if line.startswith("POST") and f"mount={layer}" in line.replace("%3A", ":")], seen
    uploads = [line for line in seen if layer in line.replace("%3A", ":") and line.startswith(("PUT", "PATCH"))]
    assert not uploads, "the base's layer was sent although the registry has it in another repository"


def test_a_cached_build_loads_no_http_and_no_compressor(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN echo hi\nCOPY f /f\n", {"f": "x"})
    pybuild.build(context, "-t", "cached:1")
    result = pybuild.build(context, "-t", "cached:1", env={"PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "builder.cli.main" in loaded
    heavy = {"requests", "urllib3", "oras", "tqdm", "zstandard", "isal", "asyncio", "http.client", "ssl"} & loaded
    assert not heavy
