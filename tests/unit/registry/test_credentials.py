"""Credentials: the order of sources, helpers, login and logout, and that secrets stay secret."""

from __future__ import annotations

import base64
import json
import os
import stat
import traceback
from pathlib import Path
from typing import Any

import pytest

from registry.credentials import Credential, CredentialStore
from registry.errors import AuthError, ConfigError


def auth(user: str, secret: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}


def write(path: Path, doc: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(doc))
    return path


def user_of(store: CredentialStore, registry: str, repository: str = "") -> str | None:
    found = store.find(registry, repository)
    return found.username if found else None


def test_order_of_files(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    store = CredentialStore(env)
    assert user_of(store, "h.x") is None
    write(tmp_path / ".docker/config.json", {"auths": {"h.x": auth("docker", "p"), "only.x": auth("only", "p")}})
    assert user_of(store, "h.x") == "docker"
    write(tmp_path / ".config/containers/auth.json", {"auths": {"h.x": auth("config", "p")}})
    assert user_of(store, "h.x") == "config"
    write(tmp_path / "run/containers/auth.json", {"auths": {"h.x": auth("run", "p")}})
    assert user_of(store, "h.x") == "run"
    assert user_of(store, "only.x") == "only"
    write(tmp_path / "dc/config.json", {"auths": {"only.x": auth("dc", "p")}})
    assert user_of(CredentialStore({**env, "DOCKER_CONFIG": str(tmp_path / "dc")}), "only.x") == "dc"
    named = write(tmp_path / "a.json", {"auths": {"h.x": auth("env", "p")}})
    assert user_of(CredentialStore({**env, "REGISTRY_AUTH_FILE": str(named)}), "h.x") == "env"
    assert user_of(CredentialStore({**env, "REGISTRY_AUTH_FILE": str(named)}), "only.x") is None
    flag = write(tmp_path / "b.json", {"auths": {"h.x": auth("flag", "p")}})
    assert user_of(CredentialStore({"REGISTRY_AUTH_FILE": str(named)}, authfile=str(flag)), "h.x") == "flag"


def test_longest_key_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        {"auths": {"h.x": auth("host", "p"), "h.x/team": auth("team", "p"), "h.x/team/app": auth("app", "p")}},
    )
    store = CredentialStore({}, authfile=str(path))
    assert user_of(store, "h.x", "team/app") == "app"
    assert user_of(store, "h.x", "team/app/sub") == "app"
    assert user_of(store, "h.x", "team/other") == "team"
    assert user_of(store, "h.x", "teams") == "host"
    assert user_of(store, "h.x:5000", "team") is None


@pytest.mark.parametrize("key", ["docker.io", "https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_keys(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.json", {"auths": {key: auth("hub", "p")}})
    assert user_of(CredentialStore({}, authfile=str(path)), "docker.io", "library/debian") == "hub"


def test_url_keys_and_separate_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        {"auths": {"https://h.x/v1/": auth("url", "p:q"), "f.x": {"username": "f", "password": "g"}, "empty.x": {}}},
    )
    store = CredentialStore({}, authfile=str(path))
    found = store.find("h.x")
    assert found == Credential("url", "p:q")
    assert store.find("f.x") == Credential("f", "g")
    assert store.find("empty.x") is None


def test_identity_token(tmp_path: Path) -> None:
    entry = {**auth("<token>", ""), "identitytoken": "refresh-me"}
    path = write(tmp_path / "a.json", {"auths": {"h.x": entry}})
    found = CredentialStore({}, authfile=str(path)).find("h.x")
    assert found is not None and found.identity_token == "refresh-me"


class Helper:
    """Stands in for docker-credential-* programs."""

    def __init__(self, answers: dict[str, tuple[int, bytes, bytes]]) -> None:
        self.answers = answers
        self.calls: list[tuple[str, str, bytes]] = []

    def __call__(self, program: str, verb: str, stdin: bytes) -> tuple[int, bytes, bytes]:
        self.calls.append((program, verb, stdin))
        if program not in self.answers:
            raise FileNotFoundError(program)
        return self.answers[program]


def secret(user: str, value: str) -> tuple[int, bytes, bytes]:
    return 0, json.dumps({"ServerURL": "x", "Username": user, "Secret": value}).encode(), b""


def test_helpers_by_registry_then_store(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json",
        {"credHelpers": {"h.x": "one"}, "credsStore": "all", "auths": {"h.x": auth("stored", "p"), "s.x": {}}},
    )
    helper = Helper({"docker-credential-one": secret("helped", "p1"), "docker-credential-all": secret("<token>", "t")})
    store = CredentialStore({}, authfile=str(path), run_helper=helper)
    assert store.find("h.x") == Credential("helped", "p1")
    assert store.find("s.x") == Credential(identity_token="t")
    assert [c[:2] for c in helper.calls] == [("docker-credential-one", "get"), ("docker-credential-all", "get")]
    assert helper.calls[0][2] == b"h.x"


def test_helpers_of_registries_conf(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"auths": {"h.x": auth("filed", "p"), "f.x": auth("f", "p")}})
    helper = Helper({"docker-credential-vault": secret("vaulted", "v")})

    def store(*names: str) -> CredentialStore:
        return CredentialStore({}, authfile=str(path), run_helper=helper, helpers=lambda: names)

    assert user_of(store("vault", "containers-auth.json"), "h.x") == "vaulted"
    assert user_of(store("containers-auth.json", "vault"), "h.x") == "filed"
    assert user_of(store("containers-auth.json", "vault"), "docker.io") == "vaulted"
    assert helper.calls[-1][2] == b"https://index.docker.io/v1/"
    helper.answers["docker-credential-vault"] = (1, b"credentials not found in native keychain", b"")
    assert user_of(store("vault"), "f.x") is None


def test_a_helper_that_knows_nothing_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"credsStore": "all", "auths": {"h.x": auth("stored", "p")}})
    helper = Helper({"docker-credential-all": (1, b"credentials not found in native keychain\n", b"")})
    store = CredentialStore({}, authfile=str(path), run_helper=helper)
    assert user_of(store, "h.x") == "stored"
    assert user_of(store, "other.x") is None


def test_a_failing_helper_is_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"credHelpers": {"h.x": "bad", "n.x": "none", "j.x": "json", "p.x": "../evil"}})
    helper = Helper(
        {
            "docker-credential-bad": (7, b"", b"vault is\x1b[2J sealed\n"),
            "docker-credential-json": (0, b'{"Secret": "hunter2"', b""),
        }
    )
    store = CredentialStore({}, authfile=str(path), run_helper=helper)
    with pytest.raises(
        AuthError, match=r"docker-credential-bad get failed for h\.x with exit code 7: vault is .*sealed"
    ):
        store.find("h.x")
    with pytest.raises(AuthError, match="is not installed"):
        store.find("n.x")
    with pytest.raises(ConfigError, match="not the name"):
        store.find("p.x")
    with pytest.raises(AuthError) as caught:
        store.find("j.x")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_real_helper_gets_the_key_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker-credential-real"
    program.write_text('#!/bin/sh\nread key\nprintf \'{"Username":"%s","Secret":"%s"}\' "$1" "$key"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = write(tmp_path / "a.json", {"credHelpers": {"h.x": "real"}})
    assert CredentialStore({}, authfile=str(path)).find("h.x") == Credential("get", "h.x")


def test_login_and_logout(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    config = write(tmp_path / ".docker/config.json", {"auths": {"o.x": auth("o", "p")}, "psFormat": "kept"})
    config.chmod(0o644)
    store = CredentialStore(env)
    assert store.save("h.x", Credential("me", "pass:word")) == str(config)
    assert store.save("docker.io", Credential("hub", "p")) == str(config)
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    doc = json.loads(config.read_text())
    assert set(doc["auths"]) == {"o.x", "h.x", "https://index.docker.io/v1/"} and doc["psFormat"] == "kept"
    assert store.find("h.x") == Credential("me", "pass:word")
    assert store.erase("docker.io") == [str(config)]
    assert store.find("docker.io") is None
    assert store.erase("nothing.x") == []
    assert [p.name for p in config.parent.iterdir()] == ["config.json"]


def test_login_prefers_the_runtime_directory_and_saves_tokens(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    store = CredentialStore(env)
    written = Path(store.save("h.x/team", Credential("u", "", identity_token="tok")))
    assert written == tmp_path / "run/containers/auth.json"
    assert stat.S_IMODE(written.parent.stat().st_mode) == 0o700
    found = store.find("h.x", "team/app")
    assert found is not None and found.identity_token == "tok"


def test_login_through_a_helper_writes_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"credsStore": "all"})
    helper = Helper({"docker-credential-all": secret("u", "s")})
    store = CredentialStore({}, authfile=str(path), run_helper=helper)
    assert store.save("h.x", Credential("u", "s3cret")) == "docker-credential-all"
    assert json.loads(helper.calls[-1][2]) == {"ServerURL": "h.x", "Username": "u", "Secret": "s3cret"}
    assert "s3cret" not in path.read_text()
    assert store.erase("h.x") == ["docker-credential-all"]
    assert helper.calls[-1][1:] == ("erase", b"h.x")


def test_logout_of_everything(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", {"auths": {"o.x": auth("o", "p")}, "credsStore": "all", "credHelpers": {"h.x": "one"}}
    )
    helper = Helper({
        "docker-credential-one": secret("u", "s"),
        "docker-credential-all": (0, b'{"https://x.y/v1/": "me", "z.y": "you"}', b""),
    })  # fmt: skip
    store = CredentialStore({}, authfile=str(path), run_helper=helper)
    assert store.erase_all() == [str(path), "docker-credential-one", "docker-credential-all"]
    erased = [(program, body) for program, verb, body in helper.calls if verb == "erase"]
    assert erased == [
        ("docker-credential-one", b"h.x"),
        ("docker-credential-all", b"https://x.y/v1/"),
        ("docker-credential-all", b"z.y"),
    ]  # fmt: skip
    assert json.loads(path.read_text())["auths"] == {}
    damaged = Helper({"docker-credential-one": secret("u", "s"), "docker-credential-all": (0, b"[", b"")})
    with pytest.raises(AuthError, match="no usable list"):
        CredentialStore({}, authfile=str(path), run_helper=damaged).erase_all()


def test_login_follows_a_symbolic_link(tmp_path: Path) -> None:
    target = write(tmp_path / "dotfiles/config.json", {})
    link = tmp_path / ".docker/config.json"
    link.parent.mkdir()
    link.symlink_to(target)
    CredentialStore({"HOME": str(tmp_path)}).save("h.x", Credential("u", "p"))
    assert link.is_symlink() and "h.x" in target.read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"auths": ', "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"auths": []}', ""),
        ('{"auths": ["x"]}', "auths is not an object"),
        ('{"auths": {"h.x": "x"}}', "not an object"),
        ('{"auths": {"h.x": {"auth": 5}}}', "malformed"),
        ('{"auths": {"h.x": {"auth": "!!!"}}}', "base64"),
        ('{"auths": {"h.x": {"auth": "aHVudGVyMg=="}}}', "base64 of user:password"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    store = CredentialStore({}, authfile=str(path))
    if not complaint:
        assert store.find("h.x") is None
        return
    with pytest.raises(ConfigError, match=complaint) as caught:
        store.find("h.x")
    assert str(path) in str(caught.value)


def test_an_empty_file_and_a_missing_one_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("")
    assert CredentialStore({}, authfile=str(tmp_path / "a.json")).find("h.x") is None
    assert CredentialStore({}, authfile=str(tmp_path / "none")).find("h.x") is None


def test_secrets_are_not_shown() -> None:
    credential = Credential("user", "hunter2", "token-hunter3", origin="file")
    assert "hunter" not in repr(credential) + str(credential) and "user" in repr(credential)
    with pytest.raises(AttributeError):
        credential.password = "x"
    assert Credential.parse("u:p:q") == Credential("u", "p:q")
    for text in ("nocolon", ":nouser"):
        with pytest.raises(ConfigError) as caught:
            Credential.parse(text)
        assert text not in str(caught.value)
    assert len({Credential("a", "b"), Credential("a", "b", origin="elsewhere")}) == 1


OWN = {"PYBUILD_REGISTRY": "h.x:5000/team", "PYBUILD_REGISTRY_USER": "me", "PYBUILD_REGISTRY_PASSWORD": "hunter2"}


def test_pybuilds_own_variables_are_for_one_place() -> None:
    store = CredentialStore(OWN)
    assert store.find("h.x:5000", "team/app") == Credential("me", "hunter2")
    for registry, repository in (
        ("h.x:5000", ""),
        ("h.x:5000", "teams/app"),
        ("h.x", "team/app"),
        ("docker.io", "team"),
    ):
        assert store.find(registry, repository) is None
    hub = CredentialStore({**OWN, "PYBUILD_REGISTRY": "docker.io"})
    assert user_of(hub, "docker.io") == "me"
    assert user_of(hub, "h.x:5000") is None


def test_the_environment_comes_before_the_files_but_not_before_a_flag(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"auths": {"h.x": auth("filed", "p")}})
    own = {**OWN, "PYBUILD_REGISTRY": "h.x", "REGISTRY_AUTH_FILE": str(path)}
    assert user_of(CredentialStore(own), "h.x") == "me"
    assert user_of(CredentialStore(own, authfile=str(path)), "h.x") == "filed"
    docker = {"DOCKER_AUTH_CONFIG": json.dumps({"auths": {"h.x": auth("given", "p")}}), "REGISTRY_AUTH_FILE": str(path)}
    assert user_of(CredentialStore(docker), "h.x") == "given"
    assert user_of(CredentialStore(docker), "other.x") is None
    assert user_of(CredentialStore({**docker, **own}), "h.x") == "me"


JOB = {
    "GITLAB_CI": "true",
    "CI_REGISTRY": "registry.gl.x",
    "CI_JOB_TOKEN": "t0ken",
    "CI_DEPENDENCY_PROXY_SERVER": "gl.x:443",
    "CI_DEPENDENCY_PROXY_USER": "proxied",
    "CI_DEPENDENCY_PROXY_PASSWORD": "p",
}


def test_a_gitlab_jobs_variables(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    store = CredentialStore({**home, **JOB})
    assert store.find("registry.gl.x", "group/app") == Credential("gitlab-ci-token", "t0ken")
    assert store.find("gl.x") == Credential("proxied", "p")
    assert store.find("docker.io") is store.find("evil-registry.gl.x") is None
    deploy = {**home, **JOB, "CI_REGISTRY_USER": "deploy", "CI_REGISTRY_PASSWORD": "d"}
    assert user_of(CredentialStore(deploy), "registry.gl.x") == "deploy"
    assert user_of(CredentialStore({**deploy, "GITLAB_CI": ""}), "registry.gl.x") is None
    path = write(tmp_path / "a.json", {"auths": {"registry.gl.x": auth("filed", "p")}})
    assert user_of(CredentialStore({**deploy, "REGISTRY_AUTH_FILE": str(path)}), "registry.gl.x") == "filed"


@pytest.mark.parametrize(
    "environ",
    [
        {"PYBUILD_REGISTRY_PASSWORD": "hunter2"},
        {"PYBUILD_REGISTRY": "h.x", "PYBUILD_REGISTRY_PASSWORD": "hunter2"},
        {"PYBUILD_REGISTRY": "h.x", "PYBUILD_REGISTRY_USER": "me"},
        {"DOCKER_AUTH_CONFIG": '{"auths": {"h.x": {"auth": "hunter2"'},
        {"DOCKER_AUTH_CONFIG": '["hunter2"]'},
        {"DOCKER_AUTH_CONFIG": '{"auths": ["hunter2"]}'},
        {"DOCKER_AUTH_CONFIG": '{"auths": {"h.x": {"auth": "hunter2"}}}'},
    ],
)
def test_what_is_wrong_in_the_environment_is_named_and_not_quoted(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CredentialStore(environ).find("h.x")
    assert next(iter(environ)).partition("_USER")[0][:16] in caught.value.message
    assert "hunter2" not in caught.value.message


def test_lookups_tell_every_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"credHelpers": {"h.x": "one"}, "auths": {"h.x": {}, "h.x/team": auth("u", "p")}})
    helper = Helper({"docker-credential-one": (1, b"credentials not found in native keychain", b"")})
    store = CredentialStore({**JOB, "REGISTRY_AUTH_FILE": str(path), "PYBUILD_REGISTRY": "o.x"}, run_helper=helper)
    found = [(lookup.place, lookup.ask, lookup.otherwise) for lookup in store.lookups("h.x", "team/app")]
    assert [place for place, _, _ in found] == [
        "PYBUILD_REGISTRY",
        f"{path}, auths['h.x/team']",
        f"docker-credential-one, named in {path}, asked for h.x",
        f"{path}, auths['h.x']",
    ]
    assert [(ask() and "found") or otherwise for _, ask, otherwise in found] == [
        "is for another registry", "found", "knows none", "is empty",
    ]  # fmt: skip
    (only,) = CredentialStore({}, authfile=str(tmp_path / "none")).lookups("h.x")
    assert (only.ask(), only.otherwise) == (None, "is not there")
