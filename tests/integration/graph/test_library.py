"""The Python API alone, from a program with threads: build, failure, cancellation, plan and push."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder import BuildRequest, Image, RunMount, build
from tests.support.accounts import Account
from tests.support.cli import TIMEOUT_S, Pybuild, write_context
from tests.support.oracles import skopeo_inspect
from tests.support.registries import RegistryServer

PROGRAM = Path(__file__).with_name("library_user.py")
pytestmark = pytest.mark.registry


def test_from_a_program_with_threads(
    pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, busybox_base, tmp_path, registry.host],
        capture_output=True,
        text=True,
        env=pybuild.environ(),
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout.strip().endswith("all is well"), done.stderr
    assert done.returncode == 0
    assert skopeo_inspect(f"{registry.host}/lib/user:0")["Digest"]


@pytest.mark.rootless
def test_from_an_ordinary_users_program_with_threads(
    pybuild_rootless: Pybuild, rootless_user: Account, busybox_base: str, registry: RegistryServer
) -> None:
    program = rootless_user.home / "library_user.py"
    program.write_bytes(PROGRAM.read_bytes())
    place = pybuild_rootless.root
    place.mkdir(exist_ok=True)
    os.chown(place, rootless_user.uid, rootless_user.gid)
    done = subprocess.run(
        rootless_user.command([str(rootless_user.python), str(program), busybox_base, str(place), registry.host]),
        capture_output=True,
        text=True,
        env=rootless_user.environ(),
        cwd=rootless_user.home,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout.strip().endswith("all is well"), done.stderr


def test_an_image_defined_in_python_is_its_containerfiles(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = (
        f"FROM {busybox_base} AS tools\nRUN --mount=type=cache,target=/c echo tool | tee /c/x > /tool\n"
        f"FROM {busybox_base}\nENV A=b\nCOPY --from=tools /tool /bin/\nCOPY src /src/\n"
        "RUN cat /src/* /bin/tool > /all\n"
        'CMD ["cat", "/all"]\n'
    )
    context = write_context(tmp_path / "context", text, {"src/a": "a\n"})
    tools = Image.start(busybox_base).run("echo tool | tee /c/x > /tool", mounts=[RunMount.cache("/c")])
    app = Image.start(busybox_base).env(A="b").copy("/tool", "/bin/", source=tools).copy("src", "/src/")
    app = app.run("cat /src/* /bin/tool > /all").cmd(["cat", "/all"])
    request = BuildRequest(containerfile=app.source(), context=context, tags=("defined:1",), source_date_epoch=1)
    made = build(request, root=pybuild.root)
    assert made.executed == 4
    assert (
        pybuild.build(context, "-q", "--timestamp", "1", env={"SOURCE_DATE_EPOCH": "1"}).text.strip() == made.image_id
    )
    assert pybuild.run("run", "--rm", "defined:1").text == "a\ntool\n"
