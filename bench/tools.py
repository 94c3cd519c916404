"""The command lines that are compared: pybuild and its peers, each with storage of its own.

Every method gives an argument list; nothing is run here. A peer that is not installed is left out of
the table by `available`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[1]


def available(program: str) -> bool:
    """Whether a program is on the PATH, sbin included."""
    return shutil.which(program, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") is not None


class Pybuild(NamedTuple):
    """This checkout, by the interpreter that runs the benchmark."""

    work: Path
    name: str = "pybuild"

    def _argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "builder", "--root", str(self.work / "pybuild"), *words]

    def version(self) -> list[str]:
        return [sys.executable, "-m", "builder", "--version"]

    def build(self, context: Path, tag: str, *flags: str, cached: bool = True) -> list[str]:
        more = () if cached else ("--no-cache",)
        return self._argv("build", "--quiet", "-t", tag, *more, *flags, str(context))

    def push(self, tag: str, destination: str) -> list[str]:
        return self._argv("push", "--quiet", tag, destination)

    def pull(self, reference: str) -> list[str]:
        return self._argv("pull", "--quiet", reference)

    def copy(self, source: str, destination: str) -> list[str]:
        return self._argv("copy", "--quiet", source, destination)

    def unpack(self, layout: Path, tag: str, target: Path) -> list[str]:
        return self._argv("unpack", f"oci:{layout}:{tag}", str(target))

    def reset(self) -> None:
        """An empty store."""
        shutil.rmtree(self.work / "pybuild", ignore_errors=True)


class Buildah(NamedTuple):
    """Debian's buildah; `isolation` is `oci` (with runc) or `chroot`."""

    work: Path
    isolation: str = "oci"

    @property
    def name(self) -> str:
        return "buildah" if self.isolation == "oci" else f"buildah-{self.isolation}"

    def _argv(self, *words: str) -> list[str]:
        root = self.work / self.name
        return ["buildah", "--root", f"{root}/root", "--runroot", f"{root}/run", "--storage-driver", "overlay", *words]

    def version(self) -> list[str]:
        return ["buildah", "--version"]

    def build(self, context: Path, tag: str, *flags: str, cached: bool = True) -> list[str]:
        isolation = ["--isolation", self.isolation, *(["--runtime", "runc"] if self.isolation == "oci" else [])]
        more = ["--layers", "--tls-verify=false", *([] if cached else ["--no-cache"])]
        return self._argv("bud", "-q", "-t", tag, *isolation, *more, *flags, str(context))

    def push(self, tag: str, destination: str) -> list[str]:
        return self._argv("push", "-q", "--tls-verify=false", tag, destination)

    def pull(self, reference: str) -> list[str]:
        return self._argv("pull", "-q", "--tls-verify=false", reference)

    def reset(self) -> None:
        subprocess.run(self._argv("rmi", "--all", "--force"), check=False, capture_output=True)
        root = self.work / self.name
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(root) in (point := line.split()[4]):
                subprocess.run(["umount", "-l", point], check=False)
        shutil.rmtree(root, ignore_errors=True)


class Skopeo(NamedTuple):
    """Debian's skopeo."""

    name: str = "skopeo"

    def version(self) -> list[str]:
        return ["skopeo", "--version"]

    def copy(self, source: str, destination: str) -> list[str]:
        return ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false", source, destination]


class Umoci(NamedTuple):
    """Debian's umoci."""

    name: str = "umoci"

    def version(self) -> list[str]:
        return ["umoci", "--version"]

    def unpack(self, layout: Path, tag: str, target: Path) -> list[str]:
        return ["umoci", "raw", "unpack", "--image", f"{layout}:{tag}", str(target)]
