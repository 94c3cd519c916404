"""COPY, ADD and WORKDIR through whole builds, as root and as an ordinary user: what the layers say in the end.

The rules themselves are tested in tests/unit/builder/solve; here they meet overlay mounts, stages,
user namespaces and the writing of layers. No test needs a base image.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.cli import Pybuild, write_context

KINDS = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink"}


class Node(NamedTuple):
    """What a path is in the flattened image. `value` is a file's text, or a link's target."""

    kind: str
    mode: int
    uid: int
    gid: int
    value: str


class Builder:
    """Builds a Containerfile over some files, and flattens the image's layers."""

    def __init__(self, pybuild: Pybuild, place: Path) -> None:
        self.pybuild = pybuild
        self.place = place
        self.context = place / "context"
        self.builds = 0

    def write(self, containerfile: str, files: dict[str, str | bytes] | None = None) -> None:
        write_context(self.context, containerfile, files)

    def build(self, *arguments: str) -> dict[str, Node]:
        self.builds += 1
        self._hand_over()
        name = f"copied:{self.builds}"
        self.pybuild.build(self.context, "-t", name, *arguments)
        layout = self.place / f"layout-{self.builds}"
        self.pybuild.run("push", name, f"oci:{layout}:t")
        return flatten(layout)

    def fails(self, *arguments: str) -> str:
        self._hand_over()
        result = self.pybuild.build(self.context, *arguments, check=False)
        assert result.status != 0
        return result.stderr

    def _hand_over(self) -> None:
        if self.pybuild.account is not None:
            for path in (self.context, *self.context.rglob("*")):
                os.chown(path, self.pybuild.account.uid, self.pybuild.account.gid, follow_symlinks=False)


def flatten(layout: Path) -> dict[str, Node]:
    def blob(digest: str) -> bytes:
        return (layout / "blobs" / digest.replace(":", "/")).read_bytes()

    manifest = json.loads(blob(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]))
    found: dict[str, Node] = {}
    for layer in manifest["layers"]:
        with tarfile.open(fileobj=io.BytesIO(blob(layer["digest"]))) as tar:
            for info in tar:
                name = info.name.strip("/")
                assert ".wh." not in name, "no test here removes anything"
                value = info.linkname
                if info.isreg():
                    file = tar.extractfile(info)
                    value = file.read().decode(errors="replace") if file else ""
                kind = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink"}.get(
                    info.type, "link"
                )
                if kind == "link":
                    found[name] = found[value.strip("/")]._replace(kind="link")
                else:
                    found[name] = Node(kind, info.mode, info.uid, info.gid, value if kind != "dir" else "")
    found.pop("", None)
    found.pop(".", None)
    return found


@pytest.fixture
def builder(pybuild_each: Pybuild, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Builder]:
    place = tmp_path
    if pybuild_each.account is not None:
        place = pybuild_each.account.home / f"place-{request.node.name.partition('[')[0][:40]}"
        place.mkdir()
        shutil.chown(place, pybuild_each.account.uid, pybuild_each.account.gid)
    yield Builder(pybuild_each, place)
    if pybuild_each.account is not None:
        shutil.rmtree(place)


def test_owners_and_modes(builder: Builder) -> None:
    builder.write(
        "FROM scratch\n"
        "COPY d /plain/\n"
        "COPY --chown=1000:2000 d /owned/deep/\n"
        "COPY --chmod=u=rwX,go= d /closed/\n"
        "COPY --chown=5 --chmod=4755 d/run /bin/run\n"
        "WORKDIR /srv/dir\n"
        "COPY d/f .\n",
        {"d/f": "text", "d/run": "#!", "d/s/g": "inner"},
    )
    (builder.context / "d/run").chmod(0o750)
    (builder.context / "d/f").chmod(0o640)
    (builder.context / "d/s").chmod(0o2770)
    image = builder.build()
    assert image["plain"] == Node("dir", 0o755, 0, 0, "")
    assert image["plain/f"] == Node("file", 0o640, 0, 0, "text")
    assert image["plain/run"].mode == 0o750
    assert image["plain/s"] == Node("dir", 0o2770, 0, 0, "")
    assert {image[p][2:4] for p in image if p.startswith("owned")} == {(1000, 2000)}
    modes = {p: oct(image[f"closed/{p}"].mode) for p in ("f", "run", "s", "s/g")}
    assert modes == {"f": "0o600", "run": "0o700", "s": "0o700", "s/g": "0o600"}
    assert image["closed"].mode == 0o755
    assert image["bin/run"] == Node("file", 0o4755, 5, 5, "#!")
    assert image["srv/dir"] == Node("dir", 0o755, 0, 0, "")
    assert image["srv/dir/f"].value == "text"


def test_names_of_users_are_the_images(builder: Builder) -> None:
    builder.write(
        "FROM scratch\n"
        "COPY etc /etc/\n"
        "COPY --chown=app:staff f /a\n"
        "COPY --chown=app f /b\n"
        "COPY --chown=nobody f /c\n"
        "USER app\n"
        "WORKDIR /home/app\n"
        "COPY f .\n",
        {"f": "1", "etc/passwd": "app:x:1234:77::/home/app:\n", "etc/group": "staff:x:88:\n"},
    )
    image = builder.build()
    assert [image[p][2:4] for p in ("a", "b", "c")] == [(1234, 88), (1234, 77), (0, 0)]
    assert image["home/app"][2:4] == (1234, 77)
    assert image["home/app/f"][2:4] == (0, 0)


def test_between_stages(builder: Builder) -> None:
    """Owners stay, symlinks are followed at the top only, hard links hold together."""
    builder.write(
        "FROM scratch AS one\n"
        "COPY --chown=7:8 d /d/\n"
        "FROM scratch AS two\n"
        "COPY --from=one /d /copy/\n"
        "COPY --from=one /d/l /followed\n"
        "COPY --from=0 /d/* /flat/\n"
        "COPY --from=one --chown=9:9 /d/f /mine\n",
        {"d/f": "text", "d/s/g": "inner"},
    )
    (builder.context / "d/l").symlink_to("f")
    (builder.context / "d/h").hardlink_to(builder.context / "d/f")
    image = builder.build()
    assert image["copy/f"][2:] == (7, 8, "text")
    assert {image["copy/f"].kind, image["copy/h"].kind} == {"file", "link"}
    assert image["copy/l"] == Node("symlink", 0o777, 7, 8, "f")
    assert image["followed"] == Node("file", 0o644, 7, 8, "text")
    assert sorted(p for p in image if p.startswith("flat/")) == ["flat/f", "flat/g", "flat/h", "flat/l"]
    assert image["flat/l"].kind == "file"
    assert image["mine"][2:4] == (9, 9)


def test_over_what_an_earlier_layer_holds(builder: Builder) -> None:
    builder.write(
        "FROM scratch\nCOPY base /\nCOPY f /to-dir/\nCOPY f /to-file\nCOPY over /\n",
        {"base/dir/kept": "kept", "base/file": "old", "base/merge/a": "a", "f": "new", "over/merge/b": "b"},
    )
    (builder.context / "base/to-dir").symlink_to("dir")
    (builder.context / "base/to-file").symlink_to("/file")
    (builder.context / "over/merge").chmod(0o700)
    image = builder.build()
    assert image["dir/f"].value == image["file"].value == "new"
    assert image["dir/kept"].value == "kept"
    assert image["to-dir"].kind == image["to-file"].kind == "symlink"
    assert {p for p in image if p.startswith("merge/")} == {"merge/a", "merge/b"}
    assert image["merge"].mode == 0o700


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("COPY none /x", '"/none": not found'),
        ("COPY f /dir/", "cannot replace to directory /dir/f with file"),
        ("COPY over /", "cannot copy to non-directory: /file"),
        ("COPY ignored /x", '"/ignored": not found'),
        ("COPY outside /x", "not found"),
        ("COPY --from=base /none /x", '"/none": not found'),
        ("ADD bad.tar /x/", "outside of the directory"),
    ],
)
def test_refused(builder: Builder, line: str, complaint: str) -> None:
    builder.write(
        f"FROM scratch AS base\nCOPY base /\nFROM base\n{line}\n",
        {"f": "1", "base/dir/f/g": "", "base/file": "", "over/file/x": "", "ignored": "", ".dockerignore": "ignored\n"},
    )
    (builder.context / "outside").symlink_to("/etc/hostname")
    with tarfile.open(builder.context / "bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    stderr = builder.fails("-t", "never:1")
    assert complaint in stderr
    assert not (builder.place / "escaped").exists()


def test_parents_and_excludes(builder: Builder) -> None:
    builder.write(
        "FROM scratch\n"
        "COPY --parents a/b/c.go a/*/d.md /all/\n"
        "COPY --parents ./a/./b/*.go /pivot/\n"
        "COPY --exclude=**/*.md --exclude=a/z . /some/\n",
        {
            "a/b/c.go": "c",
            "a/b/d.md": "d",
            "a/z/d.md": "z",
            "top.md": "",
            ".dockerignore": "Containerfile\n.dockerignore\n",
        },
    )
    image = builder.build()
    files = sorted(p for p, node in image.items() if node.kind == "file")
    assert files == ["all/a/b/c.go", "all/a/b/d.md", "all/a/z/d.md", "pivot/b/c.go", "some/a/b/c.go"]
    assert "some/a/z" not in image


def test_archives(builder: Builder) -> None:
    builder.write(
        "FROM scratch\nADD t.tar.gz /x/\nADD --chown=3:4 t.tar.gz /y/\n"
        "COPY t.tar.gz /z/\nADD --unpack=false t.tar.gz /n/\n"
    )
    with tarfile.open(builder.context / "t.tar.gz", "w:gz") as tar:
        for name, uid, mode in (("d", 5, 0o1777), ("d/f", 1000, 0o4711)):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name == "d" else tarfile.REGTYPE
            info.uid, info.gid, info.mode = uid, uid + 1, mode
            tar.addfile(info, io.BytesIO())
    image = builder.build()
    assert image["x/d"][:4] == ("dir", 0o1777, 5, 6)
    assert image["x/d/f"][:4] == ("file", 0o4711, 1000, 1001)
    assert {image[p][2:4] for p in ("y", "y/d", "y/d/f")} == {(3, 4)}
    assert image["z/t.tar.gz"].kind == image["n/t.tar.gz"].kind == "file"


def test_inline_documents(builder: Builder) -> None:
    builder.write(
        "FROM scratch\nCOPY --chmod=755 --chown=5:6 <<one <<two /docs/\n1\none\n2\ntwo\nCOPY <<EOF /named\ntext\nEOF\n"
    )
    image = builder.build()
    assert image["docs/one"] == Node("file", 0o755, 5, 6, "1\n")
    assert image["docs/two"].value == "2\n"
    assert image["docs"][:4] == ("dir", 0o755, 5, 6)
    assert image["named"] == Node("file", 0o644, 0, 0, "text\n")


def test_link_takes_the_place_of_what_is_there(builder: Builder) -> None:
    builder.write(
        "FROM scratch\nCOPY base /\nCOPY --link over /\n",
        {"base/file": "old", "over/file/inner": "new", "over/dir": "a file"},
    )
    (builder.context / "base/sym").symlink_to("file")
    write_context(builder.context, (builder.context / "Containerfile").read_text(), {"over/sym/x": "x"})
    image = builder.build()
    assert image["file/inner"].value == "new"
    assert image["sym/x"].value == "x"
    assert image["file"].kind == image["sym"].kind == "dir"


def test_the_cache_goes_by_content_not_by_time(builder: Builder) -> None:
    builder.write("FROM scratch\nCOPY d /d/\nCOPY *.md /m/\n", {"d/f": "1", "d/g": "2", "a.md": "a"})

    def cached() -> int:
        builder._hand_over()
        return builder.pybuild.build(builder.context, "-t", "c:1", "--progress=plain").stderr.count("CACHED")

    assert cached() == 0
    (builder.context / "d/f").write_text("1")
    (builder.context / "unrelated").write_text("x")
    assert cached() == 2
    (builder.context / "b.md").write_text("b")
    assert cached() == 1
    (builder.context / "d/g").chmod(0o755)
    assert cached() == 0


def test_a_name_that_nobody_has_is_warned_of(pybuild: Pybuild, tmp_path: Path) -> None:
    """It is root's, as with BuildKit, which says nothing."""
    text = (
        "FROM scratch\nCOPY <<passwd /etc/\nme:x:5:6::/:/bin/sh\npasswd\nCOPY --chown=you f /\nCOPY --chown=me f /g\n"
    )
    result = pybuild.build(write_context(tmp_path / "c", text, {"f": ""}), "--progress=plain", "--no-cache")
    assert result.stderr.count("WARN: --chown=you: user 'you' is not in /etc/passwd of the image: root is used") == 1
    assert "--chown=me:" not in result.stderr
