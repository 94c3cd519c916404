"""`pybuild serve`: a small registry over the local store."""

from __future__ import annotations

import os
import signal
import sys
import threading
from argparse import ArgumentParser, Namespace

from builder.cli.options import store_root
from builder.errors import UsageError


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = (
        "Repositories are the store's names: app is the image app, ghcr.io/o/app that one. Plain http, without "
        "credentials: for tests and for one machine."
    )
    add("--listen", "--address", default="127.0.0.1:5000", metavar="[ADDRESS][:PORT]",
        help="where to listen (default: 127.0.0.1:5000); port 0 takes a free one")  # fmt: skip
    add("--read-only", "--readonly", action="store_true", help="refuse whatever changes the store")
    add("--address-file", metavar="FILE", help="write HOST:PORT there once it listens")


def run(verb: str, options: Namespace) -> int:
    from layers.store import Store
    from registry.serve import RegistryServer

    address, port = _address(options.listen)
    with Store.open(store_root(options)) as store:
        try:
            server = RegistryServer(store, address, port, read_only=options.read_only)
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UsageError(f"cannot listen on {options.listen}: {reason}", hint="name another with --listen") from e
        thread = threading.Thread(target=server.serve, daemon=True)
        # A service manager ends it by SIGTERM; that is no failure.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            thread.start()
            if options.address_file:
                temporary = f"{options.address_file}.{os.getpid()}"
                with open(temporary, "w") as f:
                    f.write(server.host)
                os.replace(temporary, options.address_file)
            print(f"serving {store.root} on http://{server.host}", file=sys.stderr, flush=True)
            thread.join()
        except KeyboardInterrupt:
            pass
        finally:
            server.stop()
            server.close()
    return 0


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, "5000"
    if not port.isascii() or not port.isdigit():
        raise UsageError(f"--listen {text!r}: expected [ADDRESS]:PORT")
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104  # an empty address means all, as everywhere
