"""`pybuild build`: flags and environment into a `BuildRequest`, and its result on stdout."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from contextlib import ExitStack, suppress
from pathlib import Path

from builder.cli.buildrequest import make_request
from builder.cli.options import (
    add_additional_stores,
    add_registry_options,
    add_retry_options,
    boolean,
    duration,
    has_registry_options,
    store_root,
)
from builder.cli.sandboxflags import add_cgroup_manager, add_limit_options, add_sandbox_options, enter_scope
from builder.errors import UsageError
from builder.plan.request import BuildRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

    from builder.building import BuildResult
    from builder.solve.explain import BuildPlan
    from builder.solve.steps import OnError


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "context",
        nargs="?",
        default=None,
        metavar="CONTEXT",
        help="a directory, a tarball's or git repository's URL, or - for a tar on stdin",
    )
    add(
        "-f",
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="the Containerfile; - is stdin; a URL is fetched; several are joined (default: the context's own)",
    )
    add("-t", "--tag", action="append", default=[], metavar="NAME", help="name of the image; may be given again")
    add("--target", metavar="STAGE", help="build this stage instead of the last")
    add("--from", dest="base", metavar="IMAGE", help="begin the first stage from this image instead")
    add(
        "--build-arg",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="value of an ARG (without =: from the environment)",
    )
    add(
        "--cpp-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag for cpp(1), which reads *.in files first",
    )
    add("--build-arg-file", action="append", default=[], metavar="FILE", help="a file of KEY=VALUE lines")
    add(
        "--build-context",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another context: a directory, docker-image://…, oci-layout://…, https://…",
    )
    add("--ignorefile", metavar="FILE", help="use this instead of .containerignore or .dockerignore")
    add(
        "--platform",
        action="append",
        default=[],
        metavar="OS/ARCH",
        help="target platforms, comma-separated; several make an index",
    )
    add("--locked", action="store_true", help="use what the lock file pins, and nothing else (see `pybuild lock`)")
    add("--lock-file", metavar="FILE", help="(default: the Containerfile's name with .lock)")
    add("--source-policy-file", action="append", default=[], metavar="FILE",
        help="which images, URLs and repositories may be used, as BuildKit's JSON")  # fmt: skip
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the image")
    add(
        "--annotation",
        action="append",
        default=[],
        metavar="[LEVEL:]KEY=VALUE",
        help="of the manifest; levels: manifest, manifest-descriptor (both also as manifest[OS/ARCH]), index",
    )
    add("--env", action="append", default=[], metavar="KEY[=VALUE]", help="a variable of the image")
    add("--unsetenv", action="append", default=[], metavar="KEY", help="take a variable out of the image")
    add("--unsetlabel", action="append", default=[], metavar="KEY", help="take a label out of the image")
    add("--inherit-labels", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="take over the base image's labels (default: true)")  # fmt: skip
    add("--no-cache", action="store_true", help="run every step")
    add("--no-cache-filter", action="append", default=[], metavar="STAGE", help="run every step of these stages")
    add(
        "--pull",
        nargs="?",
        const="always",
        default="missing",
        metavar="POLICY",
        help="always, missing, never or newer (alone: always)",
    )
    add(
        "--secret",
        action="append",
        default=[],
        metavar="id=ID[,src=FILE|env=NAME]",
        help="a secret for RUN --mount=type=secret",
    )
    add(
        "--ssh",
        action="append",
        default=[],
        metavar="default|ID[=SOCKET|KEY,…]",
        help="an ssh agent, or keys, for RUN --mount=type=ssh",
    )
    add("--allow", action="append", default=[], metavar="ENTITLEMENT", help="security.insecure")
    add(
        "--network",
        default="default",
        choices=["default", "host", "none", "private"],
        help="the network of RUN: the host's (default), none, or one of its own behind NAT",
    )
    add("--isolation", default="auto", choices=["auto", "pivot", "chroot", "rootless", "single", "oci"],
        help="how RUN is isolated (default: the best that works here, see `pybuild doctor`)")  # fmt: skip
    add(
        "--storage-driver",
        default="auto",
        choices=["auto", "overlay", "fuse-overlayfs", "native"],
        help="how layers are stacked: by the kernel, by a program, or as copies (default: the first that works)",
    )
    add("--runtime", metavar="NAME", help="the runtime of --isolation oci: runc, crun, … or a path")
    add(
        "-v",
        "--volume",
        action="append",
        default=[],
        metavar="HOST:CTR[:ro]",
        help="bind a host directory for every RUN",
    )
    add(
        "--mount",
        action="append",
        default=[],
        metavar="type=TYPE,…",
        help="a mount for every RUN, as RUN --mount has it",
    )
    add("--default-mounts-file", metavar="FILE", help="read this instead of mounts.conf")
    add_sandbox_options(parser)
    add("--timeout", type=duration, metavar="DURATION", help="kill a RUN that takes longer")
    add_limit_options(parser)
    add_cgroup_manager(parser)
    add("--format", default="oci", choices=["oci", "docker"], help="media types of the image")
    add("--compression", default="gzip", choices=["gzip", "zstd", "none", "uncompressed", "estargz", "zstd:chunked"],
        help="of new layers")  # fmt: skip
    add("--compression-level", type=int, metavar="N", help="the codec's own scale")
    add("--force-compression", action="store_true", help="the base image's layers, too")
    add("--squash", action="store_true", help="make one layer of all new ones")
    add("--squash-all", action="store_true", help="make one layer of the whole image")
    add("--fold", action="store_true", help="store no data again that a lower layer of this build has (chown -R)")
    add("--verify-layers", action="store_true", help="read each new layer back and compare it with the tree")
    add("--rewrite-timestamp", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="with --timestamp, no file of a new layer is newer (default: true)")  # fmt: skip
    add(
        "--timestamp",
        type=int,
        metavar="SECONDS",
        help="time of everything new, since the epoch (also SOURCE_DATE_EPOCH)",
    )
    add("--omit-history", action="store_true", help="leave the history out of the config")
    add("--iidfile", metavar="FILE", help="write the image id there")
    add("--metadata-file", metavar="FILE", help="write what was built there, as JSON")
    add(
        "--progress",
        default=None,
        choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="(also BUILDKIT_PROGRESS)",
    )
    add("--logfile", metavar="FILE", help="append progress to this file instead of showing it")
    add("-q", "--quiet", action="store_true", help="print the image id alone")
    add("-j", "--jobs", type=int, default=0, metavar="N", help="steps at once (default: one a processor)")
    add(
        "-o",
        "--output",
        action="append",
        default=[],
        metavar="type=TYPE[,dest=PATH][,name=NAME]",
        help="registry, oci, docker, tar, local, squashfs, image; may be given again; alone: a directory, - a tar",
    )
    add("--push", action="store_true", help="send the image to the registry of its names")
    add("--load", action="store_true", help="give the image to the Docker daemon")
    add(
        "--cache-to",
        action="append",
        default=[],
        metavar="type=registry|local|inline[,ref=NAME][,mode=min|max]",
        help="write the steps' results there, for other machines",
    )
    add(
        "--cache-from",
        action="append",
        default=[],
        metavar="type=registry|local[,ref=NAME]",
        help="take steps' results from there",
    )
    add(
        "--cache-mounts",
        nargs="?",
        const=True,
        type=boolean,
        default=False,
        metavar="BOOL",
        help="let the contents of cache mounts travel with --cache-to and --cache-from",
    )
    add("--cache-ttl", type=duration, metavar="DURATION", help="do not use results older than this")
    add(
        "--secret-gate",
        nargs="?",
        const=True,
        type=boolean,
        default=False,
        metavar="BOOL",
        help="refuse an image that holds the value of a --secret, or whose build printed it",
    )
    add(
        "--on-error",
        default="stop",
        metavar="stop|shell|capsule[=FILE]",
        help="of a RUN that fails: shell opens one in its sandbox, capsule keeps all in a file for `pybuild shell`",
    )
    add("--explain", action="store_true", help="tell before running why each step is found or not")
    add(
        "--summary",
        nargs="?",
        const=True,
        type=boolean,
        default=None,
        metavar="BOOL",
        help="tell at the end where the time went (default: on a terminal)",
    )
    add("--timeline", metavar="FILE", help="draw the build as a chart, .svg or .html, or trace it, .json")
    add("--check", action="store_true", help="lint the Containerfile instead of building it")
    add("--call", choices=["build", "check", "outline", "targets"], default="build", help="do this instead of building")
    add(
        "--layers", nargs="?", const=True, type=boolean, default=True, help=SUPPRESS
    )  # buildah's default-off cache switch
    add_additional_stores(parser)
    add_registry_options(parser)
    add_retry_options(parser)


def run(verb: str, options: Namespace) -> int:
    enter_scope(options)  # before anything is read: it may execute this command anew
    with ExitStack() as stack:
        request = make_request(options, stack)
        if options.check or options.call != "build":
            from builder.cli.language import print_call

            return print_call("check" if options.check else options.call, request, root=store_root(options))
        return _build(options, request, stack)


def _log(name: str) -> TextIO:
    try:
        return open(name, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as e:
        raise UsageError(f"cannot write the log {name}: {e.strerror}") from e


def _build(options: Namespace, request: BuildRequest, stack: ExitStack) -> int:
    from builder import api
    from builder.cli.progress import make_progress, resolve_mode
    from builder.cli.recorder import Recorder

    mode = "quiet" if options.quiet else options.progress or os.environ.get("BUILDKIT_PROGRESS") or "auto"
    root = store_root(options)  # before this process becomes root of a user namespace
    api.prepare_namespaces(request.run.isolation)
    if os.environ.get("PYBUILD_GC_KEEP") or os.environ.get("PYBUILD_GC_MIN_FREE"):
        from builder.cli.maintenance import make_room

        make_room(root)
    registry = None
    if has_registry_options(options):
        from builder.cli.options import registry_options

        registry = registry_options(options)
    on_error: OnError | None = None
    if options.on_error == "shell":
        from builder.cli.shell import shell

        on_error = shell
        mode = "plain" if mode != "quiet" else mode  # nothing may draw over the shell
    launcher = None
    stream = stack.enter_context(_log(options.logfile)) if options.logfile else sys.stderr
    if resolve_mode(mode, stream, os.environ) == "tty":
        # The drawing thread must not exist before the zygote does.
        from builder.sandbox.tiers import start_launcher

        launcher = start_launcher(request.run.isolation, request.run.runtime)
    try:
        with make_progress(mode, stream, os.environ) as progress:
            recorder = Recorder(root, request, progress)
            try:
                result = api.build(
                    request,
                    root=root,
                    events=recorder,
                    registry=registry,
                    launcher=launcher,
                    on_plan=_explain if options.explain else None,
                    on_error=on_error,
                )
            except BaseException as e:
                recorder.finish(None, e)
                raise
            recorder.finish(result)
    finally:
        if launcher is not None:
            launcher.close()
    _report(options, result)
    return 0


def _explain(plan: BuildPlan) -> None:
    from builder.solve.explain import render

    print("\n".join(render(plan)), file=sys.stderr)


def _report(options: Namespace, result: BuildResult) -> None:
    if options.iidfile:
        Path(options.iidfile).write_text(result.image_id)
    if options.metadata_file:
        import json

        from builder.building import metadata

        Path(options.metadata_file).write_text(json.dumps(metadata(result), indent=2) + "\n")
    if options.timeline:
        from builder.solve.timeline import write_timeline
        from builder.version import VERSION

        parent = os.environ.get("TRACEPARENT", "")
        write_timeline(result.steps, Path(options.timeline), version=VERSION, traceparent=parent)
    wanted = options.summary
    if wanted is None:
        wanted = bool(result.executed) and not options.quiet and sys.stderr.isatty()
    if wanted:
        from builder.cli.summary import summary

        columns = None
        with suppress(OSError, ValueError):
            columns = max(os.get_terminal_size(sys.stderr.fileno()).columns, 20)
        print("\n".join(summary(result, columns)), file=sys.stderr)
    if result.folded_bytes and not options.quiet:
        print(f"folded: {result.folded_bytes} bytes of files are stored once instead of twice", file=sys.stderr)
    if not any(output.place == "-" or output.place.endswith(":-") for output in result.outputs):
        print(result.image_id)
