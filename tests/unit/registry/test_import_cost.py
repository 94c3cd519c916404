"""What the registry's modules may not drag in when they are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = ("errors", "reference", "hosts", "registriesconf", "credentials", "policy", "retry", "proxies")
HEAVY = {"requests", "urllib3", "oras", "ssl", "subprocess", "tomllib", "tempfile", "ctypes"}


@pytest.mark.parametrize(
    ("module", "forbidden"), [*((m, HEAVY) for m in LIGHT), ("client", {"requests", "urllib3", "oras", "ssl", "tqdm"})]
)
def test_imports(module: str, forbidden: set[str]) -> None:
    code = f"import sys; before = set(sys.modules); import registry.{module}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & forbidden
