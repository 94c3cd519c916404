"""What `run`, `commit`, `inspect`, `diff` and `export` do with working containers; other modules read their flags."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli import sandboxflags
from builder.cli.byhand import finder, opened, request_of, tell
from builder.cli.options import epoch_of, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.container.byhand import Command, Streams
    from builder.plan.request import BuildRequest, NetworkMode, SecretSource
    from builder.sandbox.launcher import ExitStatus

_RUN_FLAGS = frozenset({
    "help", "root", "debug", "image", "command", "interactive", "tty", "env", "env_file", "workdir", "user",
    "privileged", "volume", "mount", "hostname", "network", "isolation", "runtime", "authfile", "tls_verify",
    "add_host", "dns", "dns_search", "dns_option", "no_hosts", "device", "cap_add", "cap_drop", "security_opt",
    "ulimit", "shm_size", "memory", "memory_swap", "cpus", "cpu_shares", "cpu_period", "cpu_quota", "cpuset_cpus",
    "cpuset_mems", "pids_limit", "device_read_bps", "device_write_bps", "device_read_iops", "device_write_iops",
    "hugetlb_limit", "pid", "ipc", "uts", "cgroupns", "userns", "cgroup_parent",
    "cdi_spec_dir",
})  # fmt: skip
"""The flags of `run` that mean something in a working container."""


def run(options: Namespace, env: tuple[tuple[str, str], ...], command: tuple[str, ...]) -> int:
    """`pybuild run CONTAINER -- COMMAND…`. `options` has `known_flags`, to tell what was given."""
    from builder import api
    from builder.container import byhand
    from builder.sandbox.tiers import start_launcher

    for dest, (flag, default) in options.known_flags.items():
        if dest not in _RUN_FLAGS and getattr(options, dest) != default:
            raise UsageError(f"{flag} means nothing in a working container", hint="it is built, not started")
    if not command:
        raise UsageError("run: which command?", hint=f"pybuild run {options.image} -- COMMAND…")
    if options.tty and options.interactive and not os.isatty(0):
        raise UsageError("the input is not a terminal", hint="leave out -t")
    root = store_root(options)
    request, mounts = _request(options)
    api.prepare_namespaces(options.isolation)
    # Before the store is open, and before anything starts a thread.
    own_pids = "pid" not in request.run.shared
    launcher = start_launcher(options.isolation, getattr(options, "runtime", None), own_pids=own_pids)
    try:
        with opened(root, options.image) as container:
            if launcher.bare and container.store.snapshots.driver == "overlay":
                raise UsageError("--isolation chroot is not possible: the container's files are overlays")
            ended = byhand.run_step(
                container,
                _command(options, env, command, mounts),
                request,
                launcher,
                _streams(options),
                finder(container, root, with_registry_flags(options)),
            )
    finally:
        launcher.close()
    if ended.code:
        _tell_failure(ended, kept=options.tty)
    return ended.code


def _tell_failure(ended: ExitStatus, *, kept: bool) -> None:
    what = "was killed: out of memory" if ended.oom_killed else f"ended with status {ended.code}"
    tell(f"the command {what}; " + ("its changes are kept" if kept else "the container is as it was before"))


def _command(
    options: Namespace, env: tuple[tuple[str, str], ...], command: tuple[str, ...], mounts: tuple[str, ...]
) -> Command:
    from builder.container.byhand import Command

    if options.tty and not any(name == "TERM" for name, _ in env):
        env = (("TERM", "xterm"), *env)
    return Command(
        args=command,
        user=options.user,
        workdir=options.workdir,
        env=env,
        mounts=mounts,
        hostname=options.hostname,
        privileged=options.privileged,
    )


def _streams(options: Namespace) -> Streams:
    from builder.container.byhand import Streams

    if not options.tty:
        return Streams(0 if options.interactive else None)
    from builder.container.front import Front

    return Streams(terminal=Front(tty=True, stdin=options.interactive))


def with_registry_flags(options: Namespace) -> Namespace:
    """The flags of `run`, with those of a pull that it has not."""
    absent = dict.fromkeys(("creds", "cert_dir", "no_creds", "registries_conf", "signature_policy"))
    return Namespace(**{**absent, **vars(options)})


def _request(options: Namespace) -> tuple[BuildRequest, tuple[str, ...]]:
    """The request of the step, and the mounts that are RUN's own. Raises: UsageError."""
    from builder.plan.request import ResourceLimits, RunOptions

    secrets: dict[str, SecretSource] = {}
    mounts = tuple(_mount(text, secrets) for text in options.mount)
    agent = os.environ.get("SSH_AUTH_SOCK")
    proxies = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
    request = request_of(
        options,
        build_args={name: os.environ[name] for key in proxies for name in (key.upper(), key) if name in os.environ},
        secrets=secrets,
        ssh={"default": Path(agent)} if agent else {},
        run=RunOptions(
            network=_network(options),
            add_hosts=sandboxflags.added_hosts(options),
            cap_add=tuple(options.cap_add),
            cap_drop=tuple(options.cap_drop),
            security_opt=tuple(options.security_opt),
            ulimits=sandboxflags.ulimits(options),
            shm_size_bytes=options.shm_size,
            volumes=tuple(_volume(text) for text in options.volume),
            isolation=options.isolation,
            limits=sandboxflags.limits(options, ResourceLimits),
            dns=sandboxflags.name_servers(options),
            dns_search=sandboxflags.one_line(options.dns_search, "--dns-search"),
            dns_options=sandboxflags.one_line(options.dns_option, "--dns-option"),
            no_hosts=options.no_hosts,
            devices=sandboxflags.devices(options),
            cdi_devices=sandboxflags.cdi_devices(options),
            cdi_directories=sandboxflags.cdi_directories(options),
            shared=sandboxflags.of_host(options),
            runtime=getattr(options, "runtime", None),
        ),
    )
    return request, mounts


def _network(options: Namespace) -> NetworkMode:
    from builder.cli.run import network_choice

    if (options.network or "").startswith("container:"):
        raise UsageError(f"--network {options.network}: a working container joins no other")
    return network_choice(options)  # type: ignore[return-value]


def _volume(text: str) -> str:
    """`HOST:CTR[:ro]` with whole paths. Raises: UsageError."""
    source, _, rest = text.partition(":")
    target, _, words = rest.partition(":")
    flags = set(words.split(",")) - {""}
    if not source or not target.startswith("/") or flags - {"ro", "rw", "z", "Z"}:
        raise UsageError(f"-v {text!r}: expected HOST:CONTAINER[:ro]", hint="a working container has no named volumes")
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise UsageError(f"-v {text!r}: there is no {path} here")
    return f"{path}:{target}:{'ro' if 'ro' in flags else 'rw'}"


def _mount(text: str, secrets: dict[str, SecretSource]) -> str:
    """A mount as RUN has it; the file or variable that a secret comes from goes to `secrets`. Raises: UsageError."""
    from builder.plan.request import SecretSource

    words = text.split(",")
    table = dict(word.partition("=")[::2] for word in words)
    if table.get("type") != "secret":
        return text
    id = table.get("id") or os.path.basename(table.get("target") or table.get("dst") or "")
    source = table.get("src") or table.get("source")
    if source:
        secrets[id or os.path.basename(source)] = SecretSource(path=Path(source).expanduser().absolute())
    elif "env" in table:
        if table["env"] not in os.environ:
            raise UsageError(f"--mount {text!r}: the environment has no {table['env']}")
        secrets[id or table["env"]] = SecretSource(value=os.fsencode(os.environ[table["env"]]))
    else:
        raise UsageError(f"--mount {text!r}: where does the secret come from?", hint="add src=FILE or env=NAME")
    kept = [word for word in words if word.partition("=")[0] not in {"src", "source", "env", "id", "required"}]
    return ",".join([*kept, f"id={id or os.path.basename(source or table.get('env', ''))}", "required=true"])


# commit


def commit(options: Namespace) -> int:
    """`pybuild commit CONTAINER [IMAGE]`; the image's name may be of any transport."""
    from builder import api
    from builder.container import assemble, configuration, working
    from registry.transport import split_transport

    root = store_root(options)
    transport, rest = split_transport(options.image) if options.image else (None, "")
    elsewhere = transport not in {None, "storage"}
    changes = [configuration.instruction_change(text) for text in options.change]
    with opened(root, options.name) as container:
        made = assemble.commit_working(
            container,
            assemble.ImageOptions(
                names=_names(rest) if rest and not elsewhere else (),
                changes=changes,
                author=options.author,
                message=options.message,
                squash=options.squash,
                omit_history=options.omit_history,
                epoch_s=epoch_of(options),
                format=options.format,
                compression=options.compression,
            ),
        )
    if elsewhere:
        api.copy(f"storage:{made.image_id}", options.image, root=root)
    if options.iidfile:
        Path(options.iidfile).write_text(made.image_id)
    if options.rm:
        with api.open_store(root) as store:
            working.remove(store, working.find(root, options.name))
    if not options.quiet:
        print(made.image_id)
    return 0


def _names(text: str) -> tuple[str, ...]:
    from registry.stored import store_name

    return (store_name(text),)


# inspect, diff, export


def inspect(root: Path, name: str) -> dict[str, Any]:
    from builder.container import assemble, working

    return assemble.inspect_document(working.find(root, name))


def diff(root: Path, name: str) -> int:
    from builder.cli.differ import print_changes
    from builder.container import assemble

    with opened(root, name) as container, assemble.changes_of(container) as changes:
        print_changes(changes)
    return 0


def export(root: Path, name: str, output: str | None) -> int:
    from builder.cli.archives import output_file
    from builder.container import mounting
    from builder.rootfs import export_tree

    with opened(root, name) as container, mounting.set_aside(container), output_file(output) as sink:
        export_tree(container.view(), sink)
    return 0
