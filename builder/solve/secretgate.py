"""No secret leaves with an image: before it is named or sent, its layers, config and logs are searched.

Looked for is each `--secret` value as it is, in base64 (at any alignment, standard and URL alphabet),
hexadecimal and percent-encoded; in files, their names and link targets, in the config with its
history, and in what the steps printed. What is compressed or encrypted is not looked into. A layer
that was found clean is not searched again for the same values.
"""

from __future__ import annotations

import base64
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import SecretLeakError
from layers.events import Event, EventSink, VertexLog
from layers.sha import sha256
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Store

MIN_BYTES = 6
"""Of a value that is looked for: a shorter one is found everywhere by chance."""
_CHUNK = 4 << 20
_CLEAN = "clean:"


class Needle(NamedTuple):
    """A form of a secret's value."""

    id: str
    form: str
    data: bytes


class Finding(NamedTuple):
    """Where a value was found."""

    id: str
    form: str
    place: str


def needles(secrets: Mapping[str, bytes]) -> list[Needle]:
    """The forms to look for. Values shorter than `MIN_BYTES` have none."""
    found: dict[bytes, Needle] = {}
    for id, raw in secrets.items():
        for value in dict.fromkeys((raw, raw.strip())):
            if len(value) < MIN_BYTES:
                continue
            for form, data in _forms(value):
                if len(data) >= MIN_BYTES:
                    found.setdefault(data, Needle(id, form, data))
    return list(found.values())


def _forms(value: bytes) -> list[tuple[str, bytes]]:
    from urllib.parse import quote_from_bytes, quote_plus

    forms = [("plain", value), ("hexadecimal", value.hex().encode()), ("hexadecimal", value.hex().upper().encode())]
    forms.append(("percent-encoded", quote_from_bytes(value, safe="").encode()))
    forms.append(("percent-encoded", quote_plus(value).encode()))
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for shift in range(3):
            # Without the characters at either end in which a neighbouring byte has a part.
            text = encode(b"\0" * shift + value)
            end = len(value) + shift
            first = (shift * 8 + 5) // 6
            forms.append(("base64", text[first : end * 8 // 6]))
    return forms


class LogGate:
    """An event sink that watches for values in what steps print, and hands everything on. Thread-safe."""

    def __init__(self, inner: EventSink, wanted: Sequence[Needle]) -> None:
        self._inner = inner
        self.wanted = wanted
        self._longest = max((len(n.data) for n in wanted), default=0)
        self._tails: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()
        self.findings: list[Finding] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, VertexLog) and self.wanted:
            with self._lock:
                place = (event.vertex, event.stream)
                data = self._tails.get(place, b"") + event.data
                self._tails[place] = data[-self._longest :]
                for needle in self.wanted:
                    if needle.data in data:
                        self.findings.append(Finding(needle.id, needle.form, f"the output of {event.vertex}"))
        self._inner.emit(event)


def search_snapshot(store: Store, snapshot: str, wanted: Sequence[Needle], layer: str) -> list[Finding]:
    """Where a snapshot's own changes hold a value. Remembers that there was none. Raises: OSError, LayerError."""
    from builder.solve.layering import snapshot_changes

    key = _CLEAN + _fingerprint(store, snapshot, wanted)
    if store.cache.get(key) is not None:
        return []
    findings: list[Finding] = []
    changes, root = snapshot_changes(store, snapshot)
    for change in changes:
        if change.st is None:
            continue
        path = os.path.join(os.fsencode(root), change.path)
        shown = f"/{os.fsdecode(change.path)} ({layer})"
        names = change.path
        if stat.S_ISLNK(change.st.st_mode):
            names += b"\n" + os.readlink(path)
        findings += [Finding(n.id, n.form, f"the name of {shown}") for n in wanted if n.data in names]
        if stat.S_ISREG(change.st.st_mode):
            findings += [Finding(n.id, n.form, shown) for n in _search_file(path, wanted)]
    if not findings:
        store.cache.put(key, snapshot, b"{}")
    return findings


def _search_file(path: bytes, wanted: Sequence[Needle]) -> list[Needle]:
    overlap = max(len(n.data) for n in wanted) - 1
    found: dict[bytes, Needle] = {}
    tail = b""
    with open(path, "rb", buffering=0) as f:
        while data := f.read(_CHUNK):
            data = tail + data
            for needle in wanted:
                if needle.data not in found and needle.data in data:
                    found[needle.data] = needle
            tail = data[-overlap:] if overlap else b""
    return list(found.values())


def _fingerprint(store: Store, snapshot: str, wanted: Sequence[Needle]) -> str:
    """A name for "these values in this snapshot" that tells nothing of the values to who reads the database."""
    from hmac import digest

    key = _key(store.root / "gate.key")
    text = snapshot.encode() + b"\0" + b"\0".join(sorted(sha256(n.data).digest() for n in wanted))
    return digest(key, text, "sha256").hex()


def _key(path: Path) -> bytes:
    """A random key of this store alone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as f:
            f.write(os.urandom(32))
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
        return path.read_bytes()


def search_text(text: bytes, wanted: Sequence[Needle], place: str) -> list[Finding]:
    """Where a document holds a value, as it stands there: with JSON's escapes."""
    import json

    found: list[Finding] = []
    for needle in wanted:
        escaped = json.dumps(needle.data.decode("utf-8", "replace"), ensure_ascii=False)[1:-1].encode()
        if needle.data in text or escaped in text:
            found.append(Finding(needle.id, needle.form, place))
    return found


def refuse(findings: Sequence[Finding]) -> None:
    """Raises: SecretLeakError naming the places, never a value, if there are any."""
    if not findings:
        return
    places = list(dict.fromkeys(f"secret {f.id!r} ({f.form}) in {f.place}" for f in findings))
    more = f", and {len(places) - 8} more" if len(places) > 8 else ""
    raise SecretLeakError(
        "the image is not named and not sent, because it would give away " + "; ".join(places[:8]) + more,
        hint="use the secret in the step without keeping it, or add --secret-gate=false",
    )
