"""`containers-storage:` and `docker-daemon:`: other tools' stores, through those tools.

Their formats are their own business, so skopeo and docker move the image between them and a layout
or an archive in a temporary directory, which is then read or written as any other. Layers come out
of containers-storage compressed anew: digests are not kept.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from layers.errors import PybuildError, StoreError
from layers.values import NamedTuple
from registry.errors import InvalidReference, printable
from registry.reference import Reference
from registry.transport import ImageDestination, ImageSource, TransportContext
from registry.transports.dockerarchive import (
    DockerArchiveDestination,
    DockerArchiveLocation,
    DockerArchiveSource,
)
from registry.transports.oci import OciDestination, OciLocation, OciSource


class ForeignLocation(NamedTuple):
    """A name in another tool's store, as that tool writes it."""

    transport: str
    name: str

    def __str__(self) -> str:
        return f"{self.transport}:{self.name}"

    def source(self, context: TransportContext) -> ImageSource:
        """Raises: PybuildError if the tool is missing or fails."""
        context.check_policy(self.transport, [])
        directory = _scratch(context.scratch_dir)
        try:
            if self.transport == "docker-daemon":
                return _DaemonSource(self, directory)
            return _StorageSource(self, directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def destination(self, context: TransportContext) -> ImageDestination:
        """Raises: PybuildError if the tool is missing; InvalidReference for docker-daemon: without a tag."""
        _find_tool(_TOOLS[self.transport])
        directory = _scratch(context.scratch_dir)
        try:
            if self.transport == "docker-daemon":
                return _DaemonDestination(self, directory)
            return _StorageDestination(self, directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise


_TOOLS = {"containers-storage": "skopeo", "docker-daemon": "docker"}


def parse(transport: str, rest: str) -> ForeignLocation:
    """Raises: InvalidReference."""
    if rest.startswith("-") or "\0" in rest:
        raise InvalidReference(f"invalid image name {transport}:{rest!r}")
    return ForeignLocation(transport, rest)


def _scratch(parent: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="pybuild-", dir=parent))
    except OSError as e:
        raise StoreError(f"cannot make a temporary directory in {parent}: {e.strerror}") from e


def _find_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise PybuildError(f"{name} is not installed", hint="it is what gives access to that tool's images")
    return path


def _run(*command: str) -> None:
    """Run a tool. Raises: PybuildError with the end of what it said."""
    tool = _find_tool(command[0])
    done = subprocess.run(
        [tool, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        said = done.stderr[-4000:].decode("utf-8", "replace").strip().splitlines()
        raise PybuildError(f"{command[0]} failed: {printable(said[-1]) if said else f'status {done.returncode}'}")


class _StorageSource(OciSource):
    """An image that skopeo copied out of containers/storage."""

    def __init__(self, location: ForeignLocation, directory: Path) -> None:
        self._directory = directory
        _run("skopeo", "copy", "--quiet", str(location), f"oci:{directory}:image")
        super().__init__(OciLocation(directory, "image"))
        self.name = str(location)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _StorageDestination(OciDestination):
    """An image that skopeo will copy into containers/storage."""

    single_platform = True

    def __init__(self, location: ForeignLocation, directory: Path) -> None:
        self._directory = directory
        self._target = str(location)
        super().__init__(OciLocation(directory, "image"))
        self.name = self._target

    def commit(self) -> None:
        super().commit()
        _run("skopeo", "copy", "--quiet", f"oci:{self._directory}:image", self._target)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _DaemonSource(DockerArchiveSource):
    """An image that `docker save` wrote."""

    def __init__(self, location: ForeignLocation, directory: Path) -> None:
        self._directory = directory
        archive = directory / "image.tar"
        _run("docker", "image", "save", "--output", str(archive), location.name)
        super().__init__(DockerArchiveLocation(archive, position=0), directory)
        self.name = str(location)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _DaemonDestination(DockerArchiveDestination):
    """An image that `docker load` will read."""

    def __init__(self, location: ForeignLocation, directory: Path) -> None:
        self._directory = directory
        ref = Reference.parse(location.name).with_default_tag()
        super().__init__(DockerArchiveLocation(directory / "image.tar", ref), directory)
        self.name = str(location)

    def commit(self) -> None:
        super().commit()
        _run("docker", "image", "load", "--quiet", "--input", str(self._directory / "image.tar"))

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)
