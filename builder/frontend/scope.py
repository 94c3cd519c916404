"""Which variables stand where: global ARGs, the automatic ones, and a stage's ENV and ARG as they grow.

For reading a Containerfile without building it (lint, outline). The planner keeps scopes of its own,
since it must also know what enters a cache key.
"""

from __future__ import annotations

from collections.abc import Mapping

from builder.errors import ParseError
from builder.frontend.instructions import Arg, ArgPair, Containerfile, Env, Stage
from builder.frontend.words import expand, expand_word
from layers.oci import Platform
from layers.values import NamedTuple

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class BaseImage(NamedTuple):
    """What reading needs to know of an image that a stage begins from."""

    env: Mapping[str, str]
    has_shell: bool = False
    platform: Platform | None = None


class GlobalArg(NamedTuple):
    """A global ARG with its value, if any, and the names that its default uses."""

    arg: Arg
    pair: ArgPair
    value: str | None
    uses: frozenset[str]


class Globals(NamedTuple):
    """`values` include the automatic arguments; `declared` is what the file declares, by name."""

    values: dict[str, str]
    declared: dict[str, GlobalArg]


def automatic_args(target: Platform, build: Platform, stage: str) -> dict[str, str]:
    """The arguments that every FROM may use undeclared."""
    values = {"TARGETSTAGE": stage or "default"}
    for prefix, platform in (("BUILD", build), ("TARGET", target)):
        values[f"{prefix}PLATFORM"] = str(platform)
        values[f"{prefix}OS"] = platform.os
        values[f"{prefix}OSVERSION"] = platform.os_version
        values[f"{prefix}ARCH"] = platform.architecture
        values[f"{prefix}VARIANT"] = platform.variant
    return values


def global_scope(file: Containerfile, build_args: Mapping[str, str], automatic: Mapping[str, str]) -> Globals:
    """Evaluate the ARGs before the first FROM. Raises: ParseError."""
    values = {**automatic, **{name: build_args[name] for name in automatic if name in build_args}}
    declared: dict[str, GlobalArg] = {}
    for arg in file.global_args:
        for pair in arg.pairs:
            value, uses = build_args.get(pair.name), frozenset[str]()
            if value is None and pair.value is not None:
                try:
                    expansion = expand(pair.value, values, file.escape)
                except ParseError as e:
                    raise arg.error(e.message) from None
                value, uses = expansion.text, expansion.used
            if value is not None:
                values[pair.name] = value
            known = declared.get(pair.name)
            declared[pair.name] = GlobalArg(arg, pair, value, uses | known.uses if known else uses)
    return Globals(values, declared)


class StageScope:
    """The variables of a stage as its instructions go by.

    `env` is what expansion sees; `declared` are ARGs without a value, which are not undefined.
    """

    def __init__(
        self, stage: Stage, parent: StageScope | None, base: BaseImage | None, globals_: Globals, escape: str
    ) -> None:
        self.stage = stage
        self.globals = globals_
        self.escape = escape
        self.known: bool = parent.known if parent else base is not None
        """Whether the base image's own variables are known."""
        self.has_shell: bool = parent.has_shell if parent else base is not None and base.has_shell
        self.has_workdir: bool = parent is not None and parent.has_workdir
        self.env: dict[str, str] = dict(parent.env) if parent else {"PATH": DEFAULT_PATH}
        if base is not None and parent is None:
            self.env.update(base.env)
        self.declared: set[str] = set(parent.declared) if parent else set()

    def set_env(self, env: Env) -> None:
        """Take an expanded ENV in."""
        self.env.update((pair.name, pair.value) for pair in env.pairs)

    def set_arg(self, arg: Arg, build_args: Mapping[str, str]) -> frozenset[str]:
        """Take an ARG in. Returns the names that its defaults use in vain. Raises: ParseError."""
        unmatched: frozenset[str] = frozenset()
        for pair in arg.pairs:
            value = build_args.get(pair.name)
            if value is None and pair.value is not None:
                try:
                    expansion = expand(pair.value, self.env, self.escape)
                except ParseError as e:
                    raise arg.error(e.message) from None
                unmatched |= expansion.unmatched - self.declared
                value = expansion.text
            elif value is None:
                value = self.globals.values.get(pair.name)
            if value is not None:
                self.env[pair.name] = value
            self.declared.add(pair.name)
        return unmatched


def stage_parents(file: Containerfile, globals_: Globals) -> list[int | None]:
    """For each stage, the index of the earlier stage that it begins from. Raises: ParseError."""
    by_name: dict[str, int] = {}
    parents: list[int | None] = []
    for stage in file.stages:
        try:
            image = expand_word(stage.from_.image, globals_.values, file.escape)
        except ParseError as e:
            raise stage.from_.error(e.message) from None
        parents.append(by_name.get(image))
        if stage.name:
            by_name[stage.name] = stage.index
    return parents


def find_stage(file: Containerfile, target: str | None) -> Stage:
    """The stage of a name or number; the last one if none is asked for. Raises: ParseError."""
    from builder.frontend.spelling import did_you_mean

    if not target:
        return file.stages[-1]
    for stage in reversed(file.stages):
        if stage.name == target.lower():
            return stage
    if target.isascii() and target.isdigit() and int(target[:9]) < len(file.stages):
        return file.stages[int(target[:9])]
    names = [stage.name for stage in file.stages if stage.name]
    raise ParseError(
        f"target stage {target!r} could not be found{did_you_mean(target, names)}",
        source=file.source,
        hint=f"the stages are {', '.join(names)}" if names else "no stage has a name",
    )
