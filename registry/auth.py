"""From a challenge to an Authorization header: Basic, Bearer tokens, and their cache.

One `Authenticator` serves a client's threads. Tokens are cached by (origin, realm, service,
credential) with the scopes they cover, renewed before they end, and fetched by one thread at a time
for each key. What is kept for one origin is never offered to another.

Specs: RFC 7235 (challenges), RFC 6750 (Bearer), https://distribution.github.io/distribution/spec/auth/
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from layers.values import NamedTuple, Protocol
from registry.credentials import Credential
from registry.errors import AuthError, NotFoundError, RegistryError, ServerError, printable

CLIENT_ID = "pybuild"
MAX_TOKEN_REPLY_BYTES = 1 << 20
_MAX_CHALLENGE_CHARS = 8192
_DEFAULT_LIFETIME_S = 60.0
_MAX_LIFETIME_S = 86400.0
_TCHAR = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_TOKEN68 = _TCHAR | frozenset("/=")


class Challenge(NamedTuple):
    """One challenge of a WWW-Authenticate header; names in lower case."""

    scheme: str
    params: Mapping[str, str]


class Scope(NamedTuple):
    """`type:name:actions` of a Bearer token."""

    kind: str
    name: str
    actions: frozenset[str]

    @classmethod
    def repository(cls, name: str, *actions: str) -> Scope:
        return cls("repository", name, frozenset(actions))

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        """Parse one scope; None for what does not have the form."""
        kind, colon, rest = text.partition(":")
        name, second, actions = rest.rpartition(":")
        if not colon or not second or not name:
            return None
        return cls(kind, name, frozenset(a for a in actions.split(",") if a))

    def covers(self, other: Scope) -> bool:
        same = (self.kind, self.name) == (other.kind, other.name)
        return same and ("*" in self.actions or self.actions >= other.actions)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}:{','.join(sorted(self.actions))}"


CATALOG_SCOPE = Scope("registry", "catalog", frozenset({"*"}))


class TokenReply(NamedTuple):
    status: int
    body: bytes


class TokenTransport(Protocol):
    """How token servers are asked; `registry.http` implements it. Redirects never carry the secret elsewhere."""

    def get_token(self, url: str, params: list[tuple[str, str]], authorization: str | None) -> TokenReply: ...

    def post_token(self, url: str, form: list[tuple[str, str]]) -> TokenReply: ...


class _Key(NamedTuple):
    origin: str
    realm: str
    service: str
    credential: Credential | None


class _Token(NamedTuple):
    value: str
    scopes: frozenset[Scope]
    ends_at: float

    def __repr__(self) -> str:
        return f"_Token(<redacted>, ends_at={self.ends_at})"

    def covers(self, wanted: Iterable[Scope]) -> bool:
        return all(any(have.covers(w) for have in self.scopes) for w in wanted)


class Authenticator:
    """Answers challenges. Thread-safe."""

    def __init__(self, transport: TokenTransport, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport = transport
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[_Key, threading.Lock] = {}
        self._challenges: dict[str, Challenge] = {}
        self._tokens: dict[_Key, list[_Token]] = {}
        self._refresh_tokens: dict[_Key, str] = {}

    def knows(self, origin: str) -> bool:
        """Whether `origin` (scheme://host:port) has challenged us before."""
        return origin in self._challenges

    def learn(self, origin: str, headers: Iterable[str]) -> bool:
        """Remember the strongest challenge of WWW-Authenticate `headers`; False if there is none we can meet."""
        found = [c for header in headers for c in parse_challenges(header)]
        for scheme in ("bearer", "basic"):
            for challenge in found:
                if challenge.scheme == scheme and (scheme == "basic" or challenge.params.get("realm")):
                    with self._lock:
                        self._challenges[origin] = challenge
                    return True
        return False

    def challenge_scopes(self, origin: str) -> list[Scope]:
        """The scopes that the last challenge of `origin` asked for."""
        challenge = self._challenges.get(origin)
        if challenge is None:
            return []
        return [s for text in challenge.params.get("scope", "").split() if (s := Scope.parse(text)) is not None]

    def authorization(
        self, origin: str, scopes: Iterable[Scope], credential: Callable[[], Credential | None]
    ) -> str | None:
        """The Authorization header for a request, or None to send it without.

        `credential` is called only once `origin` has challenged us. May ask a token server.
        Raises: AuthError, NetworkError, ServerError.
        """
        challenge = self._challenges.get(origin)
        if challenge is None:
            return None
        cred = credential()
        if challenge.scheme == "basic":
            if cred is None:
                return None
            if not cred.username:
                raise AuthError(f"{origin} wants a user name and password, but {cred.origin} holds an identity token")
            return cred.basic
        wanted = merge_scopes(scopes)
        key = _Key(origin, challenge.params["realm"], challenge.params.get("service", ""), cred)
        token = self._cached(key, wanted)
        if token is None:
            with self._lock:
                flight = self._flights.setdefault(key, threading.Lock())
            with flight:
                token = self._cached(key, wanted) or self._fetch(key, wanted)
        return "Bearer " + token.value

    def forget(self, origin: str, authorization: str) -> None:
        """Drop the token that `origin` has refused."""
        value = authorization.removeprefix("Bearer ")
        with self._lock:
            for key, tokens in self._tokens.items():
                if key.origin == origin:
                    tokens[:] = [t for t in tokens if t.value != value]

    def _cached(self, key: _Key, wanted: list[Scope]) -> _Token | None:
        now = self._clock()
        with self._lock:
            tokens = self._tokens.get(key)
            if not tokens:
                return None
            tokens[:] = [t for t in tokens if t.ends_at > now]
            return next((t for t in tokens if t.covers(wanted)), None)

    def _fetch(self, key: _Key, wanted: list[Scope]) -> _Token:
        realm = _safe_realm(key.realm, key.origin, secret=key.credential is not None)
        started = self._clock()
        scope_texts = [str(s) for s in wanted]
        with self._lock:
            refresh = self._refresh_tokens.get(key) or (key.credential.identity_token if key.credential else "")
        if refresh:
            reply = self._oauth2(realm, key, scope_texts, refresh)
        else:
            params = [("service", key.service)] if key.service else []
            params += [("scope", s) for s in scope_texts]
            if key.credential:
                params.append(("account", key.credential.username))
                params.append(("client_id", CLIENT_ID))
            reply = self._transport.get_token(realm, params, key.credential.basic if key.credential else None)
            if reply.status in {404, 405} and key.credential:
                # Token servers that speak OAuth2 only refuse the GET.
                reply = self._oauth2(realm, key, scope_texts, "")
        value, lifetime_s, renewed = _parse_reply(reply, key)
        # A request that starts just before the end must still arrive in time.
        margin_s = min(30.0, lifetime_s / 4)
        token = _Token(value, frozenset(wanted), started + lifetime_s - margin_s)
        with self._lock:
            self._tokens.setdefault(key, []).append(token)
            if renewed:
                self._refresh_tokens[key] = renewed
        return token

    def _oauth2(self, realm: str, key: _Key, scopes: list[str], refresh: str) -> TokenReply:
        form = [("client_id", CLIENT_ID), ("service", key.service)]
        if scopes:
            form.append(("scope", " ".join(scopes)))
        if refresh:
            form += [("grant_type", "refresh_token"), ("refresh_token", refresh)]
        elif key.credential:
            form += [
                ("grant_type", "password"),
                ("username", key.credential.username),
                ("password", key.credential.password),
            ]
        return self._transport.post_token(realm, form)


def merge_scopes(scopes: Iterable[Scope]) -> list[Scope]:
    """The scopes with actions on the same thing united, in the order in which they first appear."""
    merged: dict[tuple[str, str], frozenset[str]] = {}
    for scope in scopes:
        key = (scope.kind, scope.name)
        merged[key] = merged.get(key, frozenset()) | scope.actions
    return [Scope(kind, name, actions) for (kind, name), actions in merged.items()]


def parse_challenges(header: str) -> list[Challenge]:
    """Parse one WWW-Authenticate header: several challenges, tokens, quoted strings, token68 (RFC 7235 section 4.1).

    What is malformed ends the list; what came before it counts.
    """
    text = header[:_MAX_CHALLENGE_CHARS]
    result: list[Challenge] = []
    position, end = 0, len(text)
    params: dict[str, str] = {}
    while position < end:
        position = _skip(text, position, " \t,")
        word, after = _take(text, position, _TCHAR)
        if not word:
            break
        following = _skip(text, after, " \t")
        if result and following < end and text[following] == "=":
            value, position = _value(text, _skip(text, following + 1, " \t"))
            if value is None:
                break
            params.setdefault(word.lower(), value)
            continue
        params = {}
        result.append(Challenge(word.lower(), params))
        position = following
        # token68, as Negotiate has it: one blob up to the comma, "=" only as its padding.
        blob, stop = _take(text, following, _TOKEN68)
        rest = _skip(text, stop, " \t")
        if blob and (rest >= end or text[rest] == ",") and "=" not in blob.rstrip("="):
            position = rest
    return result


def _skip(text: str, position: int, chars: str) -> int:
    while position < len(text) and text[position] in chars:
        position += 1
    return position


def _take(text: str, position: int, chars: frozenset[str]) -> tuple[str, int]:
    start = position
    while position < len(text) and text[position] in chars:
        position += 1
    return text[start:position], position


def _value(text: str, position: int) -> tuple[str | None, int]:
    if position < len(text) and text[position] == '"':
        out: list[str] = []
        position += 1
        while position < len(text):
            char = text[position]
            if char == '"':
                return "".join(out), position + 1
            if char == "\\" and position + 1 < len(text):
                position += 1
                char = text[position]
            out.append(char)
            position += 1
        return None, position
    # Some servers forget the quotes around a URL: read on to the next comma or space.
    start = position
    while position < len(text) and text[position] not in ", \t":
        position += 1
    return text[start:position], position


def _safe_realm(realm: str, origin: str, *, secret: bool) -> str:
    scheme = realm.partition("://")[0].lower()
    if scheme not in {"http", "https"} or not realm.isprintable() or " " in realm:
        raise ServerError(f"{origin} names an unusable token server: {printable(realm, 100)}")
    if secret and scheme == "http" and origin.startswith("https://"):
        raise AuthError(
            f"{origin} asks to send its password to {printable(realm, 100)} without encryption: refused",
            hint="the registry's token realm must be https",
        )
    if _is_near(realm) and not _is_near(origin):
        # What answers there is this machine's, and its token would be sent to the registry.
        raise AuthError(
            f"{origin} names a token server on this machine or link, {printable(realm, 100)}: refused",
            hint="ask who runs the registry",
        )
    return realm


def _is_near(url: str) -> bool:
    """Whether an address is by its spelling this machine's, or link-local, where clouds tell secrets."""
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _parse_reply(reply: TokenReply, key: _Key) -> tuple[str, float, str]:
    realm = printable(key.realm.partition("?")[0], 200)
    whose = f"those in {key.credential.origin}" if key.credential else "none were given"
    if reply.status in {400, 401, 403}:
        hint = "check the credentials, or log in again" if key.credential else "log in with `pybuild login`"
        raise AuthError(
            f"the token server {realm} refused the credentials ({whose}): HTTP {reply.status}",
            hint=hint,
            status=reply.status,
            url=key.realm,
        )
    if reply.status == 404:
        raise NotFoundError(f"the token server {realm} does not exist: HTTP 404", status=404, url=key.realm)
    if reply.status != 200:
        raise RegistryError(f"the token server {realm} answered HTTP {reply.status}", status=reply.status, url=realm)
    try:
        doc = json.loads(reply.body)
    except (ValueError, RecursionError):
        doc = None
    value = (doc.get("token") or doc.get("access_token")) if isinstance(doc, dict) else None
    if not isinstance(doc, dict) or not isinstance(value, str) or not value.isascii() or not value.isprintable():
        raise ServerError(f"the token server {realm} gave no usable token", status=200, url=key.realm)
    lifetime = doc.get("expires_in")
    seconds = _DEFAULT_LIFETIME_S
    if isinstance(lifetime, int | float) and lifetime > 0:
        seconds = float(min(lifetime, _MAX_LIFETIME_S))
    renewed = doc.get("refresh_token")
    return value, seconds, renewed if isinstance(renewed, str) else ""
