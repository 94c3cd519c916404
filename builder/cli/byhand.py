"""`pybuild from`, `copy` and `add` into working containers, `mount`, `unmount`, `containers`: images by hand.

Also what `run`, `commit`, `inspect` and `diff` do with working containers.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_registry_options, boolean, epoch_of, registry_options, store_root
from builder.errors import UsageError
from layers.errors import NameNotFound, PybuildError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.container.byhand import FindImage
    from builder.container.working import WorkingContainer
    from builder.plan.request import BuildRequest
    from layers.image import Image
    from layers.oci import Platform
    from layers.store import Store

_ADD_ONLY = ("checksum", "keep_git_dir", "unpack")


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "from":
            _configure_from(parser)
        case "copy" | "add":
            _configure_transfer(verb, parser)
        case "mount":
            add("names", nargs="*", metavar="CONTAINER", help="none: list what is mounted")
            add("--json", action="store_true", help="print JSON")
        case "unmount" | "umount":
            add("names", nargs="*", metavar="CONTAINER", help="names or IDs")
            add("-a", "--all", action="store_true", help="all that are mounted")
        case "containers":
            add("-a", "--all", action="store_true", help="also those of `run` and `create`")
            add("-q", "--quiet", action="store_true", help="IDs alone")
            add("-n", "--noheading", action="store_true", help="no headings")
            add("--no-trunc", "--notruncate", dest="no_trunc", action="store_true", help="whole IDs")
            add("--json", action="store_true", help="print JSON")
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
            add("-f", "--filter", action="append", default=[], metavar="KEY=VALUE", help="id, name, ancestor")


def _configure_from(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image, pulled if it is missing, of any transport; or scratch")
    add("--name", metavar="NAME", help="its name (default: after the image, as in debian-working-container)")
    add("--pull", nargs="?", const="always", default="missing", metavar="POLICY",
        help="fetch the image: always, missing, never or newer (default: missing; --pull alone: always)")  # fmt: skip
    add("--platform", metavar="OS/ARCH", help="the image for this platform (default: this machine's)")
    add("--cidfile", metavar="FILE", help="write the container's ID there")
    add("-q", "--quiet", action="store_true", help="no progress")
    add_registry_options(parser)


def _configure_transfer(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("container", metavar="CONTAINER", help="one made by `from`")
    what = "files, directories, archives, URLs, repositories" if verb == "add" else "files and directories"
    add("paths", nargs="+", metavar="SRC… [DST]", help=f"{what} of this machine, and where to (default: WORKDIR)")
    add("--chown", metavar="USER[:GROUP]", help="who owns what is copied (default: root)")
    add("--chmod", metavar="MODE", help="permissions of what is copied, such as 640 or u=rw,go=r")
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what matches, as an ignore file has it",
    )
    add("--contextdir", metavar="DIR", help="sources are paths in this directory, and its ignore file counts")
    add("--ignorefile", metavar="FILE", help="with --contextdir, instead of its own")
    add("--timestamp", type=int, metavar="SECONDS", help="time of what is written (also SOURCE_DATE_EPOCH)")
    if verb == "copy":
        add("--from", dest="from_", metavar="NAME", help="sources are paths in this image or working container")
        add("--parents", action="store_true", help="with the directories that they are in")
        add_registry_options(parser)
        return
    add("--checksum", metavar="DIGEST", help="of a download, or the commit of a repository")
    add("--keep-git-dir", action="store_true", default=None, help="keep the .git of a repository")
    add("--unpack", type=boolean, metavar="BOOL", help="archives (default: those of this machine)")


def takes(verb: str, words: Sequence[str]) -> bool:
    """Whether these words are about a working container: whether the first of them that is no flag names one."""
    import argparse

    from builder.container.records import is_working

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--root")
    configure(verb, parser)
    valued = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}
    skip = False
    for word in words:
        if skip:
            skip = False
        elif not word.startswith("-") or word == "-":
            return is_working(_root(words), word)
        else:
            skip = word in valued
    return False


def _root(words: Sequence[str]) -> Path:
    root = next((words[at + 1] for at, word in enumerate(words[:-1]) if word == "--root"), None)
    root = root or next((word[7:] for word in words if word.startswith("--root=")), None)
    return store_root(Namespace(root=root))


def run(verb: str, options: Namespace) -> int:
    root = store_root(options)
    match verb:
        case "from":
            return _from(root, options)
        case "copy" | "add":
            return _transfer(verb, root, options)
        case "mount":
            return _mount(root, options)
        case "unmount" | "umount":
            return _unmount(root, options)
        case _:
            return _containers(root, options)


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


@contextmanager
def opened(root: Path, name: str) -> Iterator[WorkingContainer]:
    """A working container by name, in the namespaces of builds. Raises: NoSuchContainer, ContainerError."""
    from builder import api
    from builder.container import working

    working.find(root, name)  # before anything that takes time
    api.prepare_namespaces()
    with api.open_store(root) as store, working.open_working(store, name, tell=tell) as container:
        yield container


def request_of(options: Namespace, **fields: Any) -> BuildRequest:
    """What the steps' own functions are asked with. Raises: UsageError."""
    from builder.container.byhand import step_request

    return step_request(epoch_s=epoch_of(options), environ=dict(os.environ), **fields)


# from


def _from(root: Path, options: Namespace) -> int:
    from builder import api
    from builder.container import working

    platform = None
    if options.platform:
        from layers.oci import Platform

        platform = Platform.parse(options.platform)
    if options.cidfile and os.path.exists(options.cidfile):
        raise UsageError(f"--cidfile {options.cidfile} exists already")
    api.prepare_namespaces()
    with api.open_store(root) as store:
        working.sweep(store)
        image, shown = None, "scratch"
        if options.image != "scratch":
            image, shown = base_image(store, root, options, platform)
            triggers = image.config.config.get("OnBuild") or []
            if triggers:
                tell(f"warning: the image's ONBUILD instructions are not carried out: {'; '.join(map(str, triggers))}")
        record = working.create_working(store, image, shown, name=options.name, platform=platform)
    if options.cidfile:
        Path(options.cidfile).write_text(record.id)
    print(record.name)
    return 0


def base_image(store: Store, root: Path, options: Namespace, platform: Platform | None) -> tuple[Image, str]:
    """The image, pulled as `--pull` says, and what it is called."""
    from builder.places import pull_name
    from builder.rootfs import find
    from registry.transport import split_transport

    policy = options.pull
    if policy not in {"always", "missing", "never", "newer", "ifmissing", "ifnewer"}:
        raise UsageError(f"--pull {policy!r}: there are always, missing, never and newer")
    policy = policy.removeprefix("if")
    transport, rest = split_transport(options.image)
    name = options.image if transport is None else pull_name(options.image)
    if transport == "storage":
        name, policy = rest, "never"

    def here() -> Image:
        image = find(store, name, platform)
        if platform is not None and not platform.runs(image.config.platform):
            raise NameNotFound(f"{name} is there for {image.config.platform}, not for {platform}", hint="pull it")
        return image

    if policy == "always" or transport not in {None, "docker", "storage"}:
        pull(root, options, options.image, platform)
    elif policy == "newer":
        try:
            pull(root, options, options.image, platform)
        except PybuildError:
            here()  # good enough, if it is there
    try:
        return here(), name
    except NameNotFound:
        if policy == "never":
            raise
        pull(root, options, options.image, platform)
    return here(), name


def pull(root: Path, options: Namespace, name: str, platform: Platform | None = None) -> None:
    """Raises: RegistryError."""
    from builder import api
    from builder.cli.progress import make_progress
    from registry.copy import CopyOptions

    mode = "quiet" if getattr(options, "quiet", False) else "auto"
    with make_progress(mode, sys.stderr, os.environ) as progress:
        api.pull(
            name, root=root, source_registry=registry_options(options), events=progress,
            options=CopyOptions(platform=platform),
        )  # fmt: skip


def finder(container: WorkingContainer, root: Path, options: Namespace) -> FindImage:
    """Finds the images of `--from`, and pulls what is missing."""

    def find(name: str) -> Image:
        from builder.container.create import find_image

        platform = container.platform
        return find_image(container.store, name, lambda: pull(root, options, name, platform), platform)

    return find


# copy, add


def _transfer(verb: str, root: Path, options: Namespace) -> int:
    from builder.container.byhand import Transfer, transfer

    *sources, destination = options.paths if len(options.paths) > 1 else [*options.paths, ""]
    if options.ignorefile and not options.contextdir:
        raise UsageError("--ignorefile needs --contextdir")
    from_ = getattr(options, "from_", None)
    if from_ and options.contextdir:
        raise UsageError("--from and --contextdir exclude each other")
    what = Transfer(
        sources=tuple(sources),
        destination=destination,
        add=verb == "add",
        context_dir=Path(options.contextdir).absolute() if options.contextdir else None,
        from_=from_,
        chown=options.chown,
        chmod=options.chmod,
        parents=getattr(options, "parents", False),
        exclude=tuple(options.exclude),
        **{name: getattr(options, name, None) for name in _ADD_ONLY},
    )
    request = request_of(options, ignore_file=Path(options.ignorefile) if options.ignorefile else None)
    with opened(root, options.container) as container:
        transfer(container, what, request, finder(container, root, options))
    return 0


# mount, unmount


def _need_lasting_namespace() -> None:
    if os.geteuid() != 0:
        raise UsageError(
            "an ordinary user's mount would be gone with this command", hint="work in `pybuild unshare`, where it lasts"
        )


def _mount(root: Path, options: Namespace) -> int:
    from builder.container import mounting, records

    if not options.names:
        found = [(r.name, place) for r in records.every(root, working=True) if (place := mounting.mounted_at(r))]
        _print_mounts(found, options, names=True)
        return 0
    _need_lasting_namespace()
    mounted = []
    for name in options.names:
        with opened(root, name) as container:
            mounted.append((container.record.name, mounting.mount(container)))
    _print_mounts(mounted, options, names=len(mounted) > 1)
    return 0


def _print_mounts(found: Sequence[tuple[str, Path]], options: Namespace, *, names: bool) -> None:
    if options.json:
        import json

        print(json.dumps([{"container": name, "mountPoint": str(place)} for name, place in found], indent=2))
        return
    for name, place in found:
        print(f"{name} {place}" if names else place)


def _unmount(root: Path, options: Namespace) -> int:
    from builder.cli.main import report
    from builder.container import mounting, records

    if options.all == bool(options.names):
        raise UsageError("which container?", hint="name some, or use --all")
    names = options.names or [r.name for r in records.every(root, working=True) if mounting.mounted_at(r)]
    status = 0
    for name in names:
        try:
            with opened(root, name) as container:
                if not mounting.unmount(container):
                    raise UsageError(f"working container {name} is not mounted here")
            print(name)
        except PybuildError as e:
            status = report(e)
    return status


# containers


def _containers(root: Path, options: Namespace) -> int:
    from builder.container.records import every

    found = [*every(root, working=True), *(every(root) if options.all else ())]
    tests = [_test(text) for text in options.filter]
    chosen = [record for record in found if all(test(record) for test in tests)]
    rows = [
        {
            "ContainerID": r.id if options.no_trunc or options.json else r.id[:12],
            "Builder": r.working,
            "ImageID": _short(str(r.settings["image_id"]), whole=options.no_trunc or options.json),
            "ImageName": r.settings["image"],
            "ContainerName": r.name,
        }
        for r in chosen
    ]
    if options.quiet:
        print("".join(f"{row['ContainerID']}\n" for row in rows), end="")
    elif options.json:
        import json

        print(json.dumps([{key.lower(): value for key, value in row.items()} for row in rows], indent=4))
    elif options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, rows)
    else:
        from builder.cli.images import print_table

        heads = [] if options.noheading else [["CONTAINER ID", "BUILDER", "IMAGE ID", "IMAGE NAME", "CONTAINER NAME"]]
        table = [*heads, *([_cell(value) for value in row.values()] for row in rows)]
        if table:
            print_table(table)
    return 0


def _cell(value: Any) -> str:
    return ("*" if value else "") if isinstance(value, bool) else str(value)


def _short(digest: str, *, whole: bool) -> str:
    hexes = digest.partition(":")[2]
    return hexes if whole else hexes[:12]


def _test(text: str) -> Any:
    key, _, value = text.partition("=")
    match key:
        case "id":
            return lambda record: record.id.startswith(value)
        case "name":
            return lambda record: value in record.name
        case "ancestor":
            return lambda record: (
                value in {record.settings["image"], record.settings["image"].partition(":")[0]}
                or str(record.settings["image_id"]).partition(":")[2].startswith(value)
            )
    raise UsageError(f"--filter {text!r}: unknown filter", hint="there are id=, name= and ancestor=")
