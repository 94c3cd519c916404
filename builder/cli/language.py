"""`pybuild parse`, `check`, `outline` and `targets`: reading a Containerfile without building it."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.containerfile import ignore_file_for, read_containerfile
from builder.errors import ParseError
from builder.frontend.source import SourceFile

if TYPE_CHECKING:
    from builder.plan.request import BuildRequest


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    if verb == "parse":
        add("file", nargs="?", metavar="FILE", help="a Containerfile; - is stdin")
        add(
            "--words",
            action="store_true",
            help='expand words: {"word": W, "env": {…}, "mode": "word"|"words"} a line on stdin',
        )
        add("--json", action="store_true", help="print the syntax tree as JSON (the default)")
        return
    add("context", nargs="?", metavar="CONTEXT", help="the build context, a directory")
    add("-f", "--file", metavar="FILE", help="the Containerfile; - is stdin")
    add("--json", action="store_true", help="print JSON")
    if verb != "targets":
        add("--target", metavar="STAGE", help="the stage that is meant (default: the last)")
        add("--build-arg", action="append", default=[], metavar="KEY=VALUE", help="value of an ARG")


def run(verb: str, options: Namespace) -> int:
    match verb:
        case "parse":
            return _words() if options.words else _parse(options.file or "-")
        case "check":
            return _check(options)
        case _:
            return _outline(verb, options)


def _parse(name: str) -> int:
    from builder.frontend.parser import parse_syntax
    from builder.frontend.syntaxjson import to_json

    print(json.dumps(to_json(parse_syntax(read_containerfile([name], Path("."))))))
    return 0


def _words() -> int:
    from builder.frontend.syntaxjson import words_json

    for line in sys.stdin:
        if line.strip():
            print(words_json(line), flush=True)
    return 0


def _outline(verb: str, options: Namespace) -> int:
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.outline import outline, targets, to_text

    containerfile = parse_containerfile(_source(options))
    document: Any
    if verb == "targets":
        document = targets(containerfile)
    else:
        document = outline(containerfile, options.target, build_args=_build_args(options))
    print(json.dumps(document, indent=2) if options.json else to_text(document), end="\n" if options.json else "")
    return 0


def _build_args(options: Namespace) -> dict[str, str]:
    return dict(text.partition("=")[::2] for text in options.build_arg)


def print_findings(request: BuildRequest, *, root: Path, as_json: bool) -> int:
    """Lint the request's Containerfile and print what is found; 1 where the file itself asks for that."""
    from builder import api
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.lint import effective_options, render_json, to_text
    from builder.frontend.scope import find_stage

    try:
        containerfile = parse_containerfile(request.containerfile)
        find_stage(containerfile, request.target)
        options = effective_options(containerfile, request.build_args)
        findings = api.check(request, root=root, options=options)
    except ParseError as e:
        if not as_json:
            raise
        print(json.dumps({"warnings": [], "buildError": {"message": str(e)}}, indent=2))
        return 1
    print(render_json(containerfile, findings) if as_json else to_text(containerfile, findings), end="\n" * as_json)
    if not as_json and not findings:
        print("Check complete, no warnings found.")
    return 1 if findings and options.error else 0


def print_call(call: str, request: BuildRequest, *, root: Path) -> int:
    """`build --call`: what BuildKit's frontend answers instead of building."""
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.outline import outline, targets, to_text

    if call == "check":
        return print_findings(request, root=root, as_json=False)
    containerfile = parse_containerfile(request.containerfile)
    if call == "targets":
        document = targets(containerfile)
    else:
        document = outline(containerfile, request.target, build_args=request.build_args)
    print(to_text(document), end="")
    return 0


def _check(options: Namespace) -> int:
    from builder.cli.options import store_root
    from builder.plan.request import BuildRequest

    source = _source(options)
    directory = Path(options.context or ".")
    request = BuildRequest(
        containerfile=source,
        context=directory if directory.is_dir() else None,
        ignore_file=None if source.name == "-" else ignore_file_for(Path(source.name), None),
        build_args=_build_args(options),
        target=options.target,
    )
    return print_findings(request, root=store_root(options), as_json=options.json)


def _source(options: Namespace) -> SourceFile:
    directory = Path(options.context or ".")
    if options.file or not directory.is_file():
        return read_containerfile([options.file] if options.file else [], directory)
    return read_containerfile([str(directory)], directory.parent)
