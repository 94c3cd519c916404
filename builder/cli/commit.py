"""`pybuild commit`, and `diff` and `inspect` of containers: what a container came to."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from builder.cli.options import epoch_of, store_root
from builder.errors import UsageError


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "commit":
            add("name", metavar="CONTAINER", help="running or not")
            add("image", nargs="?", metavar="NAME", help="the new image's name")
            add(
                "-c",
                "--change",
                action="append",
                default=[],
                metavar="INSTRUCTION",
                help="an instruction for its config: CMD, ENV, LABEL, USER…",
            )
            add("-a", "--author", default="", metavar="NAME", help="who made the image")
            add("-m", "--message", default="", metavar="TEXT", help="a comment in the history")
            add("-p", "--pause", default="true", choices=["true", "false"], help="freeze it meanwhile (default: true)")
            add("-s", "--squash", action="store_true", help="one layer in place of all")
            add(
                "-f",
                "--format",
                choices=["oci", "docker"],
                default="oci",
                help="media types of the image (default: oci)",
            )
            add("--timestamp", type=int, metavar="SECONDS", help="the time of the image (also SOURCE_DATE_EPOCH)")
            add("-q", "--quiet", action="store_true", help="do not print the image's ID")
            add("--iidfile", metavar="FILE", help="write the image's ID there")
            add(
                "--compression",
                choices=["gzip", "zstd", "none"],
                default="gzip",
                help="of the new layer (default: gzip)",
            )
            add("--rm", action="store_true", help="remove the container afterwards (a working one)")
            add("--omit-history", action="store_true", help="leave the history out (of a working container's image)")
        case "diff":
            add("name", metavar="CONTAINER", help="running or not")
        case "export":
            add("name", metavar="CONTAINER", help="running or not")
            add("-o", "--output", metavar="FILE", help="where to (default: stdout)")
        case _:
            add("names", nargs="+", metavar="CONTAINER", help="names or IDs")
            add("-f", "--format", metavar="TEMPLATE", help="a Go template")


def run(verb: str, options: Namespace) -> int:
    from builder.container.records import find, is_working

    root = store_root(options)
    if verb == "inspect":
        return _inspect(options)
    if verb == "export" and options.output is None and sys.stdout.isatty():
        raise UsageError("where to? The archive is no text for a terminal", hint="use -o FILE, or a pipe")
    if is_working(root, options.name):
        from builder.cli import working

        match verb:
            case "commit":
                return working.commit(options)
            case "diff":
                return working.diff(root, options.name)
            case _:
                return working.export(root, options.name, options.output)
    if verb == "commit" and (options.rm or options.omit_history):
        raise UsageError("--rm and --omit-history are for working containers", hint="`pybuild rm` removes others")
    from builder import api
    from builder.container import commit

    record = find(root, options.name)
    api.prepare_namespaces()
    if verb == "export":
        from builder.cli.archives import output_file
        from builder.container.copying import export

        with output_file(options.output) as sink:
            export(record, sink.fileno())
        return 0
    with api.open_store(root) as store:
        if verb == "diff":
            from builder.cli.differ import print_changes

            print_changes(commit.changes_of(store, record)[0])
            return 0
        from registry.stored import store_name

        made = commit.commit(
            store,
            record,
            names=(store_name(options.image),) if options.image else (),
            changes=options.change,
            author=options.author,
            message=options.message,
            pause=options.pause == "true",
            squash=options.squash,
            epoch_s=epoch_of(options),
            format=options.format,
            compression=options.compression,
        )
    if options.iidfile:
        Path(options.iidfile).write_text(made.image_id)
    if not options.quiet:
        print(made.image_id)
    return 0


def _inspect(options: Namespace) -> int:
    import json

    from builder.container import assemble, commit
    from builder.container.records import find

    root = store_root(options)
    records = [find(root, name, working=True) for name in options.names]
    documents = [assemble.inspect_document(r) if r.working else commit.inspect_document(r) for r in records]
    if options.format is not None:
        from builder.cli.template import render

        for document in documents:
            print(render(options.format, document))
        return 0
    print(json.dumps(documents, indent=4))
    return 0
