"""The import law of README.md's Hacking section, checked on the syntax trees of all modules.

What may import what, which module is the only one to use a dependency, and what a cheap command may
not load. A rule that a change breaks is either the change's mistake, or a change of the design that
belongs into the tables below.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TOP = Path(__file__).resolve().parents[2]
PACKAGES = ("layers", "registry", "builder")

LEAVES = ("layers.errors", "layers.events", "layers.oci", "layers.linux", "layers.sha")
EVERYWHERE = ("layers.values", "layers.regex")
"""What stands for pieces of the stdlib."""

LAW: dict[str, tuple[str, ...]] = {
    # The longest matching prefix counts; besides the stdlib, a module may import what its row names.
    "layers": ("layers", "zstandard", "isal", "zlib_ng"),
    **dict.fromkeys(LEAVES, LEAVES),
    **dict.fromkeys(EVERYWHERE, ()),
    "layers.content": ("layers.oci",),
    "layers.snapshot": ("layers.oci",),
    "registry": ("layers", "registry", "requests", "urllib3"),
    "registry.artifacts": ("layers", "registry", "requests", "oras"),
    "registry.syncfile": ("layers", "registry", "yaml"),
    "builder.errors": ("layers.errors", "builder.frontend.source"),
    "builder.version": (),
    "builder.frontend": ("layers.errors", "layers.oci", "builder.errors", "builder.frontend"),
    "builder.plan": (
        *("layers.errors", "layers.oci", "layers.sha", "registry.reference"),
        *("builder.errors", "builder.frontend", "builder.plan"),
    ),
    "builder.sandbox": (
        *("layers.linux", "layers.errors", "layers.sha", "layers.snapshot", "builder.errors", "builder.sandbox"),
    ),
    "builder.sandbox.cdi": ("builder.errors", "builder.sandbox.spec", "yaml"),
    "builder.sandbox.rootfs": ("layers.linux", "layers.fusemount", "builder.sandbox"),
    "builder.sandbox.zygote": ("layers.linux", "builder.sandbox"),
    "builder.sandbox.setup": ("layers.linux", "layers.ownership", "builder.sandbox"),
    "builder.sandbox.keeper": ("layers.linux", "layers.trees", "builder.sandbox"),
    "builder.sandbox.runtime": ("layers.linux", "layers.trees", "builder.sandbox"),
    "builder.sandbox.supervisor": ("layers.linux", "layers.ownership", "builder.sandbox"),
    "builder.sandbox.nodes": ("layers.linux", "layers.ownership", "builder.sandbox"),
    "builder.solve": (
        *("layers", "registry", "builder.errors", "builder.frontend", "builder.plan", "builder.sandbox"),
        *("builder.solve", "builder.session", "builder.places"),
    ),
    # session, export, container and their like: everything but what stands above them (see ABOVE).
    "builder": ("layers", "registry", "builder"),
    "builder.api": ("layers", "registry", "builder"),
    "builder.bakefile": (
        *(
            "layers.values",
            "builder.errors",
            "builder.frontend.spelling",
            "builder.hcl",
            "builder.hclfunctions",
            "yaml",
        ),
    ),
    "builder.hcl": ("layers.values",),
    "builder.hclfunctions": ("builder.hcl",),
    "builder.rootfs": ("layers", "registry", "builder.changes", "builder.export"),
    "builder.verify": ("layers", "builder.difference", "builder.plan.request"),
    "builder.inchild": ("layers", "registry", "builder"),
    "builder.__init__": ("builder.api", "builder.plan.request"),
    "builder.__main__": ("builder.cli",),
    "builder.cli": ("layers", "registry", "builder", "tqdm"),
}

ABOVE = ("builder.api", "builder.cli", "builder.__main__")
"""What nothing else in the packages imports."""

ROOMS: dict[str, tuple[str, ...]] = {
    # Only these modules import the name at all.
    "ctypes": ("layers.linux",),
    "oras": ("registry.artifacts",),
    "tqdm": ("builder.cli",),
    "argparse": ("builder.cli",),
    "zstandard": ("layers.compression", "layers.decompression"),
    "isal": ("layers.compression", "layers.decompression"),
    "zlib_ng": ("layers.compression",),
    "requests": ("registry",),
    "yaml": ("builder.bakefile", "builder.sandbox.cdi", "registry.syncfile"),
    "jsonschema": (),  # comes with oras, costs 93 ms
}

LAZY = ("requests", "urllib3", "oras", "tqdm", "yaml", "zstandard", "isal", "zlib_ng")
EAGER_ROOMS: dict[str, tuple[str, ...]] = {
    # Modules that are themselves imported lazily may import these at their top.
    "requests": ("registry.http", "registry.connections", "registry.client", "registry.auth", "registry.artifacts"),
    "urllib3": ("registry.http", "registry.connections"),
    "oras": ("registry.artifacts",),
}

FORKERS = (
    "layers.fusemount",  # the program that serves an overlay
    "builder.sandbox",  # launcher, zygote, keeper, their helpers
    "builder.container.lifecycle",  # containers outlive the command that started them
    "builder.container.reach",
    "builder.container.runtimes",  # an OCI runtime's exec
)


STDLIB = sys.stdlib_module_names | {"_sha2", "_sha256"}
"""The names of all versions that we run on."""


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool
    """Inside a function: paid when it is called."""
    typing_only: bool


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by its dotted name; packages as `name.__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((TOP / package).rglob("*.py")):
            name = ".".join(path.relative_to(TOP).with_suffix("").parts)
            found[name] = ast.parse(path.read_bytes(), str(path))
    return found


def known(module: str) -> bool:
    return module in modules() or f"{module}.__init__" in modules()


def imports(name: str) -> Iterator[Import]:
    """What a module imports, wherever in its text."""

    def visit(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy, typing_only)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(whole if known(whole) else child.module or "", child.lineno, lazy, typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from visit(child, lazy, True)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, lazy or inside, typing_only)

    yield from visit(modules()[name], False, False)


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def row(name: str) -> tuple[str, ...]:
    """The rule of a module: that of the longest prefix."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        allowed = LAW.get(".".join(parts[:length]))
        if allowed is not None:
            return allowed
    raise AssertionError(f"{name}: no rule")


def test_every_rule_is_about_something_that_exists() -> None:
    later = {"builder.container", "registry.artifacts"}
    for name in {*LAW, *FORKERS, *(room for rooms in ROOMS.values() for room in rooms)} - later:
        assert known(name), name


def test_imports_go_in_one_direction() -> None:
    broken = [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        for found in imports(name)
        if found.module.split(".")[0] not in STDLIB
        and not under(found.module, (*EVERYWHERE, *row(name)))
        and not (found.typing_only and found.module == "_typeshed")
        and not (found.typing_only and under(found.module, PACKAGES) and not name.startswith("layers."))
    ]
    assert not broken, "\n".join(broken)


def test_nothing_looks_up() -> None:
    # `inchild` carries a call of the api into a process of its own.
    exempt = (*ABOVE, "builder.__init__", "builder.inchild")
    broken = [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        for found in imports(name)
        if not found.typing_only
        and (
            (under(found.module, ABOVE) and not under(name, exempt))
            or (under(found.module, ("builder.cli",)) and under(name, ("builder.api", "builder.inchild")))
        )
    ]
    assert not broken, "\n".join(broken)


def test_a_package_loads_nothing_but_itself() -> None:
    """Importing one leaf must not drag in its neighbours: re-exports, where there are any, load lazily."""
    lazy = ("builder.__init__", "builder.container.__init__")
    for name, tree in modules().items():
        if not name.endswith("__init__"):
            continue
        assert ast.get_docstring(tree), name
        if name not in lazy:
            assert len(tree.body) == 1, f"{name}: a package's __init__ holds its docstring, nothing else"
        loaded = [i.module for i in imports(name) if not i.lazy and not i.typing_only]
        assert set(loaded) <= {"__future__", "importlib", "typing"}, f"{name}: {loaded}"


def test_each_dependency_has_one_room() -> None:
    broken = [
        f"{name}:{found.line} imports {found.module}"
        for name in modules()
        for found in imports(name)
        for room in [ROOMS.get(found.module.split(".")[0])]
        if room is not None and not under(name, room)
    ]
    assert not broken, "\n".join(broken)


def test_heavy_dependencies_are_imported_lazily() -> None:
    broken = [
        f"{name}:{found.line} imports {found.module} at its top"
        for name in modules()
        for found in imports(name)
        for top in [found.module.split(".")[0]]
        if top in LAZY and not found.lazy and not found.typing_only and not under(name, EAGER_ROOMS.get(top, ()))
    ]
    assert not broken, "\n".join(broken)


def calls(name: str) -> Iterator[tuple[str, int, ast.Call]]:
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno, node


def test_only_the_sandbox_forks() -> None:
    broken = [
        f"{name}:{line} calls {function}"
        for name in modules()
        for function, line, _ in calls(name)
        if function in {"os.fork", "os.forkpty", "fork", "pty.fork", "os.posix_spawn"} and not under(name, FORKERS)
    ]
    assert not broken, "\n".join(broken)


def test_nothing_runs_between_fork_and_exec_of_a_subprocess() -> None:
    broken = [
        f"{name}:{line}"
        for name in modules()
        for _, line, call in calls(name)
        if any(keyword.arg == "preexec_fn" for keyword in call.keywords)
    ]
    assert not broken, "\n".join(broken)


def test_only_the_command_line_prints_and_exits() -> None:
    broken = [
        f"{name}:{line} calls {function}"
        for name in modules()
        for function, line, _ in calls(name)
        if function in {"print", "sys.exit", "exit", "quit", "input"}
        and not under(name, ("builder.cli", "builder.__main__"))
    ]
    assert not broken, "\n".join(broken)


def test_the_environment_is_read_above_the_api_alone() -> None:
    """Reproducibility depends on it: what a build may read of the environment is in its request."""
    pure = ("layers.oci", "layers.tarstream", "layers.changeset", "builder.frontend", "builder.plan", "builder.solve")
    # What is fetched goes by way of the caller's proxies, and is keyed by its content.
    exempt = ("builder.solve.remote",)
    broken = [
        f"{name}:{node.lineno} reads os.environ"
        for name in modules()
        if under(name, pure) and not under(name, exempt)
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.environb"}
    ]
    assert not broken, "\n".join(broken)


def loaded_by(script: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `script`."""
    code = f"{script}\nimport sys\nsys.__stdout__.write('\\n' + '\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TOP, env={"PATH": "/usr/bin:/bin"}
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ["layers.linux", "layers.oci", "builder.frontend.parser", "builder.sandbox.zygote"])
def test_leaves_stay_light(name: str) -> None:
    heavy = loaded_by(f"import {name}") & {*LAZY, "ssl", "asyncio", "multiprocessing", "email", "http"}
    assert not heavy


def test_the_zygote_loads_little() -> None:
    loaded = {module for module in loaded_by("import builder.sandbox.zygote") if module.split(".")[0] in PACKAGES}
    assert all(under(module, ("layers", "builder")) for module in loaded)
    assert not {module for module in loaded if under(module, ("builder.solve", "builder.frontend", "registry"))}


def test_version_loads_no_dependency() -> None:
    script = (
        "import sys\nsys.argv = ['pybuild', '--version']\n"
        "from builder.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not loaded_by(script) & {*LAZY, "ssl", "sqlite3", "subprocess"}
