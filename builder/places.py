"""The local store and registry clients for one command that moves images, opened when first used.

`builder.api` does this for the verbs that it has; the commands that edit, list and validate images
share it from here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Store
    from registry.client import RegistryClient
    from registry.hosts import RegistryOptions
    from registry.retry import RetryPolicy
    from registry.transport import TransportContext


class Places(NamedTuple):
    """Where a command reads, and where it writes."""

    source: TransportContext
    destination: TransportContext


@contextmanager
def open_places(
    root: Path,
    source: RegistryOptions | None = None,
    destination: RegistryOptions | None = None,
    *,
    policy: RetryPolicy | None = None,
) -> Iterator[Places]:
    """Contexts over the store at `root` and clients with these options; one client if they are the same.

    Closed with the block. Raises, when used: StoreError, RegistryError.
    """
    from registry.transport import TransportContext

    stores: list[Store] = []
    clients: dict[RegistryOptions | None, RegistryClient] = {}
    lock = threading.Lock()

    def store() -> Store:
        from layers.store import Store

        with lock:
            if not stores:
                stores.append(Store.open(root))
            return stores[0]

    def client(options: RegistryOptions | None) -> RegistryClient:
        from registry.client import RegistryClient

        with lock:
            if options not in clients:
                clients[options] = RegistryClient(options, policy=policy)
            return clients[options]

    def context(options: RegistryOptions | None) -> TransportContext:
        policy_file = options.signature_policy if options is not None else None
        return TransportContext(
            store=store, client=lambda: client(options), uploads_dir=root / "uploads", signature_policy=policy_file
        )

    try:
        yield Places(context(source), context(source if destination is None else destination))
    finally:
        for made in clients.values():
            made.close()
        for opened in stores:
            opened.close()


def pull_name(source: str) -> str:
    """The store's name of an image that is pulled from `source`: the registry's, the archive's, or the file's.

    Raises: InvalidReference.
    """
    from registry.reference import Reference
    from registry.transport import split_transport

    transport, rest = split_transport(source)
    if transport in {None, "docker"}:
        return str(Reference.parse(rest).with_default_tag())
    if transport == "docker-archive" and rest.partition(":")[2]:
        return rest.partition(":")[2]  # the archive says its own name
    path, _, tag = rest.partition(":")
    if ":" in tag or "/" in tag:  # a whole name, as `skopeo copy … oci:DIR:NAME:TAG` writes it
        return str(Reference.parse(tag).with_default_tag())
    return f"{Path(path).name.lower()}:{tag or 'latest'}"
