"""Which proxy a request goes through: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, CIDR included.

Written out because requests knows no CIDR for host names' literal IPv6 addresses nor ports in
NO_PROXY, and reads the process environment; the rules are those of Go's httpproxy, which Docker,
skopeo and BuildKit share.
"""

from __future__ import annotations

from collections.abc import Mapping

from registry.hosts import is_loopback, split_port

_DEFAULT_PORTS = {"http": 80, "https": 443}


def choose_proxy(scheme: str, host: str, environ: Mapping[str, str]) -> str | None:
    """The proxy URL for `scheme://host[:port]`, or None for a direct connection."""
    proxy = _get(environ, f"{scheme}_proxy") or _get(environ, "all_proxy")
    if not proxy or is_loopback(host):
        return None
    if bypasses(scheme, host, _get(environ, "no_proxy")):
        return None
    return proxy if "://" in proxy else "http://" + proxy


def bypasses(scheme: str, host: str, no_proxy: str) -> bool:
    """Whether NO_PROXY exempts the host: `*`, names (with their subdomains), addresses, CIDR blocks, `:port`."""
    name, port = split_port(host.lower())
    port = port or _DEFAULT_PORTS[scheme]
    for entry in no_proxy.lower().split(","):
        entry = entry.strip()
        if not entry:
            continue
        if entry == "*":
            return True
        if "/" in entry:
            if _in_network(name, entry):
                return True
            continue
        wanted, wanted_port = (entry, None) if entry.count(":") > 1 and "[" not in entry else split_port(entry)
        if wanted_port is not None and wanted_port != port:
            continue
        if _matches(name, wanted):
            return True
    return False


def _matches(name: str, wanted: str) -> bool:
    if wanted.startswith("*."):
        wanted = wanted[1:]
    if wanted.startswith("."):
        return name.endswith(wanted)
    return name == wanted or name.endswith("." + wanted) or _same_address(name, wanted)


def _same_address(name: str, wanted: str) -> bool:
    from ipaddress import ip_address

    try:
        return ip_address(name) == ip_address(wanted)
    except ValueError:
        return False


def _in_network(name: str, entry: str) -> bool:
    from ipaddress import ip_address, ip_network

    try:
        return ip_address(name) in ip_network(entry, strict=False)
    except ValueError:
        return False


def _get(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""
