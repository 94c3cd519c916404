"""Mounts inside the sandbox, their hostile targets, and the rule that a mount point leaves no trace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.sandbox import rootfs, userns
from builder.sandbox.spec import SandboxMount
from layers import linux
from layers.snapshot import Mount
from layers.snapshotters.overlay import MAX_LOWER
from tests.integration.sandbox.boxes import Box, RootBox, UserBox, make_image
from tests.support.accounts import Account
from tests.support.machine import need_mounts

HOSTS = {"/etc/hosts": b"192.0.2.7 seven\n", "/etc/resolv.conf": b"nameserver 192.0.2.53\n"}


def layer(box: Box, *entries: tuple[str, str | bytes | None]) -> Path:
    """A lower layer: (path, bytes: a file, text: a link, None: a directory)."""
    path = box.directory("layer")[0]
    uid, gid = path.stat().st_uid, path.stat().st_gid
    for name, content in entries:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            target.mkdir(exist_ok=True)
        elif isinstance(content, str):
            target.symlink_to(content)
        else:
            target.write_bytes(content)
    for made in path.rglob("*"):
        os.chown(made, uid, gid, follow_symlinks=False)
    return path


def test_an_image_without_anything_gets_its_mount_points_without_a_trace(box: Box) -> None:
    mounts = (
        SandboxMount("tmpfs", "/var/cache/apt", mode=0o700),
        SandboxMount("file", "/run/secrets/token", b"hush", mode=0o400),
    )
    script = "cat /etc/hosts /etc/resolv.conf /run/secrets/token; stat -c '%a' /var/cache/apt; ls /proc/1 >/dev/null"
    outcome = box.sh(script, files=HOSTS, mounts=mounts)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "192.0.2.7 seven\nnameserver 192.0.2.53\nhush700\n"
    assert box.changes() == []
    assert sorted(path.name for path in box.upper.parent.iterdir()) == ["fs", "work"]


def test_kept_stubs_serve_the_next_run(root_box: RootBox) -> None:
    stubs = root_box.base / "kept"
    for _ in range(2):
        assert root_box.sh("cat /etc/hosts", files=HOSTS, stubs=stubs).out == "192.0.2.7 seven\n"
        assert root_box.changes() == []
    assert len(list(stubs.iterdir())) == 1
    mount = SandboxMount("tmpfs", "/var/cache/../x")
    assert root_box.sh("ls /var/x /x", files=HOSTS, stubs=stubs, mounts=(mount,)).err.count("No such") == 1
    assert len(list(stubs.iterdir())) == 1


def test_writing_beside_a_stub_enters_the_layer_but_the_stub_does_not(box: Box) -> None:
    assert box.sh("echo x > /etc/mine; mkdir /var; echo y > /var/z", files=HOSTS).code == 0
    assert box.changes() == ["etc", "etc/mine", "var", "var/z"]


def test_stub_parents_look_as_the_image_has_them(box: Box) -> None:
    image = layer(box, ("etc/passwd", b""), ("srv/a/b", None))
    os.chmod(image / "srv/a", 0o2751)
    os.utime(image / "srv/a", (1000, 1000))
    os.setxattr(image / "srv/a", "user.kept", b"1")
    mount = SandboxMount("tmpfs", "/srv/a/new/deep")
    script = "stat -c '%a %Y' /srv/a; ls /srv/a; touch /srv/a/file"
    outcome = box.sh(script, root=box.overlay(image, box.lower), mounts=(mount,))
    assert outcome.out == "2751 1000\nb\nnew\n"
    assert box.changes() == ["srv", "srv/a", "srv/a/file"]
    made = box.upper / "srv/a"
    assert made.stat().st_mode & 0o7777 == 0o2751
    assert os.getxattr(made, "user.kept") == b"1"


def test_a_dangling_resolv_conf_link_works(box: Box) -> None:
    image = layer(box, ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"))
    outcome = box.sh("cat /etc/resolv.conf; readlink /etc/resolv.conf", root=box.overlay(image, box.lower), files=HOSTS)
    assert outcome.out == "nameserver 192.0.2.53\n../run/systemd/resolve/stub-resolv.conf\n"
    assert box.changes() == []


def test_a_whiteout_or_opaque_directory_in_the_image_hides_no_mount_point(box: Box) -> None:
    top = layer(box, ("etc", None))
    name = "trusted.overlay.opaque" if box.dialect == "trusted" else "user.overlay.opaque"
    os.setxattr(top / "etc", name, b"y")
    os.mknod(top / "proc", 0o600 | 0o020000, os.makedev(0, 0))
    image = layer(box, ("etc/old", b""), ("proc", None))
    outcome = box.sh("ls /etc; ls /proc/1 >/dev/null", root=box.overlay(top, image, box.lower), files=HOSTS)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "hosts\nresolv.conf\n"
    assert box.changes() == []


def test_an_upper_with_its_own_whiteouts_is_left_as_it_was(box: Box) -> None:
    """A container's second run: what its first one deleted must not hide the mount points, nor come back."""
    image = layer(box, ("etc/hosts", b"old"), ("etc/keep", b""), ("opt/a", b""))
    root = box.overlay(image, box.lower)
    assert box.sh("rm -r /etc/hosts /opt; mkdir /opt", root=root).code == 0
    upper = box.upper
    os.utime(upper / "etc", (1000, 1000))
    before = {path: path.lstat().st_mtime_ns for path in upper.rglob("*")}
    mount = SandboxMount("tmpfs", "/opt/tool")
    outcome = box.sh("cat /etc/hosts; ls /opt", root=root, files=HOSTS, mounts=(mount,))
    assert outcome.out == "192.0.2.7 seven\ntool\n"
    whiteout = (upper / "etc/hosts").lstat()
    assert {path: path.lstat().st_mtime_ns for path in upper.rglob("*")} == before
    assert whiteout.st_rdev == 0 and not whiteout.st_size
    assert box.sh("ls /etc", root=root).out == "keep\n"


def test_a_bound_root_is_left_as_it_was(box: Box) -> None:
    image = layer(box, *((f"bin/{name}", "busybox") for name in ("sh", "cat", "echo")), ("etc/passwd", b""))
    (image / "bin/busybox").write_bytes((box.lower / "bin/busybox").read_bytes())
    (image / "bin/busybox").chmod(0o755)
    for path in (image, image / "etc"):
        os.utime(path, (1000, 1000))
    before = {str(p.relative_to(image)): p.lstat().st_mtime_ns for p in [image, *image.rglob("*")]}
    outcome = box.sh("cat /etc/hosts", root=Mount("bind", (image,)), files=HOSTS)
    assert outcome.out == "192.0.2.7 seven\n"
    assert {str(p.relative_to(image)): p.lstat().st_mtime_ns for p in [image, *image.rglob("*")]} == before


def test_what_the_command_did_to_a_bound_root_stays(box: Box) -> None:
    image = layer(box, *((f"bin/{name}", "busybox") for name in ("sh", "echo")), ("etc/passwd", b""))
    (image / "bin/busybox").write_bytes((box.lower / "bin/busybox").read_bytes())
    (image / "bin/busybox").chmod(0o755)
    os.utime(image / "etc", (1000, 1000))
    assert box.sh("echo x > /etc/mine", root=Mount("bind", (image,)), files=HOSTS).code == 0
    assert sorted(os.listdir(image / "etc")) == ["mine", "passwd"]
    assert (image / "etc").stat().st_mtime > 1000


@pytest.mark.parametrize(
    "target", ["/../../../../etc/pybuild-escape", "/link/pybuild-escape", "/etc/abs/pybuild-escape"]
)
@pytest.mark.parametrize("kind", ["tmpfs", "file"])
def test_hostile_targets_stay_inside(box: Box, target: str, kind: str) -> None:
    image = layer(box, ("link", "../../../../../../etc"), ("etc/abs", "/../../var/tmp"), ("var/tmp", None))
    mount = SandboxMount(kind, target, b"x" if kind == "file" else None)  # type: ignore[arg-type]
    outcome = box.sh("find / -name pybuild-escape -xdev", root=box.overlay(image, box.lower), mounts=(mount,))
    assert outcome.code == 0, outcome
    assert outcome.out.strip() in {"/etc/pybuild-escape", "/var/tmp/pybuild-escape"}
    for place in ("/etc", "/var/tmp", "/"):
        assert not os.path.lexists(f"{place}/pybuild-escape")
    assert box.changes() == []


def test_a_link_loop_is_an_error_that_names_it(box: Box) -> None:
    image = layer(box, ("a", "b"), ("b", "a"))
    outcome = box.sh("true", root=box.overlay(image, box.lower), mounts=(SandboxMount("tmpfs", "/a/x"),))
    assert outcome.error is not None
    message, operation, number, path = outcome.error
    assert operation == "root" and path and "/a" in message and number == 40


def test_binds_are_read_only_when_asked_and_never_show_devices(box: Box) -> None:
    source = layer(box, ("file", b"content"), ("sub/other", b"o"))
    mounts = (
        SandboxMount("bind", "/ro", source, readonly=True),
        SandboxMount("bind", "/rw", source),
        SandboxMount("bind", "/one", source / "file", is_file=True),
        SandboxMount("bind", "/absent", source / "nothing", optional=True),
    )
    script = "cat /ro/file /one; echo >/rw/new && echo ok; echo > /ro/x || echo refused; ls -d /absent"
    outcome = box.sh(script, mounts=mounts)
    assert "contentcontentok\nrefused\n" in outcome.out
    assert "/absent" not in outcome.out
    assert (source / "new").exists()
    assert box.changes() == []


def test_a_part_of_another_tree(box: Box) -> None:
    one = layer(box, ("a/b/file", b"1"), ("a/link", "/a/b"))
    two = layer(box, ("a/b/file", b"2"), ("a/c", b""))
    upper = box.overlay(one, two)
    changes = box.upper
    mounts = (
        SandboxMount("tree", "/t", Mount("overlay", (one, two), None, None, True, box.dialect), subpath="a/link"),
        SandboxMount("tree", "/w", upper, subpath="/a"),
        SandboxMount("tree", "/f", Mount("bind", (two,)), subpath="../../a/b/file", is_file=True, readonly=True),
    )
    outcome = box.sh("cat /t/file /f; ls /w; echo > /w/new; echo > /f || echo refused", mounts=mounts)
    assert outcome.out == "12b\nc\nlink\nrefused\n"
    assert sorted(str(p.relative_to(changes)) for p in changes.rglob("*")) == ["a", "a/new"]


def test_a_bind_without_its_source_is_an_error(box: Box) -> None:
    outcome = box.sh("true", mounts=(SandboxMount("bind", "/x", Path("/no/such/source")),))
    assert outcome.error is not None
    assert outcome.error[1] == "mount"
    assert "/no/such/source" in outcome.error[0]


def test_a_read_only_root(box: Box) -> None:
    outcome = box.sh("echo > /x || echo refused; echo > /dev/shm/x && echo ok", readonly_root=True)
    assert outcome.out == "refused\nok\n"


def test_added_hosts(box: Box) -> None:
    outcome = box.sh("cat /etc/hosts", files=HOSTS, add_hosts=(("db", "192.0.2.9"),))
    assert outcome.out == "192.0.2.7 seven\n192.0.2.9\tdb\n"


UNIFIED = 'test -e /sys/fs/cgroup/cgroup.controllers || mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'


@pytest.mark.parametrize("mode", ["subordinate", "single"])
@pytest.mark.parametrize("network", ["host", "none"])
def test_unified_control_groups_of_an_ordinary_user(
    workplace: Path, rootless_user: Account, mode: str, network: str
) -> None:
    """Where /sys/fs/cgroup is cgroup v2, as on most machines: the sandbox's own view of it, read-only."""
    need_mounts()
    make_image(workplace / "lower")
    for path in [workplace, *workplace.rglob("*")]:
        os.chown(path, rootless_user.uid, rootless_user.gid, follow_symlinks=False)
    box = UserBox(workplace, rootless_user, mode, ["unshare", "--mount", "sh", "-c", UNIFIED, "sh"])
    script = "grep ' /sys/fs/cgroup ' /proc/self/mountinfo | tail -n 1; test -e /sys/fs/cgroup/cgroup.procs; echo $?"
    found = box.sh(f"{script}; mkdir /sys/fs/cgroup/x", network=network)
    box.close()
    mount, status = found.out.splitlines()
    assert " - cgroup2 " in mount and mount.split()[5].startswith("ro,") and status == "0", found
    assert found.error is None and "Read-only" in found.err


def test_many_layers_by_the_old_mount_call(root_box: RootBox) -> None:
    """What kernels before 6.5 need for more than ten layers; in a child with a mount namespace of its own."""
    layers = [str(layer(root_box, (f"n{number}", b""))) for number in range(400)]
    snapshot = root_box.overlay()
    assert snapshot.upper and snapshot.work

    def attempt() -> str | None:
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
        home = os.getcwd()
        tree = rootfs.overlay_by_mount(layers, str(snapshot.upper), str(snapshot.work), False)
        assert os.getcwd() == home
        names = os.listdir(f"/proc/self/fd/{tree}")
        os.close(os.open("written", os.O_CREAT | os.O_WRONLY, dir_fd=tree))
        return None if len(names) == 400 else f"{len(names)} names"

    assert userns.in_child(attempt) is None
    assert root_box.changes() == ["written"]


def test_five_hundred_layers(root_box: RootBox) -> None:
    layers = [layer(root_box, (f"n{number}", b"")) for number in range(498)]
    outcome = root_box.sh("ls / | wc -l", root=root_box.overlay(*layers, root_box.lower))
    assert outcome.code == 0, outcome
    assert int(outcome.out) > 498


def test_as_many_layers_as_the_kernel_stacks(box: Box) -> None:
    """As many as a snapshot has at most; mount points that the image lacks need room as well."""
    layers = [box.directory("layer")[0] for _ in range(MAX_LOWER - 1)]
    outcome = box.sh("echo x > /made; ls / | wc -l; cat /etc/hosts", root=box.overlay(*layers, box.lower),
                     files={"/etc/hosts": b"hosts\n"})  # fmt: skip
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("hosts\n")
    assert box.changes() == ["made"]
