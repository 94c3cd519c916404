"""`--output`: a finished image written to registries, layouts, archives, directories and tar streams.

Images are copied out of the store by `registry.copy`, which sends only what is not there; file systems
are read from the result's snapshot.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from builder.building import OutputResult
from builder.errors import ContextError, UsageError
from layers.errors import PybuildError
from layers.events import EventSink
from layers.snapshot import Mount

_EARLY_JOBS = 2

if TYPE_CHECKING:
    from builder.building import Parts
    from builder.export import ExportedImage
    from builder.plan.graph import ImagePlan, ResolvedImage
    from builder.plan.request import Output
    from layers.changeset import Sink
    from layers.oci import Descriptor, Digest, Platform
    from registry.transport import ImageDestination


def write_output(
    parts: Parts,
    output: Output,
    image: ExportedImage,
    names: tuple[str, ...],
    *,
    events: EventSink,
    cancelled: Callable[[], bool],
) -> list[OutputResult]:
    """Write one output. Raises: UsageError (a name or place is missing), RegistryError, StoreError, Cancelled."""
    if output.type == "image":
        return []
    if output.type == "local":
        return [_write_tree(parts, output, cancelled)]
    if output.type == "tar":
        return [_write_tar(parts, output, cancelled)]
    if output.type == "squashfs":
        return [_write_squashfs(parts, output, cancelled)]
    from registry.copy import CopyOptions, copy_location
    from registry.transport import parse_location

    options = CopyOptions(all_platforms=True, compression=output.compression)
    if output.type == "docker-daemon":
        options = CopyOptions()
    results: list[OutputResult] = []
    for place in _places(output, names, image.descriptor.digest):
        source = parse_location(f"storage:image@{image.descriptor.digest}", "storage")
        copied = copy_location(
            source, parse_location(place), parts.transports(), options=options, events=events, cancelled=cancelled
        )
        results.append(OutputResult(output.type, place, copied.descriptor.digest, copied.moved_bytes))
    return results


def _places(output: Output, names: tuple[str, ...], digest: Digest | None = None) -> list[str]:
    """The locations that an image output means, as `registry.transport` spells them; `digest` is its image's."""
    wanted = [output.name] if output.name else list(names)
    if output.by_digest and digest is not None:
        from registry.reference import Reference

        if output.compression is not None:
            raise UsageError("push-by-digest and compression= exclude each other", hint="use --compression")
        wanted = list(dict.fromkeys(str(Reference.parse(name).without_target().with_digest(digest)) for name in wanted))
    if output.type in {"registry", "docker-daemon"}:
        if not wanted:
            raise UsageError(f"output type={output.type} needs a name", hint="add -t NAME, or name=NAME to the output")
        transport = "docker://" if output.type == "registry" else "docker-daemon:"
        return [f"{transport}{name}" for name in wanted]
    if output.dest is None:
        raise UsageError(f"output type={output.type} needs dest=PATH")
    dest = output.dest if output.dest == "-" else str(Path(output.dest).expanduser())
    if output.type == "docker":
        return [f"docker-archive:{dest}" + (f":{wanted[0]}" if wanted else "")]
    tag = wanted[0].rpartition("/")[2].partition(":")[2] if wanted else ""
    return [f"{'oci-archive' if output.tar else 'oci'}:{dest}" + (f":{tag}" if tag else "")]


def check_rights(parts: Parts, outputs: Sequence[Output], names: tuple[str, ...]) -> None:
    """Find out before a long build whether its image may be pushed where it is to go.

    Begins an upload in each repository, and cancels it. Raises: AuthError, NetworkError; whatever else a registry
    has against that says nothing about a push.
    """
    from registry.errors import AuthError, NetworkError, RegistryError
    from registry.reference import Reference

    places = [place for output in outputs if output.type == "registry" for place in _places(output, names)]
    client = parts.transports().client
    for repository in dict.fromkeys(Reference.parse(p.removeprefix("docker://")).without_target() for p in places):
        try:
            client.check_push(repository)
        except (AuthError, NetworkError) as e:
            e.add_note("before the build began")
            raise
        except RegistryError:
            continue


class EarlyPush:
    """Sends layers to the registries of the outputs while steps run: the base's at once, new ones when packed.

    What fails here is tried again, and told, when the image itself is sent. A build that the secret gate
    stops has sent blobs by then, but nothing that names them; with secrets, therefore, nothing is sent early.
    """

    def __init__(
        self, parts: Parts, outputs: Sequence[Output], names: tuple[str, ...], bases: Sequence[ResolvedImage]
    ) -> None:
        """`bases` are images whose layers will be the result's as they are."""
        from builder.solve.remotecache import StoreBlobs
        from builder.solve.scheduler import Workers
        from registry.transport import parse_location

        self._layers = parts.layers
        self._store = parts.store
        self._sources = parts.sources
        self._over = False
        self._source = StoreBlobs(parts.store)
        self._workers = Workers(_EARLY_JOBS, "push")
        self._lock = threading.Lock()
        self._destinations: list[ImageDestination] = []
        self.moved_bytes = 0
        if parts.gate is not None and parts.gate.wanted:
            return
        for output in outputs:
            if output.type == "registry" and output.compression is None:
                for place in _places(output, names):
                    try:
                        self._destinations.append(parse_location(place).destination(parts.transports()))
                    except PybuildError:
                        continue
        if not self._destinations:
            return
        parts.layers.made = self._made
        for base in bases:
            for layer in dict.fromkeys(base.manifest.layers):
                if not layer.urls:
                    self._workers.submit(partial(self._send_inherited, base, layer))

    def _made(self, snapshot: str, layer: Descriptor) -> None:
        self._workers.submit(partial(self._send, snapshot, layer))

    def _send(self, snapshot: str, layer: Descriptor) -> None:
        began = time.perf_counter()
        for destination in self._destinations:
            if not destination.has_blob(layer):
                self._put(destination, layer)
        self._layers.add_phase(snapshot, "push", time.perf_counter() - began)

    def _send_inherited(self, base: ResolvedImage, layer: Descriptor) -> None:
        """A base's layer: mounted where its repository is in the same registry, else fetched and sent."""
        for destination in self._destinations:
            if self._over or destination.has_blob(layer):
                continue
            with self._sources.source(base) as source:
                if destination.reuse_blob(layer, source) is None:
                    if self._store.stat(layer.digest) is None:
                        self._sources.fetch_blob(source, layer, f"base:{base.digest}")
                    self._put(destination, layer)

    def _put(self, destination: ImageDestination, layer: Descriptor) -> None:
        from registry.transport import BlobInput

        blob = BlobInput(layer, self._source, cancelled=lambda: self._over)
        try:
            destination.put_blob(blob)
        finally:
            with self._lock:
                self.moved_bytes += blob.moved_bytes

    def close(self, *, failed: bool = False) -> None:
        """Wait for the layers under way, and unless the build has `failed` for those still waiting. Idempotent."""
        self._layers.made = None
        if failed:
            self._over = True
            self._workers.close()
        else:
            self._workers.finish()
        for destination in self._destinations:
            destination.close()
        self._destinations.clear()


# File systems


def _trees(parts: Parts) -> list[tuple[Platform, Mount]]:
    """The root file system of each platform's image."""
    return [(plan.platform, parts.store.snapshots.view(_top(parts, plan))) for plan in parts.graph.images]


def _top(parts: Parts, plan: ImagePlan) -> str | None:
    return None if plan.top is None else parts.solver.snapshot(plan.top)


def _write_tree(parts: Parts, output: Output, cancelled: Callable[[], bool]) -> OutputResult:
    """Copy the root file systems to a directory; those of several platforms to `OS_ARCH` in it."""
    from builder.solve import fileops
    from builder.solve.steps import open_mount

    if not output.dest or output.dest == "-":
        raise UsageError("output type=local needs dest=DIRECTORY")
    top = Path(output.dest).expanduser()
    trees = _trees(parts)
    for platform, mount in trees:
        place = top if len(trees) == 1 else top / str(platform).replace("/", "_")
        try:
            place.mkdir(parents=True, exist_ok=True)
            dest = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise ContextError(f"cannot write to {place}: {e.strerror}") from e
        try:
            with open_mount(mount) as root:
                fileops.copy(root, "/", dest, "/", fileops.CopyOptions(replace_existing=True), cancelled=cancelled)
        finally:
            os.close(dest)
    return OutputResult("local", str(top), None)


def _write_tar(parts: Parts, output: Output, cancelled: Callable[[], bool]) -> OutputResult:
    """Write the root file system as a tar stream."""
    if not output.dest:
        raise UsageError("output type=tar needs dest=FILE (- is stdout)")
    with _root(parts, output) as root, _sink(output.dest) as sink:
        _stream(parts, root, sink, cancelled)
    return OutputResult("tar", output.dest, None)


@contextmanager
def _root(parts: Parts, output: Output) -> Iterator[int]:
    """The root directory of the one platform's image, open for the block."""
    from builder.solve.steps import open_mount

    trees = _trees(parts)
    if len(trees) != 1:
        raise UsageError(f"output type={output.type} writes one platform", hint="use type=local, or one --platform")
    with open_mount(trees[0][1]) as root:
        yield root


def _stream(parts: Parts, root: int, sink: Sink, cancelled: Callable[[], bool]) -> None:
    """What is in a root file system as a tar, deterministic in its order."""
    from layers.changeset import write_layer
    from layers.layerdiff import diff_trees

    place = f"/proc/self/fd/{root}/."  # the dot has the link followed
    epoch = parts.epoch_s
    write_layer(diff_trees(None, place), place, sink, compression="none", clamp_mtime=epoch, cancelled=cancelled)


_SQUASHFS_COMPRESSION = {None: [], "gzip": ["-comp", "gzip"], "zstd": ["-comp", "zstd"],
                         "none": ["-noI", "-noD", "-noF", "-noX"]}  # fmt: skip


def _write_squashfs(parts: Parts, output: Output, cancelled: Callable[[], bool]) -> OutputResult:
    """Write the root file system as a SquashFS image, which squashfs-tools makes of the tar stream."""
    import shutil
    import subprocess

    if not output.dest or output.dest == "-":
        raise UsageError("output type=squashfs needs dest=FILE: it cannot be written to a stream")
    tool = shutil.which("sqfstar")
    if tool is None:
        raise ContextError("output type=squashfs needs sqfstar", hint="install squashfs-tools 4.5 or newer")
    path = Path(output.dest).expanduser()
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    environ = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    options = ["-quiet", "-no-progress", *_SQUASHFS_COMPRESSION[output.compression]]
    try:
        part.touch(exist_ok=False)
        part.unlink()
        with (
            _root(parts, output) as root,
            subprocess.Popen(
                [tool, *options, *_root_options(root, parts.epoch_s), str(part)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environ,
            ) as tar,
        ):  # fmt: skip
            assert tar.stdin is not None
            assert tar.stderr is not None
            try:
                _stream(parts, root, tar.stdin, cancelled)
            except BrokenPipeError:
                pass  # it tells why
            except BaseException:
                tar.kill()
                raise
            _, words = tar.communicate()
        if tar.returncode:
            said = words.decode("utf-8", "replace").strip().splitlines()
            raise ContextError(f"sqfstar cannot write {path}: {said[-1] if said else f'status {tar.returncode}'}")
        part.replace(path)
    except OSError as e:
        raise ContextError(f"cannot write {path}: {e.strerror}") from e
    finally:
        part.unlink(missing_ok=True)
    return OutputResult("squashfs", output.dest, None)


def _root_options(root: int, epoch_s: int | None) -> list[str]:
    """What sqfstar is to be told of the root directory, of which it passes over a tar's entry."""
    st = os.fstat(root)
    # Version 4.5 takes -root-time and gives the root the time of day all the same: so all get the one time.
    times = [] if epoch_s is None else ["-mkfs-time", str(epoch_s), "-all-time", str(epoch_s)]
    return [*times, "-root-mode", f"{st.st_mode & 0o7777:o}", "-root-uid", str(st.st_uid), "-root-gid", str(st.st_gid)]


class _sink:  # noqa: N801 - used as a context manager's verb
    """A file that appears under its name when it is whole, or stdout."""

    def __init__(self, dest: str) -> None:
        self._path = None if dest == "-" else Path(dest).expanduser()
        self._part = None if self._path is None else self._path.with_name(f".{self._path.name}.part-{os.getpid()}")
        self._file: BinaryIO | None = None

    def __enter__(self) -> _sink:
        try:
            self._file = sys.stdout.buffer if self._part is None else self._part.open("wb")
        except OSError as e:
            raise ContextError(f"cannot write {self._path}: {e.strerror}") from e
        return self

    def write(self, data: bytes | memoryview) -> int:
        assert self._file is not None
        return self._file.write(data)

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        assert self._file is not None
        if self._part is None or self._path is None:
            self._file.flush()
            return
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
