"""`pybuild build`: flags and environment into a `BuildRequest`, and its result on stdout."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack, suppress
from pathlib import Path

from builder.cli.buildflags import add_build_options
from builder.cli.buildrequest import make_request
from builder.cli.options import has_registry_options, store_root
from builder.cli.sandboxflags import enter_scope
from builder.errors import UsageError
from builder.plan.request import BuildRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

    from builder.building import BuildResult
    from builder.solve.explain import BuildPlan
    from builder.solve.steps import OnError


def configure(verb: str, parser: ArgumentParser) -> None:
    add_build_options(parser)


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

        launcher = start_launcher(request.run.isolation, request.run.runtime, own_pids="pid" not in request.run.shared)
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
    from builder.cli.summary import plan_lines

    print("\n".join(plan_lines(plan)), file=sys.stderr)


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
        from builder.cli.progress import format_bytes

        print(f"folded: {format_bytes(result.folded_bytes)} are stored once instead of twice", file=sys.stderr)
    if not any(output.place == "-" or output.place.endswith(":-") for output in result.outputs):
        print(result.image_id)
