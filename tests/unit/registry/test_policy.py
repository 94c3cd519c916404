"""policy.json: what it lets through, and that what cannot be verified is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import ConfigError
from registry.policy import Policy, docker_scopes, load_policy
from registry.reference import Reference

D = "sha256:" + "ab" * 32
ACCEPT, REJECT = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]


def load(tmp_path: Path, doc: Any) -> Policy:
    path = tmp_path / "policy.json"
    path.write_text(doc if isinstance(doc, str) else json.dumps(doc))
    return load_policy({}, str(path))


def allowed(policy: Policy, text: str) -> bool:
    try:
        policy.check_docker(Reference.parse(text))
    except ConfigError:
        return False
    return True


def test_scopes_run_from_exact_to_general() -> None:
    assert list(docker_scopes(Reference.parse("r.a.x:5000/t/app:v1"))) == [
        "r.a.x:5000/t/app:v1",
        "r.a.x:5000/t/app",
        "r.a.x:5000/t",
        "r.a.x:5000",
        "*.a.x:5000",
        "*.x:5000",
    ]


def test_the_most_specific_scope_decides(tmp_path: Path) -> None:
    policy = load(
        tmp_path,
        {
            "default": REJECT,
            "transports": {
                "docker": {
                    "docker.io/library": ACCEPT,
                    "docker.io/library/bad": REJECT,
                    f"h.x/pinned@{D}": ACCEPT,
                    "*.corp.x": ACCEPT,
                    "evil.corp.x": REJECT,
                },
                "oci": {"": ACCEPT},
            },
        },
    )
    for text in ("debian:1", f"h.x/pinned@{D}", "a.corp.x/i", "b.a.corp.x/i"):
        assert allowed(policy, text), text
    for text in ("bad", "team/app", "h.x/pinned:1", "evil.corp.x/i", "corp.x/i"):
        assert not allowed(policy, text), text
    policy.check("oci", ["/some/dir"])
    with pytest.raises(ConfigError, match=r"policy\.json rejects this image \(default\)"):
        policy.check("docker-archive", ["/x"])


def test_the_transports_own_default(tmp_path: Path) -> None:
    policy = load(tmp_path, {"default": REJECT, "transports": {"docker": {"": ACCEPT, "h.x": REJECT}}})
    assert allowed(policy, "debian") and not allowed(policy, "h.x/a")


@pytest.mark.parametrize("kind", ["signedBy", "sigstoreSigned", "signedBaseLayer"])
def test_signatures_are_refused_clearly(tmp_path: Path, kind: str) -> None:
    policy = load(tmp_path, {"default": [{"type": kind, "keyType": "GPGKeys", "keyPath": "/k"}]})
    with pytest.raises(ConfigError, match=f"requires {kind} .* cannot verify") as caught:
        policy.check_docker(Reference.parse("debian"))
    assert caught.value.hint


def test_every_requirement_of_a_list_counts(tmp_path: Path) -> None:
    assert not allowed(load(tmp_path, {"default": [*ACCEPT, *REJECT]}), "debian")


@pytest.mark.parametrize(
    "doc",
    [
        "{",
        "[]",
        {},
        {"default": []},
        {"default": ["x"]},
        {"default": [{"type": "acceptAll"}]},
        {"default": ACCEPT, "transport": {}},
        {"default": ACCEPT, "transports": []},
        {"default": ACCEPT, "transports": {"docker": []}},
        {"default": ACCEPT, "transports": {"docker": {"": []}}},
        "[" * 100_000,
    ],
)
def test_malformed(tmp_path: Path, doc: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy\.json"):
        load(tmp_path, doc)


def test_where_it_is_found(tmp_path: Path) -> None:
    path = tmp_path / ".config/containers/policy.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"default": REJECT}))
    assert load_policy({"HOME": str(tmp_path)}).origin == str(path)
    assert allowed(Policy(), "debian")
    with pytest.raises(ConfigError, match="no such file"):
        load_policy({}, str(tmp_path / "none"))


def test_a_rejected_image_is_not_even_asked_for(tmp_path: Path) -> None:
    from registry.client import RegistryClient
    from registry.hosts import RegistryOptions
    from registry.transports.docker import DockerSource

    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"default": REJECT}))
    client = RegistryClient(RegistryOptions(signature_policy=str(path)), environ={"HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="rejects this image"):
        DockerSource(Reference.parse("127.0.0.1:1/a:b"), client).get_manifest()
