"""What a build would do, and why, told before anything runs.

The solver has looked its steps up by definition; here those that it did not find are looked for by
content, as far as that is known yet, and the rest is given its reasons (`builder.solve.explain`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING

from builder.plan.graph import BuildGraph, CopyOp, RunOp, SourceOp, Step
from builder.solve.explain import BuildPlan, Explainer, Status, StepPlan
from builder.solve.results import StepResult, from_record
from layers.oci import Platform

if TYPE_CHECKING:
    from builder.solve.stepkeys import StepKeys
    from builder.solve.steps import StepContext


class Forecast:
    """Of one look-up. Runs no step and fetches no layer."""

    def __init__(
        self,
        ctx: StepContext,
        graph: BuildGraph,
        keys: StepKeys,
        *,
        needed: Set[int],
        anew: Set[int],
        results: Mapping[int, StepResult],
        here: Callable[[int], str | None],
    ) -> None:
        self._ctx = ctx
        self._graph = graph
        self._keys = keys
        self._needed = needed
        self._anew = anew
        self._results = results
        self._here = here
        self._used: set[int] = set()
        """Steps whose files one that runs needs."""
        self.made_ns: dict[int, int] = {}
        """When the results were made that were found by content."""

    def plan(self, arguments: frozenset[str]) -> BuildPlan:
        """The steps in order. `arguments` are the names that the Containerfile declares.

        Raises: ContextError, StoreError.
        """
        explainer = Explainer(
            self._ctx.store.cache, self._ctx.request, self._graph, self._keys.definition, self._keys.entries, arguments
        )
        keys: dict[int, str | None] = {}
        rows: list[StepPlan] = []
        for step in self._graph.steps:
            if isinstance(step.op, SourceOp):
                keys[step.number] = self._keys.definition[step.number]
            elif step.number in self._results:
                keys[step.number] = self._results[step.number].key
            elif step.number in self._needed:
                status, keys[step.number] = self._foresee(step, keys)
                reasons = () if status == "hit" else explainer.reasons(step, self._cause(step, rows))
                emulated = "" if status == "hit" else _emulated(step)
                rows.append(StepPlan(step.number, step.name, status, reasons, emulated=emulated))
                continue
            rows.append(StepPlan(step.number, step.name, "hit"))
        missing = self._missing()
        rows = [row._replace(fetch_bytes=sum(missing.get(row.number, {}).values())) for row in rows]
        once: dict[str, int] = {}
        for layers in missing.values():
            once |= layers
        return BuildPlan(tuple(rows), sum(once.values()))

    def _foresee(self, step: Step, keys: Mapping[int, str | None]) -> tuple[Status, str | None]:
        """Whether a step that its definition does not find will run; and its content key, if it can be known yet."""
        below = [i for i in (step.parent, *step.inputs) if i is not None]
        if any(keys.get(i) is None for i in below):
            self._used.update(below)
            return "content", None
        if isinstance(step.op, CopyOp) and step.op.input is not None and self._here(step.op.input) is None:
            self._used.update(below)
            return "content", None
        key = self._keys.content(step, lambda i: str(keys[i]))[0]
        record = None if step.number in self._anew else self._ctx.store.cache.get(key)
        found = None if record is None else from_record(record.record, record.snapshot_id)
        if found is not None:
            self.made_ns[step.number] = found.created_ns
            return "hit", found.key
        self._used.update(below)
        return "run", key

    def _cause(self, step: Step, rows: Sequence[StepPlan]) -> Step | None:
        """The nearest step below that is not found."""
        missed = {row.number for row in rows if row.status != "hit"}
        below = [i for i in (step.parent, *step.inputs) if i in missed]
        return self._graph.steps[below[0]] if below else None

    def _missing(self) -> dict[int, dict[str, int]]:
        """The layers to be fetched, by FROM: those whose files a step needs, and those of the images themselves."""
        bases = {image.base.digest for image in self._graph.images if image.base is not None}
        missing: dict[int, dict[str, int]] = {}
        for step in self._graph.steps:
            if not isinstance(step.op, SourceOp):
                continue
            image = step.op.image
            files = step.number in self._used and self._here(step.number) is None
            if files or image.digest in bases:
                missing[step.number] = {
                    d.digest: d.size_bytes for d in image.manifest.layers if self._ctx.store.stat(d.digest) is None
                }
        return missing


def _emulated(step: Step) -> str:
    """What would run a RUN for another CPU; empty for what this machine's own runs."""
    if step.platform == Platform.host() or not isinstance(step.op, RunOp):
        return ""
    from builder.solve.emulation import can_run, emulator

    path = emulator(step.platform)
    if path is not None:
        return f"emulated by {path}"
    return "" if can_run(step.platform) else f"cannot run here: no emulator for {step.platform}"
