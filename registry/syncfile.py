"""The file that says what `sync` mirrors. Pure but for `load_sync_file`.

    destination: mirror.example:5000/base     # or oci:DIR, dir:DIR; the command line's comes first
    delete: false                             # remove tags that the source no longer has
    scoped: false                             # keep the source's host in the target's name
    images:
      - source: quay.io/team/app              # a repository
        target: mirror.example:5000/app       # its own destination, whole
        tags: ["1.*", latest, /^v[0-9]+$/]    # names, globs, /regular expressions/; all if left out
        semver: ">=1.4 <3"                    # versions, besides those tags
        exclude: ["*-rc*"]
        platform: linux/amd64                 # one platform; every one if left out
        delete: true
        tls-verify: false                     # how to reach the source: also cert-dir, and credentials
                                              # with username and password

skopeo's form is read, too: registries on top, with `images`, `images-by-tag-regex`, `images-by-semver`,
`tls-verify`, `cert-dir` and `credentials`. Whatever else stands in either is an error: a misspelt key
must not mirror the wrong thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from layers.errors import ImageError
from layers.oci import Digest, Platform
from layers.regex import Pattern, compile_pattern
from layers.values import NamedTuple
from registry.credentials import Credential
from registry.errors import ConfigError, InvalidReference, printable
from registry.reference import Reference
from registry.semver import VersionRange

MAX_FILE_BYTES = 1 << 20
_MAX_PATTERN_CHARS = 500
_TOP = {"destination", "delete", "scoped", "images"}
_ACCESS = {"tls-verify", "cert-dir", "credentials"}
_ENTRY = {"source", "target", "tags", "semver", "exclude", "platform", "delete", *_ACCESS}
_SKOPEO = {"images", "images-by-tag-regex", "images-by-semver", *_ACCESS}


class Access(NamedTuple):
    """How a source is reached, where the file says so; hashable, so that connections are shared by it."""

    tls_verify: bool | None = None
    cert_dir: str | None = None
    credential: Credential | None = None


class TagPattern(NamedTuple):
    """A tag by name or glob, by a regular expression that is searched for, or by a range of versions."""

    text: str
    regex: Pattern | None = None
    versions: VersionRange | None = None

    @classmethod
    def parse(cls, text: str) -> TagPattern:
        """`/…/` is a regular expression, all else a glob. Raises: ConfigError."""
        if len(text) > _MAX_PATTERN_CHARS:
            raise ConfigError(f"a pattern of tags is longer than {_MAX_PATTERN_CHARS} characters")
        if len(text) > 2 and text.startswith("/") and text.endswith("/"):
            return cls(text, _regex(text[1:-1]))
        return cls(text)

    @classmethod
    def semver(cls, text: str) -> TagPattern:
        """Tags that are versions in this range. Raises: ConfigError."""
        return cls(text, versions=VersionRange.parse(text))

    @property
    def exact(self) -> bool:
        """Whether it can fit one tag only, so that the registry's list need not be read."""
        return self.regex is None and self.versions is None and not set(self.text) & set("*?[")

    def fits(self, tag: str) -> bool:
        if self.versions is not None:
            return self.versions.fits(tag)
        return self.regex.search(tag) is not None if self.regex is not None else fnmatchcase(tag, self.text)


class SyncEntry(NamedTuple):
    """One repository to mirror. `digests` are copied besides the tags; with neither, every tag is."""

    source: Reference
    target: str | None = None
    tags: tuple[TagPattern, ...] = ()
    exclude: tuple[TagPattern, ...] = ()
    digests: tuple[Digest, ...] = ()
    platform: Platform | None = None
    delete: bool | None = None
    access: Access = Access()

    @property
    def needs_list(self) -> bool:
        """Whether the source's tags must be listed."""
        return not self.digests if not self.tags else not all(p.exact for p in self.tags)

    def select(self, tags: Iterable[str]) -> list[str]:
        """Those of the repository's tags that are to be mirrored, in order."""
        wanted = [t for t in tags if any(p.fits(t) for p in self.tags) or (not self.tags and not self.digests)]
        return [t for t in wanted if not any(p.fits(t) for p in self.exclude)]


class SyncConfig(NamedTuple):
    """A parsed file."""

    entries: tuple[SyncEntry, ...]
    destination: str | None = None
    delete: bool = False
    scoped: bool = False


def load_sync_file(path: Path) -> SyncConfig:
    """Read and parse the file. Raises: ConfigError naming it, with the line where YAML is at fault."""
    import yaml

    try:
        with open(path, "rb") as f:
            data = f.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than the {MAX_FILE_BYTES} bytes allowed")
    try:
        document = yaml.load(data, _loader())  # noqa: S506  # a SafeLoader's heir
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{path}{line}: {printable(str(e.problem))}") from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid YAML: {printable(str(e))}") from e
    try:
        return parse_sync(document)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e.message}", hint=e.hint) from e


def _loader() -> Any:
    """A safe loader that leaves numbers and dates as they are written: the tag 1.10 is not 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag.endswith((":bool", ":null", ":merge"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader


def parse_sync(document: Any) -> SyncConfig:
    """Parse either form of the document. Raises: ConfigError."""
    top = _mapping(document, "the file")
    if "images" not in top:
        return _parse_skopeo(top)
    _known(top, _TOP, "the file")
    images = top["images"]
    if not isinstance(images, list) or not images:
        raise ConfigError("`images` is not a list of repositories")
    return SyncConfig(
        entries=tuple(_parse_entry(entry, f"image {i + 1}") for i, entry in enumerate(images)),
        destination=_optional_text(top, "destination"),
        delete=bool(_optional_bool(top, "delete")),
        scoped=bool(_optional_bool(top, "scoped")),
    )


def _parse_entry(document: Any, where: str) -> SyncEntry:
    if isinstance(document, str):
        document = {"source": document}
    entry = _mapping(document, where)
    _known(entry, _ENTRY, where)
    source = _optional_text(entry, "source")
    if source is None:
        raise ConfigError(f"{where} has no `source`")
    where = f"{where} ({source})"
    ref = _reference(source, where)
    names = _texts(entry.get("tags"), f"`tags` of {where}")
    ranges = _texts(entry.get("semver"), f"`semver` of {where}")
    if ref.tag is not None:
        names = [ref.tag, *names]
    digests = [ref.digest] if ref.digest is not None else []
    platform = _optional_text(entry, "platform")
    try:
        parsed = Platform.parse(platform) if platform is not None and platform != "all" else None
    except ImageError as e:
        raise ConfigError(f"{where}: {e.message}") from e
    return _entry(
        ref.without_target(),
        names,
        digests,
        ranges=ranges,
        target=_optional_text(entry, "target"),
        exclude=tuple(TagPattern.parse(t) for t in _texts(entry.get("exclude"), f"`exclude` of {where}")),
        platform=parsed,
        delete=_optional_bool(entry, "delete"),
        access=_access(entry, where),
    )


def _parse_skopeo(top: Mapping[str, Any]) -> SyncConfig:
    entries: list[SyncEntry] = []
    for host, value in top.items():
        registry = _mapping(value, f"registry {host!r}")
        _known(registry, _SKOPEO, f"registry {host!r}", "misspelt")
        access = _access(registry, f"registry {host!r}")
        for name, tags in _repositories(registry, "images", host):
            entries.append(_entry(_reference(f"{host}/{name}", f"registry {host}"),
                                  _texts(tags, f"the tags of {name}"), [], access=access))  # fmt: skip
        for key, make in (("images-by-tag-regex", _searched), ("images-by-semver", TagPattern.semver)):
            for name, pattern in _repositories(registry, key, host):
                if not isinstance(pattern, str):
                    raise ConfigError(f"`{key}` of {host}: the pattern of {printable(name, 60)} is not a text")
                ref = _reference(f"{host}/{name}", f"registry {host}")
                entries.append(SyncEntry(ref, tags=(make(pattern),), access=access))
    if not entries:
        raise ConfigError("the file names no image")
    return SyncConfig(tuple(entries))


def _repositories(registry: Mapping[str, Any], key: str, host: str) -> Iterable[tuple[str, Any]]:
    return _mapping(registry.get(key) or {}, f"`{key}` of {host}").items()


def _searched(text: str) -> TagPattern:
    return TagPattern(text, _regex(text))


def _access(mapping: Mapping[str, Any], where: str) -> Access:
    """The keys that say how to reach a source. Raises: ConfigError, which quotes none of their values."""
    credential = None
    if mapping.get("credentials") is not None:
        found = _mapping(mapping["credentials"], f"`credentials` of {where}")
        _known(found, {"username", "password"}, f"`credentials` of {where}")
        user, password = (found.get(key) for key in ("username", "password"))
        if not (isinstance(user, str) and user and isinstance(password, str)):
            raise ConfigError(f"`credentials` of {where} need a `username` and a `password`")
        credential = Credential(user, password, origin="the sync file")
    return Access(_optional_bool(mapping, "tls-verify"), _optional_text(mapping, "cert-dir"), credential)


def _entry(
    ref: Reference, names: Sequence[str], digests: Sequence[Digest], *, ranges: Sequence[str] = (), **more: Any
) -> SyncEntry:
    """An entry of tags, some of which may be digests (skopeo lists both together), and of ranges of versions."""
    found = list(digests)
    patterns: list[TagPattern] = [TagPattern.semver(text) for text in ranges]
    for name in names:
        if name.startswith("sha256:"):
            try:
                found.append(Digest(name))
            except ImageError as e:
                raise ConfigError(f"{ref.repository}: {e.message}") from e
        else:
            patterns.append(TagPattern.parse(name))
    return SyncEntry(ref, tags=tuple(patterns), digests=tuple(found), **more)


def _reference(text: str, where: str) -> Reference:
    try:
        return Reference.parse(text.removeprefix("docker://"))
    except InvalidReference as e:
        raise ConfigError(f"{where}: {e.message}", hint=e.hint) from e


def _regex(text: str) -> Pattern:
    try:
        return compile_pattern(text)
    except ValueError as e:
        raise ConfigError(f"{printable(text)!r} is not a regular expression: {e}") from e


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{what} is not a mapping")
    return value


def _known(mapping: Mapping[str, Any], keys: set[str], where: str, meaning: str = "a key that is not known") -> None:
    for key in mapping:
        if key not in keys:
            raise ConfigError(
                f"{where}: {printable(key, 60)!r} is {meaning}", hint="known are " + ", ".join(sorted(keys))
            )


def _optional_text(mapping: Mapping[str, Any], key: str) -> str | None:
    value = mapping.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"`{key}` is not a text")
    return value or None


def _optional_bool(mapping: Mapping[str, Any], key: str) -> bool | None:
    value = mapping.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"`{key}` is neither true nor false")
    return value


def _texts(value: Any, what: str) -> list[str]:
    """A list of texts, or one."""
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list):
        raise ConfigError(f"{what} is not a list")
    for item in found:
        if not isinstance(item, str):
            raise ConfigError(f"{what}: {item!r} is not a text", hint='write it in quotes, such as "on"')
    return found
