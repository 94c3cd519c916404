"""`pybuild mutate`, `append`, `rebase` and `flatten`: images changed where they are, without a build."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import (
    add_registry_options,
    environment_epoch,
    epoch_of,
    key_value,
    registry_options,
    store_root,
)
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.places import Places
    from layers.oci import Platform
    from registry.composed import ComposedSource
    from registry.copy import CopyResult
    from registry.edit import BaseImage, Editor
    from registry.newlayer import NewLayer
    from registry.transport import ImageLocation, ImageSource

_SCRATCH = "/var/tmp"  # noqa: S108  # anonymous files, and directories of unguessable names


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    if verb == "append":
        add("source", metavar="IMAGE", nargs="?", help="the image to put layers on (default: an empty one)")
        add("-b", "--base", metavar="IMAGE", help="the image to put layers on, as a flag")
        add("-f", "--file", dest="files", action="append", default=[], metavar="TAR|DIR",
            help="a layer: a tar archive (- is stdin) or a directory; repeat for several")  # fmt: skip
        add("--set-base-image-annotations", action="store_true", help="note the base's name and digest")
    else:
        add("source", metavar="IMAGE", help="an image, of any transport")
    add("-t", "--tag", "-o", "--output", dest="target", metavar="NAME",
        help="where the result goes (default for docker://: the same repository, by digest)")  # fmt: skip
    add("--platform", metavar="OS/ARCH", help="of an index only this image (default: all of them)")
    add("--digestfile", metavar="FILE", help="write the result's digest there")
    add("-q", "--quiet", action="store_true", help="no progress")
    match verb:
        case "mutate":
            _configure_mutate(parser)
        case "rebase":
            add("--old-base", metavar="IMAGE", help="what it was built upon (default: as its annotations say)")
            add(
                "--new-base",
                metavar="IMAGE",
                help="what it is to be built upon (default: what the old's name means now)",
            )
            add("--check", action="store_true", help="tell only whether there is a newer base; 1 if so")
            add("--json", action="store_true", help="print what --check finds as JSON")
        case "flatten":
            add("--timestamp", type=int, metavar="SECONDS", help="no file is to be newer (also SOURCE_DATE_EPOCH)")
    add_registry_options(parser)


def _configure_mutate(parser: ArgumentParser) -> None:
    add = parser.add_argument
    for flag, short, what in (
        ("annotation", "-a", "an annotation of the manifest"),
        ("label", "-l", "a label of the config"),
        ("env", "-e", "an environment variable"),
    ):
        add(f"--{flag}", short, action="append", default=[], metavar="KEY=VALUE", help=what)
        add(f"--unset{flag}", action="append", default=[], metavar="KEY", help=f"remove {what}")
    add("--entrypoint", metavar="WORDS", help='the entrypoint: a JSON array or shell words; "" for none')
    add("--cmd", metavar="WORDS", help="the default command, likewise")
    add("--user", "-u", metavar="USER[:GROUP]", help="who commands run as")
    add("--workdir", "-w", metavar="DIR", help="the working directory")
    add("--stop-signal", metavar="SIGNAL", help="what ends containers")
    add("--author", metavar="NAME", help="who made the image")
    add(
        "--exposed-ports",
        "--port",
        action="append",
        default=[],
        metavar="PORT[/PROTOCOL]",
        help="ports to expose, by commas",
    )
    add("--volume", "-v", action="append", default=[], metavar="DIR", help="a mount point for a volume")
    add("--set-platform", metavar="OS/ARCH", help="the platform that the config names")
    add("--timestamp", type=int, metavar="SECONDS", help="the image's time of creation, in seconds since 1970")
    add(
        "--rewrite-timestamp",
        action="store_true",
        help="with --timestamp (or SOURCE_DATE_EPOCH): no file of a layer and no line of history is newer, either",
    )
    add("--strip-file", action="append", default=[], metavar="PATH",
        help="take files or directories out of all layers; PATH may have wildcards")  # fmt: skip
    add("--append", action="append", default=[], metavar="TAR|DIR", help="put a layer on top")


def run(verb: str, options: Namespace) -> int:
    from builder.cli.progress import make_progress
    from builder.places import open_places
    from registry.transport import parse_location

    if verb == "append":
        _check_append(options)
    if verb == "flatten":
        from builder import api

        api.prepare_namespaces()  # an ordinary user's owners are those of the user namespace
    mode = "quiet" if options.quiet or getattr(options, "check", False) else "auto"
    with open_places(store_root(options), registry_options(options)) as places, ExitStack() as opened:
        progress = opened.enter_context(make_progress(mode, sys.stderr, os.environ))
        location: ImageLocation | None = None
        if options.source is None:
            from layers.oci import Platform
            from registry.edit import empty_image

            source: ImageSource = empty_image("an empty image", _platform(options.platform) or Platform.host())
        else:
            location = parse_location(options.source)
            source = location.source(places.source)
        opened.callback(source.close)
        if verb == "rebase" and options.check:
            return _check_base(options, source, places, opened)
        from registry.edit import edit

        editor = _editor(verb, options, source, places, opened)
        edited = edit(source, editor, platform=_platform(options.platform), events=progress)
        opened.callback(edited.close)
        result = _write(options, location, edited, places, progress)
    if options.digestfile:
        Path(options.digestfile).write_text(result.descriptor.digest)
    print(result.descriptor.digest)
    return 0


def _write(
    options: Namespace, location: ImageLocation | None, edited: ComposedSource, places: Places, progress: object
) -> CopyResult:
    from registry.copy import CopyOptions, copy_image
    from registry.transport import parse_location
    from registry.transports.docker import DockerLocation

    if options.target:
        end = parse_location(options.target)
    elif isinstance(location, DockerLocation):
        end = DockerLocation(location.ref.with_digest(edited.get_manifest().digest))
    else:
        raise UsageError("where should the result go?", hint="name it with -t")
    destination = end.destination(places.destination)
    try:
        choices = CopyOptions(all_platforms=destination.holds_indexes)
        result = copy_image(edited, destination, options=choices, events=progress)  # type: ignore[arg-type]
        if result.written:
            destination.commit()
        return result
    finally:
        destination.close()


def _editor(verb: str, options: Namespace, source: ImageSource, places: Places, opened: ExitStack) -> Editor:
    from registry import edit

    match verb:
        case "mutate":
            return _mutation(options)
        case "append":
            appended = edit.appending(_layers(options.files), created=_created())
            if not options.set_base_image_annotations:
                return appended
            base, digest = options.source, source.get_manifest().digest

            def editor(image: edit.EditedImage) -> None:
                appended(image)
                image.annotations |= {edit.BASE_NAME: _plain_name(base), edit.BASE_DIGEST: digest}

            return editor
        case "rebase":
            old, new = _bases(options, source, places, opened)
            return edit.rebasing(old, new)
        case _:
            return edit.flattening(Path(_SCRATCH), epoch_s=epoch_of(options))


def _check_append(options: Namespace) -> None:
    if options.base and options.source:
        raise UsageError("the base is named twice", hint="leave out one")
    options.source = options.source or options.base
    if not options.files:
        raise UsageError("which layer?", hint="name a tar archive or a directory with -f")
    if options.source is None and not options.target:
        raise UsageError("where should the image go?", hint="name it with -t")
    if options.source is None and options.set_base_image_annotations:
        raise UsageError("--set-base-image-annotations needs a base")


def _layers(files: list[str]) -> Callable[[], list[NewLayer]]:
    from registry.newlayer import layer_of_directory, layer_of_file, layer_of_stream

    if files.count("-") > 1:
        raise UsageError("stdin can be one layer only")

    def make() -> list[NewLayer]:
        made: list[NewLayer] = []
        scratch = Path(_SCRATCH)
        try:
            for name in files:
                if name == "-":
                    made.append(layer_of_stream(sys.stdin.buffer, scratch, "stdin"))
                elif os.path.isdir(name):
                    made.append(layer_of_directory(Path(name), scratch, epoch_s=environment_epoch()))
                else:
                    made.append(layer_of_file(Path(name), scratch))
        except BaseException:
            for layer in made:
                layer.blob.close()
            raise
        return made

    return make


def _mutation(options: Namespace) -> Editor:
    from registry.edit import EditedImage, Mutation, appending

    def pairs(values: list[str], flag: str) -> dict[str, str]:
        return dict(key_value(v, flag) for v in values)

    ports = [p if "/" in p else f"{p}/tcp" for text in options.exposed_ports for p in text.split(",") if p]
    mutation = Mutation(
        annotations=pairs(options.annotation, "--annotation"),
        unset_annotations=options.unsetannotation,
        labels=pairs(options.label, "--label"),
        unset_labels=options.unsetlabel,
        env=pairs(options.env, "--env"),
        unset_env=options.unsetenv,
        entrypoint=_words(options.entrypoint, "--entrypoint"),
        cmd=_words(options.cmd, "--cmd"),
        user=options.user,
        workdir=options.workdir,
        stop_signal=options.stop_signal,
        author=options.author,
        ports=ports,
        volumes=options.volume,
        platform=_platform(options.set_platform),
        created=_time(options.timestamp),
    )
    editors: list[Editor] = []
    if options.rewrite_timestamp or options.strip_file:
        from registry.rewrite import LayerChanges, rewriting

        latest = epoch_of(options)
        if options.rewrite_timestamp and latest is None:
            raise UsageError("--rewrite-timestamp: to what time?", hint="say --timestamp SECONDS")
        changes = LayerChanges(latest if options.rewrite_timestamp else None, options.strip_file)
        editors.append(rewriting(changes, Path(_SCRATCH)))
    if options.append:
        editors.append(appending(_layers(options.append), created_by="pybuild mutate", created=_created()))
    editors.append(mutation.apply)

    def editor(image: EditedImage) -> None:
        for each in editors:
            each(image)

    return editor


def _bases(options: Namespace, source: ImageSource, places: Places, opened: ExitStack) -> tuple[BaseImage, BaseImage]:
    """The old base and the new, from the flags or from the image's annotations."""
    from registry.edit import BaseImage
    from registry.transport import parse_location

    def base(text: str) -> BaseImage:
        found = parse_location(text).source(places.source)
        opened.callback(found.close)
        return BaseImage(found, _plain_name(text))

    name, digest = ("", "")
    if not options.old_base or not options.new_base:
        name, digest = _base_annotations(options, source)
    new = options.new_base or f"docker://{name}"
    old = options.old_base or f"docker://{name.partition('@')[0]}@{digest}"
    return base(old), base(new)


def _base_annotations(options: Namespace, source: ImageSource) -> tuple[str, str]:
    from layers.oci import Platform
    from registry.edit import BASE_DIGEST, BASE_NAME
    from registry.reference import Reference
    from registry.unpack import find_manifest

    manifest = find_manifest(source, _platform(options.platform) or Platform.host())
    name, digest = manifest.annotations.get(BASE_NAME, ""), manifest.annotations.get(BASE_DIGEST, "")
    if not name or not digest:
        raise UsageError(
            f"{source.name} does not say what it was built upon", hint="name its base with --old-base and --new-base"
        )
    ref = Reference.parse(name).with_default_tag()
    return str(ref.with_tag(ref.tag) if ref.tag is not None else ref), digest


def _check_base(options: Namespace, source: ImageSource, places: Places, opened: ExitStack) -> int:
    from registry.transport import check_manifest

    old, new = _bases(options, source, places, opened)
    then = check_manifest(old.source.get_manifest(), None).digest
    now = check_manifest(new.source.get_manifest(), None).digest
    if options.json:
        print(json.dumps({"base": new.name, "then": then, "now": now, "current": then == now}, indent=2))
    else:
        print(f"{new.name} is still {now}" if then == now else f"{new.name} was {then} and is now {now}")
    return 0 if then == now else 1


def _words(text: str | None, flag: str) -> list[str] | None:
    if text is None:
        return None
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError as e:
            raise UsageError(f"{flag} {text!r} is not a JSON array: {e}") from e
        if not isinstance(found, list) or not all(isinstance(w, str) for w in found):
            raise UsageError(f"{flag} {text!r} is not a JSON array of strings")
        return found
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UsageError(f"{flag} {text!r}: {e}") from e


def _plain_name(text: str) -> str:
    """A base's name as an annotation has it: a reference without a transport."""
    return text.removeprefix("docker://").removeprefix("storage:")


def _platform(text: str | None) -> Platform | None:
    from layers.oci import Platform

    return Platform.parse(text) if text is not None else None


def _created() -> str | None:
    return _time(environment_epoch())


def _time(seconds: int | None) -> str | None:
    import time

    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds is not None else None
