"""Steps on a working container: RUN, COPY, ADD and changes of the config, by calls in place of instructions.

Every step is an instruction of the Containerfile language that goes through the planner's dispatcher and the
solver's step functions, so that it gives the layer, the config and the line of history that a build of the
same instruction gives. What a step needs of the image so far is in the container's settings.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from builder.container import mounting
from builder.container.records import ContainerError, Record
from builder.container.working import Line, Work, WorkingContainer, open_working
from builder.errors import ContextError
from builder.frontend import instructions as ins
from builder.frontend.gitref import is_git_source, is_http_source
from builder.frontend.source import SourceFile, SourceRange
from builder.plan.graph import CopyItem, CopyOp, MkdirOp, Op, RunOp
from builder.plan.request import BuildRequest
from builder.plan.stage import Dispatcher, StageState, transfer_words
from builder.plan.variables import Snapshot
from layers.oci import ImageConfig
from layers.snapshot import Mount
from layers.values import NamedTuple, replace

if TYPE_CHECKING:
    from builder.container.front import Front
    from builder.sandbox.launcher import ExitStatus, Launcher, Running
    from builder.solve.steps import StepContext
    from layers.image import Image
    from layers.snapshot import ActiveSnapshot

FindImage = Callable[[str], "Image"]
"""Finds the image of `--from`; may pull it."""
_WHERE = SourceRange(1, 1)
_WAIT_FOR_OTHER_S = 20.0


class Streams(NamedTuple):
    """A command's descriptors (`stdin` None: /dev/null); with `terminal` it has one of its own, shown there."""

    stdin: int | None = None
    stdout: int = 1
    stderr: int = 2
    terminal: Front | None = None


class Command(NamedTuple):
    """A command for `run`. What is None is the image's; `env` is for this command alone.

    `mounts` are spelled as for `RUN --mount`; those of type bind without `from` name directories of the host.
    """

    args: tuple[str, ...]
    user: str | None = None
    workdir: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    mounts: tuple[str, ...] = ()
    hostname: str | None = None
    privileged: bool = False


class Transfer(NamedTuple):
    """What `copy` and `add` put into the tree.

    Without `context_dir` and `from_`, sources are paths of the host. `from_` is an image or a working container.
    """

    sources: tuple[str, ...]
    destination: str = ""
    add: bool = False
    context_dir: Path | None = None
    from_: str | None = None
    chown: str | None = None
    chmod: str | None = None
    parents: bool = False
    exclude: tuple[str, ...] = ()
    checksum: str | None = None
    keep_git_dir: bool | None = None
    unpack: bool | None = None


class _Failed(Exception):
    """A command that ended with another status than 0."""

    def __init__(self, status: ExitStatus) -> None:
        super().__init__(status.code)
        self.status = status


# State


def state_of(record: Record) -> StageState:
    """The stage that a build would be in, had it come so far."""
    config = ImageConfig.build(record.settings["document"])
    source = SourceFile(record.name, "")
    state = StageState(name="", index=0, platform=config.platform, source=source, escape="\\")
    state.start_from_config(config)
    state.cmd_set = bool(record.settings["cmd_set"])
    return state


def _document(state: StageState) -> dict[str, Any]:
    document: dict[str, Any] = {"author": state.author} if state.author else {}
    return {**document, **state.platform.to_json(), "config": state.full_config()}


class _Planned:
    """The operations that instructions mean, and the trees that they take files from. Implements `Sources`."""

    def __init__(self, container: WorkingContainer, find: FindImage, stack: ExitStack) -> None:
        self.ops: list[Op] = []
        self.trees: dict[int, Mount] = {}
        self._container = container
        self._find = find
        self._stack = stack

    def stage_or_image(self, name: str, *, user: StageState, range: SourceRange) -> tuple[int | None, str | None]:
        number = len(self.trees)
        self.trees[number] = self._tree(name)
        return number, None

    def context_tree(self, context: str, source: str, range: SourceRange) -> int:
        raise ContextError(f"there is no build context to mount {source} of", hint="name a directory of this machine")

    def remote(self, kind: Literal["http", "git"], source: str, checksum: str, *, range: SourceRange) -> CopyItem:
        return CopyItem(kind, source)

    def add_step(self, state: StageState, op: Op, *, inputs: tuple[int, ...], range: SourceRange, text: str) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def _tree(self, name: str) -> Mount:
        """The files of a working container, or of an image."""
        from builder.container.records import is_working

        store = self._container.store
        if is_working(store.root, name):
            if name in {self._container.record.name, self._container.record.id}:
                return self._leased(self._container.top)
            # Not for ever: it may be waiting for this one. The lease outlives the lock.
            with open_working(store, name, limit_s=_WAIT_FOR_OTHER_S) as other, mounting.set_aside(other):
                return self._leased(other.top)
        from layers.image import unpack_image

        return self._leased(unpack_image(store, self._find(name)))

    def _leased(self, top: str | None) -> Mount:
        store = self._container.store
        if top is not None:
            self._stack.enter_context(store.lease(snapshots=[top]))
        return store.snapshots.view(top)


@contextmanager
def _planning(
    container: WorkingContainer, request: BuildRequest, find: FindImage
) -> Iterator[tuple[StageState, Dispatcher, _Planned]]:
    with ExitStack() as stack:
        planned = _Planned(container, find, stack)
        yield state_of(container.record), Dispatcher(request, planned, {}), planned


@contextmanager
def _step_context(
    container: WorkingContainer, request: BuildRequest, launcher: Callable[[], Launcher] | None = None
) -> Iterator[StepContext]:
    """What the solver's step functions take; what it opens is closed with the block."""
    from builder.session import Session
    from builder.solve.remote import RemoteSources
    from builder.solve.steps import StepContext
    from layers.events import NullSink

    session = Session(request, container.store.root)
    remotes = RemoteSources(container.store.root / "remote")
    try:
        yield StepContext(
            store=container.store,
            session=session,
            request=request,
            launcher=launcher or _no_launcher,
            events=NullSink(),
            cancelled=lambda: False,
            source=request.containerfile,
            remotes=remotes,
        )
    finally:
        remotes.close()
        session.close()


def _no_launcher() -> Launcher:
    raise AssertionError("a step without a command was to run one")


def _no_image(name: str) -> Image:
    raise ContainerError(f"no image {name} can be looked up here")


def step_request(*, epoch_s: int | None = None, **fields: Any) -> BuildRequest:
    """What a step is asked with: the fields of a `BuildRequest` that mean something for one step.

    They are `run`, `secrets`, `ssh`, `build_args` (proxies), `ignore_file` and `environ`. `epoch_s` is
    SOURCE_DATE_EPOCH.
    """
    return BuildRequest(containerfile=SourceFile("step", ""), context=None, source_date_epoch=epoch_s, **fields)


def _at(text: str) -> dict[str, Any]:
    return {"range": _WHERE, "original": text, "source": SourceFile("step", text)}


def _lines(state: StageState) -> list[Line]:
    return [Line(entry.created_by, entry.step) for entry in state.history]


# Steps


def run_step(
    container: WorkingContainer,
    command: Command,
    request: BuildRequest,
    launcher: Launcher,
    streams: Streams = Streams(),  # noqa: B008 - a constant
    find: FindImage = _no_image,
) -> ExitStatus:
    """Run a command in the container; how it ended. What it changed is a layer if it ended well.

    Of a command that failed nothing stays, but for one on a terminal, where the status is that of the last
    thing that somebody typed. Raises: ContextError, SandboxError, ParseError, StoreError.
    """
    mounts, volumes = _mounts(command.mounts)
    request = replace(request, run=replace(request.run, volumes=(*request.run.volumes, *volumes)))
    if command.privileged:
        request = replace(request, allow=request.allow | {"security.insecure"})
    text = f"RUN {' '.join(command.args)}"
    instruction = ins.Run(
        args=command.args,
        shell=False,
        mounts=mounts,
        security="insecure" if command.privileged else None,
        **_at(text),
    )
    with mounting.set_aside(container), _planning(container, request, find) as (state, dispatcher, planned):
        dispatcher.apply(state, instruction, literal=True)
        op = _adapted(planned.ops[0], command._replace(hostname=command.hostname or container.hostname))
        ended: list[ExitStatus] = []

        def make(active: ActiveSnapshot) -> None:
            with _step_context(container, request, lambda: launcher) as ctx:
                ended.append(_execute(ctx, op, active, planned.trees, streams))
            if ended[0].code and streams.terminal is None:
                raise _Failed(ended[0])

        try:
            container.advance([Work(make)], _lines(state))
        except _Failed as e:
            return e.status
        return ended[0]


def _adapted(op: Op, command: Command) -> RunOp:
    assert isinstance(op, RunOp)
    changes: dict[str, Any] = {}
    if command.user is not None:
        changes["user"] = command.user
    if command.workdir is not None:
        changes["cwd"] = posixpath.normpath(posixpath.join("/", op.cwd, command.workdir))
    if command.hostname:
        changes["hostname"] = command.hostname
    if command.env:
        changes["env"] = Snapshot({**dict(op.env), **dict(command.env)}.items())
    return op._replace(**changes)


def _mounts(texts: Sequence[str]) -> tuple[tuple[ins.RunMount, ...], list[str]]:
    """The mounts of RUN among them, and the binds of the host's directories as `--volume` has them."""
    from builder.frontend.runoptions import parse_mount

    mounts, volumes = [], []
    for text in texts:
        mount = parse_mount(text, lambda word: word)
        if mount.type != "bind" or mount.from_:
            mounts.append(mount)
            continue
        source = os.path.abspath(mount.source or ".")
        if ":" in source or ":" in mount.target or not mount.target.startswith("/"):
            raise ContainerError(f"--mount {text!r}: an absolute target is needed, and paths without colons")
        volumes.append(f"{source}:{mount.target}:{'ro' if mount.readonly else 'rw'}")
    return tuple(mounts), volumes


def _execute(
    ctx: StepContext, op: RunOp, active: ActiveSnapshot, trees: dict[int, Mount], streams: Streams
) -> ExitStatus:
    from builder.solve.steps import sandbox_spec

    cleanup: list[Callable[[], None]] = []
    try:
        spec = sandbox_spec(ctx, op, active, trees, cleanup)
        if streams.terminal is not None:
            spec = replace(spec, terminal=streams.terminal.window())
        running = ctx.launcher().run(spec, stdin_fd=streams.stdin, stdout_fd=streams.stdout, stderr_fd=streams.stderr)
        try:
            if streams.terminal is not None:
                _attend(running, streams.terminal)
            return running.wait()
        except BaseException:
            running.kill()
            running.wait()
            raise
        finally:
            running.close()
    finally:
        for action in reversed(cleanup):
            action()


class _OnTerminal:
    """A running command as `inside.attend` wants it."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.terminal = running.take_terminal()

    def fileno(self) -> int:
        return self._running.fileno()

    def wait(self) -> int:
        return self._running.wait().code


def _attend(running: Running, front: Front) -> None:
    """Join the caller's terminal with the command's until it has ended."""
    import signal
    from contextlib import suppress

    from builder.container.inside import attend
    from builder.sandbox import terminal

    command = _OnTerminal(running)

    def caught(number: int) -> None:
        if number != signal.SIGWINCH:
            running.signal(number)
            return
        with suppress(OSError):
            terminal.resize(command.terminal, *front.window())

    try:
        with front.engaged(caught) as signals:
            attend(command, front, signals, {command.terminal: 1}, command.terminal if front.stdin else -1)
    finally:
        os.close(command.terminal)


def transfer(container: WorkingContainer, what: Transfer, request: BuildRequest, find: FindImage = _no_image) -> None:
    """COPY or ADD files. Raises: ContextError naming what is not there, ParseError, RegistryError."""
    given = _instruction(what)
    instruction = given
    if what.context_dir is not None:
        request = replace(request, context=what.context_dir)
    elif what.from_ is None:
        sources = tuple(_of_host(source, parents=what.parents) for source in what.sources)
        instruction = given.replace(sources=sources)
        # Nobody's ignore file: the paths were given one by one.
        request = replace(request, context=Path("/"), ignore_file=Path(os.devnull))
    with mounting.set_aside(container), _planning(container, request, find) as (state, dispatcher, planned):
        dispatcher.apply(state, instruction, literal=True)
        op = planned.ops[0]
        assert isinstance(op, CopyOp)
        with _step_context(container, request) as ctx:
            container.advance([_work(ctx, op, planned.trees)], [Line(transfer_words(given), 0)])


def _instruction(what: Transfer) -> ins.Copy | ins.Add:
    common: dict[str, Any] = {
        "sources": what.sources,
        "destination": what.destination or ".",
        "chown": what.chown,
        "chmod": what.chmod,
        "exclude": what.exclude,
    }
    text = " ".join(["ADD" if what.add else "COPY", *what.sources, what.destination or "."])
    if what.add and (what.from_ is None and not what.parents):
        return ins.Add(
            checksum=what.checksum, keep_git_dir=what.keep_git_dir, unpack=what.unpack, **common, **_at(text)
        )
    if what.add or what.checksum or what.keep_git_dir is not None or what.unpack is not None:
        raise ContainerError("files of an image, and those with their parents, are copied, not added", hint="use copy")
    return ins.Copy(from_=what.from_, parents=what.parents, **common, **_at(text))


def _of_host(source: str, *, parents: bool) -> str:
    """A path of the host from its root, what the caller's directory is called taken as it is."""
    if is_http_source(source) or is_git_source(source):
        return source
    if source.startswith("/"):
        return source
    here = re.sub(r"([\\*?\[\]])", r"\\\1", os.getcwd())
    return f"{here}/./{source}" if parents and "/./" not in source else f"{here}/{source}"


def _work(ctx: StepContext, op: Op, trees: dict[int, Mount]) -> Work:
    from builder.solve.steps import run_copy, run_mkdir

    def make(active: ActiveSnapshot) -> None:
        if isinstance(op, CopyOp):
            run_copy(ctx, op, active, None if op.input is None else trees[op.input])
        else:
            assert isinstance(op, MkdirOp)
            run_mkdir(ctx, op, active)

    return Work(make)


class Draft(NamedTuple):
    """A container's config while it is changed: a stage, what applies instructions to it, and the fields besides."""

    state: StageState
    dispatcher: Dispatcher
    annotations: dict[str, str]
    extra: dict[str, str]
    """What belongs to images but to no stage: comments and the like, as `configuration` names them."""


Change = Callable[[Draft], None]


def configure(
    container: WorkingContainer, changes: Sequence[Change], request: BuildRequest, *, history: bool = True
) -> None:
    """Let changes of the config take effect, in order, all or none; without `history` layers alone leave a line.

    Raises: ParseError, PlanError, UsageError.
    """
    with ExitStack() as stack:
        draft, planned = stack.enter_context(drafting(container, request))
        for change in changes:
            change(draft)
        works: list[Work] = []
        if planned.ops:
            stack.enter_context(mounting.set_aside(container))
            ctx = stack.enter_context(_step_context(container, request))
            works = [_work(ctx, op, planned.trees) for op in planned.ops]
        state = draft.state
        container.advance(
            works,
            [line for line in _lines(state) if history or line.layer is not None],
            document=_document(state),
            cmd_set=state.cmd_set,
            annotations=draft.annotations,
            extra=draft.extra,
        )


@contextmanager
def drafting(container: WorkingContainer, request: BuildRequest) -> Iterator[tuple[Draft, _Planned]]:
    """The config as it is, to be changed; nothing is written."""
    with _planning(container, request, _no_image) as (state, dispatcher, planned):
        settings = container.settings
        yield Draft(state, dispatcher, dict(settings["annotations"]), dict(settings["extra"])), planned
