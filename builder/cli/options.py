"""Flags that several commands share, and how their values become the library's types."""

from __future__ import annotations

import os
import re
import stat
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _StoreConstAction
from pathlib import Path

from builder.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from registry.hosts import RegistryOptions
    from registry.retry import RetryPolicy

_MAX_BYTES = 1 << 62
_MAX_SECONDS = 100 * 365 * 86400.0
_CALLER = os.geteuid()
"""Who called: in the user namespace that builds enter, everybody is 0, and root's store is not an ordinary user's."""
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class InvalidValue(UsageError, ArgumentTypeError):
    """A value that its flag does not take: argparse names the flag; where it is a part of one, this tells enough."""


def store_root(options: Namespace) -> Path:
    """`--root`, PYBUILD_ROOT or the default. Raises: StoreError if there is no telling."""
    if options.root:
        return refuse_planted(Path(options.root), _CALLER)
    from layers.root import default_root

    return refuse_planted(default_root(os.environ, _CALLER), _CALLER)


def refuse_planted(root: Path, euid: int) -> Path:
    """`root` itself, unless another user has put it, or what leads to it, where all may: in /tmp, say.

    Whoever did could give us images of his own under any name, and change trees while we work in them as root.
    Asked before a user namespace is entered, in which owners are not told apart. Raises: StoreError.
    """
    above: os.stat_result | None = None
    path = ""
    for part in os.path.abspath(root).split("/"):
        path = f"{path}{part}/"
        try:
            found = os.lstat(path[:-1] or "/")
            if above is not None and above.st_mode & stat.S_IWOTH and found.st_uid not in {euid, 0, above.st_uid}:
                from layers.errors import StoreError

                raise StoreError(
                    f"{path[:-1]}, where the store is to be, was made by another user (uid {found.st_uid})",
                    hint="choose a directory of your own with --root or PYBUILD_ROOT",
                )
            above = os.stat(path)
        except OSError:
            break  # what is not there yet will be ours
    return root


def add_additional_stores(parser: ArgumentParser, add: Callable[..., object] | None = None) -> None:
    """`--additional-store`; `add` is `add_argument` of the group that it belongs to."""
    (add or parser.add_argument)(
        "--additional-store", action="append", default=[], metavar="DIR",
        help="another store or OCI layout, read only, to look for images in (also PYBUILD_ADDITIONAL_STORES)",
    )  # fmt: skip


def additional_stores(options: Namespace) -> tuple[Path, ...]:
    """`--additional-store`, then PYBUILD_ADDITIONAL_STORES, by colons."""
    environ = os.environ.get("PYBUILD_ADDITIONAL_STORES", "").split(":")
    return tuple(Path(name) for name in (*options.additional_store, *environ) if name)


def add_registry_options(parser: ArgumentParser, *prefixes: str) -> None:
    """`--tls-verify`, `--authfile`, `--creds` and the like; with prefixes also `--src-tls-verify` and so on."""
    add = parser.add_argument_group("registries").add_argument
    for prefix in ("", *prefixes):
        whose = f" of the {prefix}" if prefix else ""
        dash = f"{ {'source': 'src', 'destination': 'dest'}.get(prefix, prefix) }-" if prefix else ""
        dest = f"{prefix}_" if prefix else ""
        add(
            f"--{dash}tls-verify", dest=f"{dest}tls_verify", nargs="?", const=True, type=boolean, metavar="BOOL",
            help=f"ask for verified TLS{whose} (default: true, but for localhost and what registries.conf exempts)",
        )  # fmt: skip
        add(f"--{dash}creds", dest=f"{dest}creds", metavar="USER[:PASSWORD]",
            help=f"credentials{whose}; without a password it is asked for")  # fmt: skip
        add(f"--{dash}no-creds", dest=f"{dest}no_creds", action="store_true", default=None,
            help=f"use no credentials{whose}")  # fmt: skip
        add(f"--{dash}authfile", dest=f"{dest}authfile", metavar="FILE",
            help=f"credentials file{whose} (default: REGISTRY_AUTH_FILE, else those of podman and docker)")  # fmt: skip
        add(f"--{dash}cert-dir", dest=f"{dest}cert_dir", metavar="DIR",
            help=f"CA (*.crt) and client certificates (*.cert, *.key){whose}")  # fmt: skip
    add(
        "--registries-conf",
        metavar="FILE",
        help="read this instead of registries.conf (also CONTAINERS_REGISTRIES_CONF)",
    )
    add("--signature-policy", metavar="FILE", help="read this instead of policy.json")


def has_registry_options(options: Namespace) -> bool:
    """Whether any registry flag was given, so that a command without one need not load what they are about."""
    flags = ("creds", "cert_dir", "authfile", "no_creds", "registries_conf", "signature_policy")
    tries = getattr(options, "retry", None), getattr(options, "retry_delay", None)
    return any(value is not None for value in (options.tls_verify, *tries, *(getattr(options, f) for f in flags)))


def registry_options(options: Namespace, prefix: str = "") -> RegistryOptions:
    """The registry flags as a value; the unprefixed ones are the fallback of the prefixed."""
    from registry.hosts import RegistryOptions

    def pick(name: str) -> Any:
        value = getattr(options, f"{prefix}_{name}", None) if prefix else None
        return getattr(options, name, None) if value is None else value

    from registry.credentials import Credential

    creds = pick("creds")
    credential = None
    anonymous = bool(pick("no_creds"))
    if creds and anonymous:
        raise UsageError("--creds and --no-creds exclude each other")
    if creds:
        user, separator, password = str(creds).partition(":")
        if not separator:
            import getpass

            password = getpass.getpass(f"password of {user}: ")
        credential = Credential(username=user, password=password)
    return RegistryOptions(
        tls_verify=pick("tls_verify"),
        creds=credential,
        authfile=pick("authfile"),
        cert_dir=pick("cert_dir"),
        anonymous=anonymous,
        registries_conf=options.registries_conf,
        signature_policy=options.signature_policy,
        retry=retry_policy(options) if hasattr(options, "retry") else None,
    )


def add_retry_options(parser: ArgumentParser) -> None:
    """`--retry` and `--retry-delay`, as buildah, podman and skopeo have them."""
    add = parser.add_argument_group("when a registry fails").add_argument
    add("--retry", "--retry-times", dest="retry", type=int, metavar="N",
        help="so many more tries of what may yet succeed (default: 4)")  # fmt: skip
    add("--retry-delay", type=duration, metavar="DURATION",
        help="the first wait between tries; it doubles (default: 250ms)")  # fmt: skip


def retry_policy(options: Namespace) -> RetryPolicy:
    """The retry flags as a value. Raises: UsageError."""
    from registry.retry import RetryPolicy

    policy = RetryPolicy()
    if options.retry is not None:
        if options.retry < 0:
            raise UsageError(f"--retry {options.retry}: expected a number of tries")
        policy = policy._replace(attempts=options.retry + 1)
    if options.retry_delay is not None:
        policy = policy._replace(base_s=options.retry_delay, cap_s=max(policy.cap_s, options.retry_delay))
    return policy


MAX_EPOCH = 253402300799
"""The last second of the year 9999: no later time can be written down (RFC 3339)."""


def epoch_of(options: Namespace) -> int | None:
    """`--timestamp`, where there is that flag, or SOURCE_DATE_EPOCH, in seconds. Raises: UsageError."""
    given = getattr(options, "timestamp", None)
    if given is not None:
        if not 0 <= given <= MAX_EPOCH:
            raise UsageError(f"--timestamp {given}: expected seconds since 1970")
        return int(given)
    return environment_epoch()


def environment_epoch() -> int | None:
    """SOURCE_DATE_EPOCH in seconds, None where it is unset. Raises: UsageError."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if text and not is_epoch(text):
        raise UsageError(f"SOURCE_DATE_EPOCH {text!r} is not a number of seconds")
    return int(text) if text else None


def is_epoch(text: str) -> bool:
    """Whether a text is a time in seconds that an image can have."""
    return text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= MAX_EPOCH


def boolean(text: str) -> bool:
    """The words that Go's flag package takes for a boolean."""
    if text.lower() in {"1", "t", "true", "y", "yes", "on"}:
        return True
    if text.lower() in {"0", "f", "false", "n", "no", "off"}:
        return False
    raise InvalidValue(f"expected true or false, not {text!r}")


def media_types(text: str) -> str:
    """`--format`, whose `docker` others call v2s2."""
    return "docker" if text == "v2s2" else text


def take_booleans(parser: ArgumentParser) -> None:
    """Let each flag without a value be written `--flag=true` and `--flag=false`, too, as Go's are.

    Words are only looked at here: those of a command that is to be run stay as they are.
    """
    known = parser._parse_optional

    def parse_optional(word: str) -> Any:
        name, _, value = word.partition("=")
        action = parser._option_string_actions.get(name)
        if not value or action is None or action.nargs != 0 or action.const is not True:
            return known(word)
        try:
            on = boolean(value)
        except InvalidValue:
            return known(word)
        found: Any = known(name)  # (action, name, …), from Python 3.12 on in a list
        if on:
            return found
        off = _StoreConstAction([], action.dest, const=False)
        return [(off, *rest) for _, *rest in found] if isinstance(found, list) else (off, *found[1:])

    parser._parse_optional = parse_optional  # type: ignore[method-assign, assignment]


def size(text: str) -> int:
    """A size in bytes: `64m`, `1.5g`, `512`; units are powers of 1024."""
    match = re.fullmatch(r"(-1|\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise InvalidValue(f"invalid size {text!r}: expected a number with b, k, m, g or t")
    if match[1] == "-1":
        return -1
    found = float(match[1]) * _SIZE_UNITS[match[2]]
    if found > _MAX_BYTES:
        raise InvalidValue(f"invalid size {text[:40]!r}: too large")
    return int(found)


def duration(text: str) -> float:
    """A duration in seconds: `90`, `1.5s`, `10m`, `2h`, `1h30m`."""
    text = f"{text}s" if re.fullmatch(r"\d+(\.\d+)?", text) else text
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise InvalidValue(f"invalid duration {text!r}: expected a number with ms, s, m, h or d")
    found = sum(float(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[u] for n, u in parts)
    if found > _MAX_SECONDS:
        raise InvalidValue(f"invalid duration {text[:40]!r}: more than a hundred years")
    return found


def key_value(text: str, flag: str) -> tuple[str, str]:
    """`KEY=VALUE`. Raises: UsageError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"{flag} {text!r}: expected KEY=VALUE")
    return key, value


def fields(text: str, flag: str) -> dict[str, str]:
    """`a=b,c=d` in CSV, as docker's flags take it; a field without `=` maps to "". Raises: UsageError."""
    import csv

    try:
        row = next(csv.reader([text], strict=True))
    except (csv.Error, StopIteration) as e:
        raise UsageError(f"{flag} {text!r}: {e or 'empty'}") from e
    return {k.strip().lower(): v for k, _, v in (field.partition("=") for field in row)}
