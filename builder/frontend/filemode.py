"""The values of `--chmod`: octal, or symbolic as chmod(1) reads them with an umask of 0.

Pure. The planner parses to refuse early, `builder.solve.fileops` applies. It is the BSDs' chmod
(`=` leaves the sticky bit alone), but for `X`, which counts after every operator as it does on Linux.
Reference: https://man.freebsd.org/cgi/man.cgi?query=setmode&sektion=3
"""

from __future__ import annotations

from layers.values import NamedTuple

_WHO = {"a": 0o6777, "u": 0o4700, "g": 0o2070, "o": 0o007}
_STANDARD = 0o6777
_STICKY = 0o1000
_SHIFT = {"u": 6, "g": 3, "o": 0}


class _Command(NamedTuple):
    """One change.

    `op` is + or - with its `bits`; X or x, which are + and - for what is executable or a directory;
    or u, g, o: a copy, by `how` (+, -, =), to the classes in `who`.
    """

    op: str
    bits: int
    how: str = ""
    who: str = ""


class FileMode(NamedTuple):
    """A parsed `--chmod`: `octal`, or else `commands` to run one after the other."""

    octal: int | None
    commands: tuple[_Command, ...] = ()

    def apply(self, mode: int, *, is_directory: bool) -> int:
        """The permission bits (0 to 0o7777) that a file of `mode` gets."""
        if self.octal is not None:
            return self.octal
        old = mode & 0o7777
        new = old
        for command in self.commands:
            if command.op == "+":
                new |= command.bits
            elif command.op == "-":
                new &= ~command.bits
            elif command.op in "Xx":
                if old & 0o111 or is_directory:
                    new = new | command.bits if command.op == "X" else new & ~command.bits
            else:
                new = _copy_class(command, new)
        return new


def _copy_class(command: _Command, mode: int) -> int:
    value = mode >> _SHIFT[command.op] & 7
    for target in command.who:
        shift = _SHIFT[target]
        if command.how in "-=":
            mode &= ~((7 if command.how == "=" else value) << shift)
        if command.how in "+=":
            mode |= value << shift
    return mode


def parse_mode(text: str) -> FileMode:
    """Parse the value of `--chmod`. Raises: ValueError, in BuildKit's words."""
    if text[:1].isdigit():
        if all(c in "01234567" for c in text) and int(text, 8) <= 0o7777:
            return FileMode(int(text, 8))
        raise ValueError(f"invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777")
    commands: list[_Command] = []
    for clause in text.split(","):
        _parse_clause(clause, text, commands)
    return FileMode(None, tuple(commands))


def _parse_clause(clause: str, text: str, commands: list[_Command]) -> None:
    """One clause: who, then one or more of an operator with its permissions."""
    rest = clause.lstrip("augo")
    classes = clause[: len(clause) - len(rest)]
    who = 0
    for letter in classes:
        who |= _WHO[letter]
    targets = "".join(t for t in "ugo" if t in classes or "a" in classes) or "ugo"
    if not rest or rest[0] not in "+-=":
        raise ValueError(f"invalid chmod parameter: '{text}'. it should be like 755, u=rwX,go=rX or +x")
    while rest:
        operator, rest = rest[0], rest[1:]
        end = next((i for i, c in enumerate(rest) if c in "+-="), len(rest))
        permissions, rest = rest[:end], rest[end:]
        if permissions.strip("rwxXstugo"):
            raise ValueError(
                f"invalid chmod parameter: '{text}'. '{permissions}' is not made of rwxXst or of the classes ugo"
            )
        _add(operator, who, targets, permissions, commands)


def _add(operator: str, who: int, targets: str, permissions: str, commands: list[_Command]) -> None:
    """Append the commands of one operator: plain bits are gathered, copies of a class go in order."""
    bits = conditional = 0
    cleared = operator != "="
    only_other = who != 0 and not who & ~0o007
    for letter in permissions:
        if letter in "ugo":
            if bits or conditional:
                cleared = _flush(operator, who, bits, conditional, commands, cleared=cleared)
                bits = conditional = 0
            cleared = True
            commands.append(_Command(letter, 0, operator, targets))
        elif letter == "X":
            conditional = 0o111
        elif letter == "s":
            bits |= 0 if only_other else 0o6000
        elif letter == "t":
            if not only_other:
                bits |= _STICKY
                who |= _STICKY if who else 0
        else:
            bits |= {"r": 0o444, "w": 0o222, "x": 0o111}[letter]
    _flush(operator, who, bits, conditional, commands, cleared=cleared)


def _flush(operator: str, who: int, bits: int, conditional: int, commands: list[_Command], *, cleared: bool) -> bool:
    mask = who or 0o7777
    if operator == "=" and (bits or not cleared):
        commands.append(_Command("-", who or _STANDARD))
        cleared = True
    if bits:
        commands.append(_Command("-" if operator == "-" else "+", bits & mask))
    if conditional:
        commands.append(_Command("x" if operator == "-" else "X", conditional & mask))
    return cleared
