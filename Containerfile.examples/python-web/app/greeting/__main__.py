"""`python -m greeting` serves on port 8000; with `--check` it asks itself one page and ends."""

from __future__ import annotations

import sys
import threading
from urllib.request import urlopen
from wsgiref.simple_server import make_server

from greeting import application


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        with make_server("", 8000, application) as server:
            server.serve_forever()
        return
    with make_server("127.0.0.1", 0, application) as server:
        threading.Thread(target=server.handle_request).start()
        with urlopen(f"http://127.0.0.1:{server.server_port}/?name=check") as reply:
            sys.stdout.write(reply.read().decode())


if __name__ == "__main__":
    main()
