"""From a Containerfile to a graph of steps: which stages there are, what they need, in which order.

Pure but for the `Resolver`, which finds the manifest and config of base images (never their
layers). Stages that the target does not need are neither resolved nor planned. Equal steps in two
stages or two platforms are one step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from builder.errors import ParseError, PlanError, locate
from builder.frontend import instructions as ins
from builder.frontend.source import SourceRange
from builder.frontend.words import expand_word
from builder.plan.graph import (
    BuildGraph,
    CopyItem,
    CopyOp,
    ImagePlan,
    Op,
    ResolvedImage,
    SourceOp,
    Step,
)
from builder.plan.request import BuildRequest
from builder.plan.stage import Dispatcher, StageState, image_document
from layers.errors import PybuildError
from layers.oci import Platform
from layers.values import Protocol
from registry.reference import Reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, NoReturn, TypeVar

    from builder.plan.sourcepolicy import SourcePolicy

    T = TypeVar("T")


_SCRATCH_IMAGE = "docker-image://scratch"


class Resolver(Protocol):
    """Finds base images. May reach the network; called once per image and platform."""

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage: ...

    def resolve_layout(self, location: str, platform: Platform) -> ResolvedImage: ...


def plan(request: BuildRequest, containerfile: ins.Containerfile, resolver: Resolver) -> BuildGraph:
    """The graph that builds the request's target, once for each of its platforms.

    Raises: PlanError (unknown stage, circular dependency, forbidden option), ParseError (expansion),
    whatever the resolver raises.
    """
    steps = _Steps()
    platforms = request.platforms or (Platform.host(),)
    plans = [
        _PlatformPlan(request, containerfile, resolver, steps, platform, several=len(platforms) > 1)
        for platform in platforms
    ]
    images = tuple([one.image() for one in plans])
    return BuildGraph(
        steps=tuple(steps.all),
        images=images,
        warnings=tuple(map(str, containerfile.warnings)),
        demanded=tuple(sorted({step for one in plans for step in one.demanded})),
    )


class _Steps:
    """All steps so far; an equal one is made once."""

    def __init__(self) -> None:
        self.all: list[Step] = []
        self._known: dict[object, int] = {}

    def add(self, step: Step) -> int:
        op = step.op
        definition: object = (op.image.digest, str(step.platform)) if isinstance(op, SourceOp) else op
        key = (type(op), definition, step.parent, step.inputs, step.ignore_cache, step.platform)
        if key in self._known:
            return self._known[key]
        index = len(self.all)
        self.all.append(step._replace(number=index))
        self._known[key] = index
        return index


class _PlatformPlan:
    """The plan for one target platform. Implements `builder.plan.stage.Sources`."""

    def __init__(
        self,
        request: BuildRequest,
        containerfile: ins.Containerfile,
        resolver: Resolver,
        steps: _Steps,
        platform: Platform,
        *,
        several: bool,
    ) -> None:
        self._request = request
        self._file = containerfile
        self._resolver = resolver
        self._steps = steps
        self._platform = platform
        self._prefix = f"{platform} " if several else ""
        self._explicit = bool(request.platforms)
        self._images: dict[tuple[str, str], ResolvedImage] = {}
        self._states: dict[int, StageState] = {}
        self.demanded: list[int] = []
        """Steps to be made although no image has them: the ends of the stages that --after names."""
        self._by_name = {stage.name.lower(): stage.index for stage in containerfile.stages if stage.name}
        self._target = self._find_target()
        self._globals = self._global_args()
        self._dispatcher = Dispatcher(request, self, self._globals)
        self._froms = [self._expand_from(stage) for stage in containerfile.stages]
        self._bases = self._base_stages()
        self._after = [self._stages_before(stage) for stage in containerfile.stages]
        self._uses = [self._stages_used(stage) for stage in containerfile.stages]
        self._check_order()

    def image(self) -> ImagePlan:
        """Plan every stage that the target needs, and the image that comes of it."""
        for index in sorted(self._reachable()):
            self._plan_stage(index)
        state = self._states[self._target]
        request = self._request
        platform = self._image_platform(state.platform)
        document = image_document(
            state,
            platform,
            labels=request.labels,
            unset_labels=request.unset_labels,
            env=request.env,
            unset_env=request.unset_env,
        )
        return ImagePlan(
            platform=platform,
            document=document,
            top=state.top,
            base=state.base,
            history=tuple(state.history),
        )

    def _image_platform(self, base: Platform) -> Platform:
        """The platform that the image says it is for: the base's, and what --platform says of it."""
        asked = self._platform
        if not self._explicit:
            return base
        same = (asked.os, asked.architecture) == (base.os, base.architecture)
        return Platform(
            asked.os,
            asked.architecture,
            asked.variant or (base.variant if same else ""),
            asked.os_version or (base.os_version if same else ""),
            asked.os_features or base.os_features,
        )

    # Stages

    def _find_target(self) -> int:
        stages = self._file.stages
        if not stages:
            raise PlanError("the Containerfile contains no stages to build", source=self._file.source)
        wanted = self._request.target
        if not wanted:
            return len(stages) - 1
        if wanted.lower() in self._by_name:
            return self._by_name[wanted.lower()]
        if wanted.isdigit() and int(wanted) < len(stages):
            return int(wanted)
        raise PlanError(
            f'target stage "{wanted}" could not be found',
            source=self._file.source,
            hint=_did_you_mean(wanted, list(self._by_name))
            or (f"the stages are {', '.join(self._by_name)}" if self._by_name else "no stage has a name"),
        )

    def _global_args(self) -> dict[str, str]:
        """The automatic platform ARGs and those before the first FROM."""
        stage = self._request.target or self._file.stages[-1].name or "default"
        args = dict(_platform_args(self._platform, self._request, stage))
        for instruction in self._file.global_args:
            for key, default in instruction.pairs:
                if key in self._request.build_args:
                    args[key] = self._request.build_args[key]
                elif default is not None:
                    args[key] = self._expand(default, args, instruction.range)
        return args

    def _expand(self, word: str, env: Mapping[str, str], where: SourceRange) -> str:
        try:
            return expand_word(word, env, self._file.escape)
        except ParseError as e:
            raise PlanError(e.message, source=self._file.source, range=where, hint=e.hint) from e

    def _expand_from(self, stage: ins.Stage) -> tuple[str, Platform | None]:
        where = stage.from_.range
        name = self._expand(stage.from_.image, self._globals, where)
        if stage.index == 0 and self._request.base:
            name = self._request.base
        if not name:
            raise PlanError(
                f"base name ({stage.from_.image}) should not be blank", source=self._file.source, range=where
            )
        if not stage.from_.platform:
            return name, None
        text = self._expand(stage.from_.platform, self._globals, where)
        if not text:
            raise PlanError(
                f"empty platform value from expression {stage.from_.platform}", source=self._file.source, range=where
            )
        try:
            return name, Platform.parse(text)
        except PybuildError as e:
            raise PlanError(
                f"failed to parse platform {stage.from_.platform}: {e}", source=self._file.source, range=where
            ) from e

    def _base_stages(self) -> list[int | None]:
        """For each stage the latest one before it that its FROM names, if any."""
        named: dict[str, int] = {}
        bases: list[int | None] = []
        for stage, (image, _) in zip(self._file.stages, self._froms, strict=True):
            bases.append(named.get(image))
            if stage.name:
                named[stage.name.lower()] = stage.index
        return bases

    def _stages_before(self, stage: ins.Stage) -> list[int]:
        """The stages that `FROM --after` names."""
        found: list[int] = []
        for name in stage.from_.after:
            where = stage.from_.range
            wanted = self._expand(name, self._globals, where)
            at = self._stage_index(wanted, where)
            if at is None or at >= stage.index:
                earlier = [n for n, i in self._by_name.items() if i < stage.index]
                raise PlanError(
                    f'--after: no stage "{wanted}" is defined before this one',
                    source=self._file.source,
                    range=where,
                    hint=_did_you_mean(wanted, earlier),
                )
            found.append(at)
        return found

    def _reachable(self) -> set[int]:
        """The stages that the target needs, as far as can be told without base images (ONBUILD adds more)."""
        seen: set[int] = set()
        waiting = [self._target]
        while waiting:
            index = waiting.pop()
            if index in seen:
                continue
            seen.add(index)
            stage = self._file.stages[index]
            if stage.name and self._context(stage.name) is not None:
                continue
            base = self._bases[index]
            waiting += self._after[index] if base is None else [*self._after[index], base]
            for at, name, instruction in self._uses[index]:
                if at >= index:
                    self._too_late(name, instruction)
                waiting.append(at)
        return seen

    def _too_late(self, name: str, instruction: ins.Instruction) -> NoReturn:
        verb = "copy" if isinstance(instruction, ins.Copy) else "mount"
        raise PlanError(
            f'cannot {verb} from stage "{name}", it needs to be defined before current stage',
            source=self._file.source,
            range=instruction.range,
        )

    def _stages_used(self, stage: ins.Stage) -> list[tuple[int, str, ins.Instruction]]:
        """The stages that a stage's COPY and RUN --mount name, with the name and the instruction that does.

        Names are checked in stages that nothing needs, too.
        """
        found: list[tuple[int, str, ins.Instruction]] = []
        for instruction in stage.instructions:
            names: list[str] = []
            if isinstance(instruction, ins.Copy) and instruction.from_:
                names = [instruction.from_]
                self._check_literal(instruction.from_, instruction.range)
            elif isinstance(instruction, ins.Run):
                names = [m.from_ for m in (*instruction.mounts, *self._request.run.mounts) if m.from_]
            for name in names:
                at = self._stage_index(name, instruction.range)
                if at is not None:
                    found.append((at, name, instruction))
        return found

    def _check_literal(self, name: str, where: SourceRange) -> None:
        if self._expand(name, {}, where) != name:
            raise PlanError(
                "variable expansion is not supported for --from",
                source=self._file.source,
                range=where,
                hint="define a stage with FROM and an ARG before the first FROM, and copy from that stage",
            )

    def _check_order(self) -> None:
        """Refuse stages that use each other, whether the target needs them or not."""
        forward = [index for index, uses in enumerate(self._uses) if any(at >= index for at, _, _ in uses)]
        for start in forward:
            seen: set[int] = set()
            waiting = [start]
            while waiting:
                for at, _, instruction in self._uses[waiting.pop()]:
                    if at == start:
                        name = self._file.stages[start].name or str(start)
                        raise PlanError(
                            f"circular dependency detected on stage: {name}",
                            source=self._file.source,
                            range=instruction.range,
                        )
                    if at not in seen:
                        seen.add(at)
                        waiting.append(at)

    def _stage_index(self, name: str, where: SourceRange) -> int | None:
        if name.lower() in self._by_name:
            return self._by_name[name.lower()]
        if re.fullmatch(r"[+-]?[0-9]+", name):
            if not 0 <= int(name) < len(self._file.stages):
                raise PlanError(f"invalid stage index {name}", source=self._file.source, range=where)
            return int(name)
        return None

    def _plan_stage(self, index: int) -> StageState:
        if index in self._states:
            return self._states[index]
        stage = self._file.stages[index]
        name = stage.name or (f"stage-{index}" if len(self._file.stages) > 1 else "")
        image, platform = self._froms[index]
        state = StageState(
            name=name,
            index=index,
            platform=platform or self._platform,
            source=self._file.source,
            escape=self._file.escape,
        )
        state.ignore_cache = self._request.no_cache or (stage.name or name) in self._request.no_cache_filter
        replaced = self._context(stage.name) if stage.name else None
        if replaced is not None:
            self._start_from_context(state, replaced, stage.from_)
            self._states[index] = state
            return state
        instructions = list(stage.instructions)
        tops = {self._plan_stage(at).top for at in self._after[index]}
        state.after = tuple(sorted(top for top in tops if top is not None))
        self.demanded += state.after
        state.total = sum(isinstance(i, (ins.Add, ins.Copy, ins.Run, ins.Workdir)) for i in instructions)
        triggers = self._start(state, index, image, stage.from_)
        state.total += sum(isinstance(i, (ins.Add, ins.Copy, ins.Run, ins.Workdir)) for i in triggers)
        state.current_is_trigger = True
        for trigger in triggers:
            self._dispatcher.apply(state, trigger)
        state.current_is_trigger = False
        for instruction in instructions:
            self._dispatcher.apply(state, instruction)
        self._states[index] = state
        return state

    def _start(self, state: StageState, index: int, image: str, from_: ins.From) -> list[ins.Instruction]:
        """Let a stage begin from its base; return the base's ONBUILD triggers."""
        base_index = self._bases[index]
        if base_index is not None:
            base = self._plan_stage(base_index)
            expressions = list(base.onbuild)
            state.start_from_stage(base)
        elif image == "scratch":
            state.start_from_image(None, None)
            expressions = []
        else:
            state.total += 1
            context = self._context(image)
            if context is not None:
                self._start_from_context(state, context, from_)
            else:
                resolved = self._resolve(image, state.platform, from_.range)
                step = self._source_step(resolved, state, from_.range)
                state.start_from_image(resolved, step)
            expressions = [str(e) for e in state.config.pop("OnBuild", None) or []]
        if not self._request.inherit_labels:
            state.config.pop("Labels", None)
        return [self._trigger(expression, from_) for expression in expressions]

    def _trigger(self, expression: str, from_: ins.From) -> ins.Instruction:
        try:
            return ins.parse_onbuild(expression, self._file.source, from_.range)
        except ParseError as e:
            raise PlanError(
                f"ONBUILD trigger of the base, {expression!r}: {e.message}",
                source=self._file.source,
                range=from_.range,
            ) from e

    # Images and contexts

    def _resolve(self, name: str, platform: Platform, where: SourceRange, *, or_stage: bool = False) -> ResolvedImage:
        key = (name, str(platform))
        if key not in self._images:
            wanted = name
            if self._request.source_policy is not None:
                wanted = self._judged(where, lambda policy: policy.image(name))
            try:
                self._images[key] = self._resolver.resolve_image(wanted, platform)
            except PybuildError as e:
                locate(e, self._file.source, where)
                e.hint = e.hint or self._stage_meant(name, surely=or_stage)
                raise
        return self._images[key]

    def _stage_meant(self, name: str, *, surely: bool) -> str | None:
        """A hint for who meant a stage by the bare name of an image that cannot be had."""
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            return None
        from builder.frontend.spelling import nearest

        if match := nearest(name, self._by_name):
            return f"did you mean the stage {match}?"
        return f"no stage is called {name}: it was taken for an image" if surely else None

    def _source_step(self, image: ResolvedImage, state: StageState | None, where: SourceRange) -> int | None:
        if not image.manifest.layers:
            return None
        text = f"FROM {image.reference}"
        name = state.title(text, self._prefix) if state else f"[{self._prefix}internal] {text}"
        return self._steps.add(
            Step(
                number=0,
                op=SourceOp(image),
                parent=None,
                inputs=(),
                name=name,
                stage=state.name if state else "",
                platform=image.config.platform,
                range=where,
                internal=state is None,
            )
        )

    def _context(self, name: str | None) -> str | None:
        """The value of the named context that stands for `name`, if there is one."""
        if not name or name.lower() in {"scratch", "context"} or not self._request.contexts:
            return None
        names = [name]
        try:
            reference = Reference.parse(name).with_default_tag()
        except PybuildError:
            pass
        else:
            names += [str(reference), reference.familiar(), reference.familiar().removesuffix(":latest")]
        return next((self._request.contexts[n] for n in names if n in self._request.contexts), None)

    def _context_name(self, value: str) -> str:
        return next(name for name, v in self._request.contexts.items() if v == value)

    def _context_image(self, value: str, platform: Platform, where: SourceRange) -> ResolvedImage | None:
        if value.startswith("docker-image://"):
            return self._resolve(value.removeprefix("docker-image://"), platform, where)
        if value.startswith("oci-layout://"):
            location = value.removeprefix("oci-layout://")
            if self._request.source_policy is not None:
                self._judged(where, lambda policy: policy.layout(location))
            return self._resolver.resolve_layout(location, platform)
        return None

    def _start_from_context(self, state: StageState, value: str, from_: ins.From) -> None:
        if value == _SCRATCH_IMAGE:
            state.start_from_image(None, None)
            return
        image = self._context_image(value, state.platform, from_.range)
        if image is not None:
            state.start_from_image(image, self._source_step(image, state, from_.range))
        else:
            state.start_from_image(None, self.context_tree(self._context_name(value), "/", from_.range))

    # Sources protocol, for the dispatcher

    def stage_or_image(self, name: str, *, user: StageState, range: SourceRange) -> tuple[int | None, str | None]:
        self._check_literal(name, range)
        at = self._stage_index(name, range)
        if at is not None:
            if at >= user.index:
                raise PlanError(
                    f'cannot copy from stage "{name}", it needs to be defined before current stage "{user.name}"',
                    source=self._file.source,
                    range=range,
                )
            return self._plan_stage(at).top, None
        if name == "scratch":
            return None, None
        value = self._context(name)
        if value == _SCRATCH_IMAGE:
            return None, None
        if value is not None:
            image = self._context_image(value, self._platform, range)
            if image is None:
                return None, self._context_name(value)
            return self._source_step(image, None, range), None
        return self._source_step(self._resolve(name, self._platform, range, or_stage=True), None, range), None

    def context_tree(self, context: str, source: str, range: SourceRange) -> int:
        include = () if source == "/" else (source.lstrip("/"),)
        whose = f"context {context}" if context else "build context"
        op = CopyOp(
            items=(CopyItem("path", "/", include=include, required=include),), dest="/", context=context, link=False
        )
        return self._steps.add(
            Step(
                number=0,
                op=op,
                parent=None,
                inputs=(),
                name=f"[{self._prefix}internal] load {source} of {whose}",
                stage="",
                platform=self._platform,
                range=range,
                internal=True,
            )
        )

    def remote(self, kind: Literal["http", "git"], source: str, checksum: str, *, range: SourceRange) -> CopyItem:
        if self._request.source_policy is None:
            return CopyItem(kind, source)
        found = self._judged(
            range, lambda policy: policy.git(source, checksum) if kind == "git" else policy.http(source, checksum)
        )
        return CopyItem(kind, found.source, checksum=found.checksum)

    def _judged(self, where: SourceRange, ask: Callable[[SourcePolicy], T]) -> T:
        """What the source policy says, if there is one to ask. Raises: PlanError."""
        from builder.plan.sourcepolicy import SourceDenied

        assert self._request.source_policy is not None
        try:
            return ask(self._request.source_policy)
        except SourceDenied as e:
            raise PlanError(str(e), source=self._file.source, range=where, hint=e.hint) from e

    def add_step(self, state: StageState, op: Op, *, inputs: tuple[int, ...], range: SourceRange, text: str) -> int:
        if state.after and not state.began:
            # The stage begins with this step: it waits for them.
            inputs = (*inputs, *(top for top in state.after if top not in inputs))
        state.began = True
        index = self._steps.add(
            Step(
                number=0,
                op=op,
                parent=state.top,
                inputs=inputs,
                name=state.title(text, self._prefix),
                stage=state.name,
                platform=state.platform,
                range=range,
                ignore_cache=state.ignore_cache,
            )
        )
        state.top = index
        return index


def _platform_args(target: Platform, request: BuildRequest, stage: str) -> list[tuple[str, str]]:
    host = Platform.host()
    pairs = [
        ("BUILDPLATFORM", str(host)),
        ("BUILDOS", host.os),
        ("BUILDOSVERSION", host.os_version),
        ("BUILDARCH", host.architecture),
        ("BUILDVARIANT", host.variant),
        ("TARGETPLATFORM", str(target)),
        ("TARGETOS", target.os),
        ("TARGETOSVERSION", target.os_version),
        ("TARGETARCH", target.architecture),
        ("TARGETVARIANT", target.variant),
        ("TARGETSTAGE", stage),
    ]
    return [(key, request.build_args.get(key, value)) for key, value in pairs]


def _did_you_mean(word: str, known: list[str]) -> str | None:
    from builder.frontend.spelling import nearest

    match = nearest(word, known)
    return f"did you mean {match}?" if match else None
