"""`pybuild sync`: mirrors what a YAML file lists to a registry, to layouts or to directories."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import (
    add_registry_options,
    add_retry_options,
    boolean,
    media_types,
    registry_options,
    retry_policy,
    store_root,
)
from builder.errors import UsageError

if TYPE_CHECKING:
    from registry.hosts import RegistryOptions
    from registry.syncfile import Access


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="the YAML file")
    add("destination", metavar="DEST", nargs="?", help="docker://HOST/PREFIX, oci:DIR or dir:DIR (default: the file's)")
    add("--delete", nargs="?", const=True, type=boolean, metavar="BOOL",
        help="remove tags at the destination that the source no longer has (default: as the file says)")  # fmt: skip
    add("--scoped", action="store_true", help="keep the source's host in the names at the destination")
    add("--dry-run", "-n", action="store_true", help="tell what would be done")
    add("--keep-going", "-k", action="store_true", help="end with 0 though some images failed")
    add("--platform", metavar="OS/ARCH", help="of indexes only this platform (default: all)")
    add("--preserve-digests", action="store_true", help="fail rather than change a digest")
    add("--format", "-f", type=media_types, choices=["oci", "docker"], help="convert to these media types")
    add("-j", "--jobs", type=int, default=6, metavar="N", help="blobs at once (default: 6)")
    add("--progress", default="auto", choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="how it is shown (default: auto: tty on a terminal, plain elsewhere)")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="print the report as JSON")
    add_retry_options(parser)
    add_registry_options(parser, "source", "destination")


def run(verb: str, options: Namespace) -> int:
    from builder.cli.progress import make_progress
    from builder.places import open_places
    from layers.oci import Platform
    from registry.copy import CopyOptions
    from registry.sync import SyncReport, sync
    from registry.syncfile import load_sync_file
    from registry.transport import TransportContext

    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: expected a positive number")
    config = load_sync_file(Path(options.file))
    if options.scoped:
        config = config._replace(scoped=True)
    choices = CopyOptions(
        platform=Platform.parse(options.platform) if options.platform else None,
        all_platforms=not options.platform,
        preserve_digests=options.preserve_digests,
        format=options.format,
    )
    root, policy = store_root(options), retry_policy(options)
    first = registry_options(options, "source")
    with ExitStack() as opened:
        end = opened.enter_context(open_places(root, registry_options(options, "destination"), policy=policy))
        contexts: dict[Access, TransportContext] = {}

        def context_for(access: Access) -> TransportContext:
            if access not in contexts:
                places = opened.enter_context(open_places(root, _reached(first, access), policy=policy))
                contexts[access] = places.source
            return contexts[access]

        progress = opened.enter_context(
            make_progress("quiet" if options.quiet else options.progress, sys.stderr, os.environ)
        )
        report: SyncReport = sync(
            config, context_for, end.destination, destination=options.destination, delete=options.delete,
            dry_run=options.dry_run, options=choices, events=progress, jobs=options.jobs,
        )  # fmt: skip
    return _print(report, options)


def _reached(options: RegistryOptions, access: Access) -> RegistryOptions:
    """The flags with what the file says of one source: on TLS the command line has the last word."""
    if options.tls_verify is None:
        options = options._replace(tls_verify=access.tls_verify)
    if access.cert_dir is not None:
        options = options._replace(cert_dir=access.cert_dir)
    if access.credential is not None and not options.anonymous:
        options = options._replace(creds=access.credential)
    return options


def _print(report: object, options: Namespace) -> int:
    from registry.sync import SyncReport

    assert isinstance(report, SyncReport)
    if options.json:
        failures = [{"what": f.what, "error": str(f.error)} for f in report.failures]
        print(json.dumps(report._asdict() | {"failures": failures}, indent=2))
    else:
        for name in report.planned:
            print(f"would: {name}")
        for name in report.copied:
            print(f"copied: {name}")
        for name in report.deleted:
            print(f"deleted: {name}")
        if not options.dry_run:
            print(f"{len(report.copied)} copied, {len(report.unchanged)} unchanged, {len(report.deleted)} deleted, "
                  f"{len(report.failures)} failed, {report.moved_bytes} bytes moved")  # fmt: skip
    for failure in report.failures:
        print(f"error: {failure.what}: {failure.error}", file=sys.stderr)
        if failure.error.hint:
            print(f"hint: {failure.error.hint}", file=sys.stderr)
    if not report.failures or options.keep_going:
        return 0
    # One kind of failure keeps its status; several kinds are a failure of the whole.
    statuses = {int(f.error.exit_code) for f in report.failures}
    return statuses.pop() if len(statuses) == 1 else 1
