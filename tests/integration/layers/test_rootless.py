"""The same code in a user namespace: user.overlay.* marks, mapped ids, no devices."""

from __future__ import annotations

import shutil

import pytest

from tests.support.accounts import Account
from tests.support.machine import CHECKOUT, need_tool

pytestmark = [pytest.mark.root, pytest.mark.rootless]

NEEDED = ("support/__init__.py", "support/trees.py", "integration/layers/edits.py", "integration/layers/stacks.py")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount", "--"]

ROUND_TRIPS = """
import io, os, shutil, sys, tempfile
from pathlib import Path
from layers.apply import apply_layer
from layers.changeset import diff_overlay, diff_trees
from tests.integration.layers.edits import apply_edits, random_edits
from tests.integration.layers.stacks import make_layer, overlay
from tests.support.trees import differences, record

whiteouts = opaques = capabilities = 0
for seed in range(int(sys.argv[1])):
    top = Path(tempfile.mkdtemp(dir=os.environ["HOME"]))
    lowers, stack, flat = [], [], top / "flat"
    flat.mkdir()
    for number in range(3):
        upper = top / f"upper{number}"
        upper.mkdir()
        (top / "empty").mkdir(exist_ok=True)
        with overlay(top / "merged", lowers or [top / "empty"], upper, userxattr=True) as merged:
            apply_edits(os.fsencode(merged), random_edits(seed * 10 + number, 30), time_s=1_000_000 * (number + 1))
        # Mounted afresh: a file linked to while it was copied up shows two inode numbers until then.
        with overlay(top / "again", [upper, *lowers], userxattr=True) as again:
            seen = record(again)
        made = make_layer(diff_overlay(upper, lowers, "user"), upper)
        for path in upper.rglob("*"):
            whiteouts += path.is_char_device() and path.lstat().st_rdev == 0
            opaques += path.is_dir() and not path.is_symlink() and "user.overlay.opaque" in os.listxattr(path)
        capabilities += b"security.capability" in {name for entry in seen.values() for name, _ in entry.xattrs}
        lowers.insert(0, upper)
        apply_layer(io.BytesIO(made.blob), flat)
        wrong = differences(seen, record(flat))
        assert not wrong, (seed, number, "flattened", wrong)
        layer = top / f"layer{number}"
        layer.mkdir()
        apply_layer(io.BytesIO(made.blob), layer, whiteouts="overlay", dialect="user", lower=stack)
        stack.insert(0, layer)
        with overlay(top / "stacked", stack, userxattr=True) as stacked:
            wrong = differences(seen, record(stacked))
            assert not wrong, (seed, number, "stacked", wrong)
        assert make_layer(diff_trees(None, flat), flat).result.entries == len(seen)
    shutil.rmtree(top)
assert whiteouts and opaques and capabilities, (whiteouts, opaques, capabilities)
print("equal")
"""

REFUSALS = """
import io, os, sys
from pathlib import Path
from layers.apply import apply_layer
from layers.errors import LayerError
from layers.tarstream import CHARACTER_DEVICE, REGULAR, TarWriter

def unpack(name, **options):
    blocks = []
    writer = TarWriter(lambda block: blocks.append(bytes(block)))
    writer.add(b"null", CHARACTER_DEVICE, mode=0o666, uid=0, gid=0, device=(1, 3))
    writer.add(b"f", REGULAR, mode=0o600, uid=3_000_000_000, gid=0)
    writer.finish()
    target = Path(os.environ["HOME"], name)
    target.mkdir()
    said = []
    try:
        apply_layer(io.BytesIO(b"".join(blocks)), target, warn=said.append, **options)
    except LayerError as e:
        assert "cannot unpack 'f'" in e.message and "subordinate" in e.hint, (e, e.hint)
        print("refused", len(said), os.listdir(target))
    else:
        print("taken", len(said), sorted(os.listdir(target)))

unpack("refused")
unpack("taken", keep_owners=False)
"""


@pytest.fixture
def runtime(rootless_user: Account) -> str:
    """The user's PYTHONPATH: the packages under test, and the parts of these tests that need nothing else."""
    need_tool("unshare", "newuidmap")
    copy = rootless_user.home / "layer-tests"
    for name in NEEDED:
        target = copy / "tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKOUT / "tests" / name, target)
    return f"{rootless_user.pythonpath}:{copy}"


def run(user: Account, runtime: str, script: str, *args: str, namespace: bool = True) -> str:
    argv = [*(NAMESPACE if namespace else []), str(user.python), "-c", script, *args]
    done = user.run(argv, env={"PYTHONPATH": runtime}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


def test_what_the_overlay_shows_comes_back(rootless_user: Account, runtime: str) -> None:
    assert run(rootless_user, runtime, ROUND_TRIPS, "25") == "equal\n"


def test_ids_that_are_not_mapped_and_devices(rootless_user: Account, runtime: str) -> None:
    said = run(rootless_user, runtime, REFUSALS).splitlines()
    assert said == ["refused 1 ['f']", "taken 1 ['f']"]
    for name in ("refused", "taken"):
        shutil.rmtree(rootless_user.home / name)


def test_without_a_namespace(rootless_user: Account, runtime: str) -> None:
    """An ordinary user who just unpacks, with the ids left alone."""
    said = run(rootless_user, runtime, REFUSALS, namespace=False).splitlines()
    assert said == ["refused 1 ['f']", "taken 1 ['f']"]
    for name in ("refused", "taken"):
        shutil.rmtree(rootless_user.home / name)
