"""A `Box` runs commands in sandboxes on a busybox image: as root in the test's process, or as a user in another."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from builder.sandbox.launcher import Launcher
from builder.sandbox.userns import Identity
from layers.snapshot import Mount
from tests.integration.sandbox import driver
from tests.integration.sandbox.driver import Outcome
from tests.support.accounts import Account
from tests.support.machine import need_tool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

APPLETS = """
sh true false ls cat id mount umount ps env sleep touch mkdir rm rmdir ln echo stat mknod chown chmod hostname dd test
cut sed tr pwd readlink kill head tail wc grep mv cp find ifconfig ip date setsid nohup sync sort umask
unshare nsenter chroot swapon insmod dmesg losetup ping renice
"""


class Box:
    """Runs commands on a busybox image. `upper` of the last run shows what would enter the layer."""

    def __init__(self, base: Path, identity: Identity) -> None:
        self.base = base
        self.identity = identity
        self._numbers = count()
        self.lower = base / "lower"
        self.upper = base
        self.stubs: Path | None = None

    @property
    def dialect(self) -> Dialect:
        return self.identity.dialect

    def directory(self, *names: str) -> list[Path]:
        """New directories owned by whom the sandbox's root is."""
        number = next(self._numbers)
        paths = [self.base / f"{number}-{name}" for name in names]
        self._mkdir([str(path) for path in paths])
        return paths

    def overlay(self, *lower: Path) -> Mount:
        """A fresh writable overlay on `lower` (default: the busybox image)."""
        # One directory a snapshot, as the store has it: the stubs go beside the upper.
        snapshot = self.directory("snapshot")[0]
        self._mkdir([str(snapshot / "fs"), str(snapshot / "work")])
        self.upper = snapshot / "fs"
        return Mount("overlay", lower or (self.lower,), self.upper, snapshot / "work", False, self.dialect)

    def run(self, *args: str, **spec: Any) -> Outcome:
        """Run a command to its end."""
        spec.setdefault("env", {"PATH": "/bin"})
        spec.setdefault("stubs", self.stubs)
        if "root" not in spec:
            spec["root"] = self.overlay()
        return self._run({"args": args, **spec})

    def sh(self, script: str, **spec: Any) -> Outcome:
        return self.run("sh", "-c", script, **spec)

    def python(self, script: str, **spec: Any) -> Outcome:
        """Run a script with the machine's own interpreter, on the machine's own root, read-only."""
        need_tool("python3")
        spec.setdefault("root", Mount("bind", (Path("/"),), readonly=True))
        spec.setdefault("env", {"PATH": "/usr/bin:/bin"})
        return self._run({"args": ("/usr/bin/python3", "-I", "-S", "-c", script), **spec})

    def changes(self) -> list[str]:
        """What the last overlay's upper holds."""
        return sorted(str(path.relative_to(self.upper)) for path in self.upper.rglob("*"))

    def _mkdir(self, paths: list[str]) -> None:
        for path in paths:
            Path(path).mkdir()

    def _run(self, request: dict[str, Any]) -> Outcome:
        raise NotImplementedError


class RootBox(Box):
    def __init__(self, base: Path, launcher: Launcher) -> None:
        super().__init__(base, Identity("root", "trusted", (), ()))
        self.launcher = launcher

    def _run(self, request: dict[str, Any]) -> Outcome:
        return driver.run(self.launcher, request)


class UserBox(Box):
    def __init__(self, base: Path, account: Account, mode: str, wrapper: Sequence[str] = ()) -> None:
        source = Path(driver.__file__).read_text()
        self.process = subprocess.Popen(
            [*wrapper, *account.command([str(account.python), "-c", source, mode])],
            env=account.environ(),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        greeting = driver.receive(self.stdout)  # type: ignore[arg-type]
        assert greeting, "the driver did not start"
        super().__init__(base, Identity(*greeting))

    def _ask(self, request: dict[str, Any]) -> Any:
        driver.send(self.stdin, request)  # type: ignore[arg-type]
        return driver.receive(self.stdout)  # type: ignore[arg-type]

    def _run(self, request: dict[str, Any]) -> Outcome:
        return Outcome(*self._ask(request))

    def _mkdir(self, paths: list[str]) -> None:
        self._ask({"mkdir": paths})

    def close(self) -> None:
        self.stdin.close()
        self.stdout.close()
        self.process.wait(10)


def make_image(path: Path) -> None:
    """A root file system of busybox and nothing else: no /proc, /dev, /etc or /tmp."""
    if path.exists():  # a test with boxes of both kinds
        return
    (path / "bin").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copyfile(busybox, path / "bin/busybox")
    (path / "bin/busybox").chmod(0o755)
    for name in APPLETS.split():
        (path / "bin" / name).symlink_to("busybox")
