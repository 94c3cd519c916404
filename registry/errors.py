"""What goes wrong between a reference and a registry.

    PybuildError
    ├── InvalidReference       a name that the reference grammar refuses          exit 2
    ├── ConfigError            registries.conf, auth.json or policy.json is wrong exit 2
    └── RegistryError          a registry, or the way to it, refused or failed    exit 1
        ├── AuthError          401, 403, no or wrong credentials                  exit 3
        ├── NotFoundError      404                                                exit 4
        ├── RateLimitError     429                                                exit 5
        ├── NetworkError       names, connections, TLS, time-outs, truncation     exit 6
        └── ServerError        5xx, and answers that make no sense                exit 7

Bytes that do not match their digest are `layers.errors.DigestMismatch` or `SizeMismatch` (exit 8).
No message, hint or URL in here may carry a secret: URLs pass through `redact_url`, what a server
said through `printable`. Stdlib only, and little of it: commands without a registry import this.
"""

from __future__ import annotations

from layers.errors import PybuildError


class InvalidReference(PybuildError):
    """A name that is not an image reference."""

    exit_code = 2


class ConfigError(PybuildError):
    """A configuration file of the registry client is malformed, or forbids what was asked."""

    exit_code = 2


class RegistryError(PybuildError):
    """A registry refused or failed.

    `status` is the HTTP status, if there was an answer; `codes` are the distribution-spec's error
    codes in it; `url` is redacted; `retryable` says whether the same request may succeed later.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        codes: tuple[str, ...] = (),
        url: str = "",
        retryable: bool = False,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.codes = codes
        self.url = redact_url(url)
        self.retryable = retryable


class AuthError(RegistryError):
    """No credentials, wrong ones, or not enough rights."""

    exit_code = 3


class NotFoundError(RegistryError):
    """The registry has no such repository, manifest, blob or upload."""

    exit_code = 4


class RateLimitError(RegistryError):
    """The registry wants fewer requests; `retry_after_s` is what it asked for, if it said."""

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = 429,
        codes: tuple[str, ...] = (),
        url: str = "",
        retryable: bool = True,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint, status=status, codes=codes, url=url, retryable=retryable)
        self.retry_after_s = retry_after_s


class NetworkError(RegistryError):
    """The registry could not be reached, or the connection broke."""

    exit_code = 6


class ServerError(RegistryError):
    """The registry failed, or answered what the distribution-spec does not allow."""

    exit_code = 7


def redact_url(url: str) -> str:
    """`url` without user info, query and fragment: signed URLs and upload states live there."""
    head, mark, _ = url.partition("?")
    head = head.partition("#")[0]
    scheme, sep, rest = head.partition("://")
    if sep:
        authority, slash, path = rest.partition("/")
        head = scheme + sep + authority.rpartition("@")[2] + slash + path
    return printable(head + ("?…" if mark else ""), 500)


def printable(text: str, limit: int = 300) -> str:
    """What a server or a helper said, made safe to show: one line, no control characters, bounded."""
    clean = "".join(c if c.isprintable() else " " for c in text[: limit * 2])
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
