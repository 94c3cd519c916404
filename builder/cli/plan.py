"""`pybuild plan`: what `build` with the same flags would do, and why, before anything runs."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack

from builder.cli import build
from builder.cli.buildrequest import make_request
from builder.cli.options import registry_options, store_root


def configure(verb: str, parser: ArgumentParser) -> None:
    build.configure(verb, parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.description = f"{parser.description or ''} The flags are those of the build that is meant."


def run(verb: str, options: Namespace) -> int:
    from builder import api
    from builder.cli.progress import make_progress

    root = store_root(options)
    api.prepare_namespaces()
    mode = "quiet" if options.quiet else options.progress or os.environ.get("BUILDKIT_PROGRESS") or "quiet"
    with ExitStack() as stack:
        request = make_request(options, stack)
        with make_progress(mode, sys.stderr, os.environ) as progress:
            plan = api.plan_build(request, root=root, registry=registry_options(options), events=progress)
    if options.json:
        import json

        steps = [
            {
                "number": s.number, "name": s.name, "status": s.status, "fetch_bytes": s.fetch_bytes,
                "emulated": s.emulated, "reasons": [r._asdict() for r in s.reasons],
            }
            for s in plan.steps
        ]  # fmt: skip
        print(json.dumps({"steps": steps, "fetch_bytes": plan.fetch_bytes}, indent=2))
        return 0
    from builder.cli.summary import plan_lines

    print("\n".join(plan_lines(plan)))
    return 0
