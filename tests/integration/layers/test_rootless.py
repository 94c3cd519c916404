"""The same code in a user namespace: user.overlay.* marks, mapped ids, no devices."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from layers.ownership import ATTRIBUTE
from layers.tarstream import BLOCK_DEVICE, CHARACTER_DEVICE, DIRECTORY, FIFO, HARDLINK, REGULAR, SYMLINK, TarWriter
from tests.support.accounts import Account
from tests.support.machine import CHECKOUT, need_tool

pytestmark = [pytest.mark.root, pytest.mark.rootless]

NEEDED = ("support/__init__.py", "support/trees.py", "integration/layers/edits.py", "integration/layers/stacks.py")
SINGLE = ["unshare", "--user", "--map-root-user", "--mount", "--"]
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

RECORDED = """
import io, os, shutil, stat, sys
from pathlib import Path
from layers.apply import apply_layer
from layers.changeset import write_layer
from layers.layerdiff import diff_overlay, diff_trees
from layers.tarreader import TarReader
from layers.trees import copy_tree
from layers.verify import verify_layer
from tests.integration.layers.stacks import make_layer, overlay

def changed(changes, root):
    blob = io.BytesIO()
    write_layer(changes, root, blob, compression="none")
    return blob.getvalue()

def entries(blob):
    return list(TarReader(io.BytesIO(blob)))

top = Path(os.environ["HOME"], "recorded")
for name in ("flat", "layer", "upper", "merged", "copy"):
    (top / name).mkdir(parents=True)
first, second = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes()
apply_layer(io.BytesIO(first), top / "flat")
assert changed(diff_trees(None, top / "flat"), top / "flat") == first
verify_layer(io.BytesIO(first), diff_trees(None, top / "flat"), top / "flat")
fd = os.open(top / "flat", os.O_PATH)
copy_tree(fd, str(top / "copy"))
os.close(fd)
assert changed(diff_trees(None, top / "copy"), top / "copy") == first
assert not list(diff_trees(top / "flat", top / "copy"))
apply_layer(io.BytesIO(second), top / "copy")
apply_layer(io.BytesIO(second), top / "layer", whiteouts="overlay", dialect="user", lower=[top / "flat"])
assert changed(diff_overlay(top / "layer", [top / "flat"], "user"), top / "layer") == second
with overlay(top / "merged", [top / "layer", top / "flat"], top / "upper", userxattr=True) as merged:
    assert changed(diff_trees(None, merged), merged) == changed(diff_trees(None, top / "copy"), top / "copy")
    for name in ("d/file", "d/null", "d/link", "pipe"):
        os.rename(merged / name, merged / (name + ".moved"))
    (merged / "d/new").touch()
stack = [top / "layer", top / "flat"]
moved = {e.name: e for e in entries(changed(diff_overlay(top / "upper", stack, "user"), top / "upper"))}
device = moved[b"d/null.moved"]
assert (device.type, device.uid, device.devmajor, device.devminor) == (b"3", 3, 1, 3), device
assert (moved[b"d/file.moved"].uid, moved[b"d/file.moved"].gid) == (34, 4294967294), moved
assert (moved[b"d/link.moved"].uid, moved[b"pipe.moved"].gid) == (33, 8)
assert (moved[b"d/new"].uid, moved[b"d/"].gid) == (0, 2)
shutil.rmtree(top)
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


UNRECORDED = """
import errno, os, stat, sys
from layers.ownership import DEVICELESS, here
assert here() is DEVICELESS
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    DEVICELESS.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3), dir_fd=fd)
except PermissionError as e:
    assert e.errno == errno.EPERM
    print("refused", os.listdir(fd))
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


def recorded_layers(folder: Path) -> list[str]:
    """Two layers with owners and devices that nobody but root can make; the second changes owners alone."""
    paths = []
    for number, (file, attributes) in enumerate([((33, 34), {"user.k": b"v"}), ((34, 4294967294), {})]):
        blocks: list[bytes] = []
        tar = TarWriter(lambda block, blocks=blocks: blocks.append(bytes(block)))  # type: ignore[misc]
        tar.add(b"d", DIRECTORY, mode=0o2775, uid=1, gid=2, mtime_ns=5_000_000_000)
        tar.add(b"d/file", REGULAR, mode=0o6755, uid=file[0], gid=file[1], xattrs=attributes)
        if number == 0:
            tar.add(b"d/link", SYMLINK, mode=0o777, uid=33, gid=33, linkname=b"file")
            tar.add(b"d/null", CHARACTER_DEVICE, mode=0o666, uid=3, gid=0, device=(1, 3))
            tar.add(b"d/second", HARDLINK, mode=0o6755, uid=33, gid=34, linkname=b"d/file")
        tar.add(b"disk", BLOCK_DEVICE, mode=0o660, uid=0, gid=6 * number, device=(8, 1))
        if number == 0:
            tar.add(b"pipe", FIFO, mode=0o600, uid=0, gid=8)
        tar.finish()
        path = folder / f"recorded{number}.tar"
        path.write_bytes(b"".join(blocks))
        paths.append(str(path))
    return paths


def run(user: Account, runtime: str, script: str, *args: str, namespace: bool = True) -> str:
    before = SINGLE if script is RECORDED else NAMESPACE
    argv = [*(before if namespace else []), str(user.python), "-c", script, *args]
    done = user.run(argv, env={"PYTHONPATH": runtime}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


def test_what_the_overlay_shows_comes_back(rootless_user: Account, runtime: str) -> None:
    assert run(rootless_user, runtime, ROUND_TRIPS, "25") == "equal\n"


def test_owners_that_a_single_id_records(rootless_user: Account, runtime: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    layers = [str(shutil.copy(path, rootless_user.home)) for path in recorded_layers(tmp_path)]
    assert run(rootless_user, runtime, RECORDED, *layers) == "equal\n"


def test_ids_that_are_not_mapped_and_devices(rootless_user: Account, runtime: str) -> None:
    said = run(rootless_user, runtime, REFUSALS).splitlines()
    assert said == ["refused 0 ['f', 'null']", "taken 0 ['f', 'null']"]
    for name in ("refused", "taken"):
        assert os.getxattr(rootless_user.home / name / "null", ATTRIBUTE) == b"::c:1:3"
        shutil.rmtree(rootless_user.home / name)


def test_a_device_that_cannot_be_recorded_is_not_made(rootless_user: Account, runtime: str) -> None:
    """POSIX message queues are files in a directory that knows no attributes."""
    place = rootless_user.home / "queues"
    script = 'mkdir "$1" && mount -t mqueue none "$1" && exec "$2" -c "$3" "$1"'
    argv = [*NAMESPACE[:-1], "--ipc", "--", "sh", "-c", script, "sh", place, rootless_user.python, UNRECORDED]
    done = rootless_user.run(
        list(map(str, argv)), env={"PYTHONPATH": runtime}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "refused []\n", done.stderr


def test_without_a_namespace(rootless_user: Account, runtime: str) -> None:
    """An ordinary user who just unpacks, with the ids left alone."""
    said = run(rootless_user, runtime, REFUSALS, namespace=False).splitlines()
    assert said == ["refused 1 ['f']", "taken 1 ['f']"]
    for name in ("refused", "taken"):
        shutil.rmtree(rootless_user.home / name)
