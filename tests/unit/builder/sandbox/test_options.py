"""`--security-opt`: what is done, what holds already, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from builder.errors import UsageError
from builder.sandbox.options import confined_by, security


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
    assert confined_by(label) == domain


def test_without_a_label_is_as_it_is() -> None:
    with contextlib.suppress(OSError):
        if confined_by(Path("/proc/self/attr/current").read_text()):
            pytest.skip("this process is confined by a security module")
    found = security(["label=disable", "apparmor:unconfined", "no-new-privileges"])
    assert found.no_new_privs and found.seccomp == "default"


@pytest.mark.parametrize("word", ["apparmor=docker-default", "label=type:container_t", "systempaths=unconfined"])
def test_what_nothing_here_applies_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="not possible"):
        security([word])
