"""Trees removed and copied, hostile ones included."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from layers.trees import copy_tree, disk_usage, remove_tree


def nest(top: Path, levels: int, name: str = "d") -> None:
    """Directories nested deeper than a path can say."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    fd = os.open(source, os.O_PATH)
    try:
        copy_tree(fd, str(target))
    finally:
        os.close(fd)


class TestRemove:
    def test_anything(self, tmp_path: Path) -> None:
        tree = tmp_path / "tree"
        (tree / "a/b/c").mkdir(parents=True)
        (tree / "a/file").write_text("x")
        (tree / "a/dangling").symlink_to("nowhere")
        os.mkfifo(tree / "a/b/fifo")
        (tree / "a/b/c/x").touch()
        os.close(os.open(os.fsencode(tree) + b"/\xff\n", os.O_CREAT | os.O_WRONLY))
        remove_tree(f"{tree}")
        assert os.listdir(tmp_path) == []

    def test_what_is_not_there_or_no_directory(self, tmp_path: Path) -> None:
        remove_tree(f"{tmp_path}/absent")
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path)
        remove_tree(f"{tmp_path}/file")
        remove_tree(f"{tmp_path}/link")
        assert os.listdir(tmp_path) == []

    def test_symlinks_are_not_followed(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "precious").touch()
        tree = tmp_path / "tree"
        tree.mkdir()
        (tree / "to_dir").symlink_to(victim)
        (tree / "to_file").symlink_to(victim / "precious")
        remove_tree(f"{tree}")
        assert os.listdir(victim) == ["precious"]
        assert os.listdir(tmp_path) == ["victim"]

    @pytest.mark.parametrize("levels", [63, 64, 65, 200, 3000])
    def test_depth(self, tmp_path: Path, levels: int) -> None:
        tree = tmp_path / "tree"
        tree.mkdir()
        nest(tree, levels)
        nest(tree, levels, "e" * 200)
        remove_tree(f"{tree}")
        assert not tree.exists()

    def test_width(self, tmp_path: Path) -> None:
        tree = tmp_path / "tree"
        tree.mkdir()
        for i in range(5000):
            (tree / f"f{i}").touch()
        for i in range(300):
            (tree / f"d{i}").mkdir()
        remove_tree(f"{tree}")
        assert not tree.exists()

    def test_directories_without_permissions(self, tmp_path: Path) -> None:
        """Also as an ordinary user, to whom modes matter."""
        tree = tmp_path / "tree"
        (tree / "locked/inner").mkdir(parents=True)
        (tree / "locked/inner/file").touch()
        (tree / "locked/inner").chmod(0)
        (tree / "locked").chmod(0o500)
        if os.geteuid() != 0:
            remove_tree(f"{tree}")
        else:
            tmp_path.chmod(0o777)
            for path in (tmp_path, tree, tree / "locked", tree / "locked/inner", tree / "locked/inner/file"):
                os.chown(path, 12345, 12345)
            for path in tmp_path.parents:  # pytest's directories are private to root
                if path.stat().st_mode & 0o001 == 0:
                    path.chmod(path.stat().st_mode | 0o011)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.setgid(12345)
                    os.setuid(12345)
                    remove_tree(f"{tree}")
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
        assert not tree.exists()

    def test_immutable_files(self, tmp_path: Path) -> None:
        import array
        import fcntl

        tree = tmp_path / "tree"
        (tree / "d").mkdir(parents=True)
        (tree / "d/f").touch()
        frozen = array.array("l", [0x10])
        for path in (tree / "d/f", tree / "d"):
            fd = os.open(path, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, 0x40086602, frozen)
            except OSError as e:
                pytest.skip(f"needs a file system with the immutable flag, and the right to set it ({e.strerror})")
            finally:
                os.close(fd)
        with pytest.raises(PermissionError):
            (tree / "d/f").unlink()
        remove_tree(f"{tree}")
        assert not tree.exists()


class TestCopy:
    def test_metadata(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        (source / "dir").mkdir(parents=True)
        (source / "dir/file").write_bytes(b"data")
        (source / "dir/file").chmod(0o4751)
        os.link(source / "dir/file", source / "hard")
        (source / "link").symlink_to("dir/file")
        os.mkfifo(source / "fifo", 0o640)
        os.setxattr(source / "dir/file", "user.note", b"\0value")
        os.setxattr(source / "dir", "user.overlay.opaque", b"y")
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{source}/socket")
        server.close()
        for path in ("dir/file", "link", "fifo", "dir", "."):
            os.utime(source / path, ns=(1, 1_234_567_891), follow_symlinks=False)
        (source / "dir").chmod(0o2711)
        target = tmp_path / "target"
        copy(source, target)
        assert sorted(os.listdir(target)) == ["dir", "fifo", "hard", "link"]
        assert os.path.samefile(target / "hard", target / "dir/file")
        assert os.readlink(target / "link") == "dir/file"
        assert os.listxattr(target / "dir") == []
        assert os.getxattr(target / "dir/file", "user.note") == b"\0value"
        for path in ("dir/file", "link", "fifo", "dir", "."):
            old, new = os.lstat(source / path), os.lstat(target / path)
            assert (old.st_mode, old.st_mtime_ns, old.st_uid) == (new.st_mode, new.st_mtime_ns, new.st_uid), path
        assert (target / "dir/file").read_bytes() == b"data"

    def test_depth(self, tmp_path: Path) -> None:
        """Deeper than descriptors, recursion and paths reach; with links to down there."""
        source = tmp_path / "source"
        source.mkdir()
        nest(source, 2500)
        fd = os.open(source, os.O_RDONLY)
        for _ in range(2500):
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.link("leaf", "other", src_dir_fd=fd, dst_dir_fd=fd)
        os.close(fd)
        copy(source, tmp_path / "target")
        assert disk_usage(f"{tmp_path / 'target'}") == disk_usage(f"{source}") >= 2500 * 4096
        for tree in ("source", "target"):
            remove_tree(f"{tmp_path / tree}")

    def test_holes_stay_holes(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        with (source / "sparse").open("wb") as f:
            f.seek(1 << 20)
            f.write(b"middle")
            f.truncate(8 << 20)
        with (source / "hole").open("wb") as f:
            f.truncate(1 << 20)
        copy(source, tmp_path / "target")
        for name in ("sparse", "hole"):
            assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
            assert (tmp_path / "target" / name).stat().st_blocks <= (source / name).stat().st_blocks

    def test_absolute_symlinks_are_not_followed(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "etc").symlink_to("/etc")
        copy(source, tmp_path / "target")
        assert os.readlink(tmp_path / "target/etc") == "/etc"

    @pytest.mark.root
    def test_owners_and_devices(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        source = tmp_path / "source"
        source.mkdir()
        (source / "file").touch()
        os.chown(source / "file", 1234, 4321)
        os.chmod(source / "file", 0o6755)
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        copy(source, tmp_path / "target")
        found = (tmp_path / "target/file").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o6755)
        assert (tmp_path / "target/null").stat().st_rdev == os.makedev(1, 3)


def test_disk_usage_counts_an_inode_once(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d/f").write_bytes(b"x" * 100_000)
    os.link(tree / "d/f", tree / "g")
    expected = sum(os.lstat(p).st_blocks for p in (tree, tree / "d", tree / "d/f")) * 512
    assert disk_usage(f"{tree}") == expected
    assert disk_usage(f"{tmp_path}/absent") == 0
