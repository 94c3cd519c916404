"""`pybuild run`, `create`, `start` and `exec`: commands in containers.

Their exit status is the command's; 125 is pybuild's own failure, 126 a command that cannot be run,
127 one that is not there.
"""

from __future__ import annotations

import os
import sys
from argparse import REMAINDER, ArgumentParser, ArgumentTypeError, Namespace
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from builder.cli import containerflags, program, sandboxflags
from builder.cli.actions import end_actions
from builder.cli.options import add_additional_stores, additional_stores, boolean, size, store_root
from builder.cli.sandboxflags import add_limit_options
from builder.errors import UsageError
from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from builder.container.front import Front
    from builder.container.options import ContainerOptions, Healthcheck, Port, Restart, VolumeMount
    from builder.container.records import Record
    from layers.oci import Platform
    from layers.store import Store


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    if verb == "start":
        add("names", nargs="+", metavar="CONTAINER", help="containers that do not run")
        add("-a", "--attach", action="store_true", help="stay with it (one container), and show what it says")
        add("-i", "--interactive", action="store_true", help="with --attach, hand on stdin")
        add(
            "--detach-keys",
            default="ctrl-p,ctrl-q",
            metavar="KEYS",
            help="leave it running by these keys (default: ctrl-p,ctrl-q)",
        )
        return
    add("-i", "--interactive", action="store_true", help="hand on stdin")
    add("-t", "--tty", action="store_true", help="give it a terminal")
    add(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable; without a value the caller's",
    )
    add("--env-file", action="append", default=[], metavar="FILE", help="a file of NAME=VALUE lines, as --env")
    add("-w", "--workdir", "--workingdir", metavar="DIR", help="the working directory")
    add("-u", "--user", metavar="USER[:GROUP]", help="who the command runs as")
    add("--privileged", action="store_true", help="all capabilities, no filter, nothing masked")
    add("-d", "--detach", action="store_true", help="leave it running, and print its ID")
    if verb == "exec":
        add("name", metavar="CONTAINER", help="one that runs")
        add("command", nargs=REMAINDER, metavar="COMMAND", help="the command and its arguments")
        return
    containerflags.configure(parser)
    add_additional_stores(parser)
    add_limit_options(parser)
    parser.add_argument("--oom-score-adj", type=int, metavar="N",
                        help="how readily the kernel kills it when memory runs out, -1000 to 1000")  # fmt: skip
    add("image", metavar="IMAGE", help="an image, pulled if it is missing; or a container made by `from`")
    add("command", nargs=REMAINDER, metavar="COMMAND", help="the command and its arguments (default: the image's)")
    end_actions(parser)


def run(verb: str, options: Namespace) -> int:
    root = store_root(options)
    if verb == "exec":
        return _exec(root, options)
    if verb == "run":
        from builder.container.records import is_working

        if is_working(root, options.image):
            from builder.cli import working

            return working.run(options, environment(options), _command(options.command))
    from builder.opening import prepare_namespaces

    _enter_namespaces_of_others(verb, root, options)
    prepare_namespaces()
    if verb == "start":
        return _start(root, options)
    return _run(verb, root, options)


def _enter_namespaces_of_others(verb: str, root: Path, options: Namespace) -> None:
    """Where a container joins others' namespaces: into the user namespace of those. Raises: ContainerError."""
    if verb == "start":
        from builder.container import records

        joins: dict[str, str] = {}
        for name in options.names:
            joins.update(records.find(root, name).settings.get("joins") or {})
        if joins:
            from builder.container import joining

            joining.enter_user_namespace(root, joins)
        return
    wanted = _shared(options)
    if any(where != "host" for _, where in wanted):
        from builder.container import joining

        joining.enter_user_namespace(root, joining.resolve(root, dict(wanted)))


def _run(verb: str, root: Path, options: Namespace) -> int:
    from builder.container.starting import start_launcher
    from builder.opening import open_store

    wanted = _container_options(root, options)
    foreground = verb == "run" and not options.detach
    if foreground and options.tty and options.interactive and not os.isatty(0):
        raise UsageError("the input is not a terminal", hint="leave out -t")
    if options.cidfile and os.path.exists(options.cidfile):
        raise UsageError(f"--cidfile {options.cidfile} exists already")
    if not foreground:
        with open_store(root) as store:
            record = _create(store, options, wanted)
        return _leave(root, record, options) if verb == "run" else _told(record)
    with ExitStack() as stack:
        # Before anything starts a thread, and beside what follows here.
        own_pids = all(kind != "pid" for kind, _ in wanted.shared)
        launcher = stack.enter_context(start_launcher(_runtime(options), _network(wanted), own_pids=own_pids))
        from builder.container import lifecycle

        store = stack.enter_context(open_store(root))
        record = _create(store, options, wanted)
        # While the container runs nothing of ours is to be kept from gc, which would wait for us.
        store.leases.close()
        front = _front(options, tty=options.tty, leaving=store.close)

        def ended() -> None:
            if wanted.auto_remove:
                place = stack.enter_context(open_store(root)) if front.left else store
                lifecycle.remove_record(place, record, volumes=True, locked=True)
                if program.ours:
                    place.let_go()
            # Now: the kernel takes a network and mounts down, for which removing files would have to wait.
            launcher.let_go()

        return lifecycle.run_foreground(record, launcher, front, ended)


def _network(wanted: ContainerOptions) -> str:
    """The network that the container will have."""
    if wanted.network != "default":
        return wanted.network
    from builder.sandbox import network

    return "host" if network.obstacle() else "private"


def _runtime(options: Namespace) -> str | None:
    """The OCI runtime's path, if one is asked for. Raises: SandboxError if it is not installed."""
    if options.isolation != "oci":
        return None
    from builder.sandbox.oci import find_runtime

    return find_runtime(options.runtime)


def _front(options: Namespace, *, tty: bool, leaving: Callable[[], None] = lambda: None) -> Front:
    from builder.container.front import DetachKeys, Front

    front = Front(tty=tty, stdin=options.interactive, leaving=leaving)
    if tty and front.is_terminal:
        front.keys = DetachKeys(options.detach_keys)
    return front


def _leave(root: Path, record: Record, options: Namespace) -> int:
    """Start a container under a monitor of its own."""
    from builder.container import lifecycle
    from builder.opening import open_store

    try:
        lifecycle.start_detached(record)
    except BaseException:
        if options.rm:
            with open_store(root) as store:
                lifecycle.remove_record(store, record, volumes=True)
        raise
    return _told(record)


def _told(record: Record) -> int:
    print(record.id)
    return 0


def _create(store: Store, options: Namespace, wanted: ContainerOptions) -> Record:
    from builder.container.create import create_container, find_image

    platform = None
    if options.platform:
        from layers.oci import Platform

        platform = Platform.parse(options.platform)
    if options.pull == "always":
        _pull(store.root, options, platform)
    pull: Callable[[], None] | None = partial(_take_or_pull, store.root, options, platform)
    if options.pull == "never" and not additional_stores(options):
        pull = None
    image = find_image(store, options.image, pull, platform)
    if options.replace:
        from builder.container import lifecycle
        from builder.container.records import NoSuchContainer

        with suppress(NoSuchContainer):
            lifecycle.remove(store, options.name, force=True, volumes=True)
    record = create_container(store, image, wanted, warn=_warn)
    if options.cidfile:
        Path(options.cidfile).write_text(record.id)
    return record


def _take_or_pull(root: Path, options: Namespace, platform: Platform | None) -> None:
    """Take the image from an additional store, else, if that is allowed, from its registry."""
    from registry.additional import find_additional
    from registry.reference import Reference

    place = find_additional(additional_stores(options), Reference.parse(options.image))
    if place is None:
        if options.pull != "never":
            _pull(root, options, platform)
        return
    from builder import api
    from builder.cli.progress import make_progress
    from registry.copy import CopyOptions

    name = Reference.parse(options.image).with_default_tag().canonical()
    with make_progress("quiet" if options.quiet else "auto", sys.stderr, os.environ) as progress:
        api.copy(str(place), f"storage:{name}", root=root, events=progress, options=CopyOptions(platform=platform))


def _pull(root: Path, options: Namespace, platform: Platform | None) -> None:
    from builder import api
    from builder.cli.progress import make_progress
    from registry.copy import CopyOptions
    from registry.hosts import RegistryOptions

    registry = RegistryOptions(tls_verify=options.tls_verify, authfile=options.authfile)
    choice = CopyOptions(platform=platform)
    with make_progress("quiet" if options.quiet else "auto", sys.stderr, os.environ) as progress:
        api.pull(options.image, root=root, source_registry=registry, events=progress, options=choice)


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr)


def _start(root: Path, options: Namespace) -> int:
    from builder.container import lifecycle, records

    if not options.attach:
        from builder.cli.main import report

        status = 0
        for name in options.names:
            try:
                lifecycle.start_detached(records.find(root, name))
                print(name)
            except PybuildError as e:
                status = report(e)
        return status
    if len(options.names) != 1:
        raise UsageError("--attach takes one container")
    record = records.find(root, options.names[0])
    with lifecycle.launcher_of(record) as launcher:
        front = _front(options, tty=bool(record.settings["tty"]))
        return lifecycle.run_foreground(record, launcher, front)


# exec


def _exec(root: Path, options: Namespace) -> int:
    from builder.container import records
    from builder.container.front import Front
    from builder.container.inside import run_inside

    words = _command(options.command)
    if not words:
        raise UsageError("exec: no command")
    if options.tty and options.interactive and not options.detach and not os.isatty(0):
        raise UsageError("the input is not a terminal", hint="leave out -t")
    front = None if options.detach else Front(tty=options.tty, stdin=options.interactive)
    return run_inside(
        records.find(root, options.name),
        words,
        front=front,
        tty=options.tty,
        env=environment(options),
        cwd=options.workdir,
        user=options.user,
        privileged=options.privileged,
    )


def _command(words: list[str]) -> tuple[str, ...]:
    return tuple(words[1:] if words[:1] == ["--"] else words)


# Flags into options


def _container_options(root: Path, options: Namespace) -> ContainerOptions:
    from builder.container.options import ContainerOptions
    from builder.sandbox.spec import Resources

    containerflags.refuse(options)
    words = None if options.entrypoint is None else entrypoint(options.entrypoint)
    mounts = [
        *(_volume(text) for text in options.volume),
        *(_mount(text) for text in options.mount),
        *(_tmpfs(text) for text in options.tmpfs),
    ]
    if options.volumes_from or options.read_only_tmpfs:
        mounts += containerflags.more_mounts(options, root, {mount.target for mount in mounts})
    return ContainerOptions(
        image=options.image,
        command=_command(options.command),
        name=options.name,
        entrypoint=words,
        env=(*containerflags.host_environment(options), *environment(options)),
        unset_env=tuple(options.unsetenv),
        labels=_labels(options),
        workdir=options.workdir,
        user=options.user,
        group_add=tuple(options.group_add),
        hostname=options.hostname,
        add_hosts=sandboxflags.added_hosts(options),
        dns=sandboxflags.name_servers(options),
        dns_search=sandboxflags.one_line(options.dns_search, "--dns-search"),
        dns_options=sandboxflags.one_line(options.dns_option, "--dns-option"),
        no_hosts=options.no_hosts,
        network=network_choice(options),  # type: ignore[arg-type]
        shared=_shared(options),
        ports=tuple(port for text in options.publish for port in _ports(text)),
        publish_all=options.publish_all,
        exposed=containerflags.exposed(options),
        mounts=tuple(mounts),
        read_only=options.read_only,
        tty=options.tty,
        stdin=options.interactive,
        init=options.init,
        auto_remove=options.rm,
        cap_add=tuple(options.cap_add),
        cap_drop=tuple(options.cap_drop),
        security_opt=tuple(options.security_opt),
        privileged=options.privileged,
        devices=sandboxflags.devices(options),
        cdi_devices=sandboxflags.cdi_devices(options),
        cdi_directories=sandboxflags.cdi_directories(options),
        ulimits=sandboxflags.ulimits(options),
        limits=sandboxflags.limits(options, Resources),
        shm_size_bytes=options.shm_size or 64 << 20,
        oom_score_adj=options.oom_score_adj,
        sysctls=containerflags.sysctls(options),
        umask=containerflags.umask(options),
        time_zone=containerflags.time_zone(options),
        timeout_s=options.timeout or None,
        pid_file=None if options.pidfile is None else Path(options.pidfile).absolute(),
        isolation=options.isolation,
        runtime=options.runtime,
        restart=restart_policy(options.restart, auto_remove=options.rm),
        stop_signal=_stop_signal(options.stop_signal),
        stop_timeout_s=options.stop_timeout,
        health=_health(options),
        no_healthcheck=options.no_healthcheck,
        log_bytes=_log_bytes(options),
    )


def network_choice(options: Namespace) -> str:
    """`--network` as `NetworkChoice`; another container's is joined as "host". Raises: UsageError."""
    text = options.network or "default"
    if text.startswith("container:") and text != "container:":
        return "host"
    if text not in {"default", "private", "bridge", "host", "none"}:
        raise UsageError(f"--network {text}: there are private (bridge), host, none and container:NAME")
    return "private" if text == "bridge" else text


def _shared(options: Namespace) -> tuple[tuple[str, str], ...]:
    """Namespaces that are not the container's own. Raises: UsageError for what contradicts them."""
    found = sandboxflags.shared(options)
    if (options.network or "").startswith("container:"):
        found["net"] = options.network
        given = {"-p": options.publish, "-P": options.publish_all, "--add-host": options.add_host, "--dns": options.dns,
                 "--hostname": options.hostname}  # fmt: skip
        for flag, value in given.items():
            if value:
                raise UsageError(f"{flag} means nothing with the network of another container")
    if "uts" in found and options.hostname:
        raise UsageError("--hostname means nothing with the host name of others (--uts)")
    if found.get("cgroup", "host") != "host":
        raise UsageError(f"--cgroupns {found['cgroup']}: there are private and host")
    return tuple(sorted(found.items()))


def _labels(options: Namespace) -> tuple[tuple[str, str], ...]:
    """Those of files, and after them those of flags. Raises: UsageError."""
    lines: list[str] = []
    for file in options.label_file:
        try:
            text = Path(file).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as e:
            raise UsageError(f"--label-file {file}: {e.strerror}") from e
        lines += [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return tuple((key, value) for key, _, value in (text.partition("=") for text in [*lines, *options.label]))


def _stop_signal(text: str | None) -> str | None:
    if text is not None:
        from builder.errors import ParseError
        from builder.frontend.signals import check_signal

        try:
            check_signal(text)
        except ParseError as e:
            raise UsageError(f"--stop-signal: {e.message}") from e
    return text


def _log_bytes(options: Namespace) -> int:
    kept = 10 << 20
    for text in options.log_opt:
        key, _, value = text.partition("=")
        if key != "max-size":
            raise UsageError(f"--log-opt {text!r}: not possible", hint="there is max-size=SIZE")
        kept = _size(value)
    if kept < 4096:
        raise UsageError("--log-opt max-size: at least 4k")
    return 0 if options.log_driver == "none" else kept


def entrypoint(text: str) -> tuple[str, ...]:
    """`--entrypoint`: a JSON array, a word, or nothing. Raises: UsageError."""
    import json

    if text.startswith("["):
        try:
            words = json.loads(text)
        except ValueError as e:
            raise UsageError(f"--entrypoint {text!r}: no JSON array") from e
        if not all(isinstance(word, str) for word in words):
            raise UsageError(f"--entrypoint {text!r}: an array of strings is meant")
        return tuple(words)
    return (text,) if text else ()


def environment(options: Namespace) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for file in options.env_file:
        try:
            lines = Path(file).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError as e:
            raise UsageError(f"--env-file {file}: {e.strerror}") from e
        pairs += [pair for line in lines if line.strip() and not line.lstrip().startswith("#") for pair in _pair(line)]
    for text in options.env:
        pairs += _pair(text)
    return tuple(pairs)


def _pair(text: str) -> list[tuple[str, str]]:
    name, separator, value = text.partition("=")
    if not name or "\0" in text:
        raise UsageError(f"-e {text!r}: expected NAME or NAME=VALUE")
    if separator:
        return [(name, value)]
    return [(name, os.environ[name])] if name in os.environ else []


def _ports(text: str) -> list[Port]:
    """`[[IP:]HOST:]CTR[/PROTOCOL]`, ranges of one length allowed."""
    from builder.container.options import Port

    try:
        rest, _, protocol = text.partition("/")
        protocol = protocol or "tcp"
        head, _, inside = rest.rpartition(":")
        address, _, outside = head.rpartition(":")
        first, _, last = inside.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        begin, _, end = outside.partition("-")
        hosts = list(range(int(begin), int(end or begin) + 1)) if outside else [0] * len(numbers)
        if len(hosts) != len(numbers) or not numbers or protocol not in {"tcp", "udp"}:
            raise ValueError
        if not all(0 < n < 65536 for n in numbers) or not all(0 <= n < 65536 for n in hosts):
            raise ValueError
    except ValueError:
        raise UsageError(f"-p {text!r}: expected [[IP:]HOST:]CONTAINER[/tcp|udp]") from None
    return [Port(address.strip("[]"), host, number, protocol) for host, number in zip(hosts, numbers, strict=True)]


def _volume(text: str) -> VolumeMount:
    from builder.container.options import VolumeMount

    parts = text.split(":")
    if len(parts) == 1:
        return VolumeMount("volume", parts[0])
    source, target, *more = parts
    words = more[0].split(",") if more else []
    known = {"ro", "rw", "z", "Z", "rbind", "bind", "noexec", "exec", "nocopy", "U", "private", "rprivate"}
    if len(more) > 1 or not source or not target or set(words) - known:
        raise UsageError(f"-v {text!r}: expected HOST:CONTAINER[:ro]")
    is_path = source.startswith(("/", "./", "../", "~")) or source in {".", ".."}
    return VolumeMount(
        "bind" if is_path else "volume",
        target,
        os.path.expanduser(source) if is_path else source,
        readonly="ro" in words,
        recursive="bind" not in words,
        noexec="noexec" in words,
        copy="nocopy" not in words,
    )


def _mount(text: str) -> VolumeMount:
    from builder.container.options import VolumeMount

    fields: dict[str, str] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        fields[{"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}.get(key, key)] = value
    kind = fields.pop("type", "volume")
    target = fields.pop("target", "")
    known = {"source", "readonly", "tmpfs-size", "tmpfs-mode", "volume-nocopy", "bind-nonrecursive", "bind-propagation"}
    if kind not in {"bind", "volume", "tmpfs"} or not target or set(fields) - known:
        raise UsageError(
            f"--mount {text!r}: not possible",
            hint="such as type=bind,source=/a,target=/b,readonly; or volume, or tmpfs",
        )
    if kind == "bind" and not fields.get("source"):
        raise UsageError(f"--mount {text!r}: a bind needs a source")
    return VolumeMount(
        kind,  # type: ignore[arg-type]
        target,
        fields.get("source", ""),
        readonly=_on(fields, "readonly"),
        recursive=not _on(fields, "bind-nonrecursive"),
        size_bytes=_size(fields["tmpfs-size"]) if "tmpfs-size" in fields else None,
        mode=int(fields["tmpfs-mode"], 8) if fields.get("tmpfs-mode", "").isdigit() else None,
        copy=not _on(fields, "volume-nocopy"),
    )


def _on(fields: dict[str, str], key: str) -> bool:
    if key not in fields:
        return False
    try:
        return boolean(fields[key] or "true")
    except ArgumentTypeError as e:
        raise UsageError(f"--mount {key}: {e}") from e


def _size(text: str) -> int:
    try:
        return size(text)
    except ArgumentTypeError as e:
        raise UsageError(str(e)) from e


def _tmpfs(text: str) -> VolumeMount:
    from builder.container.options import VolumeMount

    target, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key == "size":
            values["size_bytes"] = _size(value)
        elif key == "mode" and value.isdigit():
            values["mode"] = int(value, 8)
        elif word in {"ro", "noexec"}:
            values["readonly" if word == "ro" else "noexec"] = True
        elif word not in {"rw", "exec", "nosuid", "nodev"}:
            raise UsageError(f"--tmpfs {text!r}: unknown option {word!r}", hint="there are size=, mode=, ro and noexec")
    return VolumeMount("tmpfs", target, **values)


def restart_policy(text: str, *, auto_remove: bool) -> Restart:
    """`--restart`. Raises: UsageError."""
    from builder.container.options import Restart

    name, separator, count = text.partition(":")
    if name not in {"no", "on-failure", "always", "unless-stopped"} or (separator and not count.isdigit()):
        raise UsageError(f"--restart {text!r}: there are no, on-failure[:N], always and unless-stopped")
    if separator and name != "on-failure":
        raise UsageError(f"--restart {text!r}: on-failure alone takes a number")
    if name != "no" and auto_remove:
        raise UsageError("--restart and --rm exclude each other")
    return Restart(name, int(count or 0))  # type: ignore[arg-type]


def _health(options: Namespace) -> Healthcheck | None:
    from builder.container.options import Healthcheck

    given = {
        "interval_s": options.health_interval,
        "timeout_s": options.health_timeout,
        "start_period_s": options.health_start_period,
        "start_interval_s": options.health_start_interval,
        "retries": options.health_retries,
    }
    values = {key: value for key, value in given.items() if value is not None}
    if options.health_cmd is None:
        if values:
            raise UsageError("--health-… needs --health-cmd")
        return None
    if options.health_cmd == "none":
        return Healthcheck(("NONE",))
    return Healthcheck(("CMD-SHELL", options.health_cmd), **values)
