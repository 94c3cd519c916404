"""A spec as a list of operations, and the resolving of hostile paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from builder.sandbox import rootfs
from builder.sandbox.operations import Host, capability_mask, operations
from builder.sandbox.setup import OPERATIONS
from builder.sandbox.spec import SandboxMount, SandboxSpec
from layers.snapshot import Mount

ROOT = Mount("overlay", (Path("/l1"), Path("/l0")), Path("/s/fs"), Path("/s/work"))


def names(spec: SandboxSpec) -> list[str]:
    return [operation[0] for operation in operations(spec)]


def test_operations_are_json_that_setup_knows() -> None:
    spec = SandboxSpec(
        args=("true",),
        root=ROOT,
        network="none",
        files={"/etc/hosts": b"x"},
        mounts=(SandboxMount("tree", "/t", ROOT, subpath="a"), SandboxMount("bind", "/b", Path("/src"))),
        readonly_root=True,
    )
    made = operations(spec, Host(seccomp=3))
    assert json.loads(json.dumps(made)) == made
    assert {operation[0] for operation in made} <= set(OPERATIONS)


def test_the_order_is_what_security_needs() -> None:
    spec = SandboxSpec(args=("true",), root=ROOT)
    order = ["keyring", "stage", "dev", "mask", "readonly", "root", "place", "enter", "limits"]
    assert [name for name in names(spec) if name in order] == order
    assert names(spec)[-3:] == ["workdir", "identity", "cwd"]
    assert [name for name, _ in operations(spec, Host(single=True))][-3:] == ["identity", "workdir", "cwd"]


def test_devices_are_asked_for_where_they_may_be_made() -> None:
    spec, host = SandboxSpec(args=("true",), root=ROOT), Host(nodes=4)
    found = operations(spec, host)
    step = found.index(["nodes", {"program": 4}])
    assert [name for name, _ in found].index("enter") < step < [name for name, _ in found].index("identity")
    without = SandboxSpec(args=("true",), root=ROOT, capabilities=spec.capabilities - {"CAP_MKNOD"})
    assert "nodes" not in [name for name, _ in (*operations(without, host), *operations(spec, Host()))]


def test_privilege_drops_masks_not_isolation() -> None:
    found = names(SandboxSpec(args=("true",), root=ROOT, privileged=True))
    assert "mask" not in found and "readonly" not in found
    assert {"keyring", "root", "enter", "identity"} <= set(found)


def test_secrets_stay_out_of_descriptions() -> None:
    spec = SandboxSpec(args=("true",), root=ROOT, mounts=(SandboxMount("file", "/run/secrets/x", b"hush hush"),))
    text = spec.describe()
    assert "/run/secrets/x" in text
    assert "aHVzaCBodXNo" not in text and "hush hush" not in text
    assert "hush" not in repr(spec.mounts[0])


def test_optional_sources_that_are_missing_leave_no_mount_point(tmp_path: Path) -> None:
    mount = SandboxMount("bind", "/x", tmp_path / "none", optional=True)
    spec = SandboxSpec(args=("true",), root=ROOT, mounts=(mount,), files={"/etc/y": tmp_path / "none"})
    root = next(arguments for name, arguments in operations(spec) if name == "root")
    assert root["targets"] == [["/proc", False], ["/sys", False], ["/dev", False]]


def test_unknown_capabilities_are_refused() -> None:
    assert capability_mask(frozenset({"CAP_CHOWN", "kill"})) == 1 | 1 << 5
    with pytest.raises(KeyError):
        capability_mask(frozenset({"CAP_MAGIC"}))


@pytest.mark.parametrize(
    ("path", "expected", "exists"),
    [
        ("/a/b/file", ["a", "b", "file"], True),
        ("/a/./b/../b//file", ["a", "b", "file"], True),
        ("../../../a", ["a"], True),
        ("/abs/file", ["a", "b", "file"], True),
        ("/up/file", ["a", "b", "file"], True),
        ("/up/none/../new", ["a", "b", "new"], False),
        ("/dangling/x", ["run", "nowhere", "x"], False),
        ("/out/passwd", ["etc", "passwd"], False),
    ],
)
def test_walking_stays_inside(tmp_path: Path, path: str, expected: list[str], exists: bool) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    (tmp_path / "abs").symlink_to("/a/b")
    (tmp_path / "up").symlink_to("../../../a/b")
    (tmp_path / "dangling").symlink_to("/run/nowhere")
    (tmp_path / "out").symlink_to("../../../../../../etc")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        assert rootfs.walk(fd, path) == (expected, exists)
    finally:
        os.close(fd)


def test_walking_a_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            rootfs.walk(fd, "/a/x")
    finally:
        os.close(fd)


def test_undo_follows_no_link(tmp_path: Path) -> None:
    """What ran in the sandbox may have put a link where a parent was."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stub").touch()
    base = tmp_path / "base"
    base.mkdir()
    (base / "etc").symlink_to(outside)
    inode = (outside / "stub").stat().st_ino
    rootfs.undo([{"base": str(base), "made": [["etc/stub", inode, None]], "parents": [["etc", None, 0]]}])
    assert (outside / "stub").exists()
