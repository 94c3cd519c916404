"""`pybuild parse`, `check`, `outline` and `targets`: reading a Containerfile without building it."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import ContextError, ParseError
from builder.frontend.source import SourceFile

if TYPE_CHECKING:
    from builder.plan.request import BuildRequest

_MAX_BYTES = 64 << 20


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
            return check_file(_source(options), as_json=options.json, context=options.context, options=options)
        case _:
            return _outline(verb, options)


def _parse(name: str) -> int:
    from builder.frontend.parser import parse_syntax
    from builder.frontend.syntaxjson import to_json

    print(json.dumps(to_json(parse_syntax(_read(name)))))
    return 0


def _words() -> int:
    from builder.frontend.syntaxjson import words_json

    for line in sys.stdin:
        if line.strip():
            print(words_json(line), flush=True)
    return 0


def _outline(verb: str, options: Namespace) -> int:
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.outline import outline, targets

    containerfile = parse_containerfile(_source(options))
    document: Any = targets(containerfile) if verb == "targets" else outline(containerfile, options.target)
    if options.json:
        print(json.dumps(document, indent=2))
        return 0
    _print_tree(document)
    return 0


def _print_tree(document: Any, indent: str = "") -> None:
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if isinstance(value, (dict, list)) and value:
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        elif value not in (None, "", [], {}):
            print(f"{indent}{key}: {value}")


def check_file(
    source: SourceFile,
    *,
    as_json: bool,
    context: str | None = None,
    options: Namespace | None = None,
    request: BuildRequest | None = None,
) -> int:
    """Lint a Containerfile and print the findings; 1 where the file itself asks for that."""
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.lint import check_options, lint, render_json, to_text

    del context
    args = dict(request.build_args) if request else {}
    for text in getattr(options, "build_arg", None) or []:
        key, _, value = text.partition("=")
        args[key] = value
    try:
        containerfile = parse_containerfile(source)
    except ParseError as e:
        if not as_json:
            raise
        print(json.dumps({"warnings": [], "buildError": {"message": str(e)}}, indent=2))
        return 1
    findings = lint(containerfile, build_args=args)
    print(render_json(containerfile, findings) if as_json else to_text(containerfile, findings), end="")
    return 1 if findings and check_options(containerfile).error else 0


def _source(options: Namespace) -> SourceFile:
    if options.file:
        return _read(options.file)
    directory = Path(options.context or ".")
    if directory.is_file():
        return _read(str(directory))
    for name in ("Containerfile", "Dockerfile"):
        if (directory / name).exists():
            return _read(str(directory / name))
    raise ContextError(f"no Containerfile or Dockerfile in {directory}", hint="name one with -f")


def _read(name: str) -> SourceFile:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_MAX_BYTES + 1)
        else:
            with open(name, "rb") as f:
                data = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ContextError(f"cannot read {name}: {e.strerror}") from e
    if len(data) > _MAX_BYTES:
        raise ContextError(f"{name} is larger than {_MAX_BYTES >> 20} MiB")
    return SourceFile(name, data.decode("utf-8", "surrogateescape"))
