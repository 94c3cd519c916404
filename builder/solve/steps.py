"""How each kind of step makes its snapshot: RUN in the sandbox, COPY and WORKDIR on a mounted tree.

A step is given its parent's snapshot and those of its inputs, all committed; it prepares an active
one, changes it, and leaves it to `builder.solve.solver` to commit. Nothing here knows of caches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from builder.errors import ContextError, StepError
from builder.frontend.source import SourceFile
from builder.plan.graph import CopyItem, CopyOp, MkdirOp, MountOp, RunOp, Step
from builder.plan.request import BuildRequest, RunOptions
from layers.errors import Cancelled
from layers.events import EventSink, VertexLog, VertexWarning
from layers.sha import sha256
from layers.snapshot import ActiveSnapshot, Mount
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.sandbox.launcher import ExitStatus, Launcher, Running, Usage
    from builder.sandbox.spec import SandboxMount, SandboxSpec
    from builder.session import Session
    from builder.solve.fileops import CopyOptions
    from builder.solve.remote import RemoteSources
    from builder.solve.treepack import LeftOut
    from layers.store import Store

_TAIL_BYTES = 8 << 10
"""How much of a command's last output an error carries."""


_MAX_SHOWN = 400
"""How much of a command a message quotes."""


StartAgain = Callable[["tuple[str, ...]", "tuple[int, int] | None"], "Running"]
"""Starts another command in a failed step's sandbox, on a terminal of (rows, columns) or on 0, 1 and 2."""
OnError = Callable[[StepError, StartAgain], None]
"""Told of a failed RUN while its file system, its mounts and its secrets are still there."""


class StepContext(NamedTuple):
    """What running a step takes. `launcher` starts the zygote when first called."""

    store: Store
    session: Session
    request: BuildRequest
    launcher: Callable[[], Launcher]
    events: EventSink
    cancelled: Callable[[], bool]
    source: SourceFile
    remotes: RemoteSources
    stop_fd: int = -1
    """Readable when the step is to stop at once."""
    on_error: OnError | None = None


@contextmanager
def open_mount(mount: Mount) -> Iterator[int]:
    """A descriptor of a mounted tree's root, for as long as the block lasts."""
    from layers.snapshotters.overlay import open_tree

    fd = open_tree(mount)
    try:
        yield fd
    finally:
        os.close(fd)


def run_mkdir(ctx: StepContext, op: MkdirOp, active: ActiveSnapshot) -> None:
    """WORKDIR: the directory and its missing parents, owned by USER."""
    from builder.solve import accounts, fileops

    with open_mount(active.mount) as root:
        owner = accounts.resolve_owner(root, op.user) if op.user else None
        fileops.make_directory(root, op.path, 0o755, owner, _epoch_ns(ctx.request))


def run_copy(
    ctx: StepContext,
    op: CopyOp,
    active: ActiveSnapshot,
    source: Mount | None,
    left_out: LeftOut | None = None,
    *,
    vertex: str = "",
) -> None:
    """COPY and ADD. `source` is the tree of `--from`; without it the build context is meant.

    `left_out`: see `builder.solve.treepack`; `vertex` warns. Raises: ContextError naming what is not there.
    """
    from builder.solve import accounts

    def warn(text: str) -> None:
        ctx.events.emit(VertexWarning(vertex, f"--chown={op.chown}: {text}"))

    with open_mount(active.mount) as dest, _upper(active.mount) as upper:
        owner = accounts.resolve_owner(dest, op.chown, warn=warn) if op.chown else None
        for number, item in enumerate(op.items, 1):
            last = (upper, left_out) if number == len(op.items) else (None, None)
            _copy_item(ctx, op, item, dest, owner, source, *last)


@contextmanager
def _upper(mount: Mount) -> Iterator[int | None]:
    """The upper directory of an overlay that the kernel mounts; nobody but this process has that mounted."""
    if mount.type != "overlay" or mount.upper is None or mount.program is not None:
        yield None
        return
    fd = os.open(mount.upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy_item(
    ctx: StepContext,
    op: CopyOp,
    item: CopyItem,
    dest: int,
    owner: tuple[int, int] | None,
    source: Mount | None,
    upper: int | None,
    left_out: LeftOut | None,
) -> None:
    from builder.solve import fileops

    if item.kind == "inline":
        fileops.copy_data(dest, item.source, item.data, op.dest, copy_options(ctx, op, item, owner=owner))
        return
    if item.kind in {"http", "git"}:
        with ctx.remotes.tree(ctx, op, item) as (fd, path):
            options = copy_options(ctx, op, item, owner=owner)
            fileops.copy(fd, path, dest, op.dest, options, cancelled=ctx.cancelled, upper_fd=upper)
        return
    options = copy_options(ctx, op, item, owner=owner)
    if source is not None:
        with open_mount(source) as fd:
            fileops.copy(
                fd, item.source, dest, op.dest, options, cancelled=ctx.cancelled, upper_fd=upper, left_out=left_out
            )
        return
    if op.input is not None:
        raise ContextError(f'"{item.source}": not found: the stage is empty')
    fd = ctx.session.context(op.context or "").fd
    fileops.copy(fd, item.source, dest, op.dest, options, cancelled=ctx.cancelled, upper_fd=upper, left_out=left_out)


def copy_options(ctx: StepContext, op: CopyOp, item: CopyItem, *, owner: tuple[int, int] | None) -> CopyOptions:
    """How `builder.solve.fileops` is to copy one item; the cache key is computed with the same."""
    from builder.solve.fileops import CopyOptions

    path = item.kind == "path"
    unpack = op.unpack if op.unpack is not None else op.add and path
    from_context = path and op.input is None
    ignore = ctx.session.context(op.context or "").ignore if from_context else None
    mode: int | str | None = None
    if op.mode:
        mode = int(op.mode, 8) if op.mode.isdigit() else op.mode
    return CopyOptions(
        owner=owner,
        mode=mode,
        include=item.include,
        exclude=op.exclude,
        required=item.required,
        copy_dir_contents=path or item.kind == "git",
        follow_symlinks=path,
        allow_wildcard=path,
        allow_empty_wildcard=path,
        create_dest=True,
        replace_existing=op.link,
        unpack=unpack,
        mtime_ns=_epoch_ns(ctx.request),
        ignore=ignore,
        reset_owner=from_context,
    )


def _epoch_ns(request: BuildRequest) -> int | None:
    return None if request.source_date_epoch is None else request.source_date_epoch * 1_000_000_000


def run_command(
    ctx: StepContext, step: Step, op: RunOp, active: ActiveSnapshot, trees: Mapping[int, Mount], vertex: str
) -> Usage:
    """RUN: the command in a sandbox on the active snapshot; what it used.

    Raises: StepError when it fails, SandboxError when it cannot be started, Cancelled.
    """
    cleanup: list[Callable[[], None]] = []
    try:
        spec = sandbox_spec(ctx, op, active, trees, cleanup)
        status, failure = _execute(ctx, step, op, spec, vertex)
        if failure is not None and ctx.on_error is not None:
            _ask(ctx, ctx.on_error, failure, spec, active)
    finally:
        for action in reversed(cleanup):
            action()
    if failure is not None:
        raise failure
    return status.usage


def _execute(
    ctx: StepContext, step: Step, op: RunOp, spec: SandboxSpec, vertex: str
) -> tuple[ExitStatus, StepError | None]:
    out_r, out_w = os.pipe2(os.O_CLOEXEC)
    err_r, err_w = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            running = ctx.launcher().run(spec, stdin_fd=null, stdout_fd=out_w, stderr_fd=err_w)
        finally:
            for fd in (null, out_w, err_w):
                os.close(fd)
        try:
            # Its output alone does not tell when its time is up: `wait` ends it then.
            expire = None if spec.timeout_s is None else (time.monotonic() + spec.timeout_s, running.wait)
            tail = _pump(ctx, {out_r: 1, err_r: 2}, vertex, expire)
            status = running.wait()
        except BaseException:
            running.kill()
            running.wait()
            raise
        finally:
            running.close()
    finally:
        os.close(out_r)
        os.close(err_r)
    return status, None if status.code == 0 else _failure(ctx, step, op, status, tail)


def _ask(ctx: StepContext, on_error: OnError, failure: StepError, spec: SandboxSpec, active: ActiveSnapshot) -> None:
    """Let the caller look into a failed step. The other branches are stopped; only the first failure is asked about."""
    from builder.solve.scheduler import Stop
    from layers.values import replace

    if isinstance(ctx.cancelled, Stop):
        if ctx.cancelled():
            return
        ctx.cancelled.set()

    def start(args: tuple[str, ...], terminal: tuple[int, int] | None) -> Running:
        snapshots = ctx.store.snapshots
        if snapshots.driver == "overlay":
            snapshots.reset_work(active)
        again = replace(spec, args=args, terminal=terminal, timeout_s=None)
        return ctx.launcher().run(again, stdin_fd=0, stdout_fd=1, stderr_fd=2)

    on_error(failure, start)


def _failure(ctx: StepContext, step: Step, op: RunOp, status: ExitStatus, tail: bytes) -> StepError:
    shown = " ".join(" ".join(op.args).split())
    shown = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "…"
    if status.oom_killed:
        limit = ctx.request.run.limits.memory_bytes
        what = "killed: out of memory" + (f" (limit {limit >> 20} MiB)" if limit else "")
    elif status.timed_out:
        what = f"killed: it ran longer than {ctx.request.run.timeout_s:g} s"
    elif status.signal:
        what = f"killed by signal {status.signal}"
    else:
        what = f"exit code: {status.code}"
    return StepError(
        f'process "{shown}" did not complete successfully: {what}',
        step=step.name,
        exit_status=status.code,
        source=ctx.source,
        range=step.range,
        argv=op.args,
        log_tail=tail.decode("utf-8", "replace"),
    )


def _pump(
    ctx: StepContext,
    streams: dict[int, int],
    vertex: str,
    expire: tuple[float, Callable[[], object]] | None = None,
) -> bytes:
    """Hand the command's output on as events until it closes; its last bytes are returned.

    `expire` is a time of the monotonic clock, and what to call then.
    """
    import select

    poller = select.poll()
    for fd in streams:
        poller.register(fd, select.POLLIN)
    if ctx.stop_fd >= 0:
        poller.register(ctx.stop_fd, select.POLLIN)
    left = set(streams)
    tail = b""
    while left:
        ready = poller.poll(200 if expire is None else max(0, min(200, (expire[0] - time.monotonic()) * 1000)))
        if ctx.cancelled():
            raise Cancelled
        if expire is not None and time.monotonic() >= expire[0]:
            expire[1]()
            expire = None
        for fd, _ in ready:
            if fd == ctx.stop_fd:
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                poller.unregister(fd)
                left.discard(fd)
                continue
            ctx.events.emit(VertexLog(vertex, streams[fd], data, time.time_ns()))
            tail = (tail + data)[-_TAIL_BYTES:]
    return tail


def sandbox_spec(
    ctx: StepContext,
    op: RunOp,
    active: ActiveSnapshot,
    trees: Mapping[int, Mount],
    cleanup: list[Callable[[], None]],
) -> SandboxSpec:
    """The spec of a RUN; what to do when it has ended, or was not even begun, goes into `cleanup`."""
    from builder.sandbox import options as rights
    from builder.sandbox.spec import Resources, SandboxMount, SandboxSpec
    from builder.solve import accounts

    options = ctx.request.run
    env = dict(op.env)
    user = accounts.user_in(active.mount, op.user)
    env.setdefault("HOME", user.home)
    for key, value in op.proxy:
        env.setdefault(key.upper(), value)
        env.setdefault(key.lower(), value)
    mounts: list[SandboxMount] = []
    caches = _caches(ctx, op, trees, cleanup)
    for number, mount in enumerate(op.mounts):
        made = _mount(ctx, mount, number, trees, env, caches, cleanup)
        if made is not None:
            mounts.append(made)
    for volume in options.volumes:
        host, _, rest = volume.partition(":")
        target, _, mode = rest.partition(":")
        mounts.append(_of_host(host, target, readonly="ro" in mode.split(",")))
    mounts += [_of_host(path, target, readonly=True) for path, target in options.host_mounts]
    mounts += [
        SandboxMount("file", path, source=data, readonly=True, mode=0o755, is_file=True) for path, data in op.files
    ]
    chosen = rights.security(options.security_opt)
    files: dict[str, Path | bytes] = {
        "/etc/resolv.conf": rights.resolv_conf(options.dns, options.dns_search, options.dns_options)
    }
    if not options.no_hosts:
        files["/etc/hosts"] = rights.hosts(op.hostname, of_host=True)
    spec = SandboxSpec(
        args=op.args,
        root=active.mount,
        env=env,
        cwd=op.cwd,
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        mounts=tuple(mounts),
        files=files,
        add_hosts=options.add_hosts,
        hostname=op.hostname,
        network=op.network if op.network in {"none", "private"} else "host",  # type: ignore[arg-type]
        shared=tuple((kind, "host") for kind in options.shared),  # type: ignore[misc]
        devices=options.devices,
        capabilities=rights.capabilities(options.cap_add, options.cap_drop),
        no_new_privs=chosen.no_new_privs,
        seccomp=chosen.seccomp,
        rlimits=options.ulimits,
        resources=Resources(**options.limits._asdict()),
        isolation=options.isolation if options.isolation in {"pivot", "chroot"} else "auto",  # type: ignore[arg-type]
        privileged=op.security == "insecure",
        shm_size_bytes=options.shm_size_bytes or 64 << 20,
        timeout_s=options.timeout_s,
        stubs=ctx.store.root / "stubs",
    )
    return _with_devices(spec, op, options) if op.devices or options.cdi_devices else spec


def _with_devices(spec: SandboxSpec, op: RunOp, options: RunOptions) -> SandboxSpec:
    """The spec with its CDI devices; those of a RUN that are not there and need not be are left out."""
    from builder.sandbox import cdi

    names = list(options.cdi_devices)
    for name, required in op.devices:
        try:
            cdi.find([name], options.cdi_directories)
            names.append(name)
        except cdi.NoSuchDevice:
            if required:
                raise
    return cdi.apply(spec, cdi.find(names, options.cdi_directories))


def _of_host(path: str, target: str, *, readonly: bool) -> SandboxMount:
    from builder.sandbox.spec import SandboxMount

    source = Path(path)
    return SandboxMount("bind", target, source=source, readonly=readonly, recursive=True, is_file=not source.is_dir())


def _mount(
    ctx: StepContext,
    mount: MountOp,
    number: int,
    trees: Mapping[int, Mount],
    env: dict[str, str],
    caches: Mapping[str, Path],
    cleanup: list[Callable[[], None]],
) -> SandboxMount | None:
    from builder.sandbox.spec import SandboxMount

    match mount.type:
        case "tmpfs":
            return SandboxMount("tmpfs", mount.target, size_bytes=mount.size_bytes, mode=0o1777)
        case "secret":
            return _secret(ctx, mount, env)
        case "ssh":
            return _ssh(ctx, mount, number, env)
        case "cache":
            from builder.solve.mounts import cache_id

            path, movable = caches[cache_id(mount)], ctx.launcher().bare
            return SandboxMount("bind", mount.target, source=path, readonly=mount.readonly, movable=movable)
        case "bind":
            from builder.solve.mounts import bind_mount

            return bind_mount(ctx, mount, trees, cleanup)


def _secret(ctx: StepContext, mount: MountOp, env: dict[str, str]) -> SandboxMount | None:
    from builder.sandbox.spec import SandboxMount

    id = mount.id
    value = ctx.session.secret(id)
    if value is None:
        if mount.required:
            raise ContextError(f"secret {id!r} is required but was not given", hint=f"add --secret id={id},src=FILE")
        return None
    if mount.env:
        env[mount.env] = value.decode("utf-8", "surrogateescape")
    if mount.env and not mount.target:
        return None
    return SandboxMount(
        "file",
        mount.target or f"/run/secrets/{id.rsplit('/', 1)[-1]}",
        source=value,
        readonly=True,
        mode=0o400 if mount.mode is None else mount.mode,
        uid=mount.uid or 0,
        gid=mount.gid or 0,
        is_file=True,
    )


def _ssh(ctx: StepContext, mount: MountOp, number: int, env: dict[str, str]) -> SandboxMount | None:
    from builder.sandbox.spec import SandboxMount

    socket = ctx.session.ssh_socket(mount.id or "default")
    if socket is None:
        if mount.required:
            raise ContextError(
                f"ssh agent {mount.id or 'default'!r} is required but was not given", hint="add --ssh default"
            )
        return None
    target = mount.target or f"/run/buildkit/ssh_agent.{number}"
    env.setdefault("SSH_AUTH_SOCK", target)
    return SandboxMount("bind", target, source=socket, is_file=True)


def _caches(
    ctx: StepContext, op: RunOp, trees: Mapping[int, Mount], cleanup: list[Callable[[], None]]
) -> dict[str, Path]:
    if not any(mount.type == "cache" for mount in op.mounts):
        return {}
    from builder.solve.mounts import acquire_caches

    # Where nothing can be mounted the directory is moved into the image for the while: one RUN at a time.
    return acquire_caches(ctx, op.mounts, trees, cleanup, alone=ctx.launcher().bare)


def cache_directory(root: Path, id: str) -> Path:
    """Where the cache mount of an id lives; the id is hostile, so its digest names the directory."""
    return root / "cachemounts" / sha256(id.encode("utf-8", "surrogateescape")).hexdigest()[:32]
