"""Fuzz the Containerfile frontend and the planner: `python bench/fuzz/containerfile.py [SECONDS] [SEED]`.

With atheris installed, coverage guides the search (arguments are then libFuzzer's own, such as
`-max_total_time=60 CORPUS_DIR`). Without it, lines are put together from the language's own pieces
and mutated at random; the seed is printed, so that a failure can be repeated.

Whatever the text, and whatever a base image says: there is an answer or a ParseError (for ignore files
a ContextError) within `SLOW_S`. Anything else is a finding, printed with its input, and the exit status is 1.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from builder.errors import ContextError, ParseError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.frontend.instructions import KEYWORDS, parse_containerfile
from builder.frontend.lint import lint, to_text
from builder.frontend.outline import outline, targets
from builder.frontend.parser import parse_syntax
from builder.frontend.source import SourceFile
from builder.frontend.syntaxjson import to_json, words_json
from builder.plan.graph import ResolvedImage
from builder.plan.planner import plan
from builder.plan.request import BuildRequest
from layers.oci import ImageConfig, Manifest, Platform

SLOW_S = 2.0
ENVIRONMENT = {"A": "value", "x": "", "b": "a b", "P": "a/b.c/d"}
PIECES = [
    " ", "\t", "\n", "\r\n", "\\\n", "\\", "`", "#", "# escape=`\n", "# check=skip=all\n", "#!x\n", "=", "$", "${", "}",
    "A", "b", '"', "'", "<<E", "<<-'E'", "\nE\n", "[", "]", ",", '"x"', '["a"]', "{}", "--from=", "--link", "--chown=",
    "--mount=type=cache,target=/x", "--mount=", "type=secret", "id=", "--", ":-", ":+", ":?", "//", "/", "##", "%%",
    "?", "*", "**", "!", "[a-z]", "[^", "80", "-90/udp", "AS", "x", "CMD", "5s", "--interval=", "\ufeff", "é", "\x00",
    "\udc80", "\u2028", "scratch", "https://h/x", "git@h:x", "-",
]  # fmt: skip


class HostileImages:
    """A resolver for which every image exists, with triggers and settings out of the text."""

    def __init__(self, text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        self.config = {
            "OnBuild": text.split("\n")[:5],
            "Env": text.split()[:5],
            "WorkingDir": text[:50],
            "Shell": [text[:9]],
        }

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        document = {**platform.to_json(), "config": self.config, "rootfs": {"type": "layers", "diff_ids": []}}
        config = ImageConfig.build(document)
        manifest = Manifest.build(config=config.descriptor, layers=[])
        return ResolvedImage(name, manifest.descriptor.digest, manifest, config)

    resolve_layout = resolve_image


def check(text: str) -> None:
    """Read a text in every way there is. Raises what the frontend must not raise."""
    source = SourceFile("Containerfile", text)
    try:
        to_json(parse_syntax(source))
        file = parse_containerfile(source)
        for stage in file.stages:
            for instruction in (*file.global_args, stage.from_, *stage.instructions):
                instruction.expand(ENVIRONMENT, file.escape)
        outline(file)
        targets(file)
        to_text(file, lint(file))
        plan(BuildRequest(containerfile=source, context=Path(".")), file, HostileImages(text))
    except ParseError as e:
        if e.source is None or not e.render():
            raise AssertionError(f"an error without a place: {e.message}") from e
    try:
        matcher = IgnoreMatcher.parse(text)
        for path in ("a", "a/b/c", "x" * 255, "a/" * 50 + "x"):
            if matcher.match(path) is not matcher.decide(path)[0]:
                raise AssertionError(f"match and decide disagree on {path[:20]}")
    except ContextError:
        pass
    words_json(text)


def timed_check(text: str) -> None:
    start = time.perf_counter()
    check(text)
    elapsed = time.perf_counter() - start
    if elapsed > SLOW_S:
        raise AssertionError(f"took {elapsed:.1f} s")


def random_text(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randrange(1, 8)):
        pieces = rng.choices(PIECES, k=rng.randrange(0, 20))
        if rng.random() < 0.8:
            pieces[:0] = [rng.choice(KEYWORDS), " "]
        if rng.random() < 0.05:
            pieces *= rng.randrange(2, 300)
        lines.append("".join(pieces))
    return rng.choice(["", "FROM scratch\n", "FROM scratch AS a\n"]) + "\n".join(lines)


def search(seconds: float, seed: int) -> int:
    rng = random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        text = random_text(rng)
        count += 1
        try:
            timed_check(text)
        except Exception as e:  # noqa: BLE001  (whatever it is, it is the finding)
            print(f"seed {seed}, text {count}: {type(e).__name__}: {e}\n{text[:2000]!r}")
            return 1
    print(f"seed {seed}: {count} texts, nothing found")
    return 0


def with_atheris() -> None:
    import atheris

    def one(data: bytes) -> None:
        timed_check(data.decode("utf-8", "surrogateescape"))

    atheris.instrument_all()
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


def main() -> int:
    try:
        with_atheris()
    except ImportError:
        seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
        return search(seconds, int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32))
    return 0


if __name__ == "__main__":
    sys.exit(main())
