#!/usr/bin/env python3
"""Measure the inner loop of a Python web application beside buildah: one source line changed, rebuilt, pushed.

  bench/app.py [--rounds N]

Two stages, after Containerfile.examples/python-web: packages are installed from a wheel directory, the
source is compiled, the result is copied onto the base. Needs root, docker-registry, mmdebstrap, the
network for one apt-get install, and buildah (without it pybuild is measured alone). At the end stands
where the time of pybuild's last round went.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))

from bench.run import OUT, Driver  # noqa: E402
from bench.tools import Buildah, Pybuild, available  # noqa: E402
from tests.support.registries import RegistryServer  # noqa: E402

EXAMPLE = TOP / "Containerfile.examples" / "python-web"
BASE = """FROM {base}
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
"""
APP = """FROM {base} AS build
COPY wheels/ /wheels/
RUN python3 -m venv /app/venv && /app/venv/bin/pip install -q --no-index --find-links /wheels greeting
COPY src/ /app/src/
RUN /app/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /app/src
FROM {base}
RUN useradd --system --no-create-home --uid 999 app
COPY --from=build /app /app
USER app
CMD ["/app/venv/bin/python", "/app/src/main.py"]
"""


def make_context(folder: Path, base: str) -> Path:
    """The application, with forty modules of source."""
    (folder / "src").mkdir(parents=True)
    (folder / "Containerfile").write_text(APP.format(base=base))
    subprocess.run([sys.executable, str(EXAMPLE / "make_wheels.py"), str(folder / "wheels")], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    for number in range(40):
        (folder / "src" / f"part{number}.py").write_text("".join(f"def f{n}():\n    return {n}\n" for n in range(200)))
    (folder / "src" / "main.py").write_text("import part0\nprint(part0.f0())\n")
    return folder


def change(folder: Path, text: str) -> None:
    with (folder / "src" / "part7.py").open("a") as source:
        source.write(f"# {text}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root: buildah is measured with overlay and runc")
    OUT.mkdir(exist_ok=True)
    maker = TOP / "Containerfile.examples" / "make_base.py"
    subprocess.run([sys.executable, str(maker), "debian", str(OUT / "bases" / "debian")], check=True, stdout=sys.stderr)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=OUT))
    pybuild = Pybuild(work)
    tools: list[Pybuild | Buildah] = [pybuild]
    if available("buildah"):
        tools.append(Buildah(work, "oci" if available("runc") else "chroot"))
    try:
        with RegistryServer(work / "registry") as registry:
            registry.push_layout(OUT / "bases" / "debian", "base/debian", "1")
            driver = Driver(work, registry)
            base = f"{registry.host}/base/python:1"
            (work / "base").mkdir()
            (work / "base" / "Containerfile").write_text(BASE.format(base=driver.debian))
            driver.quiet(pybuild.build(work / "base", base, "--push"))
            pybuild.reset()
            measure(driver, tools, base, options.rounds)
    finally:
        for tool in tools:
            tool.reset()
        shutil.rmtree(work, ignore_errors=True)
    return 0


def measure(driver: Driver, tools: list[Pybuild | Buildah], base: str, rounds: int) -> None:
    """Print medians of: nothing cached, rebuilt after a change, that and pushed."""
    times: dict[str, dict[str, list[float]]] = {}
    meta = driver.work / "meta.json"
    for tool in tools:
        name = f"{driver.host}/app/{tool.name}:1"
        folder = make_context(driver.work / f"app-{tool.name}", base)
        first = driver.timed(tool.build(folder, name))
        driver.quiet(tool.push(name, f"docker://{name}"))
        times[tool.name] = {"first build": [first], "rebuilt": [], "rebuilt and pushed": []}
    for number in range(rounds):
        for tool in tools:
            name, folder = f"{driver.host}/app/{tool.name}:1", driver.work / f"app-{tool.name}"
            change(folder, f"rebuilt in round {number}")
            times[tool.name]["rebuilt"].append(driver.timed(tool.build(folder, name)))
            change(folder, f"pushed in round {number}")
            if isinstance(tool, Pybuild):
                took = driver.timed(tool.build(folder, name, "--push", "--metadata-file", str(meta)))
            else:
                took = driver.timed(tool.build(folder, name)) + driver.timed(tool.push(name, f"docker://{name}"))
            times[tool.name]["rebuilt and pushed"].append(took)
    for what in ("first build", "rebuilt", "rebuilt and pushed"):
        print(f"{what:<20} " + "  ".join(f"{t} {statistics.median(v[what]):.2f} s" for t, v in times.items()))
    document = json.loads(meta.read_text())
    print(f"where pybuild's last round went ({document['pybuild.wall_s']:.2f} s after the start of the program):")
    for step in document["pybuild.steps"]["list"]:
        if not step["cached"]:
            phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in step["phases"].items())
            print(f"  {step['wall_s']:.3f} s  {step['name'][:60]}: {phases}")


if __name__ == "__main__":
    raise SystemExit(main())
