"""`probe` tells what works here by trying it, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.accounts import Account
from tests.support.machine import CHECKOUT, need_mounts, need_root, need_tool, which

SCRIPT = """
import json, sys
from pathlib import Path
from builder.sandbox.probe import probe
report = probe(Path(sys.argv[1]))
print(json.dumps({
    "tiers": {t.tier: [t.works, t.missing, t.grant] for t in report.tiers},
    "facts": {f.name: [f.works, f.detail, f.grant] for f in report.facts},
    "chosen": report.chosen and report.chosen.tier,
}))
"""


def report(command: list[str], directory: Path, **options: Any) -> dict[str, Any]:
    argv = [*command, "-c", SCRIPT, str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=directory, **options)
    assert not os.listdir(directory)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(CHECKOUT)}


def test_root_takes_the_first_tier(workplace: Path, environ: dict[str, str]) -> None:
    need_root()
    need_mounts()
    found = report([sys.executable], workplace, env=environ)
    assert found["chosen"] == "root"
    assert found["tiers"]["root"] == [True, None, None]
    assert found["facts"]["device nodes"] == [True, "RUN makes them", None]


def test_root_without_its_powers_is_told(workplace: Path, environ: dict[str, str]) -> None:
    need_root()
    need_tool("setpriv")
    bare = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", sys.executable]
    found = report(bare, workplace, env=environ)
    works, missing, grant = found["tiers"]["root"]
    assert not works and "CAP_SYS_ADMIN" in missing and "docker run" in grant


def test_a_user_with_subordinate_ids(workplace: Path, rootless_user: Account) -> None:
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    command = rootless_user.command([str(rootless_user.python)])
    found = report(command, workplace, env=rootless_user.environ())
    assert found["chosen"] == "subordinate"
    assert found["tiers"]["single"][0]
    assert found["tiers"]["root"] == [False, "pybuild does not run as root", "sudo pybuild …"]
    if which("runc") or which("crun"):
        assert found["tiers"]["oci"][0]
    assert found["facts"]["storage"][:2] == [True, "overlay, by the kernel"]
    works, detail, _ = found["facts"]["device nodes"]
    assert works and "an empty file" in detail


def test_no_new_privs_takes_the_helpers_away(workplace: Path, rootless_user: Account) -> None:
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    command = rootless_user.command(["setpriv", "--no-new-privs", str(rootless_user.python)])
    found = report(command, workplace, env=rootless_user.environ())
    assert found["chosen"] == "single"
    works, missing, grant = found["tiers"]["subordinate"]
    assert not works and "newuidmap" in missing and "no_new_privs" in grant
    assert not found["tiers"]["oci"][0]
    assert found["facts"]["restrictions"][0] is False


def test_a_user_namespace_that_is_refused(workplace: Path, rootless_user: Account) -> None:
    """Under a filter that refuses unshare, as containers have it; the hint is for a person."""
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    filtered = (
        "import sys; from layers import linux; from builder.sandbox import seccomp\n"
        "rules = (seccomp.Rule(('unshare', 'clone3', 'mount'), 0x50001),)\n"
        "linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)\n"
        "profile = seccomp.Profile(seccomp.ALLOW, rules, (linux.machine(),))\n"
        "linux.seccomp_filter(seccomp.compile_profile(profile))\n"
    )
    command = rootless_user.command([str(rootless_user.python)])
    argv = [*command, "-c", filtered + SCRIPT, str(workplace)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=rootless_user.environ(), cwd="/")
    found = json.loads(done.stdout)
    assert found["chosen"] is None
    works, missing, grant = found["tiers"]["single"]
    assert not works and "user namespace" in missing and grant
