"""The private network: NAT as root, slirp4netns or pasta as an ordinary user; nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder.sandbox.network import resolv_conf
from builder.sandbox.spec import SandboxMount
from tests.integration.sandbox.boxes import RootBox, UserBox, make_image
from tests.integration.sandbox.test_lifecycle import KILLED, assert_appears, assert_gone
from tests.support.accounts import Account
from tests.support.machine import CHECKOUT, need_tool, which
from tests.support.networks import assert_taken_down, left_behind, networks_of, traces


@contextmanager
def greeter(address: str) -> Iterator[int]:
    """A server on the host that greets whoever connects with the address it came from."""
    with socket.create_server((address, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(f"hello {peer[0]}\n".encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def host_address() -> str:
    """An address of this machine that is not the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def need_nat() -> None:
    need_tool("ip")
    if not (which("iptables") or which("nft")):
        pytest.skip("needs iptables or nftables")


CONNECT = "import socket; s = socket.create_connection(('{}', {}), 60); print(s.makefile().read(), end='')"


def test_a_veth_pair_with_nat(root_box: RootBox) -> None:
    need_nat()
    before = left_behind()
    address = host_address()
    with greeter(address) as port:
        outcome = root_box.python(CONNECT.format(address, port), network="private")
        assert outcome.out.startswith("hello 10.213."), outcome
        names = "import socket; print(sorted(n for _, n in socket.if_nameindex()))"
        assert root_box.python(names, network="private").out == "['eth0', 'lo']\n"
    assert_taken_down(before)


def test_the_host_loopback_is_not_reached(root_box: RootBox) -> None:
    need_nat()
    with greeter("127.0.0.1") as port:
        outcome = root_box.python(CONNECT.format("127.0.0.1", port), network="private")
    assert "refused" in outcome.err


def test_two_at_once_have_two_subnets(root_box: RootBox) -> None:
    need_nat()
    found: list[str] = []
    both = root_box.directory("both")[0]
    mount = SandboxMount("bind", "/tmp", source=both)
    script = """
import os, time
print(open('/proc/net/fib_trie').read())
open(f'/tmp/{NUMBER}', 'w').close()
while len(os.listdir('/tmp')) < 2: time.sleep(0.01)
"""

    def one(number: int) -> None:
        text = root_box.python(script.replace("NUMBER", str(number)), network="private", mounts=(mount,)).out
        found.append(next(word for word in text.split() if word.startswith("10.213.")))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


def test_sigkill_leaves_rules_only_until_the_next(root_box: RootBox) -> None:
    need_nat()
    before = left_behind()
    marker = f"7{os.getpid()}41"
    root = root_box.overlay()
    script = KILLED.replace("root=root, env", 'root=root, network="private", env')
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(CHECKOUT), str(root_box.lower), str(root.upper), str(root.work), marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdout.readline() == b"started\n"
    assert_appears(marker)
    mine = networks_of(process.pid)
    assert len(mine) == 1
    assert mine <= set(traces().values())
    process.kill()
    process.wait(60)
    process.stdout.close()
    assert_gone(marker)
    assert_taken_down(before)


AHEAD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from builder.sandbox.launcher import Launcher
from builder.sandbox.spec import SandboxSpec
from layers.snapshot import Mount
lower, upper, work = map(Path, sys.argv[2:5])
script = "cd /sys/class/net; echo *"
with Launcher.start("private") as launcher:
    for network in sys.argv[5:]:
        spec = SandboxSpec(
            args=("sh", "-c", script), root=Mount("overlay", (lower,), upper, work), env={"PATH": "/bin"},
            network=network,
        )
        with launcher.run(spec, stdout_fd=1, stderr_fd=2) as running:
            assert running.wait().code == 0
"""


@pytest.mark.parametrize("networks", [[], ["private", "private"], ["none", "private"]])
def test_a_network_made_ahead(root_box: RootBox, networks: list[str]) -> None:
    """It is the first sandbox's if that wants one, is taken down if not, and is there anew for the next."""
    need_nat()
    before = left_behind()
    root = root_box.overlay()
    done = subprocess.run(
        [sys.executable, "-c", AHEAD, str(CHECKOUT), *map(str, (root_box.lower, root.upper, root.work)), *networks],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = {"private": "eth0 lo", "none": "lo"}
    assert done.stdout.splitlines() == [shown[network] for network in networks]
    assert_taken_down(before)


def test_the_rules_of_a_killed_zygote_are_cleared(root_box: RootBox) -> None:
    need_nat()
    before = left_behind()
    marker = f"7{os.getpid()}42"
    root = root_box.overlay()
    script = KILLED.replace("root=root, env", 'root=root, network="private", env')
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(CHECKOUT), str(root_box.lower), str(root.upper), str(root.work), marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdout.readline() == b"started\n"
    zygote = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(zygote), signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert_gone(marker)
    assert root_box.run("true", network="private").code == 0
    assert_taken_down(before)


def test_without_a_tun_device_the_user_is_told(user_box: UserBox) -> None:
    if not (which("slirp4netns") or which("pasta")):
        pytest.skip("needs slirp4netns or passt")
    if os.stat("/dev/net/tun").st_mode & 0o006 == 0o006:
        pytest.skip("/dev/net/tun is open to all here")
    outcome = user_box.run("true", network="private")
    assert outcome.error is not None
    assert outcome.error[1] == "network"
    assert "/dev/net/tun" in outcome.error[0]


OPEN_TUN = """
mount -t tmpfs tmpfs /mnt && mknod -m 666 /mnt/tun c 10 200 && mount --bind /mnt/tun /dev/net/tun
test -z "$HIDE" || { touch /mnt/none && mount --bind /mnt/none "$HIDE"; }
exec "$@"
"""


@pytest.mark.parametrize("tool", ["slirp4netns", "pasta"])
def test_a_user_mode_network(
    workplace: Path, rootless_user: Account, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a mount namespace where /dev/net/tun is open to all, as it is on most machines."""
    need_tool(tool, "unshare")
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")
    other = which("slirp4netns")
    monkeypatch.setenv("HIDE", other if tool == "pasta" and other else "")
    make_image(workplace / "lower")
    os.chown(workplace, rootless_user.uid, rootless_user.gid)
    wrapper = ["unshare", "-m", "sh", "-ec", OPEN_TUN, "sh"]
    address = host_address()
    box = UserBox(workplace, rootless_user, "subordinate", wrapper)
    try:
        with greeter(address) as port, greeter("127.0.0.1") as local:
            outcome = box.python(CONNECT.format(address, port), network="private")
            assert outcome.out.startswith("hello "), outcome
            gateway = "10.0.2.2" if tool == "slirp4netns" else "127.0.0.1"
            assert "hello" not in box.python(CONNECT.format(gateway, local), network="private").out
    finally:
        box.close()


def test_resolvers_on_the_loopback_are_replaced() -> None:
    plain = b"search x\nnameserver 192.0.2.1\n"
    assert resolv_conf(plain, rootless=True) == plain
    assert resolv_conf(b"nameserver 127.0.0.53\nnameserver 192.0.2.1\n", rootless=False) == b"nameserver 192.0.2.1\n"
    replaced = resolv_conf(b"options edns0\nnameserver 127.0.0.53\n", rootless=True)
    assert replaced in {b"options edns0\nnameserver 10.0.2.3\n", b"options edns0\nnameserver 169.254.1.1\n"}
