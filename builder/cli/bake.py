"""`pybuild bake`: all the builds of a build file, each as `build` would do it; what they share runs once."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import boolean, store_root
from builder.cli.written import written
from builder.errors import ContextError, UsageError

if TYPE_CHECKING:
    from builder.bakefile import BakeFile, Target

DEFAULT_FILES = (
    "compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml", "docker-bake.json", "docker-bake.hcl",
    "docker-bake.override.json", "docker-bake.override.hcl",
)  # fmt: skip


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help="targets and groups (default: the one called default)")
    add("-f", "--file", action="append", default=[], metavar="FILE",
        help="bake's HCL or JSON, or a compose file, - for stdin; later ones over earlier ones")  # fmt: skip
    add("--set", action="append", default=[], metavar="TARGET.KEY=VALUE", help="change a target; * stands for all")
    add("--var", action="append", default=[], metavar="NAME=VALUE", help="a variable's value")
    add("--print", action="store_true", help="print what would be built, as JSON, and build nothing")
    add("--list", action="store_true", help="list the targets and groups")
    add("--push", action="store_true", help="send the images to the registries of their names")
    add("--load", action="store_true", help="give the images to the Docker daemon")
    add("--no-cache", action="store_true", help="run every step")
    add("--pull", nargs="?", const=True, type=boolean, metavar="BOOL", help="look for newer base images")
    add(
        "--progress",
        choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="how it is shown (default: BUILDKIT_PROGRESS, else auto: tty on a terminal, plain elsewhere)",
    )
    add("--metadata-file", metavar="FILE", help="write what was built there, as JSON by target")
    add("--allow", action="append", default=[], metavar="ENTITLEMENT", help="grant what targets ask for; as in `build`")
    add("--dry-run", action="store_true", help="print the commands that do the same")


def run(verb: str, options: Namespace) -> int:
    whole = _read(options)
    if options.list:
        for name in sorted({*whole.targets, *whole.groups}):
            members = whole.groups.get(name)
            print(name if members is None else f"{name}: {' '.join(members)}")
        return 0
    targets = whole.selected(options.targets, options.set)
    _check_entitlements(targets, {name for text in options.allow for name in text.split(",")})
    if options.print:
        document = {"target": {t.name: dict(t.attributes) for t in targets}}
        print(json.dumps({"group": {"default": {"targets": [t.name for t in targets]}}, **document}, indent=2))
        return 0
    return _build(options, targets)


def _read(options: Namespace) -> BakeFile:
    from builder.bakefile import MAX_FILE_BYTES, parse_files

    names = options.file or [name for name in DEFAULT_FILES if os.path.exists(name)]
    if not names:
        raise ContextError(f"there is no build file here: none of {', '.join(DEFAULT_FILES)}")
    texts = []
    for name in names:
        try:
            data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if name == "-" else _bounded(Path(name), MAX_FILE_BYTES)
        except OSError as e:
            raise ContextError(f"cannot read {name}: {e.strerror}") from e
        if len(data) > MAX_FILE_BYTES:
            raise ContextError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = data.decode("utf-8", "surrogateescape")
        texts.append((f"{name}.json" if name == "-" and text.lstrip().startswith("{") else name, text))
    variables = dict(text.partition("=")[::2] for text in options.var)
    return parse_files(texts, {**_dotenv(), **os.environ, **variables})


def _bounded(path: Path, limit: int) -> bytes:
    with path.open("rb") as f:
        return f.read(limit + 1)


def _dotenv() -> dict[str, str]:
    """compose's `.env` beside the files."""
    try:
        lines = Path(".env").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, sign, value in pairs if sign}


def _build(options: Namespace, targets: list[Target]) -> int:
    from tempfile import TemporaryDirectory

    from builder.cli.main import main

    root = store_root(options)
    own = ["--root", str(root), *(["--debug"] if options.debug else [])]
    results: dict[str, Any] = {}
    with TemporaryDirectory(prefix="pybuild-bake-") as place:
        for target in targets:
            digests = {name: done["containerimage.digest"] for name, done in results.items()}
            arguments = arguments_of(target, options, root, digests, Path(place))
            if options.dry_run:
                print(f"pybuild build {shlex.join(arguments)}")
                results[target.name] = {"containerimage.digest": f"sha256:{'0' * 64}"}
                continue
            print(f"target {target.name}", file=sys.stderr)
            metadata = Path(place) / "metadata.json"
            status = main(["build", *own, "--metadata-file", str(metadata), *arguments])
            if status != 0:
                print(f"error: target {target.name} failed", file=sys.stderr)
                return status
            results[target.name] = json.loads(metadata.read_bytes())
    if options.metadata_file:
        with written(options.metadata_file) as out:
            out.write((json.dumps(results, indent=2) + "\n").encode())
    return 0


def _check_entitlements(targets: list[Target], granted: set[str]) -> None:
    """A file asks for entitlements; to grant them is for whoever runs it. Raises: UsageError."""
    for target in targets:
        for name in target.attributes.get("entitlements", []):
            if name not in granted:
                raise UsageError(f"target {target.name} asks for {name}", hint=f"grant it with --allow {name}")


def arguments_of(target: Target, options: Namespace, root: Path, digests: dict[str, str], place: Path) -> list[str]:
    """The arguments of `build` that do a target; `digests` are of what was built before it."""
    attributes = dict(target.attributes)
    context = attributes.pop("context", ".")
    attributes["no-cache"] = options.no_cache or attributes.get("no-cache", False)
    attributes["pull"] = options.pull if options.pull is not None else attributes.get("pull", False)
    words: list[str] = []
    if "dockerfile-inline" in attributes:
        inline = place / f"{len(digests)}.Containerfile"
        inline.write_text(attributes.pop("dockerfile-inline"))
        attributes.pop("dockerfile", None)
        words += ["-f", str(inline)]
    elif "dockerfile" in attributes:
        words += ["-f", _beside(context, attributes.pop("dockerfile"))]
    for name, value in attributes.pop("contexts", {}).items():
        if value.startswith("target:"):
            value = f"oci-layout://{root}@{digests[value.removeprefix('target:')]}"
        words += ["--build-context", f"{name}={value}"]
    for key, flag in _FLAGS.items():
        words += _flag(flag, attributes.pop(key, None))
    platforms = attributes.pop("platforms", [])
    words += ["--platform", ",".join(platforms)] if platforms else []
    assert not attributes, f"bake's attributes are all flags: {sorted(attributes)}"
    words += ["--push"] if options.push else []
    words += ["--load"] if options.load else []
    words += ["--progress", options.progress] if options.progress else []
    return [*words, f"./{context}" if context.startswith("-") and context != "-" else context]


_FLAGS = {
    "annotations": "--annotation", "args": "--build-arg", "cache-from": "--cache-from", "cache-to": "--cache-to",
    "call": "--call", "entitlements": "--allow", "extra-hosts": "--add-host", "labels": "--label",
    "network": "--network", "no-cache": "--no-cache", "no-cache-filter": "--no-cache-filter", "output": "--output",
    "pull": "--pull", "secret": "--secret", "shm-size": "--shm-size", "ssh": "--ssh", "tags": "--tag",
    "target": "--target", "ulimits": "--ulimit",
}  # fmt: skip


def _flag(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, dict):
        value = [f"{key}={text}" for key, text in value.items()]
    texts = [value] if isinstance(value, str) else value
    # A value that looks like a flag is none: it must not become another flag of the build.
    return [word for text in texts for word in ([f"{flag}={text}"] if text.startswith("-") else [flag, text])]


def _beside(context: str, dockerfile: str) -> str:
    """A Dockerfile's name is one within its context."""
    if "://" in context or context == "-" or os.path.isabs(dockerfile) or "://" in dockerfile:
        return dockerfile
    return os.path.join(context, dockerfile)
