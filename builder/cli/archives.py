"""`pybuild save`, `load`, `import`, `export`, `image …` and `unshare`: images as files and directories."""

from __future__ import annotations

import json
import os
import sys
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from builder.cli.options import epoch_of, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from layers.oci import Platform
    from layers.store import Store

_FORMATS = ("docker-archive", "oci-archive", "docker-dir", "oci-dir")


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "save":
            add("names", nargs="+", metavar="NAME", help="images of the store")
            add("-o", "--output", metavar="FILE", help="where to (default: stdout)")
            add(
                "--format", choices=_FORMATS, default="docker-archive", help="what is written (default: docker-archive)"
            )
            add("--platform", metavar="OS/ARCH", help="of an index this image alone")
        case "load":
            add("-i", "--input", metavar="FILE", help="an archive or an OCI layout (default: stdin)")
            add("--platform", metavar="OS/ARCH", help="of an index this image alone")
        case "import":
            add("source", metavar="FILE|URL|-", help="the tar of a root file system")
            add("name", nargs="?", metavar="NAME", help="the image's name")
            add("-c", "--change", action="append", default=[], metavar="INSTRUCTION", help="CMD, ENV, LABEL, USER…")
            add("-m", "--message", default="", metavar="TEXT", help="a comment in the history")
            add("--platform", metavar="OS/ARCH", help="what it is for (default: this machine)")
            add("--compression", choices=["gzip", "zstd", "none"], default="gzip", help="of the layer")
            add("--timestamp", type=int, metavar="SECONDS", help="the time of the image (also SOURCE_DATE_EPOCH)")
        case "export":
            add("name", metavar="NAME", help="an image of the store")
            add("-o", "--output", metavar="FILE", help="where to (default: stdout)")
            add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
            add("--compression", choices=["gzip", "zstd", "none"], default="none", help="of the tar (default: none)")
            add("--timestamp", type=int, metavar="SECONDS", help="no file is newer than this")
        case "image":
            add("action", choices=["mount", "unmount", "umount", "tree"], help="mount read-only, undo it; show layers")
            add("names", nargs="*", metavar="NAME", help="images of the store; mount without any lists what is mounted")
            add("-a", "--all", action="store_true", help="all that are mounted (unmount), or all images")
            add("--json", action="store_true", help="print JSON")
        case "unshare":
            add("command", nargs=REMAINDER, metavar="COMMAND", help="the command and its arguments (default: $SHELL)")
    if verb in {"save", "load", "import"}:
        add("-q", "--quiet", action="store_true", help="no progress")


def run(verb: str, options: Namespace) -> int:
    from builder import api

    root = store_root(options)
    if verb == "unshare":
        return _unshare(options, root)
    if verb == "image" and options.action != "tree" and os.geteuid() != 0:
        raise UsageError(
            "an ordinary user's mount would be gone with this command",
            hint="work in `pybuild unshare`, where it lasts, or use `pybuild unpack`",
        )
    if (
        verb == "export"
        or (verb == "image" and options.action != "tree")
        or os.environ.get("PYBUILD_GC_KEEP")
        or os.environ.get("PYBUILD_GC_MIN_FREE")
    ):
        api.prepare_namespaces()
    if verb in {"load", "import"}:
        from builder.cli.maintenance import make_room

        make_room(root)
    with api.open_store(root) as store:
        match verb:
            case "save":
                return _save(store, options)
            case "load":
                return _load(store, options)
            case "import":
                return _import(store, options)
            case "export":
                return _export(store, options)
            case _:
                return _image(store, options)


def _save(store: Store, options: Namespace) -> int:
    from builder.archives import save_images
    from builder.cli.progress import make_progress
    from registry.copy import CopyOptions

    if options.output is None and (sys.stdout.isatty() or options.format.endswith("dir")):
        raise UsageError("where to? The archive is no text for a terminal", hint="use -o FILE, or a pipe")
    platform = _platform(options)
    choice = CopyOptions(platform=platform, all_platforms=platform is None and options.format.startswith("oci"))
    with make_progress("quiet" if options.quiet else "auto", sys.stderr, os.environ) as progress:
        save_images(store, options.names, options.output or "-", format=options.format, options=choice, events=progress)
    return 0


def _load(store: Store, options: Namespace) -> int:
    from builder.archives import load_images
    from builder.cli.progress import make_progress
    from registry.copy import CopyOptions

    if options.input is None and sys.stdin.isatty():
        raise UsageError("there is no archive on stdin", hint="use -i FILE, or a pipe")
    platform = _platform(options)
    choice = CopyOptions(platform=platform, all_platforms=platform is None)
    with make_progress("quiet" if options.quiet else "auto", sys.stderr, os.environ) as progress:
        loaded = load_images(store, options.input or "-", options=choice, events=progress)
    from registry.reference import Reference

    for image in loaded:
        for name in image.names:
            print(f"Loaded image: {Reference.parse(name).familiar()}")
        if not image.names:
            print(f"Loaded image ID: {image.image_id}")
    return 0


def _import(store: Store, options: Namespace) -> int:
    from builder.rootfs import import_rootfs

    with _input(options.source, store) as stream:
        made = import_rootfs(
            store,
            stream,
            name=options.name,
            changes=options.change,
            message=options.message,
            platform=_platform(options),
            compression=options.compression,
            epoch_s=epoch_of(options),
        )
    print(made.image_id)
    return 0


@contextmanager
def _input(source: str, store: Store) -> Iterator[BinaryIO]:
    """A file, stdin or a download as a stream."""
    if source == "-":
        yield cast(BinaryIO, sys.stdin.buffer)
        return
    path = Path(source)
    if source.startswith(("http://", "https://")):
        from builder.solve.fetch import fetch_http

        path = fetch_http(source, store.root / "remote", environ=os.environ).path
    try:
        stream = path.open("rb", buffering=0)
    except OSError as e:
        raise UsageError(f"cannot read {source}: {e.strerror}") from e
    with stream:
        yield cast(BinaryIO, stream)


def _export(store: Store, options: Namespace) -> int:
    from builder.rootfs import export_rootfs

    if options.output is None and sys.stdout.isatty():
        raise UsageError("where to? The archive is no text for a terminal", hint="use -o FILE, or a pipe")
    with output_file(options.output) as sink:
        export_rootfs(
            store,
            options.name,
            sink,
            platform=_platform(options),
            compression=options.compression,
            clamp_mtime_s=options.timestamp,
        )
    return 0


@contextmanager
def output_file(path: str | None) -> Iterator[BinaryIO]:
    """Stdout, or a file that appears under its name when it is whole."""
    if path is None or path == "-":
        yield cast(BinaryIO, sys.stdout.buffer)
        sys.stdout.flush()
        return
    target = Path(path)
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:  # a device, a pipe
            yield cast(BinaryIO, stream)
        return
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as stream:
            yield cast(BinaryIO, stream)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _tree(store: Store, options: Namespace) -> int:
    from builder.cli.images import human_size
    from builder.images import layer_tree

    if not options.names:
        raise UsageError("no image was named")
    trees = [(name, layer_tree(store, name)) for name in options.names]
    if options.json:
        print(json.dumps([{"name": name, "layers": [x._asdict() for x in layers]} for name, layers in trees], indent=2))
        return 0
    for name, layers in trees:
        print(f"{name}  {human_size(sum(layer.size_bytes for layer in layers))}")
        for layer in layers:
            branch = "└──" if layer is layers[-1] else "├──"
            tops = f"  top of {', '.join(layer.tops)}" if layer.tops else ""
            step = " ".join(layer.created_by.split())[:50]
            print(f"{branch} {layer.digest[7:19]}  {human_size(layer.size_bytes):>7}  {step}{tops}")
    return 0


def _image(store: Store, options: Namespace) -> int:
    if options.action == "tree":
        return _tree(store, options)
    from builder.rootfs import mount_image, mounted_images, unmount_image

    if options.action == "mount" and not options.names and not options.all:
        mounted = mounted_images(store)
    elif options.action == "mount":
        names = options.names or [n.name for n in store.names.list() if n.name[0] != "@" and "#" not in n.name]
        mounted = [mount_image(store, name) for name in names]
    else:
        names = [m.image_id for m in mounted_images(store)] if options.all else options.names
        if not names and not options.all:
            raise UsageError("no image was named")
        mounted = [unmount_image(store, name) for name in names]
    if options.json:
        print(json.dumps([{"id": m.image_id, "path": str(m.path)} for m in mounted], indent=2))
        return 0
    for each in mounted:
        # One mount: the path alone, so that a script can say `cd "$(pybuild image mount NAME)"`.
        if options.action == "mount" and len(options.names) == 1:
            print(each.path)
        else:
            print(f"{each.image_id[7:19]} {each.path}" if options.action == "mount" else each.image_id)
    return 0


def _unshare(options: Namespace, root: Path) -> int:
    from builder import api

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    command = command or [os.environ.get("SHELL") or "/bin/sh"]
    api.prepare_namespaces()
    environment = {**os.environ, "PYBUILD_ROOT": str(root.absolute())}
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606 - the user's own command
    except OSError as e:
        raise UsageError(f"cannot run {command[0]}: {e.strerror}") from e


def _platform(options: Namespace) -> Platform | None:
    if options.platform is None:
        return None
    from layers.oci import Platform

    return Platform.parse(options.platform)
