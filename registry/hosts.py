"""Where the content of a reference is: endpoints, in the order in which they are tried.

What decides: the caller's flags (`RegistryOptions`), registries.conf v2 with its drop-ins (parsed by
`registry.registriesconf`), certs.d, and Docker's rule that a registry on this machine may speak
plain http. Files are read, the network is not. The environment is a parameter.

Formats: containers-registries.conf(5), containers-certs.d(5)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from layers.values import NamedTuple
from registry.errors import ConfigError
from registry.reference import DEFAULT_DOMAIN, Reference, is_short_name

if TYPE_CHECKING:
    from registry.credentials import Credential
    from registry.policy import Policy
    from registry.registriesconf import RegistriesConf, RegistryTable
    from registry.retry import RetryPolicy

DOCKER_HUB_HOST = "registry-1.docker.io"


class RegistryOptions(NamedTuple):
    """What the flags of a command say about registries.

    `tls_verify` None means: as configured. `cert_dir` holds `*.crt`, `*.cert` and `*.key` and stands
    in for certs.d; `ca_file` and `client_cert`/`client_key` add to it. `anonymous` sends no credentials.
    `registries_conf` and `signature_policy` name files that stand in for registries.conf and policy.json.
    """

    tls_verify: bool | None = None
    cert_dir: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    authfile: str | None = None
    creds: Credential | None = None
    anonymous: bool = False
    registries_conf: str | None = None
    signature_policy: str | None = None
    retry: RetryPolicy | None = None
    """How often, and after how long, what may yet succeed is tried again; None is the client's own way."""


class TlsConfig(NamedTuple):
    """How to speak TLS to a host; hashable, so that connections are pooled by it."""

    verify: bool = True
    ca_files: tuple[str, ...] = ()
    client_cert: str | None = None
    client_key: str | None = None


class Endpoint(NamedTuple):
    """One place to ask for a repository.

    `schemes` are tried in order until one answers. `host` is what is connected to, `registry` the
    name that credentials are stored under. `origin` tells people which setting led here.
    """

    schemes: tuple[str, ...]
    host: str
    registry: str
    repository: str
    tls: TlsConfig
    origin: str
    mirror: bool = False

    @property
    def insecure(self) -> bool:
        return not self.tls.verify or "http" in self.schemes


class HostConfig:
    """Resolves references to endpoints. Thread-safe: it is read-only once the files are loaded."""

    def __init__(self, options: RegistryOptions | None = None, environ: Mapping[str, str] | None = None) -> None:
        self.options = options or RegistryOptions()
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self._conf: RegistriesConf | None = None
        self._names: RegistriesConf | None = None
        self._policy: Policy | None = None

    @property
    def conf(self) -> RegistriesConf:
        """The merged registries.conf but for files of aliases alone, read at first use.

        Raises: ConfigError if a file is malformed.
        """
        if self._conf is None:
            from registry.registriesconf import load_registries_conf

            self._conf = load_registries_conf(self.options.registries_conf, self.environ, aliases=False)
        return self._conf

    @property
    def names(self) -> RegistriesConf:
        """The whole of registries.conf, aliases included, read at first use. Raises: ConfigError."""
        if self._names is None:
            from registry.registriesconf import load_registries_conf

            self._names = load_registries_conf(self.options.registries_conf, self.environ)
        return self._names

    @property
    def policy(self) -> Policy:
        """The policy.json that says which images may be pulled, read at first use.

        Raises: ConfigError if it is malformed.
        """
        if self._policy is None:
            from registry.policy import load_policy

            self._policy = load_policy(self.environ, self.options.signature_policy)
        return self._policy

    def resolve_endpoints(self, ref: Reference, *, for_pull: bool) -> list[Endpoint]:
        """The endpoints of `ref`, first to last; never empty.

        Mirrors and rewritten locations serve pulls only, as containers tools have it.

        Raises: ConfigError if the configuration blocks the registry.
        """
        table = self.conf.find(ref)
        if table is None:
            return [self._endpoint(ref.domain, ref.path, insecure=False, origin="default")]
        if table.blocked and for_pull:
            raise ConfigError(f"{ref.repository} is blocked by {table.origin}")
        endpoints: list[Endpoint] = []
        if for_pull:
            for mirror in table.mirrors:
                if not mirror.serves(ref, digest_only=table.mirror_by_digest_only):
                    continue
                domain, path = _rewrite(ref, table, mirror.location)
                endpoints.append(
                    self._endpoint(domain, path, insecure=mirror.insecure, origin=mirror.origin, mirror=True)
                )
        domain, path = _rewrite(ref, table, table.location) if for_pull else (ref.domain, ref.path)
        endpoints.append(self._endpoint(domain, path, insecure=table.insecure, origin=table.origin))
        return endpoints

    def resolve_name(self, text: str, *, interactive: bool = False) -> list[Reference]:
        """The references that `text` may mean, in the order in which to try them.

        A name with a registry, or a configuration without aliases and search registries, gives
        exactly what `Reference.parse` gives.

        Raises: InvalidReference; ConfigError if `short-name-mode` is enforcing and the name ambiguous.
        """
        parsed = Reference.parse(text)
        if not is_short_name(text):
            return [parsed]
        name = text.partition("@")[0].partition(":")[0]
        alias = self.names.aliases.get(name)
        if alias is not None:
            base = Reference.parse(alias[0])
            return [base._replace(tag=parsed.tag, digest=parsed.digest)]
        search = self.names.search
        if not search:
            return [parsed]
        if self.names.short_name_mode == "enforcing" and len(search) > 1 and not interactive:
            raise ConfigError(
                f"short name {text!r} is ambiguous: {', '.join(search)}",
                hint="write the registry's host in front of it, or add an alias to registries.conf",
            )
        return [Reference.parse(f"{host}/{text}") for host in search]

    def name_origin(self, text: str) -> str:
        """What makes a name without a registry mean what `resolve_name` says; "" for one with a registry."""
        if not is_short_name(text):
            return ""
        alias = self.names.aliases.get(text.partition("@")[0].partition(":")[0])
        if alias is not None:
            return f"alias of {alias[1]}"
        return f"search registries of {self.names.search_origin}" if self.names.search else "default registry"

    def tls_for(self, host: str, *, insecure: bool) -> TlsConfig:
        """The TLS settings for a host; `insecure` as a configuration or the caller's endpoint says."""
        options = self.options
        ca_files, cert, key = self._certs(host)
        if options.ca_file:
            ca_files = (*ca_files, options.ca_file)
        if options.client_cert:
            cert, key = options.client_cert, options.client_key or options.client_cert
        verify = options.tls_verify if options.tls_verify is not None else not insecure
        return TlsConfig(verify, ca_files if verify else (), cert, key)

    def _endpoint(self, domain: str, path: str, *, insecure: bool, origin: str, mirror: bool = False) -> Endpoint:
        host = DOCKER_HUB_HOST if domain == DEFAULT_DOMAIN else domain
        wanted = self.options.tls_verify
        tls = self.tls_for(domain, insecure=insecure)
        schemes: tuple[str, ...] = ("https",)
        local = is_loopback(domain)
        if wanted is None and local and not tls.ca_files:
            # Docker's rule: plain http is allowed on this machine, so a certificate proves nothing.
            insecure, tls = True, tls._replace(verify=False)
        if wanted is False or (wanted is None and insecure):
            # A plain server may wait for ever for the line that a TLS greeting is not; a TLS server
            # refuses plain http at once. What does not leave the machine need not be tried encrypted first.
            schemes = ("http", "https") if local else ("https", "http")
        if wanted is False:
            origin = f"{origin}, --tls-verify=false"
        return Endpoint(schemes, host, domain, path, tls, origin, mirror)

    def _certs(self, host: str) -> tuple[tuple[str, ...], str | None, str | None]:
        """CA files and the first client pair of the first directory that certs.d has for the host."""
        if self.options.cert_dir:
            found = _read_cert_dir(self.options.cert_dir)
            if found is None:
                raise ConfigError(f"cannot read the certificate directory {self.options.cert_dir}")
            return found
        home = self.environ.get("XDG_CONFIG_HOME") or os.path.join(self.environ.get("HOME", "/"), ".config")
        for base in (os.path.join(home, "containers/certs.d"), "/etc/containers/certs.d", "/etc/docker/certs.d"):
            found = _read_cert_dir(os.path.join(base, host))
            if found is not None:
                return found
        return (), None, None


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine by its spelling: localhost, 127.0.0.0/8 or ::1."""
    name, _port = split_port(host)
    if name == "localhost" or name.endswith(".localhost") or name == "::1":
        return True
    parts = name.split(".")
    return len(parts) == 4 and parts[0] == "127" and all(_is_octet(p) for p in parts)


def _is_octet(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 4 and int(text) < 256


def split_port(host: str) -> tuple[str, int | None]:
    """Split `host[:port]`; brackets of an IPv6 address are removed."""
    name, colon, port = host.rpartition(":")
    if not colon or port.endswith("]") or not (port.isascii() and port.isdigit() and len(port) < 9):
        name, port = host, ""
    return name.strip("[]"), int(port) if port else None


def _rewrite(ref: Reference, table: RegistryTable, location: str) -> tuple[str, str]:
    if not location:
        return ref.domain, ref.path
    text = location + ref.repository[table.match_length(ref) :]
    _domain, slash, path = text.partition("/")
    if not slash or not path:
        raise ConfigError(f"{table.origin}: location {location!r} leaves no repository name for {ref.repository}")
    target = Reference.parse(text)
    return target.domain, target.path


def _read_cert_dir(path: str) -> tuple[tuple[str, ...], str | None, str | None] | None:
    try:
        names = sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    authorities = tuple(os.path.join(path, n) for n in names if n.endswith(".crt"))
    for name in names:
        if name.endswith(".cert"):
            key = os.path.join(path, name[:-5] + ".key")
            if not os.path.exists(key):
                raise ConfigError(f"{os.path.join(path, name)} has no key {key} beside it")
            return authorities, os.path.join(path, name), key
    for name in names:
        if name.endswith(".key"):
            raise ConfigError(f"{os.path.join(path, name)} has no certificate {name[:-4]}.cert beside it")
    return authorities, None, None
