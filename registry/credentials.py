"""Credentials: where users keep them, and how `login` and `logout` change them.

Sources, first match wins: the caller's own (`--creds`); the authfile named by flag, alone; else what
the environment holds (`registry.credentialenv`), then the files, in order: `REGISTRY_AUTH_FILE`, or
`$XDG_RUNTIME_DIR/containers/auth.json`, `$XDG_CONFIG_HOME/containers/auth.json`, and
`$DOCKER_CONFIG/config.json` or `~/.docker/config.json`; then a GitLab job's variables. In each file a
credential helper for the host comes before a stored entry, a longer key before a shorter one. No
secret is ever in a message, a repr or an argument list.

Formats: containers-auth.json(5); docker-login; https://github.com/docker/docker-credential-helpers
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from layers.values import NamedTuple
from registry.credentialenv import DOCKER_AUTH_CONFIG, docker_config, gitlab_credentials, own_credential
from registry.errors import AuthError, ConfigError, printable
from registry.reference import DEFAULT_DOMAIN

MAX_AUTHFILE_BYTES = 1 << 20
HUB_LEGACY_KEY = "https://index.docker.io/v1/"
_HUB_KEYS = (DEFAULT_DOMAIN, HUB_LEGACY_KEY, "index.docker.io", "registry-1.docker.io")
AUTH_FILES = "containers-auth.json"
"""registries.conf's word, among its `credential-helpers`, for the files."""
_HELPER_TIMEOUT_S = 60
_TOKEN_USER = "<token>"
_NOT_FOUND = "credentials not found in native keychain"


class Credential:
    """A user name with a password, or an identity token. Immutable; its repr keeps the secret."""

    __slots__ = ("identity_token", "origin", "password", "username")

    username: str
    password: str
    identity_token: str
    origin: str

    def __init__(self, username: str = "", password: str = "", identity_token: str = "", origin: str = "") -> None:
        for name, value in zip(self.__slots__, (identity_token, origin, password, username), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Credential is immutable: {name}")

    @classmethod
    def parse(cls, text: str, origin: str = "--creds") -> Credential:
        """Parse `user:password`, as the flag takes it.

        Raises: ConfigError if there is no user name or no password.
        """
        username, colon, password = text.partition(":")
        if not username or not colon:
            raise ConfigError(f"{origin} must have the form USER:PASSWORD")
        return cls(username, password, origin=origin)

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header (RFC 7617, UTF-8)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credential) and (self.username, self.password, self.identity_token) == (
            other.username,
            other.password,
            other.identity_token,
        )

    def __hash__(self) -> int:
        return hash((self.username, self.password, self.identity_token))

    def __repr__(self) -> str:
        return f"Credential(username={self.username!r}, secret=<redacted>, origin={self.origin!r})"


class Lookup(NamedTuple):
    """One place to look for a credential: `place` and `otherwise` (what it means if nothing is found) in words.

    `ask` raises ConfigError or AuthError if the place is malformed, or its helper fails.
    """

    place: str
    ask: Callable[[], Credential | None]
    otherwise: str = ""


HelperRunner = Callable[[str, str, bytes], tuple[int, bytes, bytes]]
"""(program, verb, stdin) -> (exit code, stdout, stderr). Raises FileNotFoundError if there is no such program."""


class CredentialStore:
    """Finds, saves and erases credentials. Thread-safe; files are read anew at each look-up."""

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        authfile: str | None = None,
        run_helper: HelperRunner | None = None,
        helpers: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._environ: Mapping[str, str] = os.environ if environ is None else environ
        self._authfile = authfile or self._environ.get("REGISTRY_AUTH_FILE") or None
        self._authfile_required = authfile is not None
        self._run_helper = run_helper or _run_helper
        self._helpers = helpers

    def files(self) -> list[str]:
        """The files that are read, in order."""
        if self._authfile:
            return [self._authfile]
        env, home = self._environ, self._environ.get("HOME", "/")
        result = []
        if env.get("XDG_RUNTIME_DIR"):
            result.append(os.path.join(env["XDG_RUNTIME_DIR"], "containers/auth.json"))
        config_home = env.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
        result.append(os.path.join(config_home, "containers/auth.json"))
        docker = env.get("DOCKER_CONFIG") or os.path.join(home, ".docker")
        result.append(os.path.join(docker, "config.json"))
        return result

    def login_file(self) -> str:
        """The file that `save` writes: the authfile, else XDG_RUNTIME_DIR's, else Docker's."""
        files = self.files()
        if self._authfile or self._environ.get("XDG_RUNTIME_DIR"):
            return files[0]
        return files[-1]

    def find(self, registry: str, repository: str = "") -> Credential | None:
        """The credential for a repository of a registry (its name as in references), if there is one.

        Raises: ConfigError if a file is malformed; AuthError if a credential helper fails.
        """
        for lookup in self.lookups(registry, repository):
            found = lookup.ask()
            if found is not None:
                return found
        return None

    def lookups(self, registry: str, repository: str = "") -> Iterator[Lookup]:
        """Where `find` looks, in order. Files are read as they are come to; asking may run a helper."""
        if not self._authfile_required:
            yield from self._in_environment(registry, repository)
        for source in self._helpers() or (AUTH_FILES,):
            if source != AUTH_FILES:
                for key in _helper_keys(registry):
                    yield self._helper_lookup(source, key, "registries.conf")
                continue
            for path in self.files():
                yield from self._in_file(path, registry, repository)
        if not self._authfile_required:
            for variable, user, password in gitlab_credentials(self._environ, registry):
                yield Lookup(variable, partial(Credential, user, password, origin=variable))

    def _in_environment(self, registry: str, repository: str) -> Iterator[Lookup]:
        keys = list(_keys(registry, repository))

        def own() -> Credential | None:
            pair = own_credential(self._environ, keys)
            return None if pair is None else Credential(*pair, origin="PYBUILD_REGISTRY_USER")

        if any(name.startswith("PYBUILD_REGISTRY") for name in self._environ):
            yield Lookup("PYBUILD_REGISTRY", own, "is for another registry")
        if self._environ.get(DOCKER_AUTH_CONFIG):
            load = partial(docker_config, self._environ)
            yield from self._in_document(load, DOCKER_AUTH_CONFIG, registry, repository)

    def _in_file(self, path: str, registry: str, repository: str) -> Iterator[Lookup]:
        return self._in_document(partial(_load, path, required=self._authfile_required), path, registry, repository)

    def _in_document(
        self, load: Callable[[], Mapping[str, Any] | None], path: str, registry: str, repository: str
    ) -> Iterator[Lookup]:
        try:
            doc = load()
            helpers = {} if doc is None else _table(doc, "credHelpers", path)
            auths = {} if doc is None else _table(doc, "auths", path)
        except ConfigError as e:
            yield Lookup(path, partial(_raise, e))
            return
        if doc is None:
            yield Lookup(path, _nothing, "cannot be read" if os.path.lexists(path) else "is not there")
            return
        known = False
        for key in _keys(registry, repository):
            helper = helpers.get(key)
            if isinstance(helper, str) and helper:
                known = True
                yield self._helper_lookup(helper, key, path)
            entry = _entry(auths, key)
            if entry is not None:
                known = True
                yield Lookup(f"{path}, auths[{key!r}]", partial(_decode, entry, key, path), "is empty")
        store = doc.get("credsStore")
        if isinstance(store, str) and store:
            known = True
            for key in _helper_keys(registry):
                yield self._helper_lookup(store, key, path)
        if not known:
            yield Lookup(path, _nothing, f"has nothing for {registry}")

    def _helper_lookup(self, helper: str, key: str, path: str) -> Lookup:
        place = f"docker-credential-{printable(helper)}, named in {path}, asked for {key}"
        return Lookup(place, partial(self._ask, helper, key, path), "knows none")

    def save(self, registry: str, credential: Credential) -> str:
        """Store a credential under `registry` (a host, or host/namespace); returns where it went.

        Atomic; the file's mode is 0600. Raises: ConfigError, AuthError.
        """
        path = self.login_file()
        key = HUB_LEGACY_KEY if registry == DEFAULT_DOMAIN and path.endswith("config.json") else registry
        doc = dict(_load(path, required=False) or {})
        helper = _table(doc, "credHelpers", path).get(key) or doc.get("credsStore")
        if isinstance(helper, str) and helper:
            user = credential.username or _TOKEN_USER
            secret = credential.identity_token or credential.password
            body = json.dumps({"ServerURL": key, "Username": user, "Secret": secret}).encode()
            self._call(helper, "store", body, key)
            return f"docker-credential-{helper}"
        auths = dict(_table(doc, "auths", path))
        raw = f"{credential.username}:{credential.password}".encode()
        entry = {"auth": base64.b64encode(raw).decode()}
        if credential.identity_token:
            entry["identitytoken"] = credential.identity_token
        auths[key] = entry
        doc["auths"] = auths
        _write(path, doc)
        return path

    def erase(self, registry: str) -> list[str]:
        """Forget what is stored for exactly `registry`; returns the places it was removed from."""
        gone = []
        for path in self.files():
            doc = dict(_load(path, required=False) or {})
            auths = dict(_table(doc, "auths", path))
            keys = [k for k in auths if _same_registry(k, registry)]
            if keys:
                for key in keys:
                    del auths[key]
                doc["auths"] = auths
                _write(path, doc)
                gone.append(path)
            for key in _keys(registry, ""):
                helper = _table(doc, "credHelpers", path).get(key) or doc.get("credsStore")
                if isinstance(helper, str) and helper and self._ask(helper, key, path) is not None:
                    self._call(helper, "erase", key.encode(), key)
                    gone.append(f"docker-credential-{helper}")
        return gone

    def erase_all(self) -> list[str]:
        """Forget every credential that files and their helpers keep; returns the places that had any.

        Raises: ConfigError, AuthError.
        """
        gone = []
        for path in self.files():
            doc = dict(_load(path, required=False) or {})
            if _table(doc, "auths", path):
                doc["auths"] = {}
                _write(path, doc)
                gone.append(path)
            keys: dict[str, list[str]] = {}
            for key, helper in _table(doc, "credHelpers", path).items():
                if isinstance(helper, str) and helper and self._ask(helper, key, path) is not None:
                    keys.setdefault(helper, []).append(key)
            store = doc.get("credsStore")
            if isinstance(store, str) and store:
                keys.setdefault(store, []).extend(self._listed(store, path))
            for helper, found in keys.items():
                for key in dict.fromkeys(found):
                    self._call(helper, "erase", key.encode(), key)
                if found:
                    gone.append(f"docker-credential-{helper}")
        return gone

    def _listed(self, helper: str, path: str) -> list[str]:
        """The keys that a helper knows. Raises: AuthError."""
        program, code, out, err = self._spawn(helper, "list", b"", path)
        if code != 0:
            raise _helper_error(program, "list", path, code, err or out)
        try:
            found = json.loads(out or b"{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise AuthError(f"credential helper {program} gave no usable list")
        return [key for key in found if isinstance(key, str)]

    def _ask(self, helper: str, key: str, path: str) -> Credential | None:
        program, code, out, err = self._spawn(helper, "get", key.encode(), key)
        if code != 0:
            said = (out + b" " + err).decode("utf-8", "replace")
            if _NOT_FOUND in said:
                return None
            raise _helper_error(program, "get", key, code, err or out)
        try:
            doc = json.loads(out)
            username, secret = doc["Username"], doc["Secret"]
        except (ValueError, KeyError, TypeError, RecursionError):
            # Not chained: the JSON error would quote the secret.
            raise AuthError(f"credential helper {program} gave no usable answer for {key}") from None
        if not isinstance(username, str) or not isinstance(secret, str):
            raise AuthError(f"credential helper {program} gave no usable answer for {key}")
        if not secret:
            return None
        origin = f"{program} (named in {path})"
        if username == _TOKEN_USER:
            return Credential(identity_token=secret, origin=origin)
        return Credential(username, secret, origin=origin)

    def _call(self, helper: str, verb: str, stdin: bytes, key: str) -> None:
        program, code, out, err = self._spawn(helper, verb, stdin, key)
        if code != 0:
            raise _helper_error(program, verb, key, code, err or out)

    def _spawn(self, helper: str, verb: str, stdin: bytes, key: str) -> tuple[str, int, bytes, bytes]:
        if "/" in helper or not helper.isprintable():
            raise ConfigError(f"{printable(helper)!r} is not the name of a credential helper")
        program = "docker-credential-" + helper
        try:
            code, out, err = self._run_helper(program, verb, stdin)
        except FileNotFoundError as e:
            raise AuthError(
                f"credential helper {program}, configured for {key}, is not installed",
                hint="install it, or remove it from the configuration",
            ) from e
        except OSError as e:
            raise AuthError(f"cannot run credential helper {program}: {e.strerror}") from e
        return program, code, out, err


def _run_helper(program: str, verb: str, stdin: bytes) -> tuple[int, bytes, bytes]:
    import subprocess

    try:
        done = subprocess.run([program, verb], input=stdin, capture_output=True, check=False, timeout=_HELPER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AuthError(f"credential helper {program} did not answer within {_HELPER_TIMEOUT_S} s") from None
    return done.returncode, done.stdout, done.stderr


def _nothing() -> None:
    return None


def _raise(error: Exception) -> NoReturn:
    raise error


def _helper_error(program: str, verb: str, key: str, code: int, said: bytes) -> AuthError:
    what = printable(said.decode("utf-8", "replace")) or "it said nothing"
    return AuthError(f"credential helper {program} {verb} failed for {key} with exit code {code}: {what}")


def _keys(registry: str, repository: str) -> Iterator[str]:
    """The keys that may hold a credential, the most specific first."""
    path = repository
    while path:
        yield f"{registry}/{path}"
        path = path.rpartition("/")[0]
    if registry == DEFAULT_DOMAIN:
        yield from _HUB_KEYS
    else:
        yield registry


def _helper_keys(registry: str) -> tuple[str, ...]:
    """What a helper may know a registry as; each costs a process, so the likeliest comes first."""
    return (HUB_LEGACY_KEY, DEFAULT_DOMAIN) if registry == DEFAULT_DOMAIN else (registry,)


def _entry(auths: Mapping[str, Any], key: str) -> Any:
    if key in auths:
        return auths[key]
    # docker login once stored URLs, such as https://host/v1/: compare those by their host.
    if "/" not in key:
        for stored, entry in auths.items():
            if "://" in stored and _host_of(stored) == key:
                return entry
    return None


def _host_of(key: str) -> str:
    return key.partition("://")[2].partition("/")[0] if "://" in key else key


def _same_registry(key: str, registry: str) -> bool:
    if key == registry or (registry == DEFAULT_DOMAIN and key in _HUB_KEYS):
        return True
    return "://" in key and _host_of(key) == registry


def _decode(entry: Any, key: str, path: str) -> Credential | None:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: the entry for {key} is not an object")
    token = entry.get("identitytoken") or ""
    auth = entry.get("auth") or ""
    username, password = entry.get("username") or "", entry.get("password") or ""
    if not all(isinstance(v, str) for v in (token, auth, username, password)):
        raise ConfigError(f"{path}: the entry for {key} is malformed")
    if auth:
        try:
            username, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError(f"{path}: the auth of {key} is not base64 of user:password") from None
        if not colon:
            raise ConfigError(f"{path}: the auth of {key} is not base64 of user:password")
        password = password.rstrip("\0")
    if not token and not username:
        return None
    return Credential(username, password, token, origin=path)


def _table(doc: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    value = doc.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is not an object")
    return value


def _load(path: str, *, required: bool) -> Mapping[str, Any] | None:
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_AUTHFILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as e:
        if required:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        return None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if len(raw) > MAX_AUTHFILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_AUTHFILE_BYTES} bytes")
    if not raw.strip():
        return {}
    try:
        doc = json.loads(raw)
    except (ValueError, RecursionError):
        # Not chained: the decoder's error carries the document.
        raise ConfigError(f"{path} is not valid JSON") from None
    if not isinstance(doc, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return doc


def _write(path: str, doc: Mapping[str, Any]) -> None:
    # A symbolic link (dotfile managers make them) stays one: its target is what is replaced.
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".{os.path.basename(path)}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(json.dumps(doc, indent="\t").encode() + b"\n")
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}") from e
