"""Requests to an endpoint as the distribution-spec means them: authenticated, retried, errors classed.

`Wire` joins the parts: scheme probing, challenges, tokens, back-off, and the mapping from answers to
`registry.errors`. `registry.client`, `registry.blobs` and `registry.uploads` speak through it alone.
Thread-safe.

Spec: https://github.com/opencontainers/distribution-spec/blob/main/spec.md (Error Codes, Authentication)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from urllib.parse import quote, urlencode, urlsplit

from layers.values import NamedTuple
from registry.auth import MAX_TOKEN_REPLY_BYTES, Authenticator, Scope, TokenReply
from registry.credentials import Credential, CredentialStore
from registry.errors import (
    AuthError,
    NetworkError,
    NotFoundError,
    RateLimitError,
    RegistryError,
    ServerError,
    printable,
    redact_url,
)
from registry.hosts import Endpoint, HostConfig
from registry.http import HttpClient, HttpResponse, Request, Timeouts, join_url, origin_of
from registry.retry import RETRYABLE_STATUSES, Pacer, RetryPolicy, parse_retry_after

MAX_ERROR_BYTES = 1 << 16
_MIRROR_ATTEMPTS = 2
_REFUSED_ATTEMPTS = 3


class Reply(NamedTuple):
    """An answer with its body read."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class Call(NamedTuple):
    """A request to an endpoint. `path` is relative to `/v2/`, or an absolute URL that the registry gave us."""

    method: str
    path: str
    what: str
    scopes: tuple[Scope, ...]
    ok: Collection[int] = (200,)
    headers: Mapping[str, str] = {}
    body: Callable[[], Iterable[bytes]] | None = None
    length: int | None = None
    attempts: int | None = None


class RateLimit(NamedTuple):
    """Pulls left, by Docker Hub's `ratelimit-*` headers; `window_s` 0 if not said."""

    limit: int
    remaining: int
    window_s: int
    source: str = ""


class Wire:
    """Speaks to endpoints."""

    def __init__(
        self,
        hosts: HostConfig,
        pacer: Pacer,
        *,
        policy: RetryPolicy | None = None,
        timeouts: Timeouts | None = None,
        credentials: CredentialStore | None = None,
    ) -> None:
        self.hosts = hosts
        self.pacer = pacer
        self.policy = policy or RetryPolicy()
        self.http = HttpClient(
            hosts.environ, pacer, timeouts=timeouts, tls_for=lambda host: hosts.tls_for(host, insecure=False)
        )
        self._store = credentials or CredentialStore(
            hosts.environ, authfile=hosts.options.authfile, helpers=lambda: hosts.conf.credential_helpers
        )
        self._auth = Authenticator(_TokenHttp(self), clock=pacer.clock)
        self._lock = threading.Lock()
        self._bases: dict[tuple[str, tuple[str, ...]], str] = {}
        self._probes: dict[tuple[str, tuple[str, ...]], threading.Lock] = {}
        self._found: dict[tuple[str, str], Credential | None] = {}
        self.rate_limits: dict[str, RateLimit] = {}

    def base(self, endpoint: Endpoint) -> str:
        """`scheme://host` of an endpoint; probes once where plain http is allowed.

        Raises: NetworkError.
        """
        if len(endpoint.schemes) == 1:
            return f"{endpoint.schemes[0]}://{endpoint.host}"
        key = (endpoint.host, endpoint.schemes)
        with self._lock:
            known = self._bases.get(key)
            probe = self._probes.setdefault(key, threading.Lock())
        if known:
            return known
        with probe:
            known = self._bases.get(key)
            if known is None:
                known = self._bases[key] = self._probe(endpoint)
        return known

    def _probe(self, endpoint: Endpoint) -> str:
        first_error: NetworkError | None = None
        misspoken = False
        for scheme in endpoint.schemes:
            base = f"{scheme}://{endpoint.host}"
            try:
                response = self.http.send(Request("GET", base + "/v2/", tls=endpoint.tls, follow=False))
            except NetworkError as e:
                if first_error is None or misspoken:
                    first_error = e
                continue
            status = response.status
            if status == 401:
                self._auth.learn(origin_of(base), response.header_values("WWW-Authenticate"))
            to_https = response.header("Location").startswith("https://") and 300 <= status < 400
            response.discard()
            if scheme == "http" and (status == 400 or to_https):
                # So TLS servers answer plain http: https is right, and its error tells what is wrong.
                misspoken = True
                continue
            return base
        raise first_error or NetworkError(f"{endpoint.host} speaks neither http nor https", retryable=True)

    def fetch(self, endpoint: Endpoint, call: Call, *, limit: int = MAX_ERROR_BYTES) -> Reply:
        """Send and read the whole answer, at most `limit` bytes; a truncated one is fetched again.

        Raises: RegistryError by class; SizeMismatch for a body over `limit`; Cancelled.
        """
        failures = 0
        while True:
            with self.open(endpoint, call) as response:
                try:
                    body = response.read_all(limit, call.what)
                    return Reply(response.status, response.headers, body, response.url)
                except NetworkError as e:
                    failures += 1
                    if not e.retryable or failures >= self._attempts(endpoint, call):
                        raise
            self.pacer.wait(self.policy.delay_s(failures, self.pacer.jitter))

    def open(self, endpoint: Endpoint, call: Call) -> HttpResponse:
        """Send until the status is one of `call.ok`; the body is left to the caller, who closes it.

        Raises: RegistryError by class; Cancelled; what the call's body raises.
        """
        failures, refusals = 0, 0
        demanded: list[Scope] = []
        while True:
            try:
                response, sent = self._send(endpoint, call, demanded)
            except NetworkError as e:
                failures += 1
                allowed = self._attempts(endpoint, call)
                if isinstance(e.__cause__, ConnectionRefusedError):
                    allowed = min(allowed, _REFUSED_ATTEMPTS)
                if not e.retryable or failures >= allowed:
                    raise
                self.pacer.wait(self.policy.delay_s(failures, self.pacer.jitter))
                continue
            self._note_rate_limit(endpoint, response)
            if response.status in call.ok:
                return response
            if response.status == 401 and refusals < 2 and self._answer_challenge(endpoint, response, sent):
                refusals += 1
                # The registry knows best what it wants, above all where its names are not the URL's.
                demanded = self._auth.challenge_scopes(origin_of(response.url))
                response.discard()
                continue
            error = self._error(endpoint, call, response)
            failures += 1
            wait_s = self._wait_s(error, failures)
            if not error.retryable or failures >= self._attempts(endpoint, call) or wait_s is None:
                raise error
            self.pacer.wait(wait_s)

    def _send(self, endpoint: Endpoint, call: Call, demanded: Sequence[Scope]) -> tuple[HttpResponse, str | None]:
        base = self.base(endpoint)
        url = call.path if "://" in call.path else f"{base}/v2/{call.path}"
        url = _upgraded(url, base)
        if base.startswith("https://") and url.startswith("http://") and endpoint.tls.verify:
            raise ServerError(
                f"{call.what}: the registry leads from https to http: refused",
                url=url,
                hint="--tls-verify=false allows it",
            )
        headers = dict(call.headers)
        origin = origin_of(base)
        authorization = None
        if origin_of(url) == origin:
            scopes = (*call.scopes, *demanded)
            authorization = self._auth.authorization(origin, scopes, lambda: self.credential(endpoint))
        if authorization:
            headers["Authorization"] = authorization
        request = Request(call.method, url, headers, call.body, call.length, endpoint.tls)
        return self.http.send(request), authorization

    def _answer_challenge(self, endpoint: Endpoint, response: HttpResponse, sent: str | None) -> bool:
        """Whether the request can be sent again with other credentials than `sent`."""
        base = self.base(endpoint)
        origin = origin_of(base)
        if origin_of(response.url) != origin:
            return False
        if not self._auth.learn(origin, response.header_values("WWW-Authenticate")):
            return False
        if sent is None:
            return True
        if sent.startswith("Bearer "):
            self._auth.forget(origin, sent)
            return True
        # What a helper gave may have ended (ECR's does after twelve hours): ask it once more.
        before = self.credential(endpoint)
        with self._lock:
            self._found.pop((endpoint.registry, endpoint.repository), None)
        return self.credential(endpoint) != before

    def credential(self, endpoint: Endpoint) -> Credential | None:
        """The credential for an endpoint's repository, looked up once per client.

        Raises: ConfigError, AuthError.
        """
        options = self.hosts.options
        if options.anonymous:
            return None
        if options.creds is not None:
            # Given for the registry that the user named, not for the mirrors of a configuration.
            return None if endpoint.mirror else options.creds
        key = (endpoint.registry, endpoint.repository)
        with self._lock:
            if key in self._found:
                return self._found[key]
        found = self._store.find(*key)
        with self._lock:
            self._found[key] = found
        return found

    def _attempts(self, endpoint: Endpoint, call: Call) -> int:
        allowed = call.attempts or self.policy.attempts
        return min(allowed, _MIRROR_ATTEMPTS) if endpoint.mirror else allowed

    def _wait_s(self, error: RegistryError, failures: int) -> float | None:
        delay = self.policy.delay_s(failures, self.pacer.jitter)
        if isinstance(error, RateLimitError):
            if error.retry_after_s is None:
                return delay * 4
            return None if error.retry_after_s > self.policy.max_retry_after_s else max(delay, error.retry_after_s)
        return delay

    def _note_rate_limit(self, endpoint: Endpoint, response: HttpResponse) -> None:
        remaining = response.header("ratelimit-remaining")
        if not remaining:
            return
        count, window = _rate(remaining)
        limit, limit_window = _rate(response.header("ratelimit-limit"))
        source = printable(response.header("docker-ratelimit-source"), 100)
        self.rate_limits[endpoint.registry] = RateLimit(limit, count, window or limit_window, source)

    def _error(self, endpoint: Endpoint, call: Call, response: HttpResponse) -> RegistryError:
        """Class an answer that is not what the call wants; consumes it."""
        status, url = response.status, response.url
        retry_after = response.header("Retry-After")
        try:
            body = response.read_all(MAX_ERROR_BYTES, "error")
        except Exception:  # noqa: BLE001  the status alone must do
            body = b""
        response.close()
        codes, said = parse_error_body(body)
        text = f"{call.what}: HTTP {status}" + (f" {said}" if said else "")
        if status in {401, 403}:
            return AuthError(text, status=status, codes=codes, url=url, hint=self._auth_hint(endpoint, status))
        if status == 404:
            return NotFoundError(text, status=status, codes=codes, url=url)
        if status == 429:
            limit = self.rate_limits.get(endpoint.registry)
            advice = "wait, or log in: registries allow more to users they know"
            if limit is not None:
                advice = f"{limit.remaining} of {limit.limit} pulls left; " + advice
            wait_s = parse_retry_after(retry_after)
            return RateLimitError(text, codes=codes, url=url, retry_after_s=wait_s, hint=advice)
        retryable = status in RETRYABLE_STATUSES
        if status >= 500 or status < 400:
            return ServerError(text, status=status, codes=codes, url=url, retryable=retryable)
        hint = "the registry does not allow this" if status == 405 or "UNSUPPORTED" in codes else None
        return RegistryError(text, status=status, codes=codes, url=url, retryable=retryable, hint=hint)

    def _auth_hint(self, endpoint: Endpoint, status: int) -> str:
        try:
            found = self.credential(endpoint)
        except RegistryError:
            found = None
        if found is None:
            return f"log in with `pybuild login {endpoint.registry}`"
        verb = "do not suffice" if status == 403 else "were not accepted"
        return f"the credentials {f'in {found.origin}' if found.origin else 'given'} {verb}"


class _TokenHttp:
    """Asks token servers for `registry.auth`: no redirects, so that no secret goes elsewhere."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def get_token(self, url: str, params: list[tuple[str, str]], authorization: str | None) -> TokenReply:
        headers = {"Authorization": authorization} if authorization else {}
        query = urlencode(params, quote_via=quote)
        full = url + ("&" if "?" in url else "?") + query if query else url
        return self._ask(Request("GET", full, headers, follow=authorization is None))

    def post_token(self, url: str, form: list[tuple[str, str]]) -> TokenReply:
        data = urlencode(form, quote_via=quote).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._ask(Request("POST", url, headers, lambda: iter((data,)), len(data), follow=False))

    def _ask(self, request: Request) -> TokenReply:
        wire = self._wire
        host = urlsplit(request.url).netloc.rpartition("@")[2]
        request = request._replace(tls=wire.hosts.tls_for(host, insecure=wire.hosts.options.tls_verify is False))
        failures = 0
        while True:
            try:
                with wire.http.send(request) as response:
                    status = response.status
                    body = response.read_all(MAX_TOKEN_REPLY_BYTES, "token reply")
                    wait = parse_retry_after(response.header("Retry-After"))
                if status not in RETRYABLE_STATUSES:
                    return TokenReply(status, body)
                place = redact_url(request.url)
                error: RegistryError = ServerError(
                    f"the token server {place} answered HTTP {status}", status=status, url=request.url, retryable=True
                )
                if status == 429:
                    error = RateLimitError(
                        f"the token server {place} wants fewer requests", url=request.url, retry_after_s=wait
                    )
            except NetworkError as e:
                error = e
            failures += 1
            delay = wire._wait_s(error, failures)
            if not error.retryable or failures >= wire.policy.attempts or delay is None:
                raise error
            wire.pacer.wait(delay)


def parse_error_body(body: bytes) -> tuple[tuple[str, ...], str]:
    """The error codes and a printable text of a distribution-spec error document; empty for anything else."""
    try:
        doc = json.loads(body)
    except (ValueError, RecursionError):
        return (), ""
    errors = doc.get("errors") if isinstance(doc, dict) else None
    if not isinstance(errors, list):
        return (), ""
    codes, texts = [], []
    for entry in errors[:5]:
        if not isinstance(entry, dict):
            continue
        code, message = entry.get("code"), entry.get("message")
        if isinstance(code, str):
            codes.append(printable(code, 60))
        detail = entry.get("detail")
        about = detail if isinstance(detail, str) and detail.startswith("sha256:") else None
        parts = [printable(p, 200) for p in (code, message, about) if isinstance(p, str) and p]
        texts.append(": ".join(parts))
    return tuple(codes), printable("; ".join(dict.fromkeys(t for t in texts if t)), 500)


def _rate(text: str) -> tuple[int, int]:
    """Parse `100;w=21600`."""
    count, _, window = text.partition(";w=")
    return _count(count), _count(window)


def _count(text: str) -> int:
    """A number of a header; 0 for what is none, or absurd."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _upgraded(url: str, base: str) -> str:
    """Registries behind a TLS proxy that they do not know of give http:// Locations of themselves: use https."""
    if base.startswith("https://") and url.startswith("http://"):
        host = base[len("https://") :]
        if urlsplit(url).netloc.lower() in {host.lower(), host.lower().removesuffix(":443")}:
            return "https://" + url[len("http://") :]
    return url


def location_of(response: HttpResponse | Reply, what: str) -> str:
    """The absolute form of an answer's Location.

    Raises: ServerError if there is none.
    """
    location = response.headers.get("Location", "")
    if not location:
        raise ServerError(f"{what}: the registry gave no Location", status=response.status, url=response.url)
    return join_url(response.url, location)
