"""What a Containerfile offers to whoever builds it: its arguments, secrets, ssh sockets and stages.

The JSON-able values have the keys of BuildKit's `outline` and `targets` subrequests. Pure: a base
image is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from builder.errors import ParseError
from builder.frontend.instructions import Arg, Containerfile, Copy, Env, Instruction, Run, Stage, description_of
from builder.frontend.scope import (
    BaseImage,
    Globals,
    StageScope,
    automatic_args,
    find_stage,
    global_scope,
    stage_parents,
)
from builder.frontend.source import SourceRange
from builder.frontend.words import expand
from layers.oci import Platform


def targets(file: Containerfile) -> dict[str, Any]:
    """The stages that can be built: name, description, base, and which is the default."""
    last = len(file.stages) - 1
    entries = []
    for stage in file.stages:
        entry: dict[str, Any] = {"name": stage.name or "", "default": stage.index == last}
        if stage.description:
            entry["description"] = stage.description
        entry["base"] = stage.from_.image
        if stage.from_.platform:
            entry["platform"] = stage.from_.platform
        entry["location"] = _location(stage.from_.range)
        entries.append(entry)
    return {"sources": [file.source.name], "targets": entries}


def outline(
    file: Containerfile,
    target: str | None = None,
    *,
    build_args: Mapping[str, str] | None = None,
    platform: Platform | None = None,
) -> dict[str, Any]:
    """What a build of one stage (the last, if none is named) takes: ARGs in effect, secrets, ssh.

    Raises: ParseError if there is no such stage, or a variable cannot be expanded.
    """
    stage = find_stage(file, target)
    host = Platform.host()
    automatic = automatic_args(platform or host, host, stage.name or "")
    globals_ = global_scope(file, build_args or {}, automatic)
    walk = _Walk(file, globals_, dict(build_args or {}))
    walk.visit(stage.index)
    walk.globals()
    result: dict[str, Any] = {"name": stage.name or ""}
    if stage.description:
        result["description"] = stage.description
    result["sources"] = [file.source.name]
    result["args"] = _sorted(walk.args.values())
    result["secrets"] = _sorted(walk.secrets.values())
    result["ssh"] = _sorted(walk.ssh.values())
    return result


class _Walk:
    """Visits a stage and all that it needs, the base stages first."""

    def __init__(self, file: Containerfile, globals_: Globals, build_args: dict[str, str]) -> None:
        self.file = file
        self.global_scope = globals_
        self.build_args = build_args
        self.parents = stage_parents(file, globals_)
        self.names = {stage.name: stage.index for stage in file.stages if stage.name}
        self.scopes: dict[int, StageScope] = {}
        self.used_globals: set[str] = set()
        self.args: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.ssh: dict[str, dict[str, Any]] = {}

    def visit(self, target: int) -> None:
        """Iteratively: a chain of stages may be longer than Python's stack."""
        wanted = {target}
        for index in range(target, -1, -1):
            if index in wanted:
                parent = self.parents[index]
                wanted |= {parent} if parent is not None else set()
                wanted |= {i for name in self._references(index) if (i := self._index(name, index)) is not None}
        for index in sorted(wanted):
            self._stage(self.file.stages[index])

    def _index(self, name: str, before: int) -> int | None:
        index = int(name) if name.isascii() and name.isdigit() and len(name) < 9 else self.names.get(name.lower())
        return index if index is not None and index < before else None

    def _references(self, index: int) -> list[str]:
        names: list[str] = []
        for instruction in self.file.stages[index].instructions:
            if isinstance(instruction, Copy) and instruction.from_:
                names.append(instruction.from_)
            elif isinstance(instruction, Run):
                for option in instruction.mount_options:
                    fields = (field.partition("=") for field in option.split(","))
                    names += [value for key, _, value in fields if key.lower() == "from"]
        return names

    def _stage(self, stage: Stage) -> None:
        parent = self.parents[stage.index]
        above = self.scopes[parent] if parent is not None else None
        scope = StageScope(stage, above, BaseImage({}), self.global_scope, self.file.escape)
        self.scopes[stage.index] = scope
        for word in filter(None, (stage.from_.image, stage.from_.platform)):
            try:
                self.used_globals |= expand(word, self.global_scope.values, self.file.escape).used
            except ParseError as e:
                raise stage.from_.error(e.message) from None
        for instruction in stage.instructions:
            if isinstance(instruction, Arg):
                scope.set_arg(instruction, self.build_args)
                self._arg(instruction, scope)
            elif isinstance(instruction, Env):
                scope.set_env(instruction.expand(scope.env, scope.escape))
            elif isinstance(instruction, Run):
                self._mounts(instruction.expand(scope.env, scope.escape))

    def _arg(self, arg: Arg, scope: StageScope) -> None:
        for pair in arg.pairs:
            declared = pair.name in self.global_scope.declared
            if pair.value is None and pair.name not in self.build_args and declared:
                self.used_globals.add(pair.name)  # described where it is declared
                continue
            self.args[pair.name] = self._entry(arg, pair.name, scope.env.get(pair.name) or "")

    def _entry(self, arg: Instruction, name: str, value: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name}
        if description := description_of(arg.comments, name):
            entry["description"] = description
        if value:
            entry["value"] = value
        entry["location"] = _location(arg.range)
        return entry

    def _mounts(self, run: Run) -> None:
        for mount in run.mounts:
            if mount.type == "secret":
                name = mount.source or mount.id or mount.target.rstrip("/").rpartition("/")[2]
                _require(self.secrets, name, mount.required, run.range)
            elif mount.type == "ssh":
                _require(self.ssh, mount.id or mount.source or "default", mount.required, run.range)

    def globals(self) -> None:
        """Note the global ARGs that what was visited uses, and those that their defaults use."""
        pending = sorted(self.used_globals)
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            declared = self.global_scope.declared.get(name)
            if declared is None or name in seen:
                continue
            seen.add(name)
            self.args.setdefault(name, self._entry(declared.arg, name, declared.value or ""))
            pending += sorted(declared.uses)


def _require(table: dict[str, dict[str, Any]], name: str, required: bool, place: SourceRange) -> None:
    entry = table.setdefault(name, {"name": name, "location": _location(place)})
    if required:
        entry["required"] = True


def _location(place: SourceRange) -> dict[str, Any]:
    return {"ranges": [{"start": {"line": place.start_line}, "end": {"line": place.end_line}}]}


def _sorted(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: (entry["location"]["ranges"][0]["start"]["line"], entry["name"]))


def to_text(value: Mapping[str, Any]) -> str:
    """An outline or a list of targets as a table, for people."""
    if "targets" in value:
        rows = [("TARGET", "BASE", "DESCRIPTION")]
        for entry in value["targets"]:
            name = (entry["name"] or "-") + (" (default)" if entry["default"] else "")
            rows.append((name, entry["base"], entry.get("description", "")))
        return _table(rows)
    tables = []
    if value.get("name"):
        tables.append(f"TARGET: {value['name']}\n")
    if value.get("description"):
        tables.append(f"DESCRIPTION: {value['description']}\n")
    if value["args"]:
        rows = [("BUILD ARG", "VALUE", "DESCRIPTION")]
        tables.append(_table(rows + [(e["name"], e.get("value", ""), e.get("description", "")) for e in value["args"]]))
    for key, title in (("secrets", "SECRET"), ("ssh", "SSH")):
        if value[key]:
            rows = [(title, "REQUIRED", "")]
            tables.append(_table(rows + [(e["name"], "yes" if e.get("required") else "no", "") for e in value[key]]))
    return "\n".join(tables)


def _table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
