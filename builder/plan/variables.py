"""The variables of a stage: a mapping that grows, and snapshots of it that share what did not change.

Every RUN has the whole environment as it was at that line. With thousands of ARGs before thousands of
RUNs, copies of it would take memory and time of their product; a snapshot here is a tuple of blocks of
64 entries, of which the next ENV replaces one. The blocks remember their hash and their digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from layers.sha import sha256

_BLOCK = 64


class _Block:
    """Some entries in order. Immutable."""

    __slots__ = ("_digest", "_hash", "entries")

    def __init__(self, entries: tuple[tuple[str, str], ...]) -> None:
        self.entries = entries
        self._hash: int | None = None
        self._digest: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Block) and self.entries == other.entries)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.entries)
        return self._hash

    def digest(self) -> bytes:
        if self._digest is None:
            # No variable holds a NUL: none could be given to a process.
            text = "".join([f"{name}={value}\0" for name, value in self.entries])
            self._digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
        return self._digest


class Snapshot:
    """What the variables were at one line: (name, value) pairs in the order of their first appearance."""

    __slots__ = ("_blocks",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        entries = tuple(pairs)
        self._blocks = tuple([_Block(entries[at : at + _BLOCK]) for at in range(0, len(entries), _BLOCK)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for block in self._blocks:
            yield from block.entries

    def __len__(self) -> int:
        return (len(self._blocks) - 1) * _BLOCK + len(self._blocks[-1].entries) if self._blocks else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._blocks == other._blocks

    def __hash__(self) -> int:
        return hash(self._blocks)

    def __repr__(self) -> str:
        return f"Snapshot({list(self)!r})"

    def digest(self) -> str:
        """Of all names and values, in order."""
        return sha256(b"".join([block.digest() for block in self._blocks])).hexdigest()


class Variables(dict[str, str]):
    """Names and values; `snapshot` freezes them. Nothing is ever removed. A plain dict to who looks names up."""

    __slots__ = ("_blocks", "_dirty", "_places", "_snapshot")

    def __init__(self, values: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(values)
        self._places: dict[str, int] = {}
        self._blocks: list[_Block] = []
        self._dirty: dict[str, None] = dict.fromkeys(self)
        self._snapshot: Snapshot | None = None

    def __setitem__(self, name: str, value: str) -> None:
        if self.get(name) != value:
            super().__setitem__(name, value)
            self._dirty[name] = None
            self._snapshot = None

    def update(self, values: Mapping[str, str]) -> None:  # type: ignore[override]
        for name, value in values.items():
            self[name] = value

    def snapshot(self) -> Snapshot:
        """The variables as they are now. Takes time for what was set since the last one."""
        if self._snapshot is None:
            touched: dict[int, list[tuple[str, str]]] = {}
            for name in self._dirty:
                place = self._places.setdefault(name, len(self._places))
                number, offset = divmod(place, _BLOCK)
                if number not in touched:
                    touched[number] = list(self._blocks[number].entries) if number < len(self._blocks) else []
                entries = touched[number]
                entries[offset : offset + 1] = [(name, self[name])]
            for number in sorted(touched):
                self._blocks[number : number + 1] = [_Block(tuple(touched[number]))]
            self._dirty.clear()
            frozen = Snapshot()
            frozen._blocks = tuple(self._blocks)
            self._snapshot = frozen
        return self._snapshot
