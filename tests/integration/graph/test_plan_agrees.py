"""Random changes to a random build: `plan` says what is then done; caches near and far give the fresh image."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from builder import BuildRequest, CacheRef, SourceFile, build, plan_build
from layers.values import replace
from tests.support.cli import Pybuild, write_context

pytestmark = pytest.mark.registry

STAGES = ("one", "two", "three")


class Project:
    """A context and a Containerfile of three stages, changed at random; whatever comes of it can be built."""

    def __init__(self, rng: random.Random, folder: Path, base: str) -> None:
        self.rng = rng
        self.folder = folder
        self.base = base
        self.level = 0
        for name in ("a", "dir/b", "dir/c", "dir/sub/d"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{name}\n")
        self.lines = {stage: [self.line(stage) for _ in range(3)] for stage in STAGES}

    def line(self, stage: str) -> str:
        n = self.rng.randrange(100)
        other = self.rng.choice(STAGES[: STAGES.index(stage)] or ("",))
        choices = [
            f'RUN all="$(find /in /out -type f | sort | xargs cat)"; echo "$all" > /out/run{n}',
            f"RUN echo {n} $LEVEL > /out/level",
            f"RUN echo {n} > /out/constant && chmod 60{n % 8} /out/constant",
            f"RUN mkdir -p /out/d{n % 3} && rm -rf /out/d{(n + 1) % 3}",
            "COPY dir /in/dir",
            "COPY a dir/b /in/",
            f"COPY --link dir/sub /out/link{n % 2}",
            f"COPY --chmod=75{n % 8} a /out/a",
            f"ENV E{n % 3}={n}",
            f"WORKDIR /out/w{n % 2}",
        ]
        if other:
            choices += [
                f"COPY --from={other} /out /out/from-{other}",
                f"COPY --from={other} --link /out/fixed /out/fixed-{other}",
                (
                    f"RUN --mount=type=bind,from={other},source=/out,target=/m "
                    f"find /m -type f | sort | xargs cat > /out/m{n % 2}"
                ),
            ]
        return self.rng.choice(choices)

    def text(self) -> str:
        parts = []
        for number, stage in enumerate(STAGES):
            base = STAGES[number - 1] if number == 2 else self.base
            parts += [f"FROM {base} AS {stage}", "ARG LEVEL", "RUN mkdir -p /in /out && echo fixed > /out/fixed"]
            parts += self.lines[stage]
        return (
            "\n".join([*parts, f"FROM {self.base}", "COPY --from=three /out /three", "COPY --from=one /out /one"])
            + "\n"
        )

    def change(self) -> str:
        kind = self.rng.choice(["content", "mode", "new", "gone", "arg", "line", "line", "swap", "touch"])
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name not in {"a", "b"})
        if kind == "content":
            self.rng.choice([*files, self.folder / "a"]).write_text(f"{self.rng.random()}\n")
        elif kind == "mode":
            (self.folder / "a").chmod(self.rng.choice([0o600, 0o644, 0o755]))
        elif kind == "new":
            (self.folder / "dir" / f"n{self.rng.randrange(5)}").write_text("new\n")
        elif kind == "gone" and len(files) > 2:
            self.rng.choice([f for f in files if f.name != "d"]).unlink()
        elif kind == "arg":
            self.level = self.rng.randrange(3)
        elif kind == "touch":
            (self.folder / "a").touch()
        else:
            lines = self.lines[self.rng.choice(STAGES)]
            stage = next(s for s in STAGES if self.lines[s] is lines)
            at = self.rng.randrange(len(lines))
            if kind == "swap":
                lines[at], lines[0] = lines[0], lines[at]
            else:
                lines[at] = self.line(stage)
        return kind

    def request(self) -> BuildRequest:
        return BuildRequest(
            containerfile=SourceFile("Containerfile", self.text()),
            context=self.folder,
            build_args={"LEVEL": str(self.level)},
            source_date_epoch=1_700_000_000,
        )


@pytest.mark.parametrize("seed", range(2))
def test_the_plan_is_what_is_done_and_the_result_is_the_fresh_one(
    pybuild: Pybuild, busybox_base: str, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    project = Project(rng, tmp_path / "context", busybox_base)
    cache = CacheRef("local", str(tmp_path / "cache"), mode="max")
    for number in range(12):
        kind = project.change() if number else "first"
        request = project.request()
        told = f"seed {seed}, change {number} ({kind}):\n{project.text()}"
        planned = plan_build(request, root=pybuild.root)
        done = build(request, root=pybuild.root)
        for before, after in zip(planned.steps, done.steps, strict=True):
            if "FROM" not in before.name:
                assert before.status == "content" or (before.status == "hit") == after.cached, (
                    f"{before} {after}\n{told}"
                )
        if number % 4 == 3:
            fresh = build(request, root=tmp_path / "fresh")
            assert fresh.image_id == done.image_id, told
            shutil.rmtree(tmp_path / "fresh")
        if number % 4 == 1:
            build(replace(request, cache_to=(cache,)), root=pybuild.root)
        if number % 4 == 2:  # one change after the cache was written
            afar = build(replace(request, cache_from=(cache,)), root=tmp_path / "afar")
            assert afar.image_id == done.image_id, told
            shutil.rmtree(tmp_path / "afar")


def test_an_independent_layer_may_lie_in_a_stack_twice(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    text = (
        f"FROM {busybox_base}\nCOPY --link a /out/a\nRUN rm /out/a && echo more > /out/b\n"
        "COPY --link a /out/a\nRUN cat /out/a /out/b > /all\n"
    )
    context = write_context(tmp_path / "context", text, {"a": "text\n"})
    pybuild.build(context, "-t", "twice:1")
    assert (pybuild.unpack("twice:1", tmp_path / "root") / "all").read_text() == "text\nmore\n"
    (context / "Containerfile").write_text(text.replace("RUN rm /out/a &&", "RUN"))
    pybuild.build(context, "-t", "twice:2", "--no-cache")
    assert (pybuild.unpack("twice:2", tmp_path / "root2") / "all").read_text() == "text\nmore\n"
