"""Flags that a file gives, so that nobody need repeat them: `config.toml`, a table for each command.

    [build]
    compression = "zstd"
    progress = "plain"
    build-arg = ["CI=1", "LEVEL=2"]
    [push]
    retry = 8

A key is a flag without its dashes. They count as if written before those of the command line, so that a
flag given there wins, and one that may be repeated adds to the file's. `[build]` holds for `plan` and
`verify` as well, which are about the same build. The file is what PYBUILD_CONFIG names (empty: none), else
`$XDG_CONFIG_HOME/pybuild/config.toml`. Loaded by `builder.cli.main` where there is such a file.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from builder.errors import UsageError

_MAX_BYTES = 1 << 20
_ALIKE = {"plan": ("build",), "verify": ("build",)}
_NOT_HERE = frozenset({"help", "debug", "root"})


def default_words(path: Path, verb: str, parser: ArgumentParser) -> list[str]:
    """The flags of the file for a command. Raises: UsageError naming file, table and key."""
    document = _load(path)
    words: list[str] = []
    for table in (*_ALIKE.get(verb, ()), verb):
        values = document.get(table, {})
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {table} is a table of flags: [{table}]")
        for key, value in values.items():
            known = f"--{key}" in parser._option_string_actions and key not in _NOT_HERE
            if known:
                words += _words(f"{path}: [{table}] {key}", key, value, parser)
            elif table == verb:
                raise UsageError(f"{path}: [{table}] {key}: `pybuild {verb}` has no flag --{key} for this file")
    return words


def _load(path: Path) -> dict[str, Any]:
    import tomllib

    from builder.cli.main import VERBS

    try:
        with path.open("rb") as f:
            data = f.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES} bytes")
        document = tomllib.loads(data.decode())
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
        raise UsageError(f"{path} is no TOML: {e}") from e
    for table in document:
        if table not in VERBS:
            raise UsageError(f"{path}: there is no command {table!r}", hint="a table is named as a command: [build]")
    return document


def _words(where: str, key: str, value: object, parser: ArgumentParser) -> list[str]:
    action = parser._option_string_actions[f"--{key}"]
    several = isinstance(value, list)
    if several and not isinstance(action.default, list):
        raise UsageError(f"{where}: --{key} is given once, not several times")
    words: list[str] = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool) and action.nargs == 0:
            words += [f"--{key}"] if each else []
        elif isinstance(each, (bool, str, int, float)) and action.nargs != 0:
            words.append(f"--{key}={str(each).lower() if isinstance(each, bool) else each}")
        else:
            kind = "true or false" if action.nargs == 0 else "a text or a number"
            raise UsageError(f"{where}: expected {kind}")
    return words
