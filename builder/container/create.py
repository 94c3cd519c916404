"""From a `ContainerOptions` to a container on disk: its image found, its snapshot prepared, its settings written.

The image's config is merged with what was asked for, as docker does it. Callers have entered the
user namespace (`builder.api.prepare_namespaces`) before the store was opened.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Callable
from pathlib import Path

from builder.container import codec, events
from builder.container.options import ContainerOptions, Healthcheck, VolumeMount
from builder.container.records import EXIT_ROOM_BYTES, ContainerError, Record, create, drop_name
from builder.errors import ContextError, ParseError
from builder.sandbox import options as rights
from builder.sandbox.spec import DEFAULT_PATH, SandboxMount, SandboxSpec
from layers.errors import NameNotFound
from layers.snapshot import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from layers.image import Image
    from layers.oci import Platform
    from layers.snapshot import ActiveSnapshot
    from layers.store import Store

Warn = Callable[[str], None]
_MAX_VOLUMES = 256
_MAX_PORTS = 1024
"""What an image may ask for by its config alone: each costs a directory and a mount, or two sockets."""


def find_image(store: Store, name: str, pull: Callable[[], None] | None, platform: Platform | None = None) -> Image:
    """An image of the store; if it is missing, `pull` is called once, if given. Raises: NameNotFound, ImageError."""
    from builder.rootfs import find

    try:
        return find(store, name, platform)
    except NameNotFound:
        if pull is None:
            raise
        pull()
        return find(store, name, platform)


def create_container(
    store: Store, image: Image, options: ContainerOptions, *, kind: str = "run", warn: Warn = lambda _words: None
) -> Record:
    """Make a container that can be started. Nothing is left where it fails.

    Raises: ContainerError (name taken, an option that cannot be), ContextError (user unknown), StoreError.
    """
    from builder.container.lifecycle import sweep
    from layers.image import unpack_image

    id = os.urandom(32).hex()
    name = options.name if options.name is not None else _random_name()
    top = unpack_image(store, image)
    sweep(store)
    record = create(store.root, id, name)
    active: ActiveSnapshot | None = None
    made: list[str] = []
    try:
        active = store.snapshots.prepare(top, keep=id)
        _write_base(record, image)
        settings = _settings(store, image, options, active, record, made, warn)
        settings |= {"id": id, "name": name, "kind": kind, "snapshot": id, "parent": top}
        record.settings = settings
        record.save_state(status="created", pid=0, exit_code=0, restarts=0)
        record.save_settings()
        events.of_container(record, "create")
    except BaseException:
        from layers.trees import remove_tree

        if active is not None:
            store.snapshots.discard(active)
        drop_name(store.root, name, id)
        remove_tree(str(record.directory))
        for volume in made:
            from builder.container import volumes

            volumes.remove(store.root, volume, in_use={})
        raise
    return record


def _random_name() -> str:
    from builder.container.nicknames import random_name

    return random_name()


def _write_base(record: Record, image: Image) -> None:
    """The image's documents: a `commit` needs them when the image has lost its name."""
    base = record.path("base")
    base.mkdir(mode=0o700)
    for name, data in (("manifest.json", image.manifest.raw), ("config.json", image.config.raw)):
        (base / name).write_bytes(data)
    fd = os.open(record.path("exit"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b" " * EXIT_ROOM_BYTES)
    finally:
        os.close(fd)


def merged_config(config: dict[str, Any], options: ContainerOptions) -> dict[str, Any]:
    """The image's config with what the options say instead: the container's own, and that of its commits."""
    merged = {key: value for key, value in config.items() if value is not None}
    env = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
    env.update(options.env)
    for name in options.unset_env:
        env.pop(name, None)
    merged["Env"] = [f"{key}={value}" for key, value in env.items()]
    if options.entrypoint is not None:
        # An entrypoint of one's own leaves the image's command behind.
        merged["Entrypoint"] = list(options.entrypoint)
        merged["Cmd"] = []
    if options.command:
        merged["Cmd"] = list(options.command)
    if options.user is not None:
        merged["User"] = options.user
    if options.workdir is not None:
        merged["WorkingDir"] = options.workdir
    if options.stop_signal is not None:
        merged["StopSignal"] = options.stop_signal
    if options.labels:
        merged["Labels"] = {**(config.get("Labels") or {}), **dict(options.labels)}
    if options.ports:
        exposed: dict[str, Any] = {f"{port.port}/{port.protocol}": {} for port in options.ports}
        merged["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **exposed}
    if options.exposed:
        merged["ExposedPorts"] = {**(merged.get("ExposedPorts") or {}), **{port: {} for port in options.exposed}}
    if options.no_healthcheck:
        merged["Healthcheck"] = {"Test": ["NONE"]}
    elif options.health is not None:
        merged["Healthcheck"] = health_document(options.health)
    return merged


def health_document(health: Healthcheck) -> dict[str, Any]:
    """As an image's config has it: times in nanoseconds."""
    return {
        "Test": list(health.test),
        "Interval": round(health.interval_s * 1e9),
        "Timeout": round(health.timeout_s * 1e9),
        "StartPeriod": round(health.start_period_s * 1e9),
        "StartInterval": round(health.start_interval_s * 1e9),
        "Retries": health.retries,
    }


def argv(config: dict[str, Any]) -> tuple[str, ...]:
    """What to execute. Raises: ContainerError if there is nothing."""
    words = (*_words(config.get("Entrypoint")), *_words(config.get("Cmd")))
    if not words:
        raise ContainerError("no command: the image has neither ENTRYPOINT nor CMD", hint="give one after the image")
    return words


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _settings(
    store: Store,
    image: Image,
    options: ContainerOptions,
    active: ActiveSnapshot,
    record: Record,
    made: list[str],
    warn: Warn,
) -> dict[str, Any]:
    config = merged_config(dict(image.config.config), options)
    network, words = _network(options)
    if words:
        warn(words)
    mounts, named = _mounts(store.root, config, options, _of_image(active.mount), made)
    joins: dict[str, str] = {}
    if options.shared:
        from builder.container import joining

        joins = joining.resolve(store.root, dict(options.shared))
    spec = sandbox_spec(store.root, config, options, active.mount, record.id, network, mounts)
    sandbox = codec.encode(spec)
    if "net" in joins:
        sandbox |= joining.names_of(store.root, joins["net"], sandbox)
    stop = _stop_signal(config, options, warn)
    ports: list[list[str | int]] = [list(port) for port in options.ports]
    if options.publish_all:
        ports += _exposed(config, options)
    if ports and network == "host":
        warn("with the host's network nothing is published: -p has no effect")
        ports = []
    return {
        "image": options.image,
        "image_id": str(image.image_id),
        "created_ns": time.time_ns(),
        "config": config,
        "sandbox": sandbox,
        "joins": joins,
        "driver": store.snapshots.driver,
        "tty": options.tty,
        "stdin": options.stdin,
        "window": list(options.window),
        "log_bytes": options.log_bytes,
        "auto_remove": options.auto_remove,
        "restart": list(options.restart),
        "stop_signal": stop,
        "stop_timeout_s": options.stop_timeout_s,
        "timeout_s": options.timeout_s,
        "pid_file": None if options.pid_file is None else str(options.pid_file),
        "ports": ports,
        "runtime": _runtime(options),
        "volumes": named,
        "steps": [],
    }


def _stop_signal(config: dict[str, Any], options: ContainerOptions, warn: Warn) -> str:
    """What `stop` is to send. An image's that is none is as if it had none: what it says must not keep it running.

    Raises: ContainerError for one that was asked for.
    """
    from builder.container.lifecycle import signal_number

    text = str(config.get("StopSignal") or "SIGTERM")
    try:
        signal_number(text)
    except ContainerError:
        if options.stop_signal is not None:
            raise
        warn(f"the image's stop signal {text[:40]!r} is none: SIGTERM is sent")
        return "SIGTERM"
    return text


def _exposed(config: dict[str, Any], options: ContainerOptions) -> list[list[str | int]]:
    """The image's ports that are not published yet, each at whatever port of the host. Raises: ContainerError."""
    from builder.frontend.ports import parse_ports

    hint = "publish single ones with -p"
    known = {(port.port, port.protocol) for port in options.ports}
    found: list[list[str | int]] = []
    for text in config.get("ExposedPorts") or {}:
        try:
            single = parse_ports([text])
        except ParseError as e:
            raise ContainerError(f"the image exposes a port that is none: {e.message}", hint=hint) from e
        for number, _, protocol in (port.partition("/") for port in single):
            if (int(number), protocol) not in known:
                known.add((int(number), protocol))
                found.append(["", 0, int(number), protocol])
        if len(found) > _MAX_PORTS:
            raise ContainerError(f"the image exposes more than {_MAX_PORTS} ports", hint=hint)
    return found


def sandbox_spec(
    root: Path,
    config: dict[str, Any],
    options: ContainerOptions,
    mount: Mount,
    id: str,
    network: str,
    mounts: list[SandboxMount],
) -> SandboxSpec:
    """The sandbox of a container whose config and tree these are. Raises: ContextError, ContainerError."""
    from builder.solve.accounts import user_in

    tree = _of_image(mount)
    user = user_in(tree, str(config.get("User") or ""))
    cwd = str(config.get("WorkingDir") or "/")
    if not cwd.startswith("/"):
        raise ContainerError(f"the working directory {cwd!r} is not absolute")
    if cwd != "/":
        _make_workdir(mount, cwd, (user.uid, user.gid))
    of_host = network == "host" or ("uts", "host") in options.shared
    hostname = options.hostname or (os.uname().nodename if of_host else id[:12])
    env = {"PATH": DEFAULT_PATH}
    env.update(entry.partition("=")[::2] for entry in config["Env"])
    env.setdefault("HOME", user.home)
    env.setdefault("HOSTNAME", hostname)
    if options.tty:
        env.setdefault("TERM", "xterm")
    chosen = rights.security(options.security_opt)
    groups = [*user.groups, *_extra_groups(tree, options.group_add)]
    spec = SandboxSpec(
        args=argv(config) if config.get("Entrypoint") or config.get("Cmd") else ("/bin/sh",),
        root=mount,
        env=tuple(env.items()),
        cwd=cwd,
        uid=user.uid,
        gid=user.gid,
        groups=tuple(dict.fromkeys(groups)),
        readonly_root=options.read_only,
        mounts=tuple(mounts),
        files={
            "/etc/resolv.conf": rights.resolv_conf(options.dns, options.dns_search, options.dns_options),
            "/etc/hostname": f"{hostname}\n".encode(),
            **({} if options.no_hosts else {"/etc/hosts": rights.hosts(hostname, of_host=network == "host")}),
            **({} if options.time_zone is None else {"/etc/localtime": options.time_zone}),
        },
        files_readonly=options.read_only,
        add_hosts=options.add_hosts,
        hostname=hostname,
        network=network,  # type: ignore[arg-type]
        shared=tuple((kind, "host" if where == "host" else "joined") for kind, where in options.shared),  # type: ignore[misc]
        capabilities=rights.capabilities(options.cap_add, options.cap_drop),
        no_new_privs=chosen.no_new_privs,
        seccomp=chosen.seccomp,
        rlimits=options.ulimits,
        oom_score_adj=options.oom_score_adj,
        sysctls=options.sysctls,
        umask=options.umask,
        devices=options.devices,
        resources=options.limits._replace(accounting=True),
        isolation="auto" if options.isolation == "oci" else options.isolation,
        privileged=options.privileged,
        init=options.init,
        shm_size_bytes=options.shm_size_bytes,
        stubs=root / "stubs",
    )
    if options.cdi_devices:
        from builder.sandbox import cdi

        spec = cdi.apply(spec, cdi.find(options.cdi_devices, options.cdi_directories))
    return spec


def _of_image(mount: Mount) -> Mount:
    """The tree of a container that nothing was written to yet: its upper directory can be mounted only once."""
    if mount.upper is None:
        return mount
    return Mount("overlay" if len(mount.lower) > 1 else "bind", mount.lower, readonly=True, dialect=mount.dialect)


def _make_workdir(mount: Mount, cwd: str, owner: tuple[int, int]) -> None:
    """WORKDIR is there when the command starts, whoever removed it."""
    from builder.rootfs import opened
    from builder.solve import fileops
    from layers import linux

    with opened(mount) as fd:
        try:
            os.close(linux.openat2(fd, cwd.lstrip("/"), os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            fileops.make_directory(fd, cwd, 0o755, owner)
        except OSError as e:
            raise ContextError(f"the working directory {cwd}: {os.strerror(e.errno or 0)}") from e


def _extra_groups(mount: Mount, names: tuple[str, ...]) -> list[int]:
    from builder.solve.accounts import user_in

    return [user_in(mount, f"0:{name}").gid for name in names]


def _runtime(options: ContainerOptions) -> str | None:
    """The OCI runtime's path. Raises: SandboxError if it is not installed."""
    if options.isolation != "oci":
        if options.runtime is not None:
            raise ContainerError("a runtime goes with isolation oci alone", hint="--isolation oci --runtime NAME")
        return None
    from builder.sandbox.oci import find_runtime

    return find_runtime(options.runtime)


def _network(options: ContainerOptions) -> tuple[str, str]:
    """(the network, a word where it is not the one that would be best)."""
    if options.network != "default":
        return options.network, ""
    if options.isolation == "oci":
        return "host", "the container has the host's network: isolation oci has no private one"
    from builder.sandbox import network

    obstacle = network.obstacle()
    if obstacle is None:
        return "private", ""
    return "host", f"the container has the host's network: {obstacle}"


# Volumes


def _mounts(
    root: Path, config: dict[str, Any], options: ContainerOptions, tree: Mount, made: list[str]
) -> tuple[list[SandboxMount], list[dict[str, Any]]]:
    """The sandbox's mounts, and the volumes among them by name; what was made anew goes to `made`."""
    wanted = {_target(mount.target): mount for mount in options.mounts}
    if len(wanted) < len(options.mounts):
        raise ContainerError("two mounts have the same target")
    of_image = config.get("Volumes") or {}
    if len(of_image) > _MAX_VOLUMES:
        raise ContainerError(f"the image declares {len(of_image)} volumes; more than {_MAX_VOLUMES} are refused")
    for target in map(_target, of_image):
        if (target + "/").startswith("/proc/"):
            raise ContainerError(f"the image declares a volume at {target}, in place of what the kernel has there")
        wanted.setdefault(target, VolumeMount("volume", target))
    mounts: list[SandboxMount] = []
    named: list[dict[str, Any]] = []
    # Outer ones first, or an inner one would be hidden.
    for target, mount in sorted(wanted.items(), key=lambda item: item[0].count("/")):
        if mount.type == "tmpfs":
            mounts.append(
                SandboxMount(
                    "tmpfs",
                    target,
                    mode=mount.mode,
                    size_bytes=mount.size_bytes,
                    readonly=mount.readonly,
                    noexec=mount.noexec,
                )
            )
        elif mount.type == "bind":
            mounts.append(_bind(mount, target))
        else:
            mounts.append(_volume(root, mount, target, tree, named, made))
    return mounts, named


def _target(path: str) -> str:
    """Where a mount goes, in its shortest form. Raises: ContainerError."""
    target = "/" + posixpath.normpath(path).lstrip("/")
    if not path.startswith("/"):
        raise ContainerError(f"the mount's target {path!r} is not absolute")
    if target == "/":
        raise ContainerError("nothing can be mounted at /")
    return target


def _bind(mount: VolumeMount, target: str) -> SandboxMount:
    source = Path(mount.source).absolute()
    if not source.exists():
        raise ContainerError(f"the host has no {source} to mount at {target}", hint="make it first")
    return SandboxMount(
        "bind", target, source, readonly=mount.readonly, is_file=not source.is_dir(), recursive=mount.recursive,
        noexec=mount.noexec,
    )  # fmt: skip


def _volume(
    root: Path, mount: VolumeMount, target: str, tree: Mount, named: list[dict[str, Any]], made: list[str]
) -> SandboxMount:
    from builder.container import volumes

    try:
        volume = volumes.get(root, mount.source) if mount.source else None
    except volumes.NoSuchVolume:
        volume = None
    if volume is None:
        volume = volumes.create(root, mount.source or None)
        made.append(volume.name)
    if mount.copy:
        volumes.fill(volume, tree, target)
    named.append({"name": volume.name, "target": target, "anonymous": not mount.source})
    return SandboxMount("bind", target, volume.path, readonly=mount.readonly, noexec=mount.noexec)
