"""A web server in a container, from its start to the image that is made of it."""

from __future__ import annotations

from pathlib import Path

from tests.integration.containers.boxes import (
    IMAGE,
    fetch,
    network_of,
    root_box,
    status_of,
)
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool
from tests.support.networks import assert_taken_down, left_behind, traces
from tests.support.ports import free_port
from tests.support.waiting import until

__all__ = ["root_box"]

SERVER = """\
FROM base:1
EXPOSE 8080
VOLUME /data
STOPSIGNAL QUIT
CMD ["sh", "-c", "trap 'echo stopped by QUIT; exit 5' QUIT; httpd -f -vv -p 8080 -h /srv & while :; do wait; done"]
"""


def test_the_life_of_a_web_server(root_box: Pybuild, tmp_path: Path) -> None:
    need_tool("ip")
    root_box.build(write_context(tmp_path / "web", SERVER), "-t", "web:1")
    port = free_port()
    root_box.run("run", "-d", "--name", "web", "--network", "private", "-p", f"127.0.0.1:{port}:8080", "web:1")
    before = left_behind()
    network = network_of(root_box, "web")
    assert network in traces().values()
    assert root_box.run("port", "web", "8080").text == f"127.0.0.1:{port}\n"
    until(lambda: "home" in fetch(port))

    follower = root_box.start("logs", "-f", "web")
    assert follower.stderr is not None
    fetch(port, "/nosuch")
    line = b""
    while b"404" not in line:
        line = follower.stderr.readline()
        assert line, "the log ended"

    root_box.run("exec", "web", "sh", "-c", "echo changed > /srv/index.html; echo kept > /data/kept")
    until(lambda: "changed" in fetch(port))
    root_box.run("pause", "web")
    assert fetch(port, timeout_s=0.5) == ""
    root_box.run("unpause", "web")
    until(lambda: "changed" in fetch(port))
    root_box.run("update", "-m", "64m", "--cpus", "0.5", "web")
    row = root_box.run("stats", "--no-stream", "--format", "json", "web").json()
    assert row["memory_limit_bytes"] == 64 << 20
    assert row["received_bytes"] > 0

    root_box.run("stop", "web")
    assert status_of(root_box, "web") == "exited 5"
    follower.wait(120)
    assert follower.stdout is not None
    assert follower.stdout.read() == b"stopped by QUIT\n"
    follower.stdout.close()
    follower.stderr.close()
    assert fetch(port) == ""
    assert_taken_down({line: number for line, number in before.items() if number != network})

    root_box.run("commit", "-c", "LABEL made=here", "web", "web:2")
    root_box.run("run", "-d", "--name", "again", "--network", "private", "-P", "web:2")
    again = int(root_box.run("port", "again", "8080").text.splitlines()[0].rpartition(":")[2])
    until(lambda: "changed" in fetch(again))
    assert root_box.run("exec", "again", "ls", "/data").text == ""  # volumes are not part of an image
    gone = root_box.run("rm", "-f", "-v", "web", "again").text
    assert gone == "web\nagain\n"
    assert root_box.run("volume", "ls", "-q").text == ""


ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 7))
while True:
    data, address = s.recvfrom(1000)
    s.sendto(data, address)
"""


def test_datagrams_are_handed_on(root_box: Pybuild) -> None:
    import socket

    need_tool("ip")
    port = free_port()
    host = [word for name in ("/usr", "/lib", "/lib64") for word in ("-v", f"{name}:{name}:ro")]
    words = ("--network", "private", "-p", f"{port}:7/udp", *host)
    root_box.run("run", "-d", "--name", "echo", *words, IMAGE, "/usr/bin/python3", "-c", ECHO)
    answer = b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(0.5)

        def asked() -> bool:
            nonlocal answer
            s.sendto(b"ping", ("127.0.0.1", port))
            try:
                answer = s.recv(100)
            except (TimeoutError, ConnectionError):
                return False
            return True

        until(asked)
    assert answer == b"ping"
