"""A `SandboxSpec` as JSON and back: what a container's settings keep of it, and its monitor starts.

What can be secret in a build (inline files) is a container's /etc/hosts here; everything else is a path.
"""

from __future__ import annotations

import binascii
from pathlib import Path

from builder.sandbox.spec import Resources, SandboxMount, SandboxSpec
from layers.snapshot import Mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLAIN = (
    *("cwd", "uid", "gid", "umask", "readonly_root", "files_readonly", "hostname", "network", "no_new_privs"),
    *("oom_score_adj", "isolation", "privileged", "init", "shm_size_bytes"),
)
_TUPLES = ("args", "groups", "masked_paths", "readonly_paths", "devices")


def encode(spec: SandboxSpec) -> dict[str, Any]:
    """The spec as JSON's types."""
    doc: dict[str, Any] = {name: getattr(spec, name) for name in _PLAIN}
    doc |= {name: list(getattr(spec, name)) for name in _TUPLES}
    doc["root"] = encode_mount(spec.root)
    doc["env"] = [list(pair) for pair in spec.environment().items()]
    doc["mounts"] = [_encode_sandbox_mount(mount) for mount in spec.mounts]
    doc["files"] = {target: _encode_source(source) for target, source in spec.files.items()}
    doc["shared"] = [list(pair) for pair in spec.shared]
    doc["sysctls"] = [list(pair) for pair in spec.sysctls]
    doc["add_hosts"] = [list(pair) for pair in spec.add_hosts]
    doc["capabilities"] = sorted(spec.capabilities)
    doc["seccomp"] = str(spec.seccomp)
    doc["rlimits"] = [list(row) for row in spec.rlimits]
    doc["resources"] = encode_resources(spec.resources)
    doc["stubs"] = None if spec.stubs is None else str(spec.stubs)
    return doc


def decode(doc: dict[str, Any], **changes: Any) -> SandboxSpec:
    """The spec, with `changes` to its fields."""
    fields: dict[str, Any] = {name: doc[name] for name in _PLAIN}
    fields |= {name: tuple(doc[name]) for name in _TUPLES}
    fields["root"] = decode_mount(doc["root"])
    fields["env"] = tuple((name, value) for name, value in doc["env"])
    fields["mounts"] = tuple(_decode_sandbox_mount(mount) for mount in doc["mounts"])
    fields["files"] = {target: _decode_source(source) for target, source in doc["files"].items()}
    fields["shared"] = tuple((kind, where) for kind, where in doc.get("shared", ()))
    fields["sysctls"] = tuple((name, value) for name, value in doc.get("sysctls", ()))
    fields["add_hosts"] = tuple((name, address) for name, address in doc["add_hosts"])
    fields["capabilities"] = frozenset(doc["capabilities"])
    seccomp = doc["seccomp"]
    fields["seccomp"] = seccomp if seccomp in {"default", "unconfined"} else Path(seccomp)
    fields["rlimits"] = tuple((name, soft, hard) for name, soft, hard in doc["rlimits"])
    fields["resources"] = decode_resources(doc["resources"])
    fields["stubs"] = None if doc["stubs"] is None else Path(doc["stubs"])
    return SandboxSpec(**{**fields, **changes})


def encode_mount(mount: Mount) -> dict[str, Any]:
    return {
        "type": mount.type,
        "lower": [str(path) for path in mount.lower],
        "upper": None if mount.upper is None else str(mount.upper),
        "work": None if mount.work is None else str(mount.work),
        "readonly": mount.readonly,
        "dialect": mount.dialect,
        "program": mount.program,
    }


def decode_mount(doc: dict[str, Any]) -> Mount:
    return Mount(
        doc["type"],
        tuple(Path(path) for path in doc["lower"]),
        None if doc["upper"] is None else Path(doc["upper"]),
        None if doc["work"] is None else Path(doc["work"]),
        doc["readonly"],
        doc["dialect"],
        doc.get("program"),
    )


def encode_resources(resources: Resources) -> dict[str, Any]:
    doc = {key: value for key, value in resources._asdict().items() if value is not None}
    for key in ("io", "hugetlb"):
        if key in doc:
            doc[key] = [list(row) for row in doc[key]]
    return doc


def decode_resources(doc: dict[str, Any]) -> Resources:
    fields = dict(doc)
    for key in ("io", "hugetlb"):
        if key in fields:
            fields[key] = tuple(tuple(row) for row in fields[key])
    return Resources(**fields)


def _encode_sandbox_mount(mount: SandboxMount) -> dict[str, Any]:
    doc = mount._asdict()
    doc["source"] = _encode_source(mount.source)
    return doc


def _decode_sandbox_mount(doc: dict[str, Any]) -> SandboxMount:
    return SandboxMount(**{**doc, "source": _decode_source(doc["source"])})


def _encode_source(source: Path | Mount | bytes | None) -> Any:
    if isinstance(source, bytes):
        return {"data": binascii.b2a_base64(source, newline=False).decode()}
    if isinstance(source, Mount):
        return {"tree": encode_mount(source)}
    return None if source is None else str(source)


def _decode_source(doc: Any) -> Any:
    if isinstance(doc, dict):
        return decode_mount(doc["tree"]) if "tree" in doc else binascii.a2b_base64(doc["data"])
    return None if doc is None else Path(doc)
