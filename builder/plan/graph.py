"""The build graph: steps and what each depends on, as values.

A step makes a snapshot from its parent's. Steps are numbered in an order in which every input
precedes its user. Nothing here runs anything; `builder.plan.planner` makes graphs, `builder.solve`
executes them. Plain tuples, because a cached build pays for every class at start-up.
"""

from __future__ import annotations

from collections.abc import Mapping

from builder.frontend.source import SourceRange
from builder.plan.variables import Snapshot
from layers.oci import Digest, ImageConfig, Manifest, Platform
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    MountType = Literal["bind", "cache", "tmpfs", "secret", "ssh"]


class ResolvedImage(NamedTuple):
    """A base image whose manifest and config are known; its layers need not be here."""

    reference: str
    digest: Digest
    manifest: Manifest
    config: ImageConfig


class SourceOp(NamedTuple):
    """An image from a registry, a layout or the store."""

    image: ResolvedImage


class MountOp(NamedTuple):
    """One `RUN --mount`, expanded. `input` is the step whose tree is mounted; None for none."""

    type: MountType
    target: str
    input: int | None = None
    source: str = "/"
    readonly: bool = True
    id: str = ""
    sharing: str = "shared"
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    required: bool = False
    env: str | None = None


class RunOp(NamedTuple):
    """A command in the sandbox. `proxy` is environment that counts neither for the key nor for history."""

    args: tuple[str, ...]
    env: Snapshot
    cwd: str
    user: str
    mounts: tuple[MountOp, ...] = ()
    network: str = "default"
    security: str = "sandbox"
    hostname: str = "buildkitsandbox"
    files: tuple[tuple[str, bytes], ...] = ()
    proxy: tuple[tuple[str, str], ...] = ()
    devices: tuple[tuple[str, bool], ...] = ()
    """(CDI name, whether it has to be there) each."""


class CopyItem(NamedTuple):
    """One source of a COPY or ADD.

    `kind` tells what `source` is: a path or wildcard in the input tree, a URL, a git reference, or
    the name of an inline document whose bytes are `data`. `checksum` is what a source policy asks for.
    """

    kind: Literal["path", "http", "git", "inline"]
    source: str
    data: bytes = b""
    include: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    checksum: str = ""


class CopyOp(NamedTuple):
    """Files into the tree. The input is a step (`COPY --from`) or the build context of that name."""

    items: tuple[CopyItem, ...]
    dest: str
    input: int | None = None
    context: str | None = None
    chown: str = ""
    mode: str = ""
    exclude: tuple[str, ...] = ()
    link: bool = False
    unpack: bool | None = None
    add: bool = False
    checksum: str = ""
    keep_git_dir: bool = False


class MkdirOp(NamedTuple):
    """The directory that WORKDIR makes."""

    path: str
    user: str


Op = SourceOp | RunOp | CopyOp | MkdirOp


class Step(NamedTuple):
    """One node. `parent` is the step that it builds on (None: an empty root), `inputs` are the others it needs."""

    number: int
    op: Op
    parent: int | None
    inputs: tuple[int, ...]
    name: str
    stage: str
    platform: Platform
    range: SourceRange | None = None
    ignore_cache: bool = False
    internal: bool = False
    """It stands for no instruction: it brings what one of them (`range`) needs."""


class HistoryEntry(NamedTuple):
    """A line of the image's history; `step` made its layer, None for metadata alone.

    `arguments` are those that a RUN was given, with their values: put together when the history is
    written, since each RUN tells all of them.
    """

    text: str
    step: int | None = None
    arguments: Snapshot | None = None

    @property
    def created_by(self) -> str:
        if not self.arguments:
            return self.text
        shown = "".join([f" {name}={value}" for name, value in self.arguments])
        return self.text.replace("RUN ", f"RUN |{len(self.arguments)}{shown} ", 1)


class ImagePlan(NamedTuple):
    """The image that a target stage comes to.

    `document` is the config without `created`, `rootfs` and `history`; `top` is the step whose tree
    it is (None: an empty image); `base` the image at the bottom of it, if any.
    """

    platform: Platform
    document: Mapping[str, Any]
    top: int | None
    base: ResolvedImage | None
    history: tuple[HistoryEntry, ...]


class BuildGraph(NamedTuple):
    """All steps that the targets need, and the targets, one a platform.

    `demanded` are steps to be made though no target has them (`FROM --after`).
    """

    steps: tuple[Step, ...]
    images: tuple[ImagePlan, ...]
    warnings: tuple[str, ...] = ()
    demanded: tuple[int, ...] = ()

    def chain(self, top: int | None) -> list[Step]:
        """The steps from the base to `top`, parent links only."""
        steps: list[Step] = []
        while top is not None:
            steps.append(self.steps[top])
            top = self.steps[top].parent
        return steps[::-1]
