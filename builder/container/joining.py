"""Namespaces of other containers: `--network container:NAME`, `--pid`, `--ipc`, `--uts`.

A container remembers whose namespaces it joins; they are looked up each time that it starts, as descriptors, so that
it is nobody else's that is joined. With the IPC namespace goes what is mounted at /dev/shm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.container import records
from builder.container.inside import first_process
from builder.container.records import ContainerError, Record
from builder.sandbox import enter
from layers import linux

_PREFIX = "container:"
_SHARED_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")


def resolve(root: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """By kind of namespace, the IDs of the containers that `container:NAME` names. Raises: NoSuchContainer."""
    return {
        kind: records.find(root, where.removeprefix(_PREFIX)).id
        for kind, where in wanted.items()
        if where.startswith(_PREFIX)
    }


def names_of(root: Path, id: str, sandbox: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings of a sandbox is another's when it has that one's network: names, and name servers."""
    other = records.find(root, id).settings["sandbox"]
    theirs = {path: source for path, source in other["files"].items() if path in _SHARED_FILES}
    env = [[key, other["hostname"] if key == "HOSTNAME" else value] for key, value in sandbox["env"]]
    return {"files": {**sandbox["files"], **theirs}, "hostname": other["hostname"], "env": env}


def enter_user_namespace(root: Path, ids: Mapping[str, str]) -> None:
    """Be where those containers were started: an ordinary user's have a user namespace of their own.

    To be called while the process has one thread and no store open. Raises: ContainerError, SandboxError.
    """
    for id in sorted(set(ids.values())):
        with first_process(records.find(root, id)) as (pid, _pidfd):
            if enter.join_user_namespace(pid):
                linux.unshare(linux.CLONE_NEWNS)


@contextlib.contextmanager
def joined(record: Record) -> Iterator[dict[str, int]]:
    """Descriptors of the namespaces that a container joins, for `Launcher.run`; those that are ours anyway left out.

    Raises: ContainerError.
    """
    found: dict[str, int] = {}
    try:
        try:
            for kind, id in record.settings.get("joins", {}).items():
                _open(records.find(record.root, id), kind, found)
        except OSError as e:
            raise ContainerError(f"cannot join the namespaces of another container: {e.strerror}") from e
        yield found
    finally:
        for fd in found.values():
            os.close(fd)


def _open(other: Record, kind: str, found: dict[str, int]) -> None:
    """Add a container's namespace to the descriptors. Raises: ContainerError, OSError."""
    if other.settings.get("runtime"):
        raise ContainerError(f"container {other.name} is an OCI runtime's: its namespaces cannot be joined")
    with first_process(other) as (pid, pidfd):
        if os.path.samestat(os.stat(f"/proc/{pid}/ns/{kind}"), os.stat(f"/proc/self/ns/{kind}")):
            return
        found[kind] = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        if kind == "ipc":
            found["shm"] = _shared_memory(pid)
        linux.pidfd_send_signal(pidfd, 0)  # still the process that was meant


def _shared_memory(pid: int) -> int:
    """What a process has at /dev/shm, as a mount of its own, attached nowhere. Raises: OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    ours, theirs = os.open("/proc/self/ns/mnt", flags), os.open(f"/proc/{pid}/ns/mnt", flags)
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        place = linux.openat2(root, "dev/shm", os.O_PATH | os.O_DIRECTORY, resolve=linux.RESOLVE_NO_SYMLINKS)
        # A mount can be cloned in its own namespace alone.
        linux.setns(theirs, linux.CLONE_NEWNS)
        try:
            return linux.open_tree(
                place, "", linux.OPEN_TREE_CLOEXEC | linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH | linux.AT_RECURSIVE
            )
        finally:
            linux.setns(ours, linux.CLONE_NEWNS)
            os.fchdir(here)
            os.close(place)
    finally:
        for fd in (ours, theirs, root, here):
            os.close(fd)
