"""The ports of EXPOSE: `[[ip:]host:]port[-port][/tcp|udp|sctp]`, as Docker has always read them."""

from __future__ import annotations

from collections.abc import Iterable

from builder.errors import ParseError

_PROTOCOLS = ("tcp", "udp", "sctp")
MAX_PORT = 65535


def parse_ports(specs: Iterable[str]) -> tuple[str, ...]:
    """Single ports as `port/protocol`, in order, ranges enumerated. Raises: ParseError without a place."""
    ports: dict[str, None] = {}
    for spec in specs:
        ports.update(dict.fromkeys(_parse_port(spec)))
    return tuple(ports)


def _parse_port(spec: str) -> list[str]:
    rest, _, container = spec.rpartition(":")
    address, _, host = rest.rpartition(":")
    port, _, protocol = container.partition("/")
    if not port:
        raise ParseError(f"no port specified: {spec}<empty>")
    protocol = protocol.lower() or "tcp"
    if protocol not in _PROTOCOLS:
        raise ParseError(f"invalid proto: {protocol}", hint=f"one of {', '.join(_PROTOCOLS)}")
    if address:
        _check_address(address)
    first, last = _range(port, "containerPort")
    if host:
        host_first, host_last = _range(host, "hostPort")
        if host_last - host_first != last - first and last != first:
            raise ParseError(f"invalid ranges specified for container and host Ports: {port} and {host}")
    return [f"{number}/{protocol}" for number in range(first, last + 1)]


def is_plain_port(spec: str) -> bool:
    """Whether a spec names neither a host port nor an address, which EXPOSE cannot use."""
    return ":" not in spec


def _range(text: str, what: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and len(p) <= 20 and int(p) <= MAX_PORT for p in parts):
        raise ParseError(f"invalid {what}: {text}", hint=f"a port is a number up to {MAX_PORT}, a range two with a -")
    first, last = int(parts[0]), int(parts[-1])
    if last < first:
        raise ParseError(f"invalid {what}: {text}", hint="a range counts upwards")
    return first, last


def _check_address(text: str) -> None:
    import ipaddress

    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        raise ParseError(f"invalid IP address: {text}") from None
