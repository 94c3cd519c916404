"""Proxy choice by the rules of Go's httpproxy."""

from __future__ import annotations

import pytest

from registry.proxies import bypasses, choose_proxy

ENV = {"HTTP_PROXY": "http://p:1", "https_proxy": "q:2"}


def test_scheme_and_case() -> None:
    assert choose_proxy("http", "h.x", ENV) == "http://p:1"
    assert choose_proxy("https", "h.x:5000", ENV) == "http://q:2"
    assert choose_proxy("https", "h.x", {"all_proxy": "http://all:3"}) == "http://all:3"
    assert choose_proxy("https", "h.x", {}) is None


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1", "[::1]:5000"])
def test_this_machine_is_never_proxied(host: str) -> None:
    assert choose_proxy("http", host, ENV) is None


@pytest.mark.parametrize(
    ("host", "no_proxy", "expected"),
    [
        ("h.x", "*", True),
        ("h.x", "h.x", True),
        ("a.h.x", "h.x", True),
        ("ah.x", "h.x", False),
        ("h.x", ".h.x", False),
        ("a.h.x", ".h.x", True),
        ("a.h.x", "*.h.x", True),
        ("H.X", "h.x", True),
        ("h.x:5000", "h.x:5000", True),
        ("h.x:5001", "h.x:5000", False),
        ("h.x", "h.x:443", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3:5000", "10.1.2.3", True),
        ("[fd00::5]:5000", "fd00::/8", True),
        ("[fd00::5]:5000", "fd00:0::5", True),
        ("[fd00::5]", "fe80::/10", False),
        ("h.x", " a.x , h.x ", True),
        ("h.x", "", False),
        ("h.x", ",,", False),
        ("h.x", "10.0.0.0/99", False),
        ("h.x", "nonsense/x", False),
    ],
)
def test_no_proxy(host: str, no_proxy: str, expected: bool) -> None:
    assert bypasses("https", host, no_proxy) is expected
