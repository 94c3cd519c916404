"""registries.conf: the file, its drop-ins, and the table that a reference matches.

Versions 1 and 2 of the format are read; everything known keeps the file and line that set it, for
`registry explain`. What the tables mean for a request is `registry.hosts`' business.

Formats: containers-registries.conf(5), containers-registries.conf.d(5)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from layers.errors import PybuildError
from layers.values import NamedTuple
from registry.errors import ConfigError
from registry.reference import Reference, is_short_name

MAX_CONF_BYTES = 1 << 20
SYSTEM_CONF = "/etc/containers/registries.conf"
_MODES = ("enforcing", "permissive", "disabled")
_PULL_FROM = ("all", "digest-only", "tag-only")
_SEARCH = "unqualified-search-registries"


class Mirror(NamedTuple):
    location: str
    insecure: bool
    pull_from: str
    origin: str

    def serves(self, ref: Reference, *, digest_only: bool) -> bool:
        """Whether this mirror may be asked for `ref` (`pull-from-mirror`, `mirror-by-digest-only`)."""
        by_digest = ref.digest is not None
        if digest_only or self.pull_from == "digest-only":
            return by_digest
        return not (by_digest and self.pull_from == "tag-only")


class RegistryTable(NamedTuple):
    prefix: str
    location: str
    insecure: bool
    blocked: bool
    mirror_by_digest_only: bool
    mirrors: tuple[Mirror, ...]
    origin: str

    def match_length(self, ref: Reference) -> int:
        """How many characters of `ref.repository` the prefix covers; -1 if it does not match."""
        text = ref.canonical()
        if self.prefix.startswith("*."):
            # The wildcard stands for one or more labels of the host, never for a part of the path.
            tail = self.prefix[1:]
            end = len(ref.domain.partition(":")[0])
            return end if ref.domain[:end].endswith(tail) and end > len(tail) else -1
        if not text.startswith(self.prefix):
            return -1
        following = text[len(self.prefix) : len(self.prefix) + 1]
        if following not in {"", "/", ":", "@"} or (following == ":" and len(self.prefix) < len(ref.domain)):
            return -1
        return min(len(self.prefix), len(ref.repository))


class RegistriesConf(NamedTuple):
    tables: tuple[RegistryTable, ...] = ()
    search: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, str]] = {}
    """What each short name means, and the file and line that say so."""
    search_origin: str = ""
    short_name_mode: str = "permissive"
    credential_helpers: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def find(self, ref: Reference) -> RegistryTable | None:
        """The table with the longest prefix that matches, if any."""
        best, best_length = None, -1
        for table in self.tables:
            if table.match_length(ref) >= 0 and len(table.prefix) > best_length:
                best, best_length = table, len(table.prefix)
        return best


def load_registries_conf(explicit: str | None, environ: Mapping[str, str], *, aliases: bool = True) -> RegistriesConf:
    """Read and merge the configuration that applies.

    `aliases` False leaves out files that hold nothing but short names' aliases: distributions ship
    hundreds, which only a short name needs.

    The main file is `explicit`, or `CONTAINERS_REGISTRIES_CONF`, or the user's, or the system's;
    the drop-ins of the system and then the user follow, unless the file was named explicitly.

    Raises: ConfigError if a file is malformed, or named explicitly and unreadable.
    """
    named = explicit or environ.get("CONTAINERS_REGISTRIES_CONF") or environ.get("REGISTRIES_CONFIG_PATH")
    config_home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    user = os.path.join(config_home, "containers/registries.conf")
    conf = RegistriesConf()
    if named:
        return _merge(conf, _read(named, required=True), named)
    main = user if os.path.exists(user) else SYSTEM_CONF
    drop_ins = [os.path.join(d, name) for d in (SYSTEM_CONF + ".d", user + ".d") for name in _drop_ins(d)]
    for path in (main, *drop_ins):
        document = _read(path, required=False)
        if document is not None and _says_more(document, aliases=aliases):
            conf = _merge(conf, document, path)
    return conf


def _says_more(text: str, *, aliases: bool) -> bool:
    """Whether a file has more than comments, and more than aliases if those are not wanted."""
    idle = ("#",) if aliases else ("#", "[aliases]", '"')
    return any(line and not line.startswith(idle) for line in map(str.strip, text.splitlines()))


def _drop_ins(directory: str) -> list[str]:
    try:
        return sorted(n for n in os.listdir(directory) if n.endswith(".conf"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _read(path: str, *, required: bool) -> str | None:
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_CONF_BYTES + 1)
    except FileNotFoundError:
        if not required:
            return None
        raise ConfigError(f"cannot read {path}: no such file") from None
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if len(data) > MAX_CONF_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONF_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8") from e


def _merge(conf: RegistriesConf, text: str | None, path: str) -> RegistriesConf:
    import tomllib

    try:
        doc = tomllib.loads(text or "")
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{path}: {e}") from e
    reader = _Reader(path, text or "")
    if isinstance(doc.get("registries"), dict):
        tables, search = reader.version_1(doc["registries"])
    else:
        tables, search = reader.tables(doc), reader.strings(doc, _SEARCH)
    merged = {t.prefix: t for t in conf.tables}
    merged.update((t.prefix, t) for t in tables)
    aliases = dict(conf.aliases)
    for name, value in reader.aliases(doc):
        if value:
            aliases[name] = (value, reader.line_of(name))
        else:
            aliases.pop(name, None)
    mode = doc.get("short-name-mode") or conf.short_name_mode
    if mode not in _MODES:
        raise ConfigError(f"{path}: short-name-mode {mode!r} is none of {', '.join(_MODES)}")
    return RegistriesConf(
        tables=tuple(merged.values()),
        search=conf.search if search is None else search,
        aliases=aliases,
        search_origin=conf.search_origin if search is None else reader.line_of(_SEARCH, "search", "registries"),
        short_name_mode=mode,
        credential_helpers=reader.strings(doc, "credential-helpers") or conf.credential_helpers,
        files=(*conf.files, path),
    )


class _Reader:
    """Typed access to one file's document, with the file and line in every complaint."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()
        # tomllib keeps no positions: the headers are found again, in order, to name lines to people.
        self.headers = [
            (number, "mirror" in line)
            for number, line in enumerate(self.lines, 1)
            if re.match(r"\s*\[\[\s*registry(?:\s*\.\s*mirror)?\s*\]\]", line)
        ]

    def tables(self, doc: Mapping[str, Any]) -> list[RegistryTable]:
        lines = iter(self.headers)
        result = []
        for raw in self.objects(doc.get("registry", []), "registry"):
            origin = self.origin(lines, mirror=False)
            location = self.text(raw, "location", origin)
            prefix = self.text(raw, "prefix", origin) or location
            if not prefix:
                raise ConfigError(f"{origin}: a [[registry]] needs a prefix or a location")
            if "*" in prefix and (not re.fullmatch(r"\*(?:\.[A-Za-z0-9-]+)+", prefix)):
                raise ConfigError(f"{origin}: wildcard prefix {prefix!r} must have the form *.example.com")
            mirrors = []
            for mirror in self.objects(raw.get("mirror", []), "mirror"):
                where = self.origin(lines, mirror=True)
                pull_from = self.text(mirror, "pull-from-mirror", where) or "all"
                if pull_from not in _PULL_FROM:
                    raise ConfigError(f"{where}: pull-from-mirror {pull_from!r} is none of {', '.join(_PULL_FROM)}")
                target = self.location(self.text(mirror, "location", where), where)
                if not target:
                    raise ConfigError(f"{where}: a mirror needs a location")
                mirrors.append(Mirror(target, self.flag(mirror, "insecure", where), pull_from, where))
            result.append(
                RegistryTable(
                    prefix=prefix.rstrip("/"),
                    location=self.location(location, origin),
                    insecure=self.flag(raw, "insecure", origin),
                    blocked=self.flag(raw, "blocked", origin),
                    mirror_by_digest_only=self.flag(raw, "mirror-by-digest-only", origin),
                    mirrors=tuple(mirrors),
                    origin=origin,
                )
            )
        return result

    def version_1(self, doc: Mapping[str, Any]) -> tuple[list[RegistryTable], tuple[str, ...] | None]:
        lists = {k: self.strings(v, "registries") or () for k, v in doc.items() if isinstance(v, dict)}
        insecure, blocked = lists.get("insecure", ()), lists.get("block", ())
        tables = [
            RegistryTable(host, host, host in insecure, host in blocked, False, (), self.path)
            for host in dict.fromkeys((*insecure, *blocked))
        ]
        return tables, lists.get("search")

    def aliases(self, doc: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        table = doc.get("aliases", {})
        if not isinstance(table, dict):
            raise ConfigError(f"{self.path}: aliases is not a table")
        for name, value in table.items():
            if not isinstance(value, str):
                raise ConfigError(f"{self.path}: alias {name!r} is not a string")
            if value:
                try:
                    target = Reference.parse(value)
                except PybuildError as e:
                    raise ConfigError(f"{self.path}: alias {name!r}: {e}") from e
                if target.tag or target.digest or is_short_name(value) or not is_short_name(name):
                    raise ConfigError(
                        f"{self.path}: alias {name!r} must map a name without a registry to one with a registry, "
                        "neither with a tag or digest"
                    )
            yield name, value

    def origin(self, lines: Any, *, mirror: bool) -> str:
        for number, is_mirror in lines:
            if is_mirror == mirror:
                return f"{self.path}:{number}"
        return self.path

    def line_of(self, *keys: str) -> str:
        """The first line that sets one of the keys, for people; the file alone if it cannot be told."""
        key = re.compile(rf"\s*[\"']?(?:{'|'.join(map(re.escape, keys))})[\"']?\s*=")
        return next((f"{self.path}:{n}" for n, line in enumerate(self.lines, 1) if key.match(line)), self.path)

    def location(self, text: str, origin: str) -> str:
        if "://" in text:
            raise ConfigError(f"{origin}: location {text!r} must be host[:port][/path], without a scheme")
        return text.rstrip("/")

    def objects(self, value: Any, key: str) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise ConfigError(f"{self.path}: {key} is not an array of tables")
        return value

    def text(self, table: Mapping[str, Any], key: str, origin: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            raise ConfigError(f"{origin}: {key} is not a string")
        return value.strip()

    def flag(self, table: Mapping[str, Any], key: str, origin: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{origin}: {key} is neither true nor false")
        return value

    def strings(self, table: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
        value = table.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{self.path}: {key} is not an array of strings")
        return tuple(value)
