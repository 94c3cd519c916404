"""BuildKit's lint: what a Containerfile says that is legal and probably not meant.

Pure: what lies outside the file (base images, the ignore file, build arguments) comes as parameters,
and a rule that would need what was not given stays silent. `# check=skip=A,B;error=true` is obeyed, on top
of the file for all of it, above an instruction for that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from builder.errors import ParseError
from builder.frontend.ignorefile import IgnoreMatcher, clean_path
from builder.frontend.instructions import (
    Add,
    Arg,
    Cmd,
    Containerfile,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    Shell,
    Stage,
    Workdir,
)
from builder.frontend.ports import is_plain_port
from builder.frontend.rules import RULES
from builder.frontend.scope import BaseImage, Globals, StageScope, automatic_args, global_scope, stage_parents
from builder.frontend.source import SourceRange
from builder.frontend.spelling import did_you_mean
from builder.frontend.words import expand, expand_words
from layers.errors import ImageError
from layers.oci import Platform
from layers.values import NamedTuple

CHECK_ARG = "BUILDKIT_DOCKERFILE_CHECK"
_RESERVED = frozenset({"context", "scratch"})
_NOT_IN_ENV = frozenset({"BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"})
_SECRET = re.compile("(?:_|^)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|$)", re.IGNORECASE)
_NO_SECRET = re.compile("(?:_|^)(?:public|file|version)(?:_|$)", re.IGNORECASE)
_CHECK_COMMENT = re.compile(r"check[\t ]*=[\t ]*([^ ]+)", re.IGNORECASE)
_REPOSITORY = re.compile(
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*"
    r"(?::[0-9]+)?/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
    r"(?::[\w][\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?",
    re.ASCII,
)


class Finding(NamedTuple):
    """One report. `level` is `warning`, or `error` where the file says check=error=true."""

    rule: str
    description: str
    detail: str
    range: SourceRange
    level: str


class CheckOptions(NamedTuple):
    """`# check=skip=...;error=...;experimental=...`. `all` as a name stands for every rule."""

    skip: frozenset[str] = frozenset()
    error: bool = False
    experimental: frozenset[str] = frozenset()


def parse_check_options(text: str) -> CheckOptions:
    """Parse the value of a `check` directive or of an option of the same form.

    Raises: ParseError without a place.
    """
    options = CheckOptions()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        names = frozenset(name.strip() for name in value.split(","))
        if key == "skip" and equals:
            options = options._replace(skip=names)
        elif key == "experimental" and equals:
            options = options._replace(experimental=names)
        elif key == "error" and equals:
            if value.lower() not in ("true", "false", "1", "0", "t", "f"):
                raise ParseError(f'failed to parse check option "{part}"', hint="error=true or error=false")
            options = options._replace(error=value.lower() in ("true", "1", "t"))
        else:
            keys = ("skip", "error", "experimental")
            raise ParseError(
                f'invalid check option "{part}"{did_you_mean(key, keys)}', hint="such as skip=all;error=true"
            )
    return options


def check_options(file: Containerfile) -> CheckOptions:
    """The options that the file itself states. Raises: ParseError."""
    for directive in file.directives:
        if directive.name == "check":
            try:
                return parse_check_options(directive.value)
            except ParseError as e:
                raise ParseError(e.message, source=file.source, range=directive.range, hint=e.hint) from None
    return CheckOptions()


def effective_options(file: Containerfile, build_args: Mapping[str, str] | None = None) -> CheckOptions:
    """The options in force: the build argument BUILDKIT_DOCKERFILE_CHECK, or else the file's own.

    Raises: ParseError.
    """
    override = (build_args or {}).get(CHECK_ARG)
    if not override:
        return check_options(file)
    try:
        return parse_check_options(override)
    except ParseError as e:
        raise ParseError(f"--build-arg {CHECK_ARG}: {e.message}", hint=e.hint) from None


def enforce(file: Containerfile, findings: Iterable[Finding]) -> None:
    """Refuse to build if there are findings of level `error`, that is, where check=error=true holds.

    Raises: ParseError at the first of them.
    """
    fatal = [finding for finding in findings if finding.level == "error"]
    if fatal:
        names = ", ".join(sorted({finding.rule for finding in fatal}))
        first = fatal[0]
        raise ParseError(
            f"lint violation found for rules: {names}",
            source=file.source,
            range=first.range,
            hint=f"{first.detail}; `# check=skip={first.rule};error=true` allows it",
        )


def lint(
    file: Containerfile,
    *,
    options: CheckOptions | None = None,
    build_args: Mapping[str, str] | None = None,
    target_platform: Platform | None = None,
    build_platform: Platform | None = None,
    ignore: IgnoreMatcher | None = None,
    base_image: Callable[[str, str | None], BaseImage | None] | None = None,
    stages: Iterable[int] | None = None,
) -> list[Finding]:
    """Apply the rules, in the order of the lines.

    `options` replace those that `effective_options` finds. `base_image(name, platform)` tells of the images that stages
    begin from; for one it does not know, UndefinedVar is not applied, while without `base_image` at
    all a base has no variables but PATH. `stages` limits what needs evaluation to those indexes.

    Raises: ParseError if the check directive, a global ARG, a FROM or a variable of an instruction
    cannot be evaluated: a build would fail there, too.
    """
    host = Platform.host()
    linter = _Linter(file, options or effective_options(file, build_args), dict(build_args or {}), ignore)
    linter.target = target_platform or host
    linter.check_text()
    if "all" not in linter.options.skip:
        linter.check_stages(build_platform or host, base_image, None if stages is None else set(stages))
    return sorted(linter.findings, key=lambda finding: finding.range.start_line)


class _Linter:
    def __init__(
        self,
        file: Containerfile,
        options: CheckOptions,
        build_args: dict[str, str],
        ignore: IgnoreMatcher | None,
    ) -> None:
        self.file = file
        self.options = options
        self.build_args = build_args
        self.ignore = ignore
        self.target = Platform()
        self.findings: list[Finding] = []
        self.local = CheckOptions()
        """What the comments above the instruction that is looked at add."""

    def look_at(self, instruction: Instruction) -> None:
        """Obey a `# check=skip=RULE // why` above an instruction for what is reported of it."""
        self.local = CheckOptions()
        for comment in instruction.comments:
            if match := _CHECK_COMMENT.match(comment):
                try:
                    self.local = parse_check_options(match[1])
                except ParseError:
                    pass  # an ordinary comment, after all
                return

    def report(self, rule_name: str, place: SourceRange, **values: str) -> None:
        rule = RULES[rule_name]
        names = {rule_name, "all"}
        if rule.experimental:
            # Asked for by name, it is not left out with all the others.
            if not (self.options.experimental | self.local.experimental) & names:
                return
        elif (self.options.skip | self.local.skip) & names:
            return
        level = "error" if self.options.error else "warning"
        self.findings.append(Finding(rule_name, rule.description, rule.detail.format(**values), place, level))

    # What the text alone shows.

    def check_text(self) -> None:
        for warning in self.file.warnings:
            self.report("NoEmptyContinuation", warning.range)
        for arg in self.file.global_args:
            self.look_at(arg)
            self._description("ARG", [pair.name for pair in arg.pairs], arg)
        seen: set[str] = set()
        for stage in self.file.stages:
            self.look_at(stage.from_)
            self._from_text(stage.from_, seen)
            for instruction in stage.instructions:
                self.look_at(instruction)
                if isinstance(instruction, Maintainer):
                    self.report("MaintainerDeprecated", instruction.range)
                elif isinstance(instruction, Arg):
                    self._description("ARG", [pair.name for pair in instruction.pairs], instruction)
        self._casing()

    def _from_text(self, from_: From, seen: set[str]) -> None:
        if not (from_.name and from_.as_written and from_.as_keyword):
            return
        if from_.as_written != from_.name:
            self.report("StageNameCasing", from_.range, stage=from_.as_written)
        keyword, as_ = from_.written, from_.as_keyword
        if (keyword.islower() and not as_.islower()) or (keyword.isupper() and not as_.isupper()):
            self.report("FromAsCasing", from_.range, as_=as_, from_=keyword)
        self._description("FROM", [from_.name], from_)
        if from_.name in _RESERVED:
            self.report("ReservedStageName", from_.range, stage=from_.name)
        if from_.name in seen:
            self.report("DuplicateStageName", from_.range, stage=from_.name)
        seen.add(from_.name)

    def _description(self, command: str, names: list[str], instruction: Instruction) -> None:
        if instruction.comments and instruction.comments[-1].split(" ")[0] not in names:
            name = names[0] if len(names) == 1 else "<arg_key>"
            self.report("InvalidDefinitionDescription", instruction.range, command=command, name=name)

    def _casing(self) -> None:
        everything: list[Instruction] = []
        for stage in self.file.stages:
            everything += (stage.from_, *stage.instructions)
        lower = sum(instruction.written.islower() for instruction in everything)
        upper = sum(instruction.written.isupper() for instruction in everything)
        right, casing = (str.islower, "lowercase") if lower > upper else (str.isupper, "uppercase")
        for instruction in everything:
            self.look_at(instruction)
            if not right(instruction.written):
                place = instruction.source.locate(instruction.written, instruction.range)
                self.report("ConsistentInstructionCasing", place, command=instruction.written, casing=casing)

    # What variables, base images and the ignore file show.

    def check_stages(
        self,
        build_platform: Platform,
        base_image: Callable[[str, str | None], BaseImage | None] | None,
        only: set[int] | None,
    ) -> None:
        last = self.file.stages[-1].name or ""
        automatic = automatic_args(self.target, build_platform, last)
        self._default_images(automatic)
        globals_ = global_scope(self.file, self.build_args, automatic)
        parents = stage_parents(self.file, globals_)
        scopes: list[StageScope] = []
        for stage, parent in zip(self.file.stages, parents, strict=True):
            self.look_at(stage.from_)
            image, platform = self._from_words(stage, globals_)
            base = None
            if parent is None and image != "scratch":
                base = base_image(image, platform) if base_image else BaseImage({})
                if base and base.platform:
                    self._base_platform(stage, image, platform, base.platform)
            elif parent is None:
                base = BaseImage({})
            above = None if parent is None else scopes[parent]
            scope = StageScope(stage, above, base, globals_, self.file.escape)
            scopes.append(scope)
            if only is None or stage.index in only:
                _StageLinter(self, scope).run()

    def _default_images(self, automatic: Mapping[str, str]) -> None:
        try:
            defaults = global_scope(self.file, {}, automatic).values
            for stage in self.file.stages:
                image = expand(stage.from_.image, defaults, self.file.escape).text
                self.look_at(stage.from_)
                if not _REPOSITORY.fullmatch(image):
                    self.report("InvalidDefaultArgInFrom", stage.from_.range, image=stage.from_.image)
        except ParseError:
            return  # a build argument may repair it; if none does, the build says so

    def _from_words(self, stage: Stage, globals_: Globals) -> tuple[str, str | None]:
        """Check the words of a FROM. Returns the image and the platform, expanded."""
        from_ = stage.from_
        names = list(dict.fromkeys([*globals_.declared, *globals_.values]))
        values: list[str] = []
        for word in (from_.image, from_.platform or ""):
            try:
                expansion = expand(word, globals_.values, self.file.escape)
            except ParseError as e:
                raise from_.error(e.message) from None
            for name in sorted(expansion.unmatched.difference(names)):
                suggestion = did_you_mean(name, names, match_case=True)
                self.report("UndefinedArgInFrom", from_.range, name=name, suggestion=suggestion)
            values.append(expansion.text)
            if word == from_.platform:
                self._platform_flag(from_, expansion.text, expansion.used, expansion.unmatched, globals_)
        return values[0], values[1] or None

    def _platform_flag(
        self, from_: From, value: str, used: frozenset[str], unmatched: frozenset[str], globals_: Globals
    ) -> None:
        if used == {"TARGETPLATFORM"} and not unmatched and value == globals_.values["TARGETPLATFORM"]:
            self.report("RedundantTargetPlatform", from_.range, platform=from_.platform or "")
        if used or unmatched:
            return
        try:
            platform = Platform.parse(value)
        except ImageError:
            return  # the build refuses it
        name = from_.name or ""
        if platform.os not in name and platform.architecture not in name:
            self.report("FromPlatformFlagConstDisallowed", from_.range, platform=value)

    def _base_platform(self, stage: Stage, image: str, platform: str | None, actual: Platform) -> None:
        try:
            expected = Platform.parse(platform) if platform else self.target
        except ImageError:
            return  # the build refuses it
        if (expected.os, expected.architecture) != (actual.os, actual.architecture):
            place = stage.from_.range
            self.report("InvalidBaseImagePlatform", place, image=image, expected=str(expected), actual=str(actual))


class _StageLinter:
    """Walks one stage with its variables."""

    def __init__(self, linter: _Linter, scope: StageScope) -> None:
        self.linter = linter
        self.report = linter.report
        self.scope = scope
        self.last: dict[type, Instruction] = {}

    def run(self) -> None:
        for instruction in self.scope.stage.instructions:
            self.linter.look_at(instruction)
            if isinstance(instruction, Arg):
                for pair in instruction.pairs:
                    self._secret("ARG", pair.name, instruction)
                self._undefined(instruction, self.scope.set_arg(instruction, self.linter.build_args))
                continue
            self._undefined(instruction, instruction.undefined(self.scope.env, self.scope.escape))
            expanded = instruction.expand(self.scope.env, self.scope.escape)
            if isinstance(instruction, Expose):
                self._ports(instruction)
            self._meaning(expanded)

    def _meaning(self, instruction: Instruction) -> None:
        """The rules that look at an expanded instruction."""
        place, command = instruction.range, instruction.written
        if isinstance(instruction, Env | Label):
            for pair in instruction.pairs:
                if pair.legacy:
                    self.report("LegacyKeyValueFormat", place, command=command)
                if isinstance(instruction, Env):
                    self._secret("ENV", pair.name, instruction)
            if isinstance(instruction, Env):
                self.scope.set_env(instruction)
        elif isinstance(instruction, Cmd | Entrypoint | Healthcheck):
            if before := self.last.get(type(instruction)):
                self.report("MultipleInstructionsDisallowed", before.range, command=command)
            self.last[type(instruction)] = instruction
            if isinstance(instruction, Cmd | Entrypoint) and instruction.shell and not self.scope.has_shell:
                self.report("JSONArgsRecommended", place, command=command)
        elif isinstance(instruction, Workdir):
            if not self.scope.has_workdir and not instruction.path.startswith("/"):
                self.report("WorkdirRelativePath", place, path=instruction.path)
            self.scope.has_workdir = True
        elif isinstance(instruction, Shell):
            self.scope.has_shell = True
        elif isinstance(instruction, Add) or (isinstance(instruction, Copy) and not instruction.from_):
            self._ignored_sources(instruction)

    def _undefined(self, instruction: Instruction, unmatched: frozenset[str]) -> None:
        if not self.scope.known:
            return
        for name in sorted(unmatched - self.scope.declared - _NOT_IN_ENV):
            suggestion = did_you_mean(name, self.scope.env, match_case=True).replace("mean ", "mean $")
            self.report("UndefinedVar", instruction.range, name=name, suggestion=suggestion)

    def _secret(self, command: str, name: str, instruction: Instruction) -> None:
        if _SECRET.search(name) and not _NO_SECRET.search(name):
            self.report("SecretsUsedInArgOrEnv", instruction.range, command=command, name=name)

    def _ports(self, expose: Expose) -> None:
        for word in expose.ports:
            for port in expand_words(word, self.scope.env, self.scope.escape):
                protocol = port.partition("/")[2]
                if protocol != protocol.lower():
                    self.report("ExposeProtoCasing", expose.range, port=port)
                if not is_plain_port(port):
                    self.report("ExposeInvalidFormat", expose.range, port=port)

    def _ignored_sources(self, instruction: Add | Copy) -> None:
        ignore = self.linter.ignore
        if not ignore:
            return
        command = "Add" if isinstance(instruction, Add) else "Copy"
        for source in instruction.sources:
            if "://" in source or source.startswith("git@"):
                continue
            path = clean_path(source)
            if ignore.may_bring_back(path):
                continue  # what of a directory is left cannot be told from the patterns alone
            hidden, deciding = ignore.decide(path)
            if path in (".", "/"):
                hidden, deciding = True, ignore.hides_everything()
            if hidden and deciding:
                name = deciding.file
                self.report("CopyIgnoredFile", instruction.range, command=command, file=path, ignore_file=name)


def to_text(file: Containerfile, findings: Iterable[Finding]) -> str:
    """`file:line: level: Rule: detail` and the source line, for people."""
    blocks = []
    for finding in findings:
        position = f"{file.source.name}:{finding.range.start_line}"
        blocks.append(
            f"{position}: {finding.level}: {finding.rule}: {finding.detail}\n{file.source.excerpt(finding.range)}"
        )
    return "\n".join(blocks) + ("\n" if blocks else "")


def to_json(file: Containerfile, findings: Iterable[Finding]) -> dict[str, Any]:
    """The findings as a JSON value, with the keys of BuildKit's lint subrequest."""
    return {"sources": [{"filename": file.source.name}], "warnings": [_finding_json(f) for f in findings]}


def _finding_json(finding: Finding) -> dict[str, Any]:
    place = finding.range
    start = {"line": place.start_line, "character": max(place.start_col - 1, 0)}
    end = {"line": place.end_line, "character": max(place.end_col - 1, 0)}
    return {
        "ruleName": finding.rule,
        "description": finding.description,
        "detail": finding.detail,
        "level": finding.level,
        "location": {"sourceIndex": 0, "ranges": [{"start": start, "end": end}]},
    }


def render_json(file: Containerfile, findings: Iterable[Finding]) -> str:
    """`to_json`, printed."""
    return json.dumps(to_json(file, findings), indent=2, ensure_ascii=False)
