"""Challenges, tokens, and where they may go."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from registry.auth import Authenticator, Scope, TokenReply, merge_scopes, parse_challenges
from registry.credentials import Credential
from registry.errors import AuthError, RegistryError, ServerError

PULL = Scope.repository("a/b", "pull")
PUSH = Scope.repository("a/b", "pull", "push")
BEARER = 'Bearer realm="https://auth.x/token",service="reg"'


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Basic realm=x", [("basic", {"realm": "x"})]),
        ("Basic", [("basic", {})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        ('bearer Realm = "https://a/t" , service=s', [("bearer", {"realm": "https://a/t", "service": "s"})]),
        ("Bearer realm=https://a/t,service=s", [("bearer", {"realm": "https://a/t", "service": "s"})]),
        ('Basic realm="q\\"uo\\\\te, Bearer x=y"', [("basic", {"realm": 'q"uo\\te, Bearer x=y'})]),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate abc+/==, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        (
            'Basic realm="x", charset="UTF-8", Bearer realm="y", error="invalid_token"',
            [("basic", {"realm": "x", "charset": "UTF-8"}), ("bearer", {"realm": "y", "error": "invalid_token"})],
        ),
        (", ,Basic realm=x,,", [("basic", {"realm": "x"})]),
        ('Bearer realm="unterminated', [("bearer", {})]),
        ("", []),
        ("=,=", []),
        ("\x00", []),
    ],
)
def test_parse_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert [(c.scheme, dict(c.params)) for c in parse_challenges(header)] == expected


def test_a_huge_challenge_is_cut() -> None:
    assert parse_challenges("Basic realm=x, " + "a" * 1_000_000)[0].scheme == "basic"


def test_scopes() -> None:
    assert Scope.parse("repository:h:5000/a:pull,push") == Scope.repository("h:5000/a", "pull", "push")
    assert Scope.parse("nonsense") is None and Scope.parse("a::b") is None
    assert PUSH.covers(PULL) and not PULL.covers(PUSH)
    assert Scope("registry", "catalog", frozenset({"*"})).covers(Scope("registry", "catalog", frozenset({"x"})))
    assert [str(s) for s in merge_scopes([PULL, Scope.repository("c", "pull"), PUSH])] == [
        "repository:a/b:pull,push",
        "repository:c:pull",
    ]


class TokenHttp:
    """Answers as a token server; records what it was asked."""

    def __init__(self, *replies: tuple[int, Any]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[str, str, list[tuple[str, str]], str | None]] = []
        self.gate: threading.Event | None = None

    def _answer(self) -> TokenReply:
        if self.gate:
            self.gate.wait(5)
        status, doc = self.replies.pop(0) if self.replies else (200, {"token": f"t{len(self.asked)}"})
        return TokenReply(status, doc if isinstance(doc, bytes) else json.dumps(doc).encode())

    def get_token(self, url: str, params: list[tuple[str, str]], authorization: str | None) -> TokenReply:
        self.asked.append(("GET", url, params, authorization))
        return self._answer()

    def post_token(self, url: str, form: list[tuple[str, str]]) -> TokenReply:
        self.asked.append(("POST", url, form, None))
        return self._answer()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def authenticator(http: TokenHttp, clock: Clock | None = None, origin: str = "https://h.x:443") -> Authenticator:
    auth = Authenticator(http, clock=clock or Clock())
    assert auth.learn(origin, [BEARER])
    return auth


O = "https://h.x:443"  # noqa: E741
NOBODY = lambda: None  # noqa: E731
ME = Credential("me", "pw", origin="a file")


def test_no_challenge_no_header_and_no_look_up() -> None:
    def never() -> Credential:
        raise AssertionError("asked for a credential that nobody wanted")

    assert Authenticator(TokenHttp()).authorization(O, [PULL], never) is None


def test_basic() -> None:
    auth = Authenticator(TokenHttp())
    assert auth.learn(O, ["Basic realm=x"])
    assert auth.authorization(O, [PULL], lambda: Credential("ü", "p")) == "Basic w7w6cA=="
    assert auth.authorization(O, [PULL], NOBODY) is None
    with pytest.raises(AuthError, match="identity token"):
        auth.authorization(O, [PULL], lambda: Credential(identity_token="t", origin="f"))


def test_bearer_is_preferred_and_unknown_schemes_ignored() -> None:
    auth = Authenticator(TokenHttp())
    assert not auth.learn(O, ["Negotiate", "Bearer nonsense"])
    assert auth.learn(O, ["Basic realm=x", BEARER])
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer t1"


def test_tokens_are_cached_per_scope_and_a_wider_one_serves_a_narrower() -> None:
    http = TokenHttp()
    auth = authenticator(http)
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer t1"
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer t1"
    assert auth.authorization(O, [PUSH], NOBODY) == "Bearer t2"
    assert auth.authorization(O, [Scope.repository("other", "pull")], NOBODY) == "Bearer t3"
    auth.forget(O, "Bearer t1")
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer t2"
    params = http.asked[1][2]
    assert params == [("service", "reg"), ("scope", "repository:a/b:pull,push")]


def test_one_hosts_token_is_never_offered_to_another() -> None:
    http = TokenHttp()
    auth = authenticator(http)
    first = auth.authorization(O, [PULL], NOBODY)
    other = "https://evil.x:443"
    assert auth.authorization(other, [PULL], NOBODY) is None
    assert auth.learn(other, [BEARER])
    assert auth.authorization(other, [PULL], NOBODY) != first


def test_a_credential_change_is_another_token() -> None:
    http = TokenHttp()
    auth = authenticator(http)
    assert auth.authorization(O, [PULL], NOBODY) != auth.authorization(O, [PULL], lambda: ME)
    assert http.asked[0][3] is None and http.asked[1][3] == ME.basic


def test_tokens_are_renewed_before_they_end() -> None:
    http, clock = TokenHttp((200, {"token": "short", "expires_in": 100}), (200, {"access_token": "next"})), Clock()
    auth = authenticator(http, clock)
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer short"
    clock.now += 74
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer short"
    clock.now += 2
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer next"


@pytest.mark.parametrize("lifetime", [0, -5, "soon", None])
def test_odd_lifetimes_mean_a_minute(lifetime: object) -> None:
    http, clock = TokenHttp((200, {"token": "a", "expires_in": lifetime}), (200, {"token": "b"})), Clock()
    auth = authenticator(http, clock)
    auth.authorization(O, [PULL], NOBODY)
    clock.now += 40
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer a"
    clock.now += 20
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer b"


def test_identity_token_goes_by_oauth2_and_a_renewed_one_is_kept() -> None:
    http = TokenHttp((200, {"access_token": "a", "expires_in": 100, "refresh_token": "renewed"}), (200, {"token": "b"}))
    clock = Clock()
    auth = authenticator(http, clock)
    credential = Credential(identity_token="idt", origin="f")
    assert auth.authorization(O, [PUSH], lambda: credential) == "Bearer a"
    clock.now += 1000
    auth.authorization(O, [PUSH], lambda: credential)
    forms = [dict(a[2]) for a in http.asked]
    assert [f["refresh_token"] for f in forms] == ["idt", "renewed"]
    assert forms[0]["grant_type"] == "refresh_token" and forms[0]["scope"] == "repository:a/b:pull,push"


def test_get_refused_falls_back_to_a_post_with_the_password() -> None:
    http = TokenHttp((405, {}), (200, {"token": "posted"}))
    assert authenticator(http).authorization(O, [PULL], lambda: ME) == "Bearer posted"
    form = dict(http.asked[1][2])
    assert (form["grant_type"], form["username"], form["password"]) == ("password", "me", "pw")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((401, {}), AuthError),
        ((403, {}), AuthError),
        ((404, {}), RegistryError),
        ((418, {}), RegistryError),
        ((200, b"<html>"), ServerError),
        ((200, []), ServerError),
        ((200, {"token": 5}), ServerError),
        ((200, {"token": "a\r\nX-Evil: 1"}), ServerError),
        ((200, b"[" * 100_000), ServerError),
    ],
)
def test_bad_replies(reply: tuple[int, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        authenticator(TokenHttp(reply)).authorization(O, [PULL], NOBODY)
    assert "auth.x" in str(caught.value)


def test_wrong_credentials_name_their_file_and_not_themselves() -> None:
    with pytest.raises(AuthError, match="a file") as caught:
        authenticator(TokenHttp((401, {}))).authorization(O, [PULL], lambda: ME)
    assert "pw" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("realm", ["ftp://a/t", "/token", "https://a/t t", "javascript:x"])
def test_unusable_realms(realm: str) -> None:
    auth = Authenticator(TokenHttp())
    assert auth.learn(O, [f'Bearer realm="{realm}"'])
    with pytest.raises(ServerError, match="token server"):
        auth.authorization(O, [PULL], NOBODY)


def test_a_password_never_goes_from_https_to_a_plain_realm() -> None:
    auth = Authenticator(TokenHttp())
    assert auth.learn(O, ['Bearer realm="http://auth.x/t"'])
    with pytest.raises(AuthError, match="without encryption"):
        auth.authorization(O, [PULL], lambda: ME)
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer t1"


NEAR = ["http://127.0.0.1:8200/t", "https://localhost./t", "http://169.254.169.254/t", "http://[::ffff:127.0.0.1]/t",
        "http://[fe80::1%25eth0]/t", "http://0.0.0.0/t", "http://a.localhost/t"]  # fmt: skip


@pytest.mark.parametrize("realm", NEAR)
def test_a_registry_cannot_have_what_this_machine_answers(realm: str) -> None:
    http = TokenHttp()
    auth = Authenticator(http)
    assert auth.learn(O, [f'Bearer realm="{realm}"'])
    with pytest.raises(AuthError, match="this machine or link"):
        auth.authorization(O, [PULL], NOBODY)
    assert not http.asked
    local = "http://127.0.0.1:5000"
    assert auth.learn(local, [f'Bearer realm="{realm}"'])
    assert auth.authorization(local, [PULL], NOBODY) == "Bearer t1"


@pytest.mark.parametrize("lifetime", [10**400, float("inf"), float("nan"), -1, True, "9" * 5000, None])
def test_absurd_lifetimes(lifetime: object) -> None:
    clock = Clock()
    http = TokenHttp((200, {"token": "a", "expires_in": lifetime}), (200, {"token": "b"}))
    auth = authenticator(http, clock)
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer a"
    clock.now += 90_000
    assert auth.authorization(O, [PULL], NOBODY) == "Bearer b"


def test_one_flight_per_key() -> None:
    http = TokenHttp()
    http.gate = threading.Event()
    auth = authenticator(http)
    got: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: got.append(auth.authorization(O, [PULL], NOBODY)), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    http.gate.set()
    for thread in threads:
        thread.join(10)
    assert got == ["Bearer t1"] * 8 and len(http.asked) == 1


def test_tokens_are_not_shown() -> None:
    auth = authenticator(TokenHttp((200, {"token": "sesame"})))
    auth.authorization(O, [PULL], NOBODY)
    assert "sesame" not in repr(vars(auth))
