"""Endpoints: which hosts, schemes and certificates a reference leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import ConfigError
from registry.hosts import HostConfig, RegistryOptions, is_loopback, split_port
from registry.reference import Reference

D = "sha256:" + "cd" * 32


def config(tmp_path: Path, text: str = "", **options: object) -> HostConfig:
    path = tmp_path / "registries.conf"
    path.write_text(text)
    env = {"HOME": str(tmp_path), "CONTAINERS_REGISTRIES_CONF": str(path)}
    return HostConfig(RegistryOptions(**options), env)  # type: ignore[arg-type]


def hosts(conf: HostConfig, ref: str, *, for_pull: bool = True) -> list[str]:
    found = conf.resolve_endpoints(Reference.parse(ref), for_pull=for_pull)
    return [f"{'+'.join(e.schemes)}://{e.host}/{e.repository}" for e in found]


def test_defaults(tmp_path: Path) -> None:
    conf = config(tmp_path)
    assert hosts(conf, "debian") == ["https://registry-1.docker.io/library/debian"]
    assert hosts(conf, "ghcr.io/a/b") == ["https://ghcr.io/a/b"]
    for name in ("localhost:5000", "127.9.0.1:5000", "[::1]:5000", "localhost"):
        assert hosts(conf, f"{name}/a") == [f"http+https://{name}/a"]
    endpoint = conf.resolve_endpoints(Reference.parse("debian"), for_pull=True)[0]
    assert (endpoint.registry, endpoint.origin, endpoint.insecure) == ("docker.io", "default", False)


def test_tls_verify_flag(tmp_path: Path) -> None:
    off = config(tmp_path, tls_verify=False).resolve_endpoints(Reference.parse("h.x/a"), for_pull=True)[0]
    assert off.schemes == ("https", "http") and not off.tls.verify and off.insecure
    on = config(tmp_path, tls_verify=True).resolve_endpoints(Reference.parse("localhost/a"), for_pull=True)[0]
    assert on.schemes == ("https",) and on.tls.verify and not on.insecure


def test_tls_verify_true_wins_over_an_insecure_entry(tmp_path: Path) -> None:
    conf = config(tmp_path, '[[registry]]\nlocation = "h.x"\ninsecure = true\n', tls_verify=True)
    assert hosts(conf, "h.x/a") == ["https://h.x/a"]


def test_mirrors_and_rewriting(tmp_path: Path) -> None:
    conf = config(
        tmp_path,
        """
[[registry]]
prefix = "example.com/foo"
location = "internal.example.net/bar"
[[registry.mirror]]
location = "mirror-0.local/mirror-for-foo"
[[registry.mirror]]
location = "mirror-1.local/mirrors/foo"
insecure = true
""",
    )
    assert hosts(conf, "example.com/foo/image:latest") == [
        "https://mirror-0.local/mirror-for-foo/image",
        "https+http://mirror-1.local/mirrors/foo/image",
        "https://internal.example.net/bar/image",
    ]
    assert hosts(conf, "example.com/foobar/image") == ["https://example.com/foobar/image"]
    # A push goes where it says.
    assert hosts(conf, "example.com/foo/image", for_pull=False) == ["https://example.com/foo/image"]
    found = conf.resolve_endpoints(Reference.parse("example.com/foo/i"), for_pull=True)
    assert [(e.origin.rpartition(":")[2], e.mirror) for e in found] == [("5", True), ("7", True), ("2", False)]


@pytest.mark.parametrize(
    ("setting", "by_tag", "by_digest"),
    [
        ("", True, True),
        ('pull-from-mirror = "all"', True, True),
        ('pull-from-mirror = "digest-only"', False, True),
        ('pull-from-mirror = "tag-only"', True, False),
    ],
)
def test_pull_from_mirror(tmp_path: Path, setting: str, by_tag: bool, by_digest: bool) -> None:
    text = f'[[registry]]\nlocation = "h.x"\n[[registry.mirror]]\nlocation = "m.x"\n{setting}\n'
    conf = config(tmp_path, text)
    assert ("https://m.x/a" in hosts(conf, "h.x/a:t")) is by_tag
    assert ("https://m.x/a" in hosts(conf, "h.x/a@" + D)) is by_digest


def test_mirror_by_digest_only(tmp_path: Path) -> None:
    conf = config(
        tmp_path,
        '[[registry]]\nlocation = "h.x"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = "m.x"\n',
    )
    assert hosts(conf, "h.x/a:t") == ["https://h.x/a"]
    assert len(hosts(conf, "h.x/a@" + D)) == 2


def test_docker_hub_mirror(tmp_path: Path) -> None:
    conf = config(tmp_path, '[[registry]]\nprefix = "docker.io"\n[[registry.mirror]]\nlocation = "m.x/hub"\n')
    assert hosts(conf, "debian:1") == ["https://m.x/hub/library/debian", "https://registry-1.docker.io/library/debian"]


def test_longest_prefix_and_wildcards(tmp_path: Path) -> None:
    conf = config(
        tmp_path,
        """
[[registry]]
prefix = "*.example.com"
location = "wild.net/all"
[[registry]]
prefix = "a.example.com/team"
location = "team.net/t"
[[registry]]
prefix = "b.example.com/x:v1"
location = "pinned.net/x"
""",
    )
    assert hosts(conf, "c.d.example.com/p") == ["https://wild.net/all/p"]
    assert hosts(conf, "a.example.com/team/p") == ["https://team.net/t/p"]
    assert hosts(conf, "a.example.com/teams/p") == ["https://wild.net/all/teams/p"]
    assert hosts(conf, "example.com/p") == ["https://example.com/p"]
    assert hosts(conf, "evil.com/x.example.com/p") == ["https://evil.com/x.example.com/p"]
    assert hosts(conf, "b.example.com/x:v1") == ["https://pinned.net/x"]
    assert hosts(conf, "b.example.com/x:v10") == ["https://wild.net/all/x"]


def test_a_host_prefix_is_not_another_ports(tmp_path: Path) -> None:
    conf = config(tmp_path, '[[registry]]\nprefix = "h.x"\nlocation = "other.net"\n')
    assert hosts(conf, "h.x:5000/a") == ["https://h.x:5000/a"]


def test_blocked(tmp_path: Path) -> None:
    conf = config(tmp_path, '\n[[registry]]\nlocation = "h.x"\nblocked = true\n')
    with pytest.raises(ConfigError, match=r"h\.x/a is blocked by .*registries\.conf:2"):
        hosts(conf, "h.x/a")
    assert hosts(conf, "h.x/a", for_pull=False) == ["https://h.x/a"]


def test_short_names(tmp_path: Path) -> None:
    text = """
unqualified-search-registries = ["one.x", "two.x"]
[aliases]
"tool" = "quay.io/org/tool"
"""
    conf = config(tmp_path, text)
    assert [str(r) for r in conf.resolve_name("tool:v2")] == ["quay.io/org/tool:v2"]
    assert [str(r) for r in conf.resolve_name("other@" + D)] == [f"one.x/other@{D}", f"two.x/other@{D}"]
    assert [str(r) for r in conf.resolve_name("docker.io/x")] == ["docker.io/library/x"]
    strict = config(tmp_path, 'short-name-mode = "enforcing"\n' + text)
    with pytest.raises(ConfigError, match="ambiguous"):
        strict.resolve_name("other")
    assert len(strict.resolve_name("other", interactive=True)) == 2
    assert [str(r) for r in config(tmp_path).resolve_name("debian:bookworm")] == ["docker.io/library/debian:bookworm"]


def test_certs_d(tmp_path: Path) -> None:
    directory = tmp_path / ".config/containers/certs.d/h.x:5000"
    directory.mkdir(parents=True)
    for name in ("b.crt", "a.crt", "client.cert", "client.key"):
        (directory / name).write_text("")
    tls = config(tmp_path).resolve_endpoints(Reference.parse("h.x:5000/a"), for_pull=True)[0].tls
    assert tls.ca_files == (str(directory / "a.crt"), str(directory / "b.crt"))
    assert (tls.client_cert, tls.client_key) == (str(directory / "client.cert"), str(directory / "client.key"))
    (directory / "client.key").unlink()
    with pytest.raises(ConfigError, match="has no key"):
        hosts(config(tmp_path), "h.x:5000/a")


def test_a_loopback_registry_with_a_ca_is_never_asked_over_http(tmp_path: Path) -> None:
    directory = tmp_path / ".config/containers/certs.d/localhost:5000"
    directory.mkdir(parents=True)
    (directory / "ca.crt").write_text("")
    assert hosts(config(tmp_path), "localhost:5000/a") == ["https://localhost:5000/a"]


def test_cert_dir_flag(tmp_path: Path) -> None:
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs/ca.crt").write_text("")
    conf = config(tmp_path, cert_dir=str(tmp_path / "certs"))
    assert conf.tls_for("any.x", insecure=False).ca_files == (str(tmp_path / "certs/ca.crt"),)
    with pytest.raises(ConfigError, match="certificate directory"):
        config(tmp_path, cert_dir=str(tmp_path / "none")).tls_for("any.x", insecure=False)


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "127.255.1.2:80", "[::1]:5"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.evil.com", "128.0.0.1", "127.0.0.1.evil.com", "127.0.0.999", "[::2]:1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_split_port() -> None:
    assert split_port("h:5") == ("h", 5)
    assert split_port("[::1]:5") == ("::1", 5)
    assert split_port("[::1]") == ("::1", None)
    assert split_port("h") == ("h", None)
