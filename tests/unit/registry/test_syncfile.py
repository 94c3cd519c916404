"""The file of `sync`: both forms, and everything that is refused rather than misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layers.oci import Digest, Platform
from registry.credentials import Credential
from registry.errors import ConfigError
from registry.reference import Reference
from registry.sync import Target, plan_sync
from registry.syncfile import MAX_FILE_BYTES, Access, SyncConfig, SyncEntry, TagPattern, load_sync_file, parse_sync

HEX = "0123456789abcdef" * 4


def load(tmp_path: Path, text: str) -> SyncConfig:
    path = tmp_path / "sync.yaml"
    path.write_text(text)
    return load_sync_file(path)


def test_our_form(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        destination: mirror.example:5000/base   # a comment
        delete: true
        scoped: true
        images:
          - quay.io/team/plain
          - source: docker://quay.io/team/app:extra
            target: oci:/srv/app
            tags: ["1.*", latest, '/^v[0-9]+$/']
            exclude: "*-rc*"
            platform: linux/arm64
            delete: false
            tls-verify: false
          - {source: debian, tags: [bookworm, "sha256:HEX"]}
        """.replace("HEX", HEX),
    )
    assert (config.destination, config.delete, config.scoped) == ("mirror.example:5000/base", True, True)
    plain, app, debian = config.entries
    assert (str(plain.source), plain.tags, plain.needs_list, plain.delete) == ("quay.io/team/plain", (), True, None)
    assert str(app.source) == "quay.io/team/app"
    assert [p.text for p in app.tags] == ["extra", "1.*", "latest", "/^v[0-9]+$/"]
    assert (app.target, app.platform, app.delete, app.access) == (
        "oci:/srv/app",
        Platform.parse("linux/arm64"),
        False,
        Access(tls_verify=False),
    )
    assert app.select(["v1", "v1x", "1.0", "1.0-rc1", "latest", "other", "extra"]) == ["v1", "1.0", "latest", "extra"]
    assert (str(debian.source), debian.digests) == ("docker.io/library/debian", (Digest(f"sha256:{HEX}"),))
    assert (debian.needs_list, debian.select(["bookworm", "other"])) == (False, ["bookworm"])


def test_skopeos_form(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        registry.example.com:
          images:
            busybox: []
            redis: [1.10, "2.0", "sha256:HEX"]
          images-by-tag-regex:
            nginx: ^1\\.13\\.[12]-alpine-perl$
          images-by-semver:
            alpine: ">= 3.12.0"
          tls-verify: false
        quay.io:
          images:
            coreos/etcd: [latest]
        """.replace("HEX", HEX),
    )
    assert [str(e.source) for e in config.entries] == [
        "registry.example.com/busybox",
        "registry.example.com/redis",
        "registry.example.com/nginx",
        "registry.example.com/alpine",
        "quay.io/coreos/etcd",
    ]
    assert config.entries[0].select(["a", "b"]) == ["a", "b"]
    assert config.entries[1].select(["1.1", "1.10", "2.0"]) == ["1.10", "2.0"]
    assert config.entries[3].needs_list
    assert config.entries[3].select(["latest", "3.11", "3.12", "v3.20.1", "4.0.0-rc1"]) == ["3.12", "v3.20.1"]
    assert config.entries[1].digests == (Digest(f"sha256:{HEX}"),)
    assert config.entries[2].select(["1.13.1-alpine-perl", "1.13.3-alpine-perl"]) == ["1.13.1-alpine-perl"]
    assert [e.access.tls_verify for e in config.entries] == [False, False, False, False, None]


@pytest.mark.parametrize(
    "text",
    [
        "images: [{source: a, tls-verify: no, cert-dir: /c, credentials: {username: u, password: 0123}}]",
        "docker.io: {images: {a: []}, tls-verify: no, cert-dir: /c, credentials: {username: u, password: 0123}}",
    ],
)
def test_how_a_source_is_reached(tmp_path: Path, text: str) -> None:
    (entry,) = load(tmp_path, text).entries
    assert entry.access == Access(tls_verify=False, cert_dir="/c", credential=Credential("u", "0123"))
    assert "0123" not in repr(entry)


def test_versions_beside_tags(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, "images: [{source: a, tags: [edge], semver: ['1.x', ^3], exclude: '*.9'}]").entries
    assert entry.select(["edge", "1.2", "1.9", "2.0", "3.4", "v3.5.0", "lts"]) == ["edge", "1.2", "3.4", "v3.5.0"]


def test_digests_alone_take_no_tag() -> None:
    (entry,) = parse_sync({"images": [f"debian@sha256:{HEX}"]}).entries
    assert (entry.needs_list, entry.select(["a"])) == (False, [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not a mapping"),
        ("[]", "not a mapping"),
        ("images: []", "not a list of"),
        ("images: x", "not a list of"),
        ("images: [{}]", "no `source`"),
        ("images: [{source: a, tag: x}]", "'tag'"),
        ("images: [{source: a, tags: [on]}]", "True is not a text"),
        ("images: [{source: a, tags: {b: c}}]", "not a list"),
        ("images: [{source: a, semver: latest}]", "range of versions"),
        ("images: [{source: a, credentials: {username: u}}]", "username"),
        ("images: [{source: a, credentials: [hunter2]}]", "not a mapping"),
        ("images: [{source: a, credentials: {username: u, passwort: hunter2}}]", "'passwort'"),
        ("images: [{source: a, delete: 'yes'}]", "neither true"),
        ("images: [{source: a, platform: 'a/b/c/d'}]", "platform"),
        ("images: [{source: a, tags: ['/(/']}]", "regular expression"),
        ("images: [{source: a, tags: ['sha256:12']}]", "digest"),
        ("images: [BAD NAME]", "BAD"),
        ("imagse: [a]", "not a mapping"),
        ("images: [a]\ndestinaton: x", "destinaton"),
        ("images: [a]\ndestination: [x]", "not a text"),
        ("1: 2", "not a mapping"),
        ("h.example: {images: {a: []}, credentials: {password: hunter2}}", "credentials"),
        ("h.example: {images-by-semver: {a: 'new'}}", "range of versions"),
        ("h.example: {images-by-semver: {a: ['>1']}}", "not a text"),
        ("h.example: {images-by-tag-regex: {a: yes}}", "not a text"),
        ("h.example: {}", "no image"),
        ("a: [b", ":1"),
        ("images:\n  - a\n b: c", ":3"),
        ("images: !!python/object/apply:os.system [true]", "constructor"),
        ("\t", "character"),
        ("x: &a [*a]", "not a mapping"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert what in caught.value.message
    assert "sync.yaml" in caught.value.message
    assert "hunter2" not in caught.value.message


def test_files_are_bounded_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger"):
        load(tmp_path, "#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="No such file"):
        load_sync_file(tmp_path / "none")
    with pytest.raises(ConfigError):
        load(tmp_path, "[" * 100_000)


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("1.*", ["1.0", "1."], ["11", "01.0"]),
        ("v[12]", ["v1"], ["v3"]),
        ("/alpine/", ["3-alpine-x"], ["Alpine"]),
        ("/^a$/", ["a"], ["ab"]),
        ("/", ["/"], ["a"]),
    ],
)
def test_patterns(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    parsed = TagPattern.parse(pattern)
    assert all(parsed.fits(t) for t in fits)
    assert not any(parsed.fits(t) for t in fits_not)


def test_a_pattern_that_never_ends_in_other_engines() -> None:
    from registry.tags import select

    tags = ["a" * 127 + "!", "a" * 128]
    pattern = TagPattern.parse("/^(a+)+$/")
    assert [tag for tag in tags if pattern.fits(tag)] == tags[1:]
    assert select(tags, ["/^(a|a)*$/"], ["/(.*b){20}/"]) == tags[1:]


@pytest.mark.parametrize(
    ("destination", "scoped", "shown"),
    [
        ("mirror.example:5000/base", False, "docker://mirror.example:5000/base/team/app:1"),
        ("docker://mirror.example/", False, "docker://mirror.example/team/app:1"),
        ("mirror.example", False, "docker://mirror.example/team/app:1"),
        ("mirror.example/x", True, "docker://mirror.example/x/quay.io/team/app:1"),
        ("oci:/srv", False, "oci:/srv/team/app:1"),
        ("oci:/srv", True, "oci:/srv/quay.io/team/app:1"),
        ("dir:/srv", False, "dir:/srv/team/app/1"),
    ],
)
def test_where_images_go(destination: str, scoped: bool, shown: str) -> None:
    (entry,) = parse_sync({"images": ["quay.io/team/app"]}).entries
    assert str(Target.of(entry, destination, scoped=scoped).location("1", None)) == shown


def test_a_target_is_taken_whole() -> None:
    (entry,) = parse_sync({"images": [{"source": "quay.io/a", "target": "localhost:5000/b/c"}]}).entries
    target = Target.of(entry, "other.example/x", scoped=True)
    assert str(target.location("1", None)) == "docker://localhost:5000/b/c:1"
    assert str(target.location(None, Digest(f"sha256:{HEX}"))) == f"docker://localhost:5000/b/c@sha256:{HEX}"


@pytest.mark.parametrize(
    "destination", [None, "storage:x", "docker-archive:x", "oci:a:b", "mirror.example/a:tag", "UPPER/x y"]
)
def test_where_images_cannot_go(destination: Any) -> None:
    (entry,) = parse_sync({"images": [{"source": "quay.io/a", "target": destination}]}).entries
    with pytest.raises(ConfigError if destination in {None, "storage:x", "docker-archive:x"} else Exception):
        Target.of(entry, None, scoped=False)


@pytest.mark.parametrize("tag", ["../../../etc", "a/b", "", "-x", "a b", ".", "..", "\x1b[2J", "a\0"])
def test_a_list_of_what_are_no_tags_is_one_failure(tmp_path: Path, tag: str) -> None:
    config = SyncConfig(tuple(SyncEntry(Reference.parse(f"h.example/{name}")) for name in ("bad", "good")))

    class Client:
        def list_tags(self, ref: Reference) -> list[str]:
            return ["1", tag] if ref.path == "bad" else ["1"]

    class Context:
        client = Client()

    planned, failures = plan_sync(config, lambda _access: Context(), destination=f"dir:{tmp_path}")  # type: ignore[arg-type, return-value]
    assert [failure.what for failure in failures] == ["h.example/bad"]
    assert [[str(item.destination) for item in items] for _, _, items in planned] == [[], [f"dir:{tmp_path}/good/1"]]
