"""A private network for a sandbox: a veth pair with NAT as root, slirp4netns or pasta as an ordinary user.

A helper process, forked by the zygote for each such sandbox, does what needs the host's network: it
sets up, opens the sandbox's gate (or writes why not), waits for the end and takes everything down. As
root each sandbox has a subnet of four addresses, told by a locked file; the rules of one that was
killed are removed by the next that comes. Nothing but `layers.linux` and the stdlib: the zygote's.
"""

from __future__ import annotations

import _socket as socket  # all of `socket` that is needed: see `channel`
import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import time

from builder.sandbox.netlink import Routes
from layers import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

INTERFACE = "eth0"
SLIRP_DNS = "10.0.2.3"
PASTA_DNS = "169.254.1.1"
_STATE = "/run/pybuild/net"
_NETWORK, _SUBNETS = struct.unpack("!I", socket.inet_aton("10.213.0.0"))[0], 1 << 14
_READY_S = 15.0
_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin")


class NetworkError(Exception):
    """A private network cannot be had; the words are for a person."""


def obstacle() -> str | None:
    """What keeps sandboxes from a private network here; None if nothing does."""
    with open("/proc/self/uid_map", "rb") as stream:
        rootful = os.geteuid() == 0 and stream.read().split() == [b"0", b"0", b"4294967295"]
    if rootful:
        if find_program("iptables-restore") is None and find_program("nft") is None:
            return "a private one needs iptables or nft"
        return None
    if find_program("slirp4netns") is None and find_program("pasta") is None:
        return "a private one needs slirp4netns or pasta"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return f"a private one needs /dev/net/tun: {e.strerror}"
    return None


class Subnet:
    """Four addresses: the net, the host's end, the sandbox's end, broadcast."""

    def __init__(self, number: int) -> None:
        self.number = number

    def address(self, offset: int) -> str:
        """An address of the subnet as text."""
        return socket.inet_ntoa(struct.pack("!I", _NETWORK + 4 * self.number + offset))

    @property
    def text(self) -> str:
        """The subnet in CIDR notation."""
        return f"{self.address(0)}/30"

    @property
    def interface(self) -> str:
        """The name of the host's end."""
        return f"pybuild{self.number}"


def serve(pidfd: int, gate: int, *, rootless: bool) -> NoReturn:
    """The helper's whole life. Writes a newline to `gate` when the network is up, else the error."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        network = Rootless(pidfd) if rootless else Rootful(pidfd)
        try:
            network.up()
            os.write(gate, b"\n")
            os.close(gate)
            wait(pidfd, None)
        finally:
            network.down()
    except (NetworkError, OSError) as e:
        with contextlib.suppress(OSError):
            os.write(gate, str(e).encode(errors="replace")[:2000])
    finally:
        os._exit(0)


def wait(pidfd: int, timeout_s: float | None) -> bool:
    """Whether the process ended within the time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def namespace(pidfd: int) -> int:
    """The network namespace of a process, open. Raises: OSError."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="utf-8") as stream:
        pid = next(line.split()[1] for line in stream if line.startswith("Pid:"))
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def resolv_conf(text: bytes, *, rootless: bool) -> bytes:
    """A resolv.conf that works in a private network: resolvers on the loopback are out of reach there."""
    lines = text.splitlines(keepends=True)
    local = [line for line in lines if line.startswith(b"nameserver") and _is_loopback(line)]
    if not local:
        return text
    kept = [line for line in lines if line not in local]
    if any(line.startswith(b"nameserver") for line in kept):
        return b"".join(kept)
    if rootless:
        server = SLIRP_DNS if find_program("slirp4netns") else PASTA_DNS
        return b"".join(kept) + f"nameserver {server}\n".encode()
    with contextlib.suppress(OSError), open("/run/systemd/resolve/resolv.conf", "rb") as stream:
        # What systemd's stub on the loopback asks in its turn.
        return stream.read()
    return text


def _is_loopback(line: bytes) -> bool:
    address = line.split()[1:2]
    return bool(address) and (address[0].startswith(b"127.") or address[0] == b"::1")


def find_program(name: str) -> str | None:
    """A program of the system, by its path."""
    for directory in _DIRECTORIES:
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    return None


def _need(name: str, package: str) -> str:
    path = find_program(name)
    if path is None:
        raise NetworkError(f"a private network needs {name} (Debian: apt install {package})")
    return path


def _run(*args: str, given: str = "", check: bool = True) -> None:
    """Run a program to its end, `given` (less than a pipe takes) on its stdin. Raises: NetworkError with its words."""
    read, write = os.pipe()
    stdin, given_to = os.pipe()
    os.write(given_to, given.encode())
    os.close(given_to)
    actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)]
    pid = os.posix_spawn(args[0], args, {"PATH": ":".join(_DIRECTORIES)}, file_actions=actions)
    os.close(write)
    os.close(stdin)
    with open(read, "rb") as stream:
        words = stream.read(4096).decode(errors="replace").strip()
    status = os.waitpid(pid, 0)[1]
    if check and status != 0:
        raise NetworkError(f"{' '.join(args)}: {words or f'status {status}'}")


class Rootful:
    """A veth pair, and NAT by iptables or nftables."""

    def __init__(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.subnet: Subnet | None = None
        self.lock = -1

    def up(self) -> None:
        """Raises: NetworkError, OSError."""
        self.subnet, self.lock = _take_subnet()
        subnet = self.subnet
        net = namespace(self.pidfd)
        with Routes() as routes:
            routes.add_veth(subnet.interface, INTERFACE, net)
            routes.add_address(subnet.interface, subnet.address(1), 30)
            routes.set_up(subnet.interface)
        _inside(net, subnet)
        os.close(net)
        _rules(subnet, add=True)
        _forward()

    def down(self) -> None:
        """Remove rules and interface; the latter goes with the sandbox's namespace, but not at once."""
        if self.subnet is None:
            return
        with contextlib.suppress(NetworkError, OSError):
            _clear(self.subnet)
        os.ftruncate(self.lock, 0)
        os.close(self.lock)


def _inside(net: int, subnet: Subnet) -> None:
    """Configure the sandbox's end, from within its namespace. Raises: OSError."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    linux.setns(net, linux.CLONE_NEWNET)
    try:
        with Routes() as routes:
            routes.add_address(INTERFACE, subnet.address(2), 30)
            routes.set_up(INTERFACE)
            routes.add_default_route(INTERFACE, subnet.address(1))
    finally:
        linux.setns(own, linux.CLONE_NEWNET)
        os.close(own)


def sweep() -> None:
    """Remove what killed helpers of this machine's root left. Never raises OSError."""
    with contextlib.suppress(OSError):
        for name in os.listdir(_STATE):
            with contextlib.suppress(OSError, NetworkError, ValueError):
                lock = os.open(f"{_STATE}/{name}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    if os.fstat(lock).st_size:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        _clear(Subnet(int(name)))
                        os.ftruncate(lock, 0)
                finally:
                    os.close(lock)


def _take_subnet() -> tuple[Subnet, int]:
    """A subnet that is nobody's, and its locked file; what a killed helper left is cleared. Raises: NetworkError."""
    os.makedirs(_STATE, 0o700, exist_ok=True)
    routes = _routes()
    for number in range(1, _SUBNETS):
        subnet = Subnet(number)
        lock = os.open(f"{_STATE}/{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if os.fstat(lock).st_size:
            _clear(subnet)
            os.ftruncate(lock, 0)
            routes = _routes()
        address = _NETWORK + 4 * number
        if any(address & mask == net for net, mask in routes):
            os.close(lock)
            continue
        os.write(lock, b"used\n")
        return subnet, lock
    raise NetworkError("no subnet of 10.213.0.0/16 is free")


def _routes() -> list[tuple[int, int]]:
    """(network, mask) of the host's routes but the default one."""
    found = []
    with open("/proc/net/route", encoding="utf-8") as stream:
        for row in (line.split() for line in stream.readlines()[1:]):
            # The kernel prints network order as if it were the host's.
            net, mask = (struct.unpack("!I", struct.pack("=I", int(row[index], 16)))[0] for index in (1, 7))
            if mask:
                found.append((net, mask))
    return found


def _clear(subnet: Subnet) -> None:
    _rules(subnet, add=False)
    with Routes() as routes:
        routes.delete_link(subnet.interface)


def _rules(subnet: Subnet, *, add: bool) -> None:
    """NAT for the subnet, and leave to forward. Raises: NetworkError."""
    if restore := find_program("iptables-restore"):
        verb = "-I" if add else "-D"
        post = f"{verb} POSTROUTING -s {subnet.text} ! -o {subnet.interface} -j MASQUERADE"
        out = f"{verb} FORWARD -i {subnet.interface} -j ACCEPT"
        back = f"{verb} FORWARD -o {subnet.interface} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        # One run for all three: each takes its time. Removing, one that is missing must not keep the others.
        tables = [f"*nat\n{post}\nCOMMIT\n", f"*filter\n{out}\nCOMMIT\n", f"*filter\n{back}\nCOMMIT\n"]
        try:
            _run(restore, "-w", "--noflush", given="".join(tables))
        except NetworkError:
            if add:
                raise
            for table in tables:
                _run(restore, "-w", "--noflush", given=table, check=False)
        return
    nft = _need("nft", "nftables")
    table = f"pybuild_{subnet.number}"
    if not add:
        _run(nft, "delete", "table", "ip", table, check=False)
        return
    post = f"ip saddr {subnet.text} oifname != {subnet.interface} masquerade"
    _run(nft, f"table ip {table} {{ chain post {{ type nat hook postrouting priority 100; {post}; }}; }}")


def _forward() -> None:
    path = "/proc/sys/net/ipv4/ip_forward"
    with open(path, encoding="utf-8") as stream:
        if stream.read().strip() == "1":
            return
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("1")


class Rootless:
    """slirp4netns or pasta, attached to the namespace from outside."""

    def __init__(self, pidfd: int) -> None:
        self.pidfd = pidfd
        self.pid = 0

    def up(self) -> None:
        """Raises: NetworkError, OSError."""
        net = namespace(self.pidfd)
        os.set_inheritable(net, True)
        place = f"/proc/self/fd/{net}"
        if program := find_program("slirp4netns"):
            args = [program, "--configure", "--mtu=65520", "--disable-host-loopback"]
            args += ["--netns-type=path", place, INTERFACE]
        elif program := find_program("pasta"):
            args = [program, "--config-net", "--foreground", "--quiet", "--no-map-gw", "--dns-forward", PASTA_DNS]
            args += ["-t", "none", "-u", "none", "-T", "none", "-U", "none"]
            args += ["--ns-ifname", INTERFACE, "--netns-only", "--netns", place]
        else:
            raise NetworkError(
                "a private network needs slirp4netns or pasta (Debian: apt install slirp4netns, or passt)"
            )
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            raise NetworkError(f"a private network needs /dev/net/tun: {e.strerror} (root may: chmod 666)") from e
        read, write = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)]
        self.pid = os.posix_spawn(program, args, {"PATH": ":".join(_DIRECTORIES)}, file_actions=actions)
        os.close(write)
        self._await(net, read, os.path.basename(program))
        os.close(read)
        os.close(net)

    def _await(self, net: int, words: int, name: str) -> None:
        """Until there is a default route inside: the kernel tells that the same way for both tools."""
        # For good: a user namespace's root may not come back into the host's network.
        linux.setns(net, linux.CLONE_NEWNET)
        deadline = time.monotonic() + _READY_S
        while True:
            with open("/proc/thread-self/net/route", encoding="utf-8") as stream:
                if any(line.split()[1:2] == ["00000000"] for line in stream):
                    return
            ended, _status = os.waitpid(self.pid, os.WNOHANG)
            if ended or time.monotonic() > deadline:
                self.pid = 0 if ended else self.pid
                os.set_blocking(words, False)
                with contextlib.suppress(BlockingIOError):
                    raise NetworkError(f"{name} failed: {os.read(words, 2000).decode(errors='replace').strip()}")
                raise NetworkError(f"{name} did not set up the network within {_READY_S:g} s")
            time.sleep(0.005)

    def down(self) -> None:
        """End the tool."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            for _ in range(100):
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.01)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def pass_gate(gate: int) -> None:
    """Wait, in the sandbox, until the network is up. Raises: OSError with the helper's words."""
    with open(gate, "rb") as stream:
        words = stream.read(2048).decode(errors="replace")
    if words != "\n":
        raise OSError(errno.ENETDOWN, words or "the helper for the network died")
