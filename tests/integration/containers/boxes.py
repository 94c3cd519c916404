"""A store with an image of busybox to run containers of, and looks at what they leave on the machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild

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


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for something to become so, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


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


def subnet_of(box: Pybuild, name: str) -> str:
    """The host's end of a container's private network: the beginning of its addresses."""
    words = box.run("exec", name, "ip", "-4", "-o", "addr", "show", "dev", "eth0").text.split()
    address = words[words.index("inet") + 1].partition("/")[0]
    head, _, last = address.rpartition(".")
    return f"{head}.{int(last) & ~3}"


def remains_of_network(subnet: str) -> list[str]:
    """Interfaces, addresses and firewall rules of a private network that are still there."""
    head, _, last = subnet.rpartition(".")
    found = []
    for program in (["ip", "-o", "addr"], ["iptables-save"], ["nft", "list", "ruleset"]):
        if shutil.which(program[0]):
            done = subprocess.run(program, check=False, capture_output=True, text=True)
            found += [
                line for line in done.stdout.splitlines() if f"{subnet}/" in line or f"{head}.{int(last) + 1}/" in line
            ]
    return found
