"""`pybuild build`: flags and environment into a `BuildRequest`, and its result on stdout."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli import sandboxflags
from builder.cli.containerfile import as_source, ignore_file_for, read_containerfile, read_stdin
from builder.cli.options import (
    add_registry_options,
    boolean,
    duration,
    fields,
    has_registry_options,
    key_value,
    store_root,
)
from builder.cli.sandboxflags import add_limit_options, add_sandbox_options
from builder.errors import ContextError, UsageError
from builder.frontend.source import SourceFile
from builder.plan.request import Annotation, BuildRequest, CacheRef, Output, ResourceLimits, RunOptions, SecretSource

if TYPE_CHECKING:
    from builder.building import BuildResult
    from builder.plan.sourcepolicy import SourcePolicy
    from builder.solve.explain import BuildPlan
    from builder.solve.steps import OnError


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "context",
        nargs="?",
        default=None,
        metavar="CONTEXT",
        help="a directory, a tarball's or git repository's URL, or - for a tar on stdin",
    )
    add(
        "-f",
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="the Containerfile; - is stdin; a URL is fetched; several are joined (default: the context's own)",
    )
    add("-t", "--tag", action="append", default=[], metavar="NAME", help="name of the image; may be given again")
    add("--target", metavar="STAGE", help="build this stage instead of the last")
    add("--from", dest="base", metavar="IMAGE", help="begin the first stage from this image instead")
    add(
        "--build-arg",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="value of an ARG (without =: from the environment)",
    )
    add(
        "--cpp-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag for cpp(1), which reads *.in files first",
    )
    add("--build-arg-file", action="append", default=[], metavar="FILE", help="a file of KEY=VALUE lines")
    add(
        "--build-context",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another context: a directory, docker-image://…, oci-layout://…, https://…",
    )
    add("--ignorefile", metavar="FILE", help="use this instead of .containerignore or .dockerignore")
    add(
        "--platform",
        action="append",
        default=[],
        metavar="OS/ARCH",
        help="target platforms, comma-separated; several make an index",
    )
    add("--locked", action="store_true", help="use what the lock file pins, and nothing else (see `pybuild lock`)")
    add("--lock-file", metavar="FILE", help="(default: the Containerfile's name with .lock)")
    add("--source-policy-file", action="append", default=[], metavar="FILE",
        help="which images, URLs and repositories may be used, as BuildKit's JSON")  # fmt: skip
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the image")
    add(
        "--annotation",
        action="append",
        default=[],
        metavar="[LEVEL:]KEY=VALUE",
        help="of the manifest; levels: manifest, manifest-descriptor (both also as manifest[OS/ARCH]), index",
    )
    add("--env", action="append", default=[], metavar="KEY[=VALUE]", help="a variable of the image")
    add("--unsetenv", action="append", default=[], metavar="KEY", help="take a variable out of the image")
    add("--unsetlabel", action="append", default=[], metavar="KEY", help="take a label out of the image")
    add("--inherit-labels", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="take over the base image's labels (default: true)")  # fmt: skip
    add("--no-cache", action="store_true", help="run every step")
    add("--no-cache-filter", action="append", default=[], metavar="STAGE", help="run every step of these stages")
    add(
        "--pull",
        nargs="?",
        const="always",
        default="missing",
        metavar="POLICY",
        help="always, missing, never or newer (alone: always)",
    )
    add(
        "--secret",
        action="append",
        default=[],
        metavar="id=ID[,src=FILE|env=NAME]",
        help="a secret for RUN --mount=type=secret",
    )
    add(
        "--ssh",
        action="append",
        default=[],
        metavar="default|ID[=SOCKET]",
        help="an ssh agent for RUN --mount=type=ssh",
    )
    add("--allow", action="append", default=[], metavar="ENTITLEMENT", help="security.insecure")
    add(
        "--network",
        default="default",
        choices=["default", "host", "none", "private"],
        help="the network of RUN: the host's (default), none, or one of its own behind NAT",
    )
    add("--isolation", default="auto", choices=["auto", "pivot", "chroot", "rootless", "single", "oci"],
        help="how RUN is isolated (default: the best that works here, see `pybuild doctor`)")  # fmt: skip
    add("--runtime", metavar="NAME", help="the runtime of --isolation oci: runc, crun, … or a path")
    add(
        "-v",
        "--volume",
        action="append",
        default=[],
        metavar="HOST:CTR[:ro]",
        help="bind a host directory for every RUN",
    )
    add_sandbox_options(parser)
    add("--timeout", type=duration, metavar="DURATION", help="kill a RUN that takes longer")
    add_limit_options(parser)
    add("--format", default="oci", choices=["oci", "docker"], help="media types of the image")
    add("--compression", default="gzip", choices=["gzip", "zstd", "none", "uncompressed", "estargz", "zstd:chunked"],
        help="of new layers")  # fmt: skip
    add("--compression-level", type=int, metavar="N", help="the codec's own scale")
    add("--force-compression", action="store_true", help="the base image's layers, too")
    add("--squash", action="store_true", help="make one layer of all new ones")
    add("--squash-all", action="store_true", help="make one layer of the whole image")
    add("--fold", action="store_true", help="store no data again that a lower layer of this build has (chown -R)")
    add("--verify-layers", action="store_true", help="read each new layer back and compare it with the tree")
    add("--rewrite-timestamp", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="with --timestamp, no file of a new layer is newer (default: true)")  # fmt: skip
    add(
        "--timestamp",
        type=int,
        metavar="SECONDS",
        help="time of everything new, since the epoch (also SOURCE_DATE_EPOCH)",
    )
    add("--omit-history", action="store_true", help="leave the history out of the config")
    add("--iidfile", metavar="FILE", help="write the image id there")
    add("--metadata-file", metavar="FILE", help="write what was built there, as JSON")
    add(
        "--progress",
        default=None,
        choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="(also BUILDKIT_PROGRESS)",
    )
    add("-q", "--quiet", action="store_true", help="print the image id alone")
    add("-j", "--jobs", type=int, default=0, metavar="N", help="steps at once (default: one a processor)")
    add(
        "-o",
        "--output",
        action="append",
        default=[],
        metavar="type=TYPE[,dest=PATH][,name=NAME]",
        help="registry, oci, docker, tar, local, image; may be given again; alone: a directory, - a tar on stdout",
    )
    add("--push", action="store_true", help="send the image to the registry of its names")
    add("--load", action="store_true", help="give the image to the Docker daemon")
    add(
        "--cache-to",
        action="append",
        default=[],
        metavar="type=registry|local|inline[,ref=NAME][,mode=min|max]",
        help="write the steps' results there, for other machines",
    )
    add(
        "--cache-from",
        action="append",
        default=[],
        metavar="type=registry|local[,ref=NAME]",
        help="take steps' results from there",
    )
    add(
        "--cache-mounts",
        nargs="?",
        const=True,
        type=boolean,
        default=False,
        metavar="BOOL",
        help="let the contents of cache mounts travel with --cache-to and --cache-from",
    )
    add("--cache-ttl", type=duration, metavar="DURATION", help="do not use results older than this")
    add(
        "--secret-gate",
        nargs="?",
        const=True,
        type=boolean,
        default=False,
        metavar="BOOL",
        help="refuse an image that holds the value of a --secret, or whose build printed it",
    )
    add(
        "--on-error",
        default="stop",
        metavar="stop|shell|capsule[=FILE]",
        help="of a RUN that fails: shell opens one in its sandbox, capsule keeps all in a file for `pybuild shell`",
    )
    add("--explain", action="store_true", help="tell before running why each step is found or not")
    add(
        "--summary",
        nargs="?",
        const=True,
        type=boolean,
        default=None,
        metavar="BOOL",
        help="tell at the end where the time went (default: on a terminal)",
    )
    add("--timeline", metavar="FILE", help="draw the build as a chart: .svg or .html")
    add("--check", action="store_true", help="lint the Containerfile instead of building it")
    add("--call", choices=["build", "check", "outline", "targets"], default="build", help="do this instead of building")
    add(
        "--layers", nargs="?", const=True, type=boolean, default=True, help=SUPPRESS
    )  # buildah's default-off cache switch
    add_registry_options(parser)


def run(verb: str, options: Namespace) -> int:
    with ExitStack() as stack:
        request = make_request(options, stack)
        if options.check or options.call != "build":
            from builder.cli.language import print_call

            return print_call("check" if options.check else options.call, request, root=store_root(options))
        return _build(options, request)


def _build(options: Namespace, request: BuildRequest) -> int:
    from builder import api
    from builder.cli.progress import make_progress, resolve_mode

    mode = "quiet" if options.quiet else options.progress or os.environ.get("BUILDKIT_PROGRESS") or "auto"
    root = store_root(options)  # before this process becomes root of a user namespace
    api.prepare_namespaces(request.run.isolation)
    if os.environ.get("PYBUILD_GC_KEEP") or os.environ.get("PYBUILD_GC_MIN_FREE"):
        from builder.cli.maintenance import make_room

        make_room(root)
    registry = None
    if has_registry_options(options):
        from builder.cli.options import registry_options

        registry = registry_options(options)
    on_error: OnError | None = None
    if options.on_error == "shell":
        from builder.cli.shell import shell

        on_error = shell
        mode = "plain" if mode != "quiet" else mode  # nothing may draw over the shell
    launcher = None
    if resolve_mode(mode, sys.stderr, os.environ) == "tty":
        # The drawing thread must not exist before the zygote does.
        from builder.sandbox.tiers import start_launcher

        launcher = start_launcher(request.run.isolation, request.run.runtime)
    try:
        with make_progress(mode, sys.stderr, os.environ) as progress:
            result = api.build(
                request,
                root=root,
                events=progress,
                registry=registry,
                launcher=launcher,
                on_plan=_explain if options.explain else None,
                on_error=on_error,
            )
    finally:
        if launcher is not None:
            launcher.close()
    _report(options, result)
    return 0


def _explain(plan: BuildPlan) -> None:
    from builder.solve.explain import render

    print("\n".join(render(plan)), file=sys.stderr)


def _report(options: Namespace, result: BuildResult) -> None:
    if options.iidfile:
        Path(options.iidfile).write_text(result.image_id)
    if options.metadata_file:
        import json

        from builder.building import metadata

        Path(options.metadata_file).write_text(json.dumps(metadata(result), indent=2) + "\n")
    if options.timeline:
        from builder.solve.timeline import write_timeline

        write_timeline(result.steps, Path(options.timeline))
    wanted = options.summary
    if wanted is None:
        wanted = bool(result.executed) and not options.quiet and sys.stderr.isatty()
    if wanted:
        from builder.solve.report import summary

        lines = summary(result.steps, result.wall_s, result.fetched_bytes, result.sent_bytes)
        print("\n".join(lines), file=sys.stderr)
    if result.folded_bytes and not options.quiet:
        print(f"folded: {result.folded_bytes} bytes of files are stored once instead of twice", file=sys.stderr)
    if not any(output.place == "-" or output.place.endswith(":-") for output in result.outputs):
        print(result.image_id)


def make_request(options: Namespace, stack: ExitStack) -> BuildRequest:
    """The request that the flags mean. Raises: UsageError, ContextError."""
    containerfile, context, ignore = _inputs(options, stack)
    args = _build_args(options)
    epoch = options.timestamp
    if epoch is None:
        text = args.get("SOURCE_DATE_EPOCH", os.environ.get("SOURCE_DATE_EPOCH", ""))
        if text and not text.isdigit():
            raise UsageError(f"SOURCE_DATE_EPOCH {text!r} is not a number of seconds")
        epoch = int(text) if text else None
    from layers.oci import Platform

    outputs: tuple[Output, ...] = ()
    cache_from: tuple[CacheRef, ...] = ()
    cache_to: tuple[CacheRef, ...] = ()
    if options.output or options.push or options.load or options.cache_to or options.cache_from:
        from builder.cli import outputs as flags

        outputs = flags.outputs(options)
        cache_from = flags.caches(options.cache_from, "--cache-from")
        cache_to = flags.caches(options.cache_to, "--cache-to")
    platforms = [p for value in options.platform for p in value.split(",") if p]
    if options.pull not in {"always", "missing", "never", "newer"}:
        options.pull = "always" if boolean(options.pull) else "missing"
    run_options = RunOptions(
        network=options.network,
        add_hosts=sandboxflags.added_hosts(options),
        cap_add=tuple(options.cap_add),
        cap_drop=tuple(options.cap_drop),
        security_opt=tuple(options.security_opt),
        ulimits=sandboxflags.ulimits(options),
        shm_size_bytes=options.shm_size,
        volumes=tuple(options.volume),
        isolation=_isolation(options),
        timeout_s=options.timeout,
        limits=sandboxflags.limits(options, ResourceLimits),
        dns=sandboxflags.name_servers(options),
        dns_search=sandboxflags.one_line(options.dns_search, "--dns-search"),
        dns_options=sandboxflags.one_line(options.dns_option, "--dns-option"),
        no_hosts=options.no_hosts,
        devices=sandboxflags.devices(options),
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
        platforms=tuple(dict.fromkeys(map(Platform.parse, platforms))),
        tags=tuple(options.tag),
        labels=dict(v.partition("=")[::2] for v in options.label),
        annotations_at=tuple(a for v in options.annotation for a in _annotations(v, len(platforms) > 1)),
        env=dict(_from_environment(v) for v in options.env),
        unset_env=tuple(options.unsetenv),
        unset_labels=tuple(options.unsetlabel),
        inherit_labels=options.inherit_labels,
        no_cache=options.no_cache or not options.layers,
        no_cache_filter=tuple(name for v in options.no_cache_filter for name in v.split(",")),
        pull=options.pull,
        secrets=dict(_secret(v) for v in options.secret),
        ssh=dict(_ssh(v) for v in options.ssh),
        allow=frozenset(name for v in options.allow for name in v.split(",")),
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
        jobs=options.jobs,
        outputs=outputs,
        cache_from=cache_from,
        cache_to=cache_to,
        cache_mounts=options.cache_mounts,
        cache_ttl_s=options.cache_ttl,
        capsule=_capsule(options.on_error),
        secret_gate=options.secret_gate,
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


def _inputs(options: Namespace, stack: ExitStack) -> tuple[SourceFile, Path | None, Path | None]:
    """The Containerfile, the context directory and the ignore file that belongs to the Containerfile."""
    context = options.context
    if context and _is_remote(context):
        if context == "-" and "-" in options.file:
            raise UsageError("the context and the Containerfile cannot both come from stdin")
        return _remote_inputs(options, stack)
    explicit = Path(options.ignorefile) if options.ignorefile else None
    if options.file == ["-"]:
        return read_stdin(), Path(context) if context else None, explicit
    directory = Path(context or ".")
    if not directory.is_dir():
        raise ContextError(f"the build context {directory} is not a directory")
    source = read_containerfile(options.file, directory, cpp_flags=options.cpp_flag)
    if len(options.file) > 1 or "://" in source.name:
        return source, directory, explicit
    return source, directory, ignore_file_for(Path(source.name), options.ignorefile)


def _remote_inputs(options: Namespace, stack: ExitStack) -> tuple[SourceFile, Path | None, Path | None]:
    """The same for a tar on stdin, a URL or a repository, fetched into a directory that goes with the command."""
    import tempfile

    from builder.solve.remotecontext import ContextAccess, open_remote_context

    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pybuild-context-")))
    agent = os.environ.get("SSH_AUTH_SOCK")
    keep = boolean(_build_args(options).get("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "false"))
    access = ContextAccess(ssh_socket=Path(agent) if agent else None, environ=os.environ, keep_git_dir=keep)
    remote = open_remote_context(options.context, place, place / "download", stdin=sys.stdin.buffer, access=access)
    if remote.containerfile is not None:
        return as_source(options.context, remote.containerfile), remote.path, None
    # Paths of -f are those of the context, which is not where the command runs.
    names = [name if name == "-" or "://" in name else str(remote.path / name) for name in options.file]
    source = read_containerfile(names, remote.path, cpp_flags=options.cpp_flag)
    explicit = Path(options.ignorefile) if options.ignorefile else None
    if len(names) > 1 or "://" in source.name or source.name == "-":
        return source, remote.path, explicit
    return source, remote.path, ignore_file_for(Path(source.name), options.ignorefile)


def _is_remote(context: str) -> bool:
    if context != "-" and ":" not in context and not context.startswith("github.com/"):
        return False
    from builder.solve.remotecontext import is_remote_context

    return is_remote_context(context)


def _build_args(options: Namespace) -> dict[str, str]:
    args: dict[str, str] = {}
    for name in options.build_arg_file:
        try:
            lines = Path(name).read_text().splitlines()
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

    from layers.oci import Platform

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
        where = Platform.parse(platform) if platform else None
        found.append(Annotation(match[2], match[3], level, where))  # type: ignore[arg-type]
    return found


def _from_environment(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    return key, value if separator else os.environ.get(key, "")


def _context(text: str) -> tuple[str, str]:
    name, value = key_value(text, "--build-context")
    return name, value


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


def _ssh(text: str) -> tuple[str, Path]:
    id, _, value = text.partition("=")
    socket = value or os.environ.get("SSH_AUTH_SOCK", "")
    if not socket:
        raise UsageError(
            f"--ssh {text!r}: no agent: SSH_AUTH_SOCK is not set", hint="start ssh-agent, or name its socket"
        )
    path = Path(socket)
    if not path.is_socket():
        raise UsageError(f"--ssh {text!r}: {path} is not an agent's socket")
    return id, path


def _isolation(options: Namespace) -> str:
    """`--runtime` alone means oci, as podman's flag does. Raises: UsageError."""
    isolation = str(options.isolation)
    if options.runtime and isolation not in {"auto", "oci"}:
        raise UsageError(f"--runtime and --isolation {isolation} exclude each other")
    return "oci" if options.runtime else isolation
