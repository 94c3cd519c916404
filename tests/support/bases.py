"""Base images, made on the machine by Containerfile.examples/make_base.py and pushed to the session's registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cachedir import locked, once
from tests.support.machine import CHECKOUT, need_tool
from tests.support.registries import RegistryServer

MAKER = CHECKOUT / "Containerfile.examples" / "make_base.py"


def make_base(kind: str, layout: Path) -> None:
    """Raises: subprocess.CalledProcessError with the maker's words on stderr."""
    subprocess.run([sys.executable, str(MAKER), kind, str(layout)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def busybox_layout(session_dir: Path) -> Path:
    """An OCI layout with one busybox image, tag `busybox`."""
    need_tool("busybox")
    return once(session_dir / "busybox", lambda path: make_base("busybox", path))


@pytest.fixture(scope="session")
def debian_layout(machine_cache: Path) -> Path:
    """An OCI layout with one Debian (or Ubuntu) minbase image, tag `debian`; kept between sessions."""
    need_tool("mmdebstrap")
    layout = machine_cache / "debian"
    with locked(machine_cache / "debian.lock"):
        make_base("debian", layout)
    return layout


@pytest.fixture(scope="session")
def busybox_base(registry: RegistryServer, busybox_layout: Path, session_dir: Path) -> str:
    """The reference of a busybox image in the session's registry."""
    once(session_dir / "busybox-pushed", lambda _: _push(registry, busybox_layout, "busybox"))
    return f"{registry.host}/base/busybox:1"


@pytest.fixture(scope="session")
def debian_base(registry: RegistryServer, debian_layout: Path, session_dir: Path) -> str:
    """The reference of a Debian image in the session's registry."""
    once(session_dir / "debian-pushed", lambda _: _push(registry, debian_layout, "debian"))
    return f"{registry.host}/base/debian:1"


def _push(registry: RegistryServer, layout: Path, kind: str) -> None:
    registry.push_layout(layout, f"base/{kind}", "1")
