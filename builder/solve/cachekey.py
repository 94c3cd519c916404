"""Cache keys: digests of what a step depends on.

A step has two. Its *definition key* follows from the graph alone, with build contexts by content:
a cached build looks up these, and runs nothing to know them. Its *content key* follows from the
content keys of its inputs, and from the digests of the very files it copies: it finds the step
again when what came before was made anew but came out the same. Names, tags, times and secret
values count in neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from builder.plan.graph import CopyOp, MkdirOp, RunOp, SourceOp
from builder.plan.request import RunOptions
from layers.sha import sha256

_VERSION = 2
"""Raised when the meaning of an equal definition changes."""


def source_key(op: SourceOp) -> str:
    return _digest("source", str(op.image.digest))


def run_key(op: RunOp, options: RunOptions, parent: str | None, inputs: Sequence[str]) -> str:
    """`inputs` are the keys of the mounts' trees, in the order of the mounts that have one."""
    trees = iter(inputs)
    mounts = [[*m[:2], *m[3:], None if m.input is None else next(trees)] for m in op.mounts]
    files = [[path, sha256(data).hexdigest()] for path, data in op.files]
    return _digest(
        "run",
        parent,
        [op.args, op.env.digest(), op.cwd, op.user, mounts, op.network, op.security, op.hostname, files],
        [options.add_hosts, options.cap_add, options.cap_drop, options.security_opt, options.ulimits, options.volumes],
        [options.shm_size_bytes, *_seldom(options, op)],
    )


def _seldom(options: RunOptions, op: RunOp) -> list[object]:
    """What few builds ask for, and a key has only where it is asked for. Namespaces count as the network does."""
    found: list[object] = [options.devices] if options.devices else []
    found += ["no-hosts"] * options.no_hosts
    found += [["shared", *options.shared]] if options.shared else []
    cdi = (*options.cdi_devices, *(name for name, _ in op.devices))
    return [*found, *([["cdi", *cdi]] if cdi else [])]


def copy_key(op: CopyOp, parent: str | None, content: Sequence[str], epoch_s: int | None) -> str:
    """`content` has one key an item: of the files it takes, or of the tree that it takes them from."""
    items = [[i.kind, i.source, i.include, i.required, sha256(i.data).hexdigest()] for i in op.items]
    return _digest(
        "copy",
        None if op.link else parent,
        items,
        list(content),
        [op.dest, op.chown, op.mode, op.exclude, op.link, op.unpack, op.add, op.checksum, op.keep_git_dir, epoch_s],
    )


def mkdir_key(op: MkdirOp, parent: str | None, epoch_s: int | None) -> str:
    return _digest("mkdir", parent, op.path, op.user, epoch_s)


def stack_key(parent: str | None, layer: str) -> str:
    """The key of an independent layer (`COPY --link`) once it lies on a parent."""
    return _digest("stack", parent, layer) if parent else layer


def _digest(*parts: object) -> str:
    text = json.dumps([_VERSION, *parts], separators=(",", ":"), ensure_ascii=True, default=str)
    return sha256(text.encode("ascii", "surrogatepass")).hexdigest()
