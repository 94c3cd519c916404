"""The flags of `build` and its kin, and what of the environment they ask for, as a `BuildRequest`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from builder.cli import sandboxflags
from builder.cli.containerfile import as_source, ignore_file_for, read_containerfile, read_stdin
from builder.cli.options import InvalidValue, additional_stores, boolean, epoch_of, fields, is_epoch, key_value
from builder.errors import ContextError, UsageError
from builder.frontend.source import SourceFile
from builder.plan.request import Annotation, BuildRequest, CacheRef, Output, ResourceLimits, RunOptions, SecretSource
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.frontend.language import RunMount
    from builder.plan.request import PullPolicy
    from builder.plan.sourcepolicy import SourcePolicy
    from layers.oci import Platform

_ENTITLEMENTS = frozenset({"security.insecure", "network.host", "device"})
_MOUNTS_CONF = ("/etc/containers/mounts.conf", "/usr/share/containers/mounts.conf")


def make_request(options: Namespace, stack: ExitStack) -> BuildRequest:
    """The request that the flags mean. Raises: UsageError, ContextError."""
    containerfile, context, ignore, context_epoch = _inputs(options, stack)
    args = _build_args(options)
    epoch = _epoch(options, args, containerfile, context_epoch)
    outputs: tuple[Output, ...] = ()
    cache_from: tuple[CacheRef, ...] = ()
    cache_to: tuple[CacheRef, ...] = ()
    if options.output or options.push or options.load or options.cache_to or options.cache_from:
        from builder.cli import outputs as flags

        outputs = flags.outputs(options)
        cache_from = flags.caches(options.cache_from, "--cache-from")
        cache_to = flags.caches(options.cache_to, "--cache-to")
    platforms = _platforms(options)
    _check_of_others(options)
    _check_timeline(options.timeline)
    if options.pull not in {"always", "missing", "never", "newer"}:
        options.pull = _pull(options.pull)
    _check_security(options)
    run_options = RunOptions(
        network=options.network,
        add_hosts=sandboxflags.added_hosts(options),
        cap_add=tuple(options.cap_add),
        cap_drop=tuple(options.cap_drop),
        security_opt=tuple(options.security_opt),
        ulimits=sandboxflags.ulimits(options),
        shm_size_bytes=options.shm_size,
        volumes=tuple(map(_volume, options.volume)),
        mounts=tuple(map(_mount, options.mount)),
        host_mounts=_host_mounts(options.default_mounts_file),
        isolation=_isolation(options),
        storage_driver=options.storage_driver,
        timeout_s=options.timeout,
        limits=sandboxflags.limits(options, ResourceLimits),
        dns=sandboxflags.name_servers(options),
        dns_search=sandboxflags.one_line(options.dns_search, "--dns-search"),
        dns_options=sandboxflags.one_line(options.dns_option, "--dns-option"),
        no_hosts=options.no_hosts,
        devices=sandboxflags.devices(options),
        cdi_devices=sandboxflags.cdi_devices(options),
        cdi_directories=sandboxflags.cdi_directories(options),
        shared=sandboxflags.of_host(options),
        runtime=options.runtime,
    )
    if options.verify_layers and options.compression == "estargz":
        raise UsageError("--verify-layers cannot read estargz layers, which have a table of their own in them")
    if options.format == "docker" and options.compression in {"estargz", "zstd:chunked"}:
        message = f"{options.compression} needs annotations, which Docker manifests do not have"
        raise UsageError(message, hint="use --format oci")
    return BuildRequest(
        containerfile=containerfile,
        context=context,
        contexts=dict(_context(value) for value in options.build_context),
        ignore_file=ignore,
        build_args=args,
        target=options.target,
        base=options.base,
        platforms=tuple(dict.fromkeys(platforms)),
        tags=tuple(options.tag),
        labels=dict(_label(v) for v in options.label),
        annotations_at=tuple(a for v in options.annotation for a in _annotations(v, len(platforms) > 1)),
        env=dict(pair for v in options.env for pair in _from_environment(v)),
        unset_env=tuple(options.unsetenv),
        unset_labels=tuple(options.unsetlabel),
        inherit_labels=options.inherit_labels,
        no_cache=options.no_cache or not options.layers,
        no_cache_filter=tuple(name for v in options.no_cache_filter for name in v.split(",")),
        pull=options.pull,
        secrets=dict(_secret(v) for v in options.secret),
        ssh=dict(_ssh(v, stack) for v in options.ssh),
        allow=frozenset(_entitlement(name) for v in options.allow for name in v.split(",")),
        run=run_options,
        format=options.format,
        compression="none" if options.compression == "uncompressed" else options.compression,
        compression_level=options.compression_level,
        force_compression=options.force_compression,
        squash=options.squash,
        squash_all=options.squash_all,
        fold=options.fold,
        verify_layers=options.verify_layers,
        rewrite_timestamp=options.rewrite_timestamp,
        omit_history=options.omit_history,
        source_date_epoch=epoch,
        jobs=_jobs(options.jobs),
        outputs=outputs,
        cache_from=cache_from,
        cache_to=cache_to,
        cache_mounts=options.cache_mounts,
        cache_ttl_s=options.cache_ttl,
        capsule=_capsule(options.on_error),
        secret_gate=options.secret_gate,
        additional_stores=additional_stores(options),
        source_policy=_source_policy(options, containerfile),
        environ=dict(os.environ),
    )


def _capsule(on_error: str) -> Path | None:
    """Where `--on-error` wants a capsule. Raises: UsageError."""
    kind, separator, name = on_error.partition("=")
    if kind == "capsule" and (name or not separator):
        return Path(name or "pybuild-capsule.tar").absolute()
    if on_error not in {"stop", "shell"}:
        raise UsageError(f"--on-error {on_error!r}: expected stop, shell or capsule[=FILE]")
    return None


def _source_policy(options: Namespace, containerfile: SourceFile) -> SourcePolicy | None:
    files = list(options.source_policy_file)
    if not files and os.environ.get("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"):
        files = [os.environ["EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"]]
    if not files and not options.locked:
        return None
    from builder.plan.sourcepolicy import SourcePolicy, read_policy

    policy = SourcePolicy(tuple(read_policy(Path(name)) for name in files))
    if not options.locked:
        return policy
    from builder.lock import locked_policy

    path = lock_file(options, containerfile)
    if not path.exists():
        raise UsageError(f"there is no lock file {path}", hint="`pybuild lock` makes it")
    return locked_policy(path, policy)


def lock_file(options: Namespace, containerfile: SourceFile) -> Path:
    """Where the lock of a Containerfile lies. Raises: UsageError if it has no place of its own."""
    if options.lock_file:
        return Path(options.lock_file)
    path = Path(containerfile.name)
    if not path.is_file():
        raise UsageError(f"{containerfile.name} is no file that a lock could lie beside", hint="name it: --lock-file")
    return path.with_name(path.name + ".lock")


def _epoch(
    options: Namespace, args: dict[str, str], containerfile: SourceFile, of_context: Callable[[], int | None]
) -> int | None:
    """The time of everything new: of a flag, an argument, the environment, or an ARG before the first FROM.

    `SOURCE_DATE_EPOCH=context` is a commit's, a download's; of a directory none. The argument that the
    build sees is that time, too, but for the flag's. Raises: UsageError, ParseError.
    """
    if options.timestamp is not None:
        return epoch_of(options)
    name = "SOURCE_DATE_EPOCH"
    if name not in args and os.environ.get(name):
        args[name] = os.environ[name]
    text = args.get(name)
    if text is None:
        text = _declared(containerfile, name, args)
    if text == "context":
        epoch = of_context()
        args[name] = "" if epoch is None else str(epoch)
        return epoch
    if text and not is_epoch(text):
        raise UsageError(f"invalid SOURCE_DATE_EPOCH: {text!r} is neither a number of seconds nor `context`")
    return int(text) if text else None


def _declared(containerfile: SourceFile, name: str, args: dict[str, str]) -> str:
    """The value of an ARG before the first FROM, "" where there is none. Raises: ParseError."""
    if name not in containerfile.text:
        return ""
    from builder.frontend.instructions import parse_containerfile
    from builder.frontend.scope import automatic_args, global_scope
    from layers.oci import Platform

    host = Platform.host()
    scope = global_scope(parse_containerfile(containerfile), args, automatic_args(host, host, ""))
    return scope.values.get(name, "")


class _Inputs(NamedTuple):
    """The Containerfile, the context directory, the ignore file that belongs to the former, the latter's time."""

    containerfile: SourceFile
    context: Path | None
    ignore: Path | None
    epoch: Callable[[], int | None] = lambda: None


def _inputs(options: Namespace, stack: ExitStack) -> _Inputs:
    context = options.context
    if context and _is_remote(context):
        if context == "-" and "-" in options.file:
            raise UsageError("the context and the Containerfile cannot both come from stdin")
        return _remote_inputs(options, stack)
    explicit = Path(options.ignorefile) if options.ignorefile else None
    if options.file == ["-"]:
        return _Inputs(read_stdin(), Path(context) if context else None, explicit)
    directory = Path(context or ".")
    if not directory.is_dir():
        raise ContextError(f"the build context {directory} is not a directory")
    source = read_containerfile(options.file, directory, cpp_flags=options.cpp_flag)
    if len(options.file) > 1 or "://" in source.name:
        return _Inputs(source, directory, explicit)
    return _Inputs(source, directory, ignore_file_for(Path(source.name), options.ignorefile))


def _remote_inputs(options: Namespace, stack: ExitStack) -> _Inputs:
    """The same for a tar on stdin, a URL or a repository, fetched into a directory that goes with the command."""
    import tempfile

    from builder.session import TEMPORARY_CONTEXT
    from builder.solve.remotecontext import ContextAccess, open_remote_context

    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY_CONTEXT)))
    agent = os.environ.get("SSH_AUTH_SOCK")
    keep = boolean(_build_args(options).get("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "false"))
    secrets = dict(map(_secret, options.secret))

    def value(id: str) -> bytes | None:
        source = secrets.get(id)
        return None if source is None else source.value if source.path is None else source.path.read_bytes()

    access = ContextAccess(value, Path(agent) if agent else None, environ=os.environ, keep_git_dir=keep)
    remote = open_remote_context(options.context, place, place / "download", stdin=sys.stdin.buffer, access=access)
    if remote.containerfile is not None:
        return _Inputs(as_source(options.context, remote.containerfile), remote.path, None, remote.epoch)
    # Paths of -f are those of the context, which is not where the command runs.
    names = [name if name == "-" or "://" in name else str(remote.path / name) for name in options.file]
    source = read_containerfile(names, remote.path, cpp_flags=options.cpp_flag)
    explicit = Path(options.ignorefile) if options.ignorefile else None
    if len(names) > 1 or "://" in source.name or source.name == "-":
        return _Inputs(source, remote.path, explicit, remote.epoch)
    return _Inputs(source, remote.path, ignore_file_for(Path(source.name), options.ignorefile), remote.epoch)


def _is_remote(context: str) -> bool:
    if context != "-" and ":" not in context and not context.startswith("github.com/"):
        return False
    from builder.solve.remotecontext import is_remote_context

    return is_remote_context(context)


def _build_args(options: Namespace) -> dict[str, str]:
    args: dict[str, str] = {}
    for name in options.build_arg_file:
        try:
            lines = Path(name).read_text("utf-8", "surrogateescape").splitlines()
        except OSError as e:
            raise ContextError(f"cannot read {name}: {e.strerror}") from e
        for line in lines:
            if line.strip() and not line.lstrip().startswith("#"):
                key, value = key_value(line.strip(), f"--build-arg-file {name}:")
                args[key] = value
    for text in options.build_arg:
        key, separator, value = text.partition("=")
        if not key:
            raise UsageError(f"--build-arg {text!r}: expected KEY=VALUE")
        if separator:
            args[key] = value
        elif key in os.environ:
            args[key] = os.environ[key]
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"):
        for name in (key, key.lower()):
            if name in os.environ:
                args.setdefault(name, os.environ[name])
    return args


def _annotations(text: str, several: bool) -> list[Annotation]:
    """`[LEVEL[[PLATFORM]][,LEVEL…]:]KEY=VALUE`, as docker buildx has it. Raises: UsageError."""
    import re

    match = re.fullmatch(r"(?:([a-z-]+(?:\[[^\]]*\])?(?:,[a-z-]+(?:\[[^\]]*\])?)*):)?([^=\s]+)=(.*)", text, re.DOTALL)
    if match is None:
        raise UsageError(f"--annotation {text!r}: expected [LEVEL:]KEY=VALUE")
    found = []
    for word in (match[1] or "manifest").split(","):
        level, _, platform = word.rstrip("]").partition("[")
        if level not in {"manifest", "manifest-descriptor", "index"} or (platform and level == "index"):
            raise UsageError(
                f"--annotation {text!r}: {word} is no level", hint="there are manifest, manifest-descriptor and index"
            )
        if level != "manifest" and not several:
            raise UsageError(f"--annotation {text!r}: an image for one platform has no index")
        where = _platform(platform, f"--annotation {text!r}:") if "[" in word else None
        found.append(Annotation(match[2], match[3], level, where))  # type: ignore[arg-type]
    return found


def _from_environment(text: str) -> list[tuple[str, str]]:
    """`KEY=VALUE`; `KEY` alone is what the environment has, and nothing if it has none. Raises: UsageError."""
    key, separator, value = text.partition("=")
    if not key:
        raise UsageError(f"--env {text!r}: expected KEY[=VALUE]")
    if separator:
        return [(key, value)]
    return [(key, os.environ[key])] if key in os.environ else []


def _label(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key.strip():
        raise UsageError(f"--label {text!r}: expected KEY=VALUE")
    return key, value


def _context(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator or not value:
        raise UsageError(f"--build-context {text!r}: expected NAME=VALUE")
    if "://" not in value and not _is_remote(value) and not os.path.isdir(value):
        raise UsageError(f"--build-context {text!r}: {value} is not a directory")
    return name, value


def _platforms(options: Namespace) -> list[Platform]:
    """The target platforms; none for this machine's. Raises: UsageError."""
    named = [_platform(p, "--platform") for value in options.platform for p in value.split(",") if p]
    if not (options.os or options.arch or options.variant):
        return named
    if named:
        raise UsageError("--os, --arch and --variant go with no --platform", hint="--platform OS/ARCH[/VARIANT]")
    from layers.oci import Platform

    words = (options.os or "linux", options.arch or Platform.host().architecture, options.variant)
    return [_platform("/".join(filter(None, words)), "--os, --arch, --variant")]


def _check_timeline(name: str | None) -> None:
    if name and not name.lower().endswith((".svg", ".html", ".htm", ".json")):
        raise UsageError(
            f"--timeline {name}: its form is not known by its name", hint="FILE.svg, FILE.html or FILE.json"
        )


def _check_of_others(options: Namespace) -> None:
    """Flags of docker and buildah that can say only what is so. Raises: UsageError where they say otherwise."""
    if not options.rm:
        raise UsageError(
            "--rm=false: a build makes no containers that could be kept",
            hint="--on-error=capsule keeps a step that failed; `pybuild from` makes containers",
        )
    for name, value in (("--provenance", options.provenance), ("--sbom", options.sbom)):
        if value not in {"false", "0", "disabled=true"}:
            from builder.cli.foreign import ATTESTATIONS

            raise UsageError(f"{name}={value}: only false is possible", hint=ATTESTATIONS)


def _platform(text: str, flag: str) -> Platform:
    from layers.errors import ImageError
    from layers.oci import Platform

    try:
        return Platform.parse(text)
    except ImageError as e:
        raise UsageError(f"{flag.removesuffix(':')}: {e.message}") from e


def _pull(text: str) -> PullPolicy:
    try:
        return "always" if boolean(text) else "missing"
    except InvalidValue as e:
        raise UsageError(f"--pull {text!r}: expected always, missing, never or newer") from e


def _jobs(number: int) -> int:
    if number < 0:
        raise UsageError(f"--jobs {number}: expected a number of steps")
    return number


def _entitlement(name: str) -> str:
    if name not in _ENTITLEMENTS and not name.startswith("device="):
        raise UsageError(f"--allow {name!r}: there are {', '.join(sorted(_ENTITLEMENTS))} and device=CDI-NAME")
    return name


def _check_security(options: Namespace) -> None:
    """Refuse now what a step would refuse: a cached one would never look. Raises: UsageError."""
    if options.cap_add or options.cap_drop or options.security_opt:
        from builder.sandbox import options as rights

        rights.capabilities(options.cap_add, options.cap_drop)
        rights.security(options.security_opt)


def _volume(text: str) -> str:
    """`HOST:CTR[:OPTIONS]`, both absolute; what is not `ro` or `rw` must hold anyway. Raises: UsageError."""
    host, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not host.startswith("/") or not target.startswith("/") or not target.strip("/"):
        raise UsageError(f"--volume {text!r}: expected /HOST:/CONTAINER[:ro]")
    if not os.path.exists(host):
        raise UsageError(f"--volume {text!r}: there is no {host} here")
    labels = set() if os.path.exists("/sys/fs/selinux/enforce") else {"z", "Z"}  # without SELinux there are none
    unknown = {*mode.split(",")} - {"", "ro", "rw", "bind", "rbind", *labels}
    if unknown:
        raise UsageError(f"--volume {text!r}: the option {min(unknown)} is not possible", hint="there are ro and rw")
    return text


def _secret(text: str) -> tuple[str, SecretSource]:
    values = fields(text, "--secret")
    id = values.get("id", "")
    source = values.get("src") or values.get("source")
    kind = values.get("type", "")
    name = values.get("env") or (source if kind == "env" else None)
    unknown = set(values) - {"id", "src", "source", "env", "type"}
    if unknown or kind not in {"", "file", "env"}:
        raise UsageError(f"--secret {text!r}: unknown field {', '.join(sorted(unknown)) or kind!r}")
    if not id:
        if not source:
            raise UsageError(f"--secret {text!r}: an id is missing")
        id = Path(source).name
    if name is None and source is None:
        # As docker: the variable of that name, else the file of that name.
        name = id if id in os.environ else None
        source = id
    if name is not None:
        if name not in os.environ:
            raise UsageError(f"--secret {text!r}: the environment has no {name}")
        return id, SecretSource(value=os.fsencode(os.environ[name]))
    assert source is not None
    path = Path(source).expanduser()
    if not path.is_file():
        raise UsageError(f"--secret {text!r}: {path} is not a file")
    return id, SecretSource(path=path)


def _ssh(text: str, stack: ExitStack) -> tuple[str, Path]:
    id, _, value = text.partition("=")
    keys = [Path(name) for name in value.split(",") if name]
    if keys and all(key.is_file() for key in keys):
        from builder.cli.sshkeys import agent_with

        return id, agent_with(keys, stack)
    socket = value or os.environ.get("SSH_AUTH_SOCK", "")
    if not socket:
        raise UsageError(
            f"--ssh {text!r}: no agent: SSH_AUTH_SOCK is not set", hint="start ssh-agent, or name its socket"
        )
    path = Path(socket)
    if not path.is_socket():
        raise UsageError(f"--ssh {text!r}: {path} is neither an agent's socket nor a key")
    return id, path


def _mount(text: str) -> RunMount:
    from builder.errors import ParseError
    from builder.frontend.runoptions import parse_mount

    try:
        return parse_mount(text, str)
    except ParseError as e:
        raise UsageError(f"--mount {text}: {e.message}", hint=e.hint) from e


def _host_mounts(given: str | None) -> tuple[tuple[str, str], ...]:
    """What containers-mounts.conf(5) has every RUN see of this machine. Raises: UsageError."""
    places = [Path(given)] if given else list(map(Path, _MOUNTS_CONF))
    if not given and os.geteuid() != 0:
        places.insert(0, Path.home() / ".config" / "containers" / "mounts.conf")
    for place in places:
        try:
            lines = place.read_text("utf-8", "surrogateescape").splitlines()
        except OSError as e:
            if given:
                raise UsageError(f"cannot read {place}: {e.strerror}") from e
            continue
        found = []
        for line in lines:
            source, _, target = line.strip().partition(":")
            if not source or source.startswith("#"):
                continue
            target = target or source
            if not source.startswith("/") or not target.startswith("/") or not os.path.normpath(target).strip("/"):
                raise UsageError(f"{place}: {line.strip()!r}: expected two absolute paths, /HOST:/CONTAINER")
            if os.path.isdir(source) or os.path.isfile(source):
                found.append((source, target))
        return tuple(found)
    return ()


def _isolation(options: Namespace) -> str:
    """`--runtime` alone means oci, as podman's flag does. Raises: UsageError."""
    isolation = str(options.isolation)
    if options.runtime and isolation not in {"auto", "oci"}:
        raise UsageError(f"--runtime and --isolation {isolation} exclude each other")
    return "oci" if options.runtime else isolation
