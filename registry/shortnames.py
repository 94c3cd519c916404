"""Names without a registry: which images they may mean, and which of those there is.

`registry.hosts` reads the aliases and search registries; here the registries are asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.errors import AuthError, NetworkError, NotFoundError, RegistryError
from registry.reference import Reference, is_short_name

if TYPE_CHECKING:
    from registry.client import RegistryClient


def find(client: RegistryClient, text: str) -> Reference:
    """The image that `text` means, tag included. Only a name that may mean several is asked for.

    Raises: InvalidReference, ConfigError; if none of several is there, the last registry's error, with what the
    others said as its hint.
    """
    if not is_short_name(text):
        return Reference.parse(text).with_default_tag()
    candidates = [ref.with_default_tag() for ref in client.hosts.resolve_name(text)]
    if len(candidates) == 1:
        return candidates[0]
    said: list[str] = []
    last: RegistryError | None = None
    for ref in candidates:
        try:
            if client.head_manifest(ref) is not None:
                return ref
            last = NotFoundError(f"there is no {ref}", status=404)
        except (AuthError, NetworkError) as e:
            # A registry that knows us not, or that is away, must not hide the next one's image.
            last = e
        said.append(str(last))
    assert last is not None
    last.hint = "; ".join(filter(None, (f"{text!r} may mean: " + "; ".join(said), last.hint)))
    raise last
