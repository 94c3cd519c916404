"""Devices by the names of the Container Device Interface, `vendor.com/class=name`: what a sandbox needs for them.

Vendors describe their devices in JSON or YAML files of a few directories: nodes, mounts, environment, groups.
`find` reads these and returns the sum as `Edits`, which `apply` puts into a spec. What would have to be run
on the host for a device (hooks), or what nothing here does, is refused by name: such a device does not work
without it. https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from builder.errors import SandboxError
from builder.sandbox.spec import SandboxMount, SandboxSpec
from layers.values import NamedTuple, replace

DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
"""Of the specification; what is in a later one goes before what is in an earlier one."""
_SUFFIXES = (".json", ".yaml", ".yml")
_MAX_FILES = 1000
_MAX_BYTES = 4 << 20
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_REFUSED = ("hooks", "intelRdt", "netDevices")
_HARMLESS = frozenset({"rw", "bind", "rbind", "nosuid", "nodev", "exec", "private", "rprivate", "slave", "rslave"})


class Edits(NamedTuple):
    """What devices ask for."""

    env: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    """As `SandboxSpec.devices` has them."""
    mounts: tuple[SandboxMount, ...] = ()
    groups: tuple[int, ...] = ()


class _Device(NamedTuple):
    file: str
    edits: tuple[dict[str, Any], ...]
    """Those of the whole file, and its own."""


class NoSuchDevice(SandboxError):
    """No file describes the device."""


def is_name(text: str) -> bool:
    """Whether this is a CDI name, with or without a device's (`=*` is all of a kind), and not a path."""
    kind, equals, name = text.partition("=")
    return bool(_KIND.fullmatch(kind)) and (not equals or name == "*" or bool(_DEVICE.fullmatch(name)))


def find(names: Iterable[str], directories: Sequence[str] = DIRECTORIES) -> Edits:
    """What these devices need together. Raises: NoSuchDevice; SandboxError for a device that cannot be had here."""
    known, broken = _load(directories)
    edits = Edits()
    done: set[int] = set()
    for name in dict.fromkeys(names):
        for full in _chosen(name, known, broken, directories):
            device = known[full]
            for part in device.edits:
                if id(part) not in done:  # of the same file's devices, what is common counts once
                    done.add(id(part))
                    edits = _with(edits, part, f"CDI device {full} ({device.file})")
    return edits


def apply(spec: SandboxSpec, edits: Edits) -> SandboxSpec:
    """The spec with the devices."""
    return replace(
        spec,
        env=(*spec.environment().items(), *edits.env),
        devices=tuple(dict.fromkeys((*spec.devices, *edits.nodes))),
        mounts=(*spec.mounts, *edits.mounts),
        groups=tuple(dict.fromkeys((*spec.groups, *edits.groups))),
    )


def _chosen(name: str, known: dict[str, _Device], broken: list[str], directories: Sequence[str]) -> list[str]:
    """The full names that one means: itself, all of its kind, or without a device's name the kind's first."""
    kind, equals, device = name.partition("=")
    found = sorted(
        full for full in known if full.partition("=")[0] == kind and device in {"", "*", full[len(kind) + 1 :]}
    )
    if not found:
        hint = f"of {', '.join(directories)}" + (f"; not to be read: {'; '.join(broken)}" if broken else "")
        raise NoSuchDevice(
            f"there is no CDI device {name}", operation="device", hint=f"none is described in the files {hint}"
        )
    return found if equals else found[:1]


def _load(directories: Sequence[str]) -> tuple[dict[str, _Device], list[str]]:
    """All devices by name, and what is wrong with files that cannot be read."""
    known: dict[str, _Device] = {}
    broken: list[str] = []
    for directory in directories:
        here: dict[str, _Device] = {}
        twice: set[str] = set()
        try:
            names = sorted(os.listdir(directory))[:_MAX_FILES]
        except OSError:
            continue
        for name in names:
            if name.endswith(_SUFFIXES):
                path = f"{directory}/{name}"
                try:
                    found = _described(path)
                except (OSError, ValueError) as e:
                    broken.append(f"{path}: {e.strerror if isinstance(e, OSError) else e}")
                    continue
                twice |= here.keys() & found.keys()
                here |= found
        for full in twice:
            broken.append(f"{full} is described twice in {directory}")
            del here[full]
        known |= here
    return known, broken


def _described(path: str) -> dict[str, _Device]:
    """The devices of one file. Raises: OSError, ValueError for what is no such file."""
    with open(path, "rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("it is too large")
    document = _parsed(path, data)
    kind, devices = document.get("kind"), document.get("devices")
    if not isinstance(document.get("cdiVersion"), str) or not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise ValueError("it has no cdiVersion, or no kind such as vendor.com/class")
    if not isinstance(devices, list):
        raise ValueError("it has no list of devices")  # noqa: TRY004 - what is wrong is the file
    common = document.get("containerEdits") or {}
    found: dict[str, _Device] = {}
    for device in devices:
        name = device.get("name") if isinstance(device, dict) else None
        own = device.get("containerEdits") or {} if isinstance(device, dict) else None
        if not isinstance(name, str) or not _DEVICE.fullmatch(name) or not isinstance(own, dict):
            raise ValueError("a device of it has no name, or no edits")
        found[f"{kind}={name}"] = _Device(path, (common, own))
    if not isinstance(common, dict):
        raise ValueError("containerEdits is no map")  # noqa: TRY004 - what is wrong is the file
    return found


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    try:
        if path.endswith(".json"):
            document = json.loads(data)
        else:
            import yaml

            try:
                document = yaml.safe_load(data)
            except yaml.YAMLError as e:
                raise ValueError(str(e).replace("\n", " ")) from e
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(document, dict):
        raise ValueError("expected a map at the top")  # noqa: TRY004 - what is wrong is the file
    return document


def _with(edits: Edits, part: dict[str, Any], what: str) -> Edits:
    """Add one part of a file. Raises: SandboxError for what cannot be."""
    for key in _REFUSED:
        if part.get(key):
            raise SandboxError(
                f"{what} needs {_shown(key, part[key])}, which nothing here does", operation="device",
                hint="its nodes can be given by path (--device PATH), its files by --volume",
            )  # fmt: skip
    unknown = part.keys() - {"env", "deviceNodes", "mounts", "additionalGids", *_REFUSED}
    if unknown:
        raise SandboxError(f"{what}: {min(map(str, unknown))} is not known here", operation="device")
    try:
        return Edits(
            (*edits.env, *(_variable(entry) for entry in part.get("env") or ())),
            (*edits.nodes, *(_node(node) for node in part.get("deviceNodes") or ())),
            (*edits.mounts, *(_mount(mount) for mount in part.get("mounts") or ())),
            (*edits.groups, *(_group(gid) for gid in part.get("additionalGids") or ())),
        )
    except (ValueError, TypeError, AttributeError) as e:
        raise SandboxError(f"{what}: {e}", operation="device") from e


def _shown(key: str, value: Any) -> str:
    if key != "hooks" or not isinstance(value, list) or not isinstance(value[0], dict):
        return str(key)
    return f"the hook {value[0].get('hookName')} {value[0].get('path')}"


def _variable(entry: Any) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not name or not equals or "\0" in entry:
        raise ValueError(f"the variable {entry!r} is not NAME=VALUE")
    return name, value


def _group(gid: Any) -> int:
    if not isinstance(gid, int) or isinstance(gid, bool) or not 0 < gid < 1 << 32:
        raise ValueError(f"the group {gid!r} is no number of one")
    return gid


def _node(node: Any) -> str:
    """A node of the host's, under the name that it is to have: HOST or HOST:PATH. Nodes are bound, never made."""
    path = node.get("path")
    host = node.get("hostPath") or path
    for given in (path, host):
        if not isinstance(given, str) or not given.startswith("/dev/") or ".." in given.split("/") or ":" in given:
            raise ValueError(f"the node {given!r} is not beneath /dev")
    try:
        status = os.stat(host)
    except OSError as e:
        raise ValueError(f"the node {host}: {e.strerror}") from e
    letter = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}.get(stat.S_IFMT(status.st_mode))
    has = {
        "type": letter, "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev),
        "fileMode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "gid": status.st_gid,
    }  # fmt: skip
    if letter is None:
        raise ValueError(f"{host} is no device")
    for key, value in has.items():
        wanted = node.get(key)
        if wanted not in {None, value} and not (key == "type" and wanted in {"", "u"} and letter == "c"):
            raise ValueError(f"the node {host} has not the {key} {wanted!r} that is asked for")
    return host if host == path else f"{host}:{path}"


def _mount(mount: Any) -> SandboxMount:
    source, target = mount.get("hostPath"), mount.get("containerPath")
    options = mount.get("options") or []
    if mount.get("type") not in {None, "", "bind", "none"}:
        raise ValueError(f"a mount of type {mount['type']} is not possible")
    if not (isinstance(source, str) and source.startswith("/") and isinstance(target, str) and target.startswith("/")):
        raise ValueError("a mount's paths are not absolute")
    unknown = {*options} - _HARMLESS - {"ro", "noexec"}
    if unknown:
        raise ValueError(f"the mount option {min(unknown)} is not possible")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"the host has no {source} to mount")
    return SandboxMount(
        "bind", target, path, readonly="ro" in options, is_file=not path.is_dir(), noexec="noexec" in options,
        recursive="bind" not in options,
    )  # fmt: skip
