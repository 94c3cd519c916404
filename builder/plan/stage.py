"""One stage on its way through its instructions: what each does to the image and to the graph.

`StageState` is BuildKit's dispatch state: the environment, the config, the history and the topmost
step so far. `builder.plan.planner` decides which stages there are and in which order they come.

Behaviour: https://docs.docker.com/reference/dockerfile/ and, where that is silent, BuildKit's
Dockerfile frontend.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping

from builder.errors import ParseError, PlanError
from builder.frontend import instructions as ins
from builder.frontend.filemode import parse_mode
from builder.frontend.gitref import is_git_source, is_http_source, parse_git_ref
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.words import expand_word
from builder.plan.gotext import go_duration, go_quoted
from builder.plan.graph import CopyItem, CopyOp, HistoryEntry, MkdirOp, MountOp, Op, ResolvedImage, RunOp
from builder.plan.request import BuildRequest
from builder.plan.variables import Variables
from layers.oci import ImageConfig, Platform
from layers.values import Protocol, assert_never

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHELL = ("/bin/sh", "-c")
WINDOWS_SHELL = ("cmd", "/S", "/C")
PROXY_ARGS = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
_NOT_IN_ENVIRONMENT = frozenset({"BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"})


class Sources(Protocol):
    """What a stage needs of the planner: steps for what COPY and mounts take files from."""

    def stage_or_image(self, name: str, *, user: StageState, range: SourceRange) -> tuple[int | None, str | None]:
        """The step of a stage or image, or the name of a build context (one of the two; both None: empty)."""

    def context_tree(self, context: str, source: str, range: SourceRange) -> int:
        """A step that holds `source` of a build context, at the same path."""

    def remote(self, kind: Literal["http", "git"], source: str, checksum: str, *, range: SourceRange) -> CopyItem:
        """What ADD of a URL or repository fetches, as the source policy has it."""

    def add_step(self, state: StageState, op: Op, *, inputs: tuple[int, ...], range: SourceRange, text: str) -> int: ...


class StageState:
    """A stage being planned. Mutable, and private to the planner."""

    def __init__(self, *, name: str, index: int, platform: Platform, source: SourceFile, escape: str) -> None:
        self.name = name
        self.index = index
        self.platform = platform
        self.source = source
        self.escape = escape
        self.top: int | None = None
        self.base: ResolvedImage | None = None
        self.env = Variables()
        self.image_env: dict[str, str] = {}
        self.bare_env: set[str] = set()
        """Of `image_env`, those that the base image's config lists without a `=`."""
        self.config: dict[str, Any] = {}
        self.author: str | None = None
        self.history: list[HistoryEntry] = []
        self.args = Variables()
        """The build arguments so far, each with the value that a RUN has."""
        self.onbuild: list[str] = []
        self.cmd_set = False
        self.after: tuple[int, ...] = ()
        """The steps that have to be done before this stage's first one."""
        self.began = False
        self.ignore_cache = False
        self.total = 0
        self.done = 0
        self.current_is_trigger = False

    def start_from_image(self, image: ResolvedImage | None, step: int | None) -> None:
        """Begin with an image's config and tree (None: scratch)."""
        self.base, self.top = image, step
        self.start_from_config(None if image is None else image.config)

    def start_from_config(self, config: ImageConfig | None) -> None:
        """Begin with what a config says, of files nothing (None: scratch)."""
        if config is None:
            self.config = {"WorkingDir": "/"}
        else:
            self.platform = config.platform
            self.config = _copy_json(config.config)
            author = config.document.get("author")
            self.author = author if isinstance(author, str) else None
        self._load_environment()

    def start_from_stage(self, base: StageState) -> None:
        """Begin where an earlier stage of this file ended; its ONBUILD triggers are the caller's to run."""
        self.base, self.top, self.platform, self.author = base.base, base.top, base.platform, base.author
        self.config = _copy_json(base.config)
        self.config.pop("OnBuild", None)
        self.env = Variables(base.env)
        self.image_env = dict(base.image_env)
        self.bare_env = set(base.bare_env)
        self.args = Variables(base.args)
        self.history = list(base.history)
        self._load_environment()

    def _load_environment(self) -> None:
        """Take the config's `Env` apart; `full_config` puts it together again."""
        for entry in self.config.pop("Env", None) or []:
            key, equals, value = str(entry).partition("=")
            self.image_env[key] = value
            if not equals:
                self.bare_env.add(key)
        if self.platform.os != "windows":
            self.image_env.setdefault("PATH", DEFAULT_PATH)
        self.env.update(self.image_env)

    def full_config(self) -> dict[str, Any]:
        """The execution part of the image config."""
        config = dict(self.config)
        config["Env"] = self.env_lines(self.image_env)
        return config

    def env_lines(self, env: Mapping[str, str]) -> list[str]:
        """Variables as the config lists them."""
        return [name if name in self.bare_env else f"{name}={value}" for name, value in env.items()]

    def set_env(self, name: str, value: str) -> None:
        """What ENV does: for the image and for what follows."""
        self.env[name] = self.image_env[name] = value
        self.bare_env.discard(name)
        if name in self.args:
            self.args[name] = value

    @property
    def workdir(self) -> str:
        return str(self.config.get("WorkingDir") or "/")

    @property
    def user(self) -> str:
        return str(self.config.get("User") or "")

    def shell(self) -> tuple[str, ...]:
        default = WINDOWS_SHELL if self.platform.os == "windows" else DEFAULT_SHELL
        return tuple(self.config.get("Shell") or default)

    def with_shell(self, args: tuple[str, ...]) -> tuple[str, ...]:
        return (*self.shell(), " ".join(args))

    def title(self, text: str, prefix: str = "") -> str:
        """`[name 2/4] RUN …`, the name of a step for people."""
        self.done += 1
        keyword, _, rest = " ".join(text.split()).partition(" ")
        line = f"{keyword.upper()} {rest}"
        number = f"{self.done:>{len(str(self.total))}}/{self.total}"
        trigger = "ONBUILD " if self.current_is_trigger else ""
        return f"[{prefix}{self.name + ' ' if self.name else ''}{number}] {trigger}{line}"

    def record(self, text: str, step: int | None = None, *, arguments: bool = False) -> None:
        self.history.append(HistoryEntry(text, step, self.args.snapshot() if arguments else None))

    def fail(self, message: str, where: SourceRange, hint: str | None = None) -> PlanError:
        return PlanError(message, source=self.source, range=where, hint=hint)


class Dispatcher:
    """Applies instructions to stages; one per plan."""

    def __init__(self, request: BuildRequest, sources: Sources, global_args: Mapping[str, str]) -> None:
        self._request = request
        self._sources = sources
        self._globals = global_args
        self._proxy = tuple(
            (key, value) for key, value in sorted(request.build_args.items()) if key.lower() in PROXY_ARGS
        )

    def apply(self, state: StageState, instruction: ins.Instruction, *, literal: bool = False) -> None:
        """Let one instruction take effect; with `literal` its words mean themselves. Raises: ParseError, PlanError."""
        if not literal and not isinstance(instruction, ins.Arg):
            instruction = instruction.expand(state.env, state.escape)
        self._dispatch(state, instruction)

    def _dispatch(self, state: StageState, i: ins.Instruction) -> None:
        config = state.config
        match i:
            case ins.Run():
                self._run(state, i)
            case ins.Copy() | ins.Add():
                self._copy(state, i)
            case ins.Workdir():
                self._workdir(state, i)
            case ins.Arg():
                self._arg(state, i)
            case ins.Env():
                for pair in i.pairs:
                    state.set_env(pair.name, pair.value)
                state.record("ENV " + " ".join(f"{p.name}={p.value}" for p in i.pairs))
            case ins.Label():
                _table(config, "Labels").update((p.name, p.value) for p in i.pairs)
                state.record("LABEL " + " ".join(f"{p.name}={p.value}" for p in i.pairs))
            case ins.User():
                config["User"] = i.user
                state.record(f"USER {i.user}")
            case ins.Expose():
                _table(config, "ExposedPorts").update((p, {}) for p in i.ports)
                state.record(f"EXPOSE [{' '.join(i.ports)}]")
            case ins.Volume():
                _table(config, "Volumes").update((p, {}) for p in i.paths)
                state.record(f"VOLUME [{' '.join(i.paths)}]")
            case ins.Cmd():
                args = state.with_shell(i.args) if i.shell else i.args
                config["Cmd"] = list(args)
                config["ArgsEscaped"] = True
                state.cmd_set = True
                state.record(f"CMD {go_quoted(args)}")
            case ins.Entrypoint():
                args = state.with_shell(i.args) if i.shell else i.args
                config["Entrypoint"] = list(args)
                if not state.cmd_set:
                    config.pop("Cmd", None)
                state.record(f"ENTRYPOINT {go_quoted(args)}")
            case ins.Shell():
                config["Shell"] = list(i.args)
                state.record(f"SHELL [{' '.join(i.args)}]")
            case ins.StopSignal():
                config["StopSignal"] = i.signal
                state.record(f"STOPSIGNAL {i.signal}")
            case ins.Healthcheck():
                config["Healthcheck"] = _healthcheck(i)
                state.record(f"HEALTHCHECK {_healthcheck_text(i)}")
            case ins.Onbuild():
                state.onbuild.append(i.expression)
                config.setdefault("OnBuild", []).append(i.expression)
            case ins.Maintainer():
                state.author = i.name
                state.record(f"MAINTAINER {i.name}")
            case ins.From():
                raise state.fail("FROM cannot stand here", i.range)
            case _:
                assert_never(i)

    def _arg(self, state: StageState, i: ins.Arg) -> None:
        shown: list[str] = []
        for key, default in i.pairs:
            value = default
            if key in self._request.build_args:
                value = self._request.build_args[key]
            elif default is not None:
                try:
                    value = expand_word(default, state.env, state.escape)
                except ParseError as e:
                    raise PlanError(e.message, source=state.source, range=i.range, hint=e.hint) from e
            elif key in self._globals:
                value = self._globals[key]
            if value is not None and key not in _NOT_IN_ENVIRONMENT:
                state.env[key] = value
            state.args[key] = state.env.get(key, value or "")
            shown.append(key if value is None else f"{key}={value}")
        state.record("ARG " + " ".join(shown))

    def _workdir(self, state: StageState, i: ins.Workdir) -> None:
        # As BuildKit has it, an absolute path stays as it is written, a slash at its end and all.
        path = i.path if i.path.startswith("/") else _join(state.workdir, i.path)
        state.config["WorkingDir"] = path
        step = None
        if path != "/":
            op = MkdirOp(path=_join(path), user=state.user)
            step = self._sources.add_step(state, op, inputs=(), range=i.range, text=i.original)
        state.record(f"WORKDIR {path}", step)

    def _run(self, state: StageState, i: ins.Run) -> None:
        script = i.script()
        if not script.args and not script.shell:
            raise state.fail("RUN has no command: its list is empty", i.range)
        files: tuple[tuple[str, bytes], ...] = ()
        args = script.args
        if script.file is not None:
            files = ((args[0], script.file[1].encode("utf-8", "surrogateescape")),)
        elif script.shell:
            args = state.with_shell(args)
        summary = ""
        if i.heredocs and not script.args[0].startswith(i.args[0]):
            lines = i.heredocs[0].content.strip().split("\n", 1)
            summary = f" ({lines[0].strip()}{'...' if len(lines) > 1 else ''})"
        mounts = [self._mount(state, mount, i.range) for mount in (*i.mounts, *self._request.run.mounts)]
        for device in i.devices:
            if not {"device", f"device={device.name}"} & self._request.allow:
                hint = f"allow it with --allow device={device.name}"
                raise state.fail(f"RUN --device={device.name} is not allowed", i.range, hint)
        security = i.security or "sandbox"
        if security == "insecure" and "security.insecure" not in self._request.allow:
            raise state.fail(
                "RUN --security=insecure is not allowed", i.range, "allow it with --allow security.insecure"
            )
        op = RunOp(
            args=args,
            env=state.env.snapshot(),
            cwd=state.workdir,
            user=state.user,
            mounts=tuple(mounts),
            network=i.network if i.network and i.network != "default" else self._request.run.network,
            security=security,
            hostname=self._request.build_args.get("BUILDKIT_SANDBOX_HOSTNAME", "buildkitsandbox"),
            files=files,
            proxy=self._proxy,
            devices=tuple((device.name, device.required) for device in i.devices),
        )
        inputs = tuple(m.input for m in mounts if m.input is not None)
        step = self._sources.add_step(state, op, inputs=inputs, range=i.range, text=i.original + summary)
        state.record(f"RUN {' '.join(args)} # buildkit", step, arguments=True)

    def _mount(self, state: StageState, mount: ins.RunMount, where: SourceRange) -> MountOp:
        source = posixpath.normpath("/" + (mount.source or "/").lstrip("/"))
        step: int | None = None
        if mount.type in {"bind", "cache"}:
            if mount.from_:
                step, context = self._sources.stage_or_image(mount.from_, user=state, range=where)
                if context is not None:
                    step = self._sources.context_tree(context, source, where)
            elif mount.type == "bind":
                step = self._sources.context_tree("", source, where)
        target = mount.target or ""
        if mount.type not in {"secret", "ssh"} or target:
            target = posixpath.normpath(posixpath.join("/", state.workdir, target or "."))
            if mount.type not in {"secret", "ssh"} and target == "/":
                raise state.fail(f'invalid mount target "{mount.target}"', where)
        return MountOp(
            type=mount.type,  # type: ignore[arg-type]  # the parser has checked it
            target=target,
            input=step,
            source=source,
            readonly=mount.readonly,
            id=_mount_id(mount),
            sharing=mount.sharing or "shared",
            mode=mount.mode,
            uid=mount.uid,
            gid=mount.gid,
            size_bytes=mount.size_bytes or None,
            required=mount.required,
            env=mount.env,
        )

    def _copy(self, state: StageState, i: ins.Copy | ins.Add) -> None:
        add = isinstance(i, ins.Add)
        step: int | None = None
        context: str | None = ""
        if isinstance(i, ins.Copy) and i.from_:
            step, context = self._sources.stage_or_image(i.from_, user=state, range=i.range)
        items = [self._copy_item(state, i, source) for source in i.sources]
        items += [CopyItem("inline", doc.name, doc.content.encode("utf-8", "surrogateescape")) for doc in i.heredocs]
        checksum = (i.checksum or "") if isinstance(i, ins.Add) else ""
        if checksum and len(i.sources) != 1:
            raise state.fail("checksum can't be specified for multiple sources", i.range)
        if checksum and items[0].kind not in {"http", "git"}:
            raise state.fail("checksum requires HTTP(S) or Git sources", i.range)
        if i.chmod:
            try:
                parse_mode(i.chmod)
            except ValueError as e:
                raise state.fail(str(e), i.range) from e
        needs_tree = any(item.kind == "path" for item in items)
        op = CopyOp(
            items=tuple(items),
            dest=_relative_to_workdir(state.workdir, i.destination),
            input=step,
            context=context if needs_tree and step is None else None,
            chown=i.chown or "",
            mode=i.chmod or "",
            exclude=i.exclude,
            # BuildKit makes no independent layer of what has a mode.
            link=i.link and not i.chmod,
            unpack=i.unpack if isinstance(i, ins.Add) else None,
            add=add,
            checksum=checksum,
            keep_git_dir=bool(i.keep_git_dir) if isinstance(i, ins.Add) else False,
        )
        inputs = () if step is None else (step,)
        made = self._sources.add_step(state, op, inputs=inputs, range=i.range, text=i.original)
        state.record(transfer_words(i), made)

    def _copy_item(self, state: StageState, i: ins.Copy | ins.Add, source: str) -> CopyItem:
        known = isinstance(i, ins.Add) and i.keep_git_dir is not None
        if is_git_source(source, known=known):
            if not isinstance(i, ins.Add):
                raise state.fail("source can't be a git ref for COPY", i.range, "use ADD")
            try:
                parse_git_ref(source, known=known)
            except ValueError as e:
                raise state.fail(f"{source}: {e}", i.range) from e
            return self._sources.remote("git", source, i.checksum or "", range=i.range)
        if is_http_source(source):
            if not isinstance(i, ins.Add):
                raise state.fail("source can't be a URL for COPY", i.range, "use ADD")
            return self._sources.remote("http", source, i.checksum or "", range=i.range)
        include: tuple[str, ...] = ()
        required: tuple[str, ...] = ()
        if isinstance(i, ins.Copy) and i.parents:
            # The pivot `/./` splits what is left out of the destination's path from what is kept.
            head, pivot, tail = source.partition("/./")
            root, pattern = (head, tail) if pivot else ("/", source)
            pattern = posixpath.normpath("/" + pattern).lstrip("/")
            include = (pattern,)
            if not _has_wildcards(root) and not _has_wildcards(pattern):
                required = (posixpath.normpath("/" + posixpath.join(root, pattern)).lstrip("/"),)
            source = root
        return CopyItem("path", "/" + posixpath.normpath("/" + source).lstrip("/"), include=include, required=required)


def transfer_words(i: ins.Copy | ins.Add) -> str:
    """What the history says of a COPY or ADD."""
    words = [i.keyword]
    words += ["--parents"] * (isinstance(i, ins.Copy) and i.parents)
    words += [f"--chown={i.chown}"] * bool(i.chown) + [f"--chmod={i.chmod}"] * bool(i.chmod)
    words += [*i.sources, *(f"<<{doc.name}" for doc in i.heredocs), i.destination, "# buildkit"]
    return " ".join(words)


def image_document(
    state: StageState,
    platform: Platform,
    *,
    labels: Mapping[str, str],
    unset_labels: Collection[str] = (),
    env: Mapping[str, str],
    unset_env: Collection[str] = (),
) -> dict[str, Any]:
    """The config document of the image that a stage came to, without times, rootfs and history.

    Equal stages give equal bytes: the order of the keys is part of it.
    """
    config = state.full_config()
    all_labels = {**(config.get("Labels") or {}), **labels}
    config["Labels"] = {k: v for k, v in all_labels.items() if k not in unset_labels}
    config["Env"] = state.env_lines({k: v for k, v in {**state.image_env, **env}.items() if k not in unset_env})
    document: dict[str, Any] = {"author": state.author} if state.author else {}
    document |= platform.to_json()
    document["config"] = {k: v for k, v in config.items() if v not in (None, [], {}, "")}
    return document


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A map of the config, made if it is missing or null. The config is the stage's own copy."""
    if not config.get(name):
        config[name] = {}
    table: dict[str, Any] = config[name]
    return table


def _healthcheck_text(i: ins.Healthcheck) -> str:
    """The history's words for a HEALTHCHECK: the fields of a Go struct."""
    times = zip(
        ("Interval", "Timeout", "StartPeriod", "StartInterval"),
        (i.interval_ns, i.timeout_ns, i.start_period_ns, i.start_interval_ns),
        strict=True,
    )
    shown = "".join([f"{name}:{go_duration(ns)} " for name, ns in times])
    return f"{{Test:[{' '.join(i.test)}] {shown}Retries:{i.retries}}}"


def _healthcheck(i: ins.Healthcheck) -> dict[str, Any]:
    fields = {
        "Interval": i.interval_ns,
        "Timeout": i.timeout_ns,
        "StartPeriod": i.start_period_ns,
        "StartInterval": i.start_interval_ns,
        "Retries": i.retries,
    }
    return {"Test": list(i.test), **{name: value for name, value in fields.items() if value}}


def _mount_id(mount: ins.RunMount) -> str:
    """What a mount is known by: a cache by its target as it is written, whatever the WORKDIR, if it has no id."""
    if mount.type == "secret":
        return mount.source or mount.id or posixpath.basename(mount.target)
    if mount.type == "cache" and not mount.id and mount.target:
        return posixpath.normpath(mount.target)
    return mount.id


def _join(*parts: str) -> str:
    """An absolute, clean path."""
    return "/" + posixpath.normpath(posixpath.join("/", *parts)).lstrip("/")


def _relative_to_workdir(workdir: str, path: str) -> str:
    """An absolute destination; a trailing slash, which means a directory, is kept."""
    directory = path in {"", "."} or path.endswith(("/", "/."))
    absolute = _join(workdir, path)
    return absolute if not directory or absolute == "/" else absolute + "/"


def _has_wildcards(text: str) -> bool:
    return re.search(r"[*?\[]", re.sub(r"\\.", "", text)) is not None


def _copy_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object that shares no mutable part with it."""

    def copy(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {k: copy(v) for k, v in item.items()}
        return [copy(v) for v in item] if isinstance(item, list) else item

    return {k: copy(v) for k, v in value.items()}
