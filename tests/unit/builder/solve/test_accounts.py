"""Users and groups of an image, as `--chown` and `USER` understand them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.errors import ContextError
from builder.solve.accounts import ResolvedUser, resolve_owner, resolve_user

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment
daemon:x:1:2:daemon:/usr/sbin:/usr/sbin/nologin

app:x:1000:1001::/home/app:/bin/sh
twin:x:1000:5::/home/twin:/bin/sh
nohome:x:7:7
broken
many::8:x8:::
big:x:4294967290:1::/:
12:x:3000:3000::/twelve:
"""
GROUP = """\
root:x:0:root
bin:x:1:root,daemon
staff:x:50:app
app:x:1001:
extra:x:60:other,app,app
big:x:4294967290:
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("owner", "wanted"),
    [
        ("5", (5, 5)),
        ("5:6", (5, 6)),
        ("root", (0, 0)),
        ("root:5", (0, 5)),
        ("app", (1000, 1001)),
        ("app:staff", (1000, 50)),
        ("app:9", (1000, 9)),
        ("9:app", (9, 1001)),
        (":staff", (0, 50)),
        ("1000", (1000, 1000)),
        ("4294967290", (4294967290, 4294967290)),
        ("12", (12, 12)),
        ("nohome", (7, 7)),
        ("many", (8, 0)),
    ],
)
def test_owner(root: int, owner: str, wanted: tuple[int, int]) -> None:
    told: list[str] = []
    assert resolve_owner(root, owner, warn=told.append) == wanted
    assert told == []


def test_unknown_names_count_as_root_but_not_silently(root: int) -> None:
    told: list[str] = []
    assert resolve_owner(root, "nobody:nogroup", warn=told.append) == (0, 0)
    assert ["nobody" in told[0], "nogroup" in told[1]] == [True, True]
    assert resolve_owner(root, "app:nogroup") == (1000, 1001)


@pytest.mark.parametrize("owner", ["4294967295", "99999999999", "1:4294967295"])
def test_numbers_out_of_range(root: int, owner: str) -> None:
    with pytest.raises(ContextError, match="is not a user or group id"):
        resolve_owner(root, owner)


def test_an_empty_image_knows_numbers_only(tmp_path: Path) -> None:
    assert resolve_owner(None, "5:6") == (5, 6)
    assert resolve_owner(None, "root") == (0, 0)
    with pytest.raises(ContextError, match="empty image"):
        resolve_owner(None, "app")
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert resolve_owner(fd, "app:app") == (0, 0)
        assert resolve_user(fd, "") == ResolvedUser(0, 0, (0,), "/", "")
        assert resolve_user(fd, "5") == ResolvedUser(5, 0, (0,), "/", "")
        assert resolve_user(fd, "root:root") == ResolvedUser(0, 0, (0,), "/", "")
        with pytest.raises(ContextError, match="unable to find user root"):
            resolve_user(fd, "root")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("user", "wanted"),
    [
        ("", (0, 0, (0, 1), "/root", "root")),
        ("root", (0, 0, (0, 1), "/root", "root")),
        ("0", (0, 0, (0, 1), "/root", "root")),
        ("app", (1000, 1001, (1001, 50, 60), "/home/app", "app")),
        ("1000", (1000, 1001, (1001, 50, 60), "/home/app", "app")),
        ("app:staff", (1000, 50, (50,), "/home/app", "app")),
        ("app:60", (1000, 60, (60,), "/home/app", "app")),
        ("1000:77", (1000, 77, (77,), "/home/app", "app")),
        ("app:77", (1000, 77, (77,), "/home/app", "app")),
        ("555", (555, 0, (0,), "/", "")),
        ("555:staff", (555, 50, (50,), "/", "")),
        ("daemon", (1, 2, (2, 1), "/usr/sbin", "daemon")),
        ("nohome", (7, 7, (7,), "/", "nohome")),
        ("12", (12, 0, (0,), "/", "")),
        (":staff", (0, 50, (50,), "/root", "root")),
    ],
)
def test_user(root: int, user: str, wanted: tuple[object, ...]) -> None:
    assert tuple(resolve_user(root, user)) == wanted


@pytest.mark.parametrize(
    ("user", "complaint"),
    [
        ("nobody", "unable to find user nobody: no matching entries in passwd file"),
        ("app:nogroup", "unable to find group nogroup: no matching entries in group file"),
        ("2147483648", "in range"),
        ("-1", "in range"),
        ("app:99999999999", "in range"),
        ("big", "in range"),
        ("app:big", "in range"),
    ],
)
def test_user_refused(root: int, user: str, complaint: str) -> None:
    with pytest.raises(ContextError, match=complaint):
        resolve_user(root, user)


def test_files_are_read_inside_the_image(tmp_path: Path) -> None:
    """An absolute symlink of the image is one of the image; a fifo in the file's place does not hang the build."""
    image = tmp_path / "image"
    (image / "usr/lib").mkdir(parents=True)
    (image / "etc").mkdir()
    (image / "usr/lib/passwd").write_text("inner:x:5:5::/in:\n")
    (image / "etc/passwd").symlink_to("/usr/lib/passwd")
    (image / "etc/group").symlink_to("../../../../../../etc/none")
    fd = os.open(image, os.O_PATH)
    try:
        assert resolve_user(fd, "inner").uid == 5
        (image / "etc/passwd").unlink()
        os.mkfifo(image / "etc/passwd")
        assert resolve_owner(fd, "inner:root") == (0, 0)
        (image / "etc/passwd").unlink()
        (image / "etc/passwd").mkdir()
        with pytest.raises(ContextError, match="etc/passwd"):
            resolve_user(fd, "inner")
    finally:
        os.close(fd)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    with (tmp_path / "etc/passwd").open("wb") as file:
        file.truncate(1 << 30)
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(ContextError, match="larger than 16 MiB"):
            resolve_user(fd, "app")
    finally:
        os.close(fd)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(passwd=st.binary(max_size=200), user=st.text(max_size=10))
def test_no_file_makes_it_stumble(tmp_path_factory: pytest.TempPathFactory, passwd: bytes, user: str) -> None:
    top = tmp_path_factory.mktemp("any")
    (top / "etc").mkdir()
    (top / "etc/passwd").write_bytes(passwd)
    (top / "etc/group").write_bytes(passwd[::-1])
    fd = os.open(top, os.O_PATH)
    try:
        for resolve in (resolve_owner, resolve_user):
            try:
                resolve(fd, user)
            except ContextError:
                pass
    finally:
        os.close(fd)
