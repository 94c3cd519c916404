"""policy.json: which images may be pulled at all.

`insecureAcceptAnything` and `reject` are honoured. A requirement that wants a signature we cannot
verify refuses the image: treating it as accepted would be worse than having no policy.
Callers: whoever reads an image, before its first byte is used (`TransportContext.check_policy` for local places).

Format: containers-policy.json(5)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from registry.errors import ConfigError, printable
from registry.reference import Reference

MAX_POLICY_BYTES = 1 << 20
SYSTEM_POLICY = "/etc/containers/policy.json"
_ACCEPT, _REJECT = "insecureAcceptAnything", "reject"
_SIGNED = ("signedBy", "sigstoreSigned", "signedBaseLayer")
_KEYS = {"default", "transports"}


class Policy(NamedTuple):
    """A parsed policy; `origin` is its file. Without a file, everything is accepted."""

    default: tuple[str, ...] = (_ACCEPT,)
    scopes: Mapping[tuple[str, str], tuple[str, ...]] = {}
    origin: str = ""

    def check(self, transport: str, scopes: Iterator[str] | list[str]) -> None:
        """Raise ConfigError unless an image of `transport` may be used; `scopes` run from exact to general."""
        for scope in (*scopes, ""):
            found = self.scopes.get((transport, scope))
            if found is not None:
                where = f"{transport}:{scope}" if scope else transport
                return self._require(found, where)
        return self._require(self.default, "default")

    def check_docker(self, ref: Reference) -> None:
        """Raise ConfigError unless `ref` may be pulled."""
        self.check("docker", docker_scopes(ref))

    def _require(self, requirements: tuple[str, ...], where: str) -> None:
        for kind in requirements:
            if kind == _REJECT:
                raise ConfigError(f"{self.origin} rejects this image ({where})")
            if kind != _ACCEPT:
                raise ConfigError(
                    f"{self.origin} requires {kind} for this image ({where}), which pybuild cannot verify yet",
                    hint="pull it with a tool that verifies signatures, or name another policy",
                )


def docker_scopes(ref: Reference) -> Iterator[str]:
    """The scopes of a reference in the order in which a policy is searched."""
    if ref.tag or ref.digest:
        yield ref.canonical()
    name = ref.repository
    while name:
        yield name
        name = name.rpartition("/")[0]
    labels = ref.domain.split(".")
    for n in range(1, len(labels)):
        yield "*." + ".".join(labels[n:])


def load_policy(environ: Mapping[str, str], explicit: str | None = None) -> Policy:
    """Read the policy that applies: `explicit`, the user's, or the system's; none accepts everything.

    Raises: ConfigError if it is malformed, or named explicitly and unreadable.
    """
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    candidates = [explicit] if explicit else [os.path.join(home, "containers/policy.json"), SYSTEM_POLICY]
    for path in candidates:
        try:
            with open(path, "rb") as f:
                raw = f.read(MAX_POLICY_BYTES + 1)
        except FileNotFoundError:
            if explicit:
                raise ConfigError(f"cannot read {path}: no such file") from None
            continue
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        if len(raw) > MAX_POLICY_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_POLICY_BYTES} bytes")
        return _parse(raw, path)
    return Policy()


def _parse(raw: bytes, path: str) -> Policy:
    try:
        doc = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid JSON: {printable(str(e), 100)}") from e
    if not isinstance(doc, dict) or "default" not in doc or not set(doc) <= _KEYS:
        raise ConfigError(f"{path}: a policy has the keys `default` and, if need be, `transports`, and no other")
    scopes: dict[tuple[str, str], tuple[str, ...]] = {}
    transports = doc.get("transports", {})
    if not isinstance(transports, dict):
        raise ConfigError(f"{path}: transports is not an object")
    for transport, table in transports.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: transports.{transport} is not an object")
        for scope, value in table.items():
            scopes[transport, scope] = _requirements(value, path, f"{transport}:{scope}")
    return Policy(_requirements(doc["default"], path, "default"), scopes, path)


def _requirements(value: Any, path: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{path}: {where} is not a list with at least one requirement")
    kinds = []
    for entry in value:
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in {_ACCEPT, _REJECT, *_SIGNED}:
            raise ConfigError(f"{path}: {where} has a requirement of unknown type {kind!r}")
        kinds.append(str(kind))
    return tuple(kinds)
