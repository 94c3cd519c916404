"""Image references: `domain/path:tag@digest`, parsed as Docker and containers tools read them.

Pure and light: the planner imports it. Nothing here asks a registry or a configuration file; what
short names mean beyond Docker's own defaults is the matter of `registry.hosts`.

Grammar: https://github.com/distribution/reference (reference.go)
"""

from __future__ import annotations

import re

from layers.errors import ImageError
from layers.oci import Digest
from layers.values import NamedTuple
from registry.errors import InvalidReference

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
MAX_PATH_CHARS = 255
"""The reference grammar's limit on a repository's path."""

_OFFICIAL = "library/"
_MAX_TEXT_CHARS = 1024
_COMPONENT = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = rf"(?:{_COMPONENT}(?:\.{_COMPONENT})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?\Z"  # compiled if there is one
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_HEX_ID = re.compile(r"[0-9a-f]{64}\Z")


class Reference(NamedTuple):
    """A parsed reference. Make one with `parse`; change it with `with_tag`, `with_digest`."""

    domain: str
    path: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse `text`; a name without a domain is Docker Hub's, without a namespace its `library/`.

        Neither tag nor digest is added: see `with_default_tag`.

        Raises: InvalidReference saying which part is wrong.
        """
        if not text or len(text) > _MAX_TEXT_CHARS:
            raise InvalidReference(f"invalid reference: {'empty' if not text else 'longer than any can be'}")
        if _HEX_ID.match(text):
            raise InvalidReference(
                f"invalid reference {text!r}: 64 hex digits are an image ID, not a name",
                hint="write NAME@sha256:… to name an image by its digest",
            )
        rest, at, digest_text = text.partition("@")
        digest = _digest(digest_text, text) if at else None
        name, tag = _split_tag(rest)
        if tag is not None and not _TAG.match(tag):
            raise InvalidReference(f"invalid reference {text!r}: {tag!r} is not a tag")
        domain, path = split_domain(name)
        if domain != DEFAULT_DOMAIN and not re.match(_DOMAIN, domain):
            raise InvalidReference(f"invalid reference {text!r}: {domain!r} is not a registry host")
        if path != path.lower():
            raise InvalidReference(f"invalid reference {text!r}: the repository name must be lowercase")
        if not _PATH.match(path):
            raise InvalidReference(f"invalid reference {text!r}: {path!r} is not a repository name")
        if len(path) > MAX_PATH_CHARS:
            raise InvalidReference(f"invalid reference: the repository name is longer than {MAX_PATH_CHARS} characters")
        return cls(domain, path, tag, digest)

    @property
    def repository(self) -> str:
        """`domain/path`, without tag and digest."""
        return f"{self.domain}/{self.path}"

    @property
    def target(self) -> str:
        """What names the manifest in a registry's URL: the digest if there is one, else the tag, else `latest`."""
        return self.digest or self.tag or DEFAULT_TAG

    def canonical(self) -> str:
        """The full form, with every part that is set."""
        text = self.repository
        if self.tag is not None:
            text += ":" + self.tag
        if self.digest is not None:
            text += "@" + self.digest
        return text

    def familiar(self) -> str:
        """The short form that people write: Docker Hub's domain and `library/` left out."""
        text = self.canonical()
        if self.domain == DEFAULT_DOMAIN:
            short = text[len(DEFAULT_DOMAIN) + 1 :]
            # `library/a/b` would parse back as another name were its first part dropped.
            if short.startswith(_OFFICIAL) and "/" not in self.path[len(_OFFICIAL) :]:
                short = short[len(_OFFICIAL) :]
            return short
        return text

    def with_tag(self, tag: str) -> Reference:
        """The same repository under `tag`, without digest.

        Raises: InvalidReference if `tag` is not a tag.
        """
        if not _TAG.match(tag):
            raise InvalidReference(f"{tag!r} is not a tag")
        return self._replace(tag=tag, digest=None)

    def with_digest(self, digest: str) -> Reference:
        """The same repository at `digest`, without tag.

        Raises: InvalidReference if `digest` is not a digest.
        """
        return self._replace(tag=None, digest=_digest(digest, self.repository + "@" + digest))

    def with_default_tag(self) -> Reference:
        """Itself, or `:latest` if it has neither tag nor digest."""
        return self if self.tag is not None or self.digest is not None else self._replace(tag=DEFAULT_TAG)

    def without_target(self) -> Reference:
        """The bare repository."""
        return self._replace(tag=None, digest=None)

    def __str__(self) -> str:
        return self.canonical()


def split_domain(name: str) -> tuple[str, str]:
    """Split `name` into domain and path, with Docker's defaults for both; neither is validated."""
    first, slash, rest = name.partition("/")
    explicit = slash and ("." in first or ":" in first or first == "localhost" or first != first.lower())
    domain, path = (first, rest) if explicit else (DEFAULT_DOMAIN, name)
    if domain == "index.docker.io":
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = _OFFICIAL + path
    return domain, path


def is_short_name(text: str) -> bool:
    """Whether `text` names no registry, so that short-name aliases and search registries apply."""
    name = _split_tag(text.partition("@")[0])[0]
    first, slash, _ = name.partition("/")
    return not (slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()))


def _split_tag(text: str) -> tuple[str, str | None]:
    name, colon, tag = text.rpartition(":")
    # A colon before the last slash is the domain's port.
    if not colon or "/" in tag:
        return text, None
    return name, tag


def _digest(digest: str, text: str) -> Digest:
    try:
        return Digest(digest)
    except ImageError as e:
        raise InvalidReference(f"invalid reference {text!r}: {digest!r} is not a digest") from e
