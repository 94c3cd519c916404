"""What Docker's words for a sandbox mean."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.sandbox import options
from builder.sandbox.spec import DEFAULT_CAPABILITIES


def test_capabilities_are_added_and_dropped() -> None:
    assert options.capabilities((), ()) == DEFAULT_CAPABILITIES
    assert options.capabilities(("sys_ptrace",), ("CAP_CHOWN",)) == (
        DEFAULT_CAPABILITIES | {"CAP_SYS_PTRACE"}
    ) - {"CAP_CHOWN"}  # fmt: skip
    assert options.capabilities((), ("all",)) == frozenset()
    assert options.capabilities(("CHOWN",), ("ALL",)) == {"CAP_CHOWN"}
    assert "CAP_SYS_ADMIN" in options.capabilities(("ALL",), ())
    assert "CAP_SYS_ADMIN" not in options.capabilities(("ALL",), ("SYS_ADMIN",))


@pytest.mark.parametrize("add, drop", [(("CAP_NOTHING",), ()), ((), ("chmod",))])
def test_an_unknown_capability_is_an_error(add: tuple[str, ...], drop: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="no such capability"):
        options.capabilities(add, drop)


def test_security() -> None:
    assert options.security(()) == ("default", False)
    assert options.security(("seccomp=unconfined", "no-new-privileges")) == ("unconfined", True)
    assert options.security(("no-new-privileges:false", "seccomp:/a/b.json")) == (Path("/a/b.json"), False)


@pytest.mark.parametrize(
    "word",
    ["apparmor=x", "label=type:container_t", "systempaths=unconfined", "seccomp=", "no-new-privileges=perhaps", ""],
)
def test_what_cannot_be_applied_is_an_error(word: str) -> None:
    with pytest.raises(UsageError, match="not possible"):
        options.security((word,))


@pytest.mark.parametrize(
    ("label", "domain"),
    [
        ("", None),
        ("unconfined\n", None),
        ("kernel\0", None),
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\0", None),
        ("docker-default (enforce)\n", "docker-default"),
        ("system_u:system_r:container_t:s0:c1,c2\0", "container_t"),
    ],
)
def test_labels_of_security_modules(label: str, domain: str | None) -> None:
    assert options.confined_by(label) == domain


def test_without_a_label_is_as_it_is() -> None:
    with contextlib.suppress(OSError):
        if options.confined_by(Path("/proc/self/attr/current").read_text()):
            pytest.skip("this process is confined by a security module")
    found = options.security(["label=disable", "apparmor:unconfined", "no-new-privileges"])
    assert found.no_new_privs and found.seccomp == "default"


def test_resolv_conf_replaces_only_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "# made by hand\nnameserver 192.0.2.1\nsearch example.org\noptions ndots:1\n"
    monkeypatch.setattr(Path, "read_text", lambda *_a, **_k: own)
    assert options.resolv_conf() == own.encode()
    lines = options.resolv_conf(("192.0.2.7", "2001:db8::1"), (), ("ndots:2", "rotate")).decode().splitlines()
    assert lines == [
        "# made by hand", "search example.org", "nameserver 192.0.2.7", "nameserver 2001:db8::1",
        "options ndots:2 rotate",
    ]  # fmt: skip
    assert b"search" not in options.resolv_conf((), (".",))
    assert b"search a.test b.test\n" in options.resolv_conf((), ("a.test", "b.test"))
