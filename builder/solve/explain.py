"""Why a step is found or has to run: what its key was made of, kept, and compared with last time.

Two kinds of cache records serve this, beside the step's own. `inputs:KEY` holds what a definition key
was made of: the instruction's fields, its variables, the files that it copies, its base image.
`slot:PLACE` says which definition key the step at that place of that Containerfile had last. Both are
written when a step has run, in the background; a build that finds everything reads and writes neither.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from builder.plan.graph import BuildGraph, CopyOp, MkdirOp, RunOp, SourceOp, Step
from builder.plan.request import BuildRequest
from layers.sha import sha256
from layers.values import NamedTuple

if TYPE_CHECKING:
    from builder.solve.contenthash import ContentEntry
    from layers.records import Cache

INPUTS = "inputs:"
SLOT = "slot:"
_MAX_FILES = 200_000
_PART_FILES = 1000  # so many are put into words at a time: bounds memory
_MAX_RECORD_BYTES = 64 << 20
_MAX_SHOWN = 200
_FORMER = 16
"""So many steps more than today a stage may have had, for its steps to be known wherever they stood."""
_NUMBER = re.compile(r"\[[^\[\]]* ?\d+/\d+\] ")

Status = Literal["hit", "run", "content"]


class Reason(NamedTuple):
    """One input that differs. `old` and `new` are None where there is no such value."""

    kind: str
    subject: str
    old: str | None = None
    new: str | None = None

    def __str__(self) -> str:
        if self.kind in {"new", "gone", "forced", "above"}:
            return self.subject
        if self.old is None:
            return f"{self.kind} {self.subject}: added" + (f" ({self.new})" if self.new else "")
        if self.new is None:
            return f"{self.kind} {self.subject}: removed" + (f" (was {self.old})" if self.old else "")
        return f"{self.kind} {self.subject}: {self.old} -> {self.new}"


class StepPlan(NamedTuple):
    """A step before it runs.

    `hit`: its result is here. `run`: it has to run. `content`: it runs unless the files that it takes
    from a step above come out as they were. `fetch_bytes` of a FROM are those that are not here yet.
    `emulated` tells, of a RUN that is not found and is for another CPU, what would run it here.
    """

    number: int
    name: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    fetch_bytes: int = 0
    emulated: str = ""


class BuildPlan(NamedTuple):
    """All steps of a build in order, and what it will fetch."""

    steps: tuple[StepPlan, ...]
    fetch_bytes: int

    def count(self, status: Status) -> int:
        return sum(step.status == status for step in self.steps)


def slot_of(request: BuildRequest, graph: BuildGraph) -> list[str]:
    """The place of every step: which Containerfile, stage and platform, and the how-many-eth there."""
    place = _place(request)
    counts: dict[tuple[str, str], int] = {}
    slots: list[str] = []
    for step in graph.steps:
        where = (step.stage, str(step.platform))
        counts[where] = counts.get(where, 0) + (not step.internal)
        slots.append(_slot(place, where, step.name if step.internal else counts[where]))
    return slots


def _place(request: BuildRequest) -> str:
    name = request.containerfile.name
    return os.path.abspath(name) if name not in {"-", ""} else os.path.abspath(request.context or ".")


def _slot(place: str, where: tuple[str, str], what: str | int) -> str:
    text = json.dumps([place, *where, what])
    return SLOT + sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# What a key is made of


def describe(
    step: Step, graph: BuildGraph, request: BuildRequest, entries: Iterable[ContentEntry] | None
) -> dict[str, Any]:
    """The inputs of a step as JSON values; `entries` are the files that a COPY takes, None if unknown.

    Those are under "files" by path, as they are: there may be a hundred thousand, and they are not made twice.
    """
    doc: dict[str, Any] = {"step": step.name, "op": type(step.op).__name__}
    match step.op:
        case RunOp() as op:
            options = request.run
            doc["fields"] = {
                "command": " ".join(op.args),
                "working directory": op.cwd,
                "user": op.user,
                "network": op.network,
                "security": op.security,
                "host name": op.hostname,
            }
            doc["env"] = dict(op.env)
            doc["mounts"] = [_mount_text(m) for m in op.mounts]
            doc["heredocs"] = {path: sha256(data).hexdigest() for path, data in op.files}
            doc["options"] = {
                "--add-host": options.add_hosts, "--cap-add": options.cap_add, "--cap-drop": options.cap_drop,
                "--security-opt": options.security_opt, "--ulimit": options.ulimits, "--volume": options.volumes,
                "--shm-size": options.shm_size_bytes,
            }  # fmt: skip
            seldom = {
                "--device": (*options.devices, *options.cdi_devices, *(name for name, _ in op.devices)),
                "namespaces of the host": options.shared,
            }
            doc["options"] |= {name: " ".join(values) for name, values in seldom.items() if values}
        case CopyOp() as op:
            doc["fields"] = {
                "sources": " ".join(i.source for i in op.items),
                "destination": op.dest,
                "--chown": op.chown,
                "--chmod": op.mode,
                "--exclude": " ".join(op.exclude),
                "--parents": " ".join(p for i in op.items for p in i.include),
                "--link": str(op.link),
                "--unpack": str(op.unpack),
                "--checksum": op.checksum,
                **_epoch(request),
            }
            doc["heredocs"] = {i.source: sha256(i.data).hexdigest() for i in op.items if i.kind == "inline"}
        case MkdirOp() as op:
            doc["fields"] = {"path": op.path, "user": op.user, **_epoch(request)}
        case SourceOp():
            pass
    base = graph.steps[step.parent].op if step.parent is not None else None
    if isinstance(base, SourceOp):
        doc["base"] = [base.image.reference, base.image.digest]
    doc["images"] = {
        source.image.reference: source.image.digest
        for i in step.inputs
        if isinstance(source := graph.steps[i].op, SourceOp)
    }
    plain: dict[str, Any] = json.loads(json.dumps(doc, default=str))
    if entries is not None and isinstance(step.op, CopyOp):
        plain["files"] = {e.path: e for e in entries}
    return plain


def _epoch(request: BuildRequest) -> dict[str, str]:
    return {} if request.source_date_epoch is None else {"SOURCE_DATE_EPOCH": str(request.source_date_epoch)}


def _mount_text(mount: Any) -> str:
    """A mount as one writes it: what is as it is by itself is left out."""
    said = {"source": "/", "id": mount.target, "sharing": "shared", "readonly": mount.type in {"bind", "secret", "ssh"}}
    parts = [
        f"{k}={str(v).lower() if isinstance(v, bool) else v}"
        for k, v in mount._asdict().items()
        if k != "input" and v not in (None, "") and v != said.get(k, False)
    ]
    return ",".join(parts)


def encode(doc: Mapping[str, Any]) -> bytes:
    """The record's bytes, of what `describe` gave; without the files, where they are too many to be worth it."""
    packer = zlib.compressobj(1)
    files: Mapping[str, ContentEntry] | None = doc.get("files")
    head = _json({k: v for k, v in doc.items() if k != "files"})
    if files is None or len(files) > _MAX_FILES:
        return packer.compress(head) + packer.flush()
    parts = [packer.compress(head[:-1] + b',"files":{')]
    some: dict[str, tuple[Any, ...]] = {}
    joint = b""
    for number, (path, entry) in enumerate(files.items(), 1):
        some[path] = entry[1:]
        if len(some) == _PART_FILES or number == len(files):
            parts.append(packer.compress(joint + _json(some)[1:-1]))
            joint = b","
            some.clear()
    parts.append(packer.compress(b"}}") + packer.flush())
    return b"".join(parts)


def _json(doc: Mapping[str, Any]) -> bytes:
    return json.dumps(doc, separators=(",", ":")).encode("utf-8", "surrogatepass")


def decode(data: bytes) -> dict[str, Any] | None:
    """A record's document; None if it is damaged or of another version."""
    try:
        raw = zlib.decompressobj().decompress(data, _MAX_RECORD_BYTES)
        doc = json.loads(raw)
    except (zlib.error, ValueError):
        return None
    return doc if isinstance(doc, dict) else None


# What differs


class Explainer:
    """Compares the steps that are not found with what stood at their places last time."""

    def __init__(
        self,
        cache: Cache,
        request: BuildRequest,
        graph: BuildGraph,
        keys: Sequence[str],
        entries: Callable[[Step], Iterable[ContentEntry] | None],
        arguments: frozenset[str],
    ) -> None:
        self._cache = cache
        self._request = request
        self._graph = graph
        self._keys = keys
        self._entries = entries
        self._arguments = arguments | frozenset(request.build_args)
        self._slots = slot_of(request, graph)
        self._texts = {_bare(step.name) for step in graph.steps}
        self._stages: dict[tuple[str, str], list[str]] = {}
        self._former: dict[str, str | None] = {}
        self._last = {k: r.record.decode("ascii", "replace") for k, r in cache.get_many(self._slots).items()}

    def reasons(self, step: Step, above: Step | None) -> tuple[Reason, ...]:
        """Why the step is not found. `above` is the nearest step before it that is not found either, if any."""
        if step.ignore_cache:
            flag = "--no-cache" if self._request.no_cache else f"--no-cache-filter {step.stage}"
            return (Reason("forced", flag),)
        last, old = self._before(step)
        if last is None and not step.internal and self._keys_of((step.stage, str(step.platform))):
            return (Reason("new", "a new instruction"), *_above(above))
        if last is None:
            return _above(above) or (Reason("new", "it was never built here, or what was known of it is pruned"),)
        if last == self._keys[step.number]:
            return _above(above) or (self._unused(last),)
        if old is None:
            return (*_above(above), Reason("gone", "what it was made of last time is no longer known"))
        new = describe(step, self._graph, self._request, self._entries(step))
        if old.get("op") != new["op"] or (self._is_kept(old) and _text(old) != _text(new)):
            return (Reason("new", "a new instruction"), *_above(above))
        own = tuple(self._differences(old, new))
        return own + _above(above) or (Reason("above", "what it copies from or mounts is made anew"),)

    def _before(self, step: Step) -> tuple[str | None, dict[str, Any] | None]:
        """The key and the inputs of last time: of the same instruction, wherever it stood, else of what stood here."""
        last = self._last.get(self._slots[step.number])
        old = self._inputs(last)
        if last == self._keys[step.number] or step.internal or (old is not None and _text(old) == _bare(step.name)):
            return last, old
        for key in self._keys_of((step.stage, str(step.platform))):
            if self._text_of(key) == _bare(step.name):
                return key, self._inputs(key)
        return last, old

    def _keys_of(self, where: tuple[str, str]) -> list[str]:
        """The keys that the steps of a stage had last time, those beyond its end of today included."""
        if where not in self._stages:
            count = sum((s.stage, str(s.platform)) == where and not s.internal for s in self._graph.steps)
            slots = [_slot(_place(self._request), where, n) for n in range(1, count + 1 + _FORMER)]
            found = self._cache.get_many(slots)
            self._stages[where] = [found[slot].record.decode("ascii", "replace") for slot in slots if slot in found]
        return self._stages[where]

    def _text_of(self, key: str) -> str | None:
        """The instruction that a key of last time belongs to: every step looks for its own among all of a stage."""
        if key not in self._former:
            old = self._inputs(key)
            self._former[key] = None if old is None else _text(old)
        return self._former[key]

    def _inputs(self, key: str | None) -> dict[str, Any] | None:
        record = None if key is None else self._cache.get(INPUTS + key)
        return None if record is None else decode(record.record)

    def _is_kept(self, old: Mapping[str, Any]) -> bool:
        """Whether the instruction that stood somewhere last time is still in the file."""
        return _text(old) in self._texts

    def _unused(self, key: str) -> Reason:
        """Why a step is not found although nothing that it is made of has changed."""
        if self._request.cache_ttl_s is not None and self._cache.get(key) is not None:
            return Reason("forced", "--cache-ttl: its result is too old")
        return Reason("gone", "its result is no longer in the cache")

    def _differences(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Reason]:
        if old.get("base") != new.get("base"):
            was, now = old.get("base") or ["", ""], new.get("base") or ["", ""]
            same = was[0] == now[0]
            yield Reason(
                "base", now[0] or was[0], was[1] if same else f"{was[0]} {was[1]}", now[1] if same else " ".join(now)
            )
        yield from _compared("image", old.get("images"), new["images"])
        yield from _compared("instruction", old.get("fields"), new.get("fields"))
        for reason in _compared("variable", old.get("env"), new.get("env")):
            yield reason._replace(kind="ARG" if reason.subject in self._arguments else "ENV")
        yield from _listed("instruction", "--mount", old.get("mounts") or (), new.get("mounts") or ())
        yield from _compared("heredoc", old.get("heredocs"), new.get("heredocs"))
        yield from _compared("flag", old.get("options"), new.get("options"))
        if "files" in new and "files" in old:
            yield from _files(old["files"], new["files"])


def _bare(name: str) -> str:
    """A step's instruction without the place that it has in its stage."""
    return _NUMBER.sub("", name)


def _text(doc: Mapping[str, Any]) -> str:
    return _bare(str(doc.get("step")))


def _above(step: Step | None) -> tuple[Reason, ...]:
    if step is None:
        return ()
    place = _NUMBER.match(step.name)
    return (Reason("above", f"{place[0].strip() if place else step.name} is made anew"),)


def _compared(kind: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterable[Reason]:
    old, new = old or {}, new or {}
    for name in dict.fromkeys((*old, *new)):
        was, now = _shown(old.get(name)), _shown(new.get(name))
        if was == now:
            continue
        if was is None or now is None:
            yield Reason(kind, name, was and _cut(was), now and _cut(now))
        elif "\n" in was.strip("\n") or "\n" in now.strip("\n"):
            yield from _lines(kind, name, was, now)
        else:
            yield Reason(kind, name, *_apart(was.strip("\n"), now.strip("\n")))


def _listed(kind: str, name: str, old: Sequence[str], new: Sequence[str]) -> Iterable[Reason]:
    yield from (Reason(kind, name, text, None) for text in old if text not in new)
    yield from (Reason(kind, name, None, text) for text in new if text not in old)


def _lines(kind: str, name: str, old: str, new: str) -> Iterable[Reason]:
    """The first line in which two scripts differ."""
    for number, (was, now) in enumerate(zip_longest(old.split("\n"), new.split("\n")), 1):
        if was != now:
            both = (was, now) if was is None or now is None else _apart(was, now)
            yield Reason(kind, f"{name}, line {number}", *(text and _cut(text) for text in both))
            return


def _apart(old: str, new: str) -> tuple[str, str]:
    """Two texts with what they have in common cut away where they are long, so that the difference shows."""
    same = next((at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = 0 if max(len(old), len(new)) <= _MAX_SHOWN else max(0, same - _MAX_SHOWN // 4)
    lead = "…" if start else ""
    return _cut(lead + old[start:]), _cut(lead + new[start:])


def _cut(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _shown(value: Any) -> str | None:
    """A value for people, whole; None where there is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) or None
    return json.dumps(value)


def _files(old: Mapping[str, Any], new: Mapping[str, ContentEntry]) -> Iterable[Reason]:
    for path in sorted({*old, *new}):
        entry = new.get(path)
        was, now = old.get(path), None if entry is None else list(entry[1:])
        if was == now:
            continue
        name = path or "/"
        if was is None or now is None:
            yield Reason("file", name, None if was is None else _content(was), None if now is None else _content(now))
            continue
        if was[0] != now[0] or was[4] != now[4]:
            yield Reason("file", name, _content(was), _content(now))
        if was[1] != now[1]:
            yield Reason("mode of", name, f"{was[1]:04o}", f"{now[1]:04o}")
        if was[2:4] != now[2:4]:
            yield Reason("owner of", name, f"{was[2]}:{was[3]}", f"{now[2]}:{now[3]}")


def _content(entry: Sequence[Any]) -> str:
    kind, value = str(entry[0]), str(entry[4])
    if kind == "file":
        return f"sha256:{value[:12]}"
    return f"{kind} {value}".strip()
