"""A store with an image of busybox to run containers of, and looks at what they leave on the machine."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild
from tests.support.networks import subnet_of

IMAGE = "base:1"
CONTAINERFILE = """\
FROM scratch
COPY busybox /bin/busybox
COPY passwd /etc/passwd
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir /tmp /srv && chmod 1777 /tmp && echo home > /srv/index.html && chown -R 33:33 /srv
ENV GREETING=hello
STOPSIGNAL TERM
CMD ["sh"]
"""


@pytest.fixture
def box(pybuild_each: Pybuild, tmp_path: Path) -> Iterator[Pybuild]:
    """The command line over a store that has an image of busybox; nothing runs any more in the end."""
    yield from _filled(pybuild_each, tmp_path)


@pytest.fixture
def root_box(pybuild: Pybuild, tmp_path: Path) -> Iterator[Pybuild]:
    """The same as root alone."""
    yield from _filled(pybuild, tmp_path)


def _filled(pybuild: Pybuild, tmp_path: Path) -> Iterator[Pybuild]:
    home = pybuild.account.home if pybuild.account else tmp_path
    context = home / f"context-{os.getpid()}"
    context.mkdir(exist_ok=True)
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox")
    shutil.copyfile(busybox, context / "busybox")
    (context / "busybox").chmod(0o755)
    (context / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n")
    (context / "Containerfile").write_text(CONTAINERFILE)
    pybuild.build(context, "-t", IMAGE)
    yield pybuild
    pybuild.run("rm", "-f", "-a")
    shutil.rmtree(context)


def start(box: Pybuild, *words: str) -> str:
    """A detached container with the host's network; its ID."""
    return box.run("run", "-d", "--network", "host", *words).text.strip()


def status_of(box: Pybuild, name: str) -> str:
    """STATE EXITCODE."""
    return box.run("ps", "-a", "--filter", f"name={name}", "--format", "{{.State}} {{.ExitCode}}").text.strip()


def pid_of(box: Pybuild, name: str) -> int:
    """The first process of a container."""
    return int(box.run("inspect", "--format", "{{.State.Pid}}", name).text)


def parent(pid: int) -> int:
    """A process's parent: of a container's first one the zygote, whose parent is the monitor."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("PPid:")).split()[1])


def fetch(port: int, path: str = "/", timeout_s: float = 5.0) -> str:
    """What a web server on the loopback answers; "" where nobody does."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as s:
            s.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            data = b""
            while piece := s.recv(4096):
                data += piece
        return data.decode()
    except OSError:
        return ""


def network_of(box: Pybuild, name: str) -> int:
    """The number of a container's private network."""
    words = box.run("exec", name, "ip", "-4", "-o", "addr", "show", "dev", "eth0").text.split()
    return subnet_of(words[words.index("inet") + 1])
