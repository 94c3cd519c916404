"""Changes of a working container's config, from the texts that `config` takes.

A field's change is the instruction that does the same in a Containerfile, where there is one, and so leaves
the same line in the history. What ends with `-` removes; `-` alone removes all. Removals, and what no
instruction says (the author, the platform, annotations), leave no line.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Literal

from builder.container.byhand import Change, Draft
from builder.errors import ParseError, UsageError
from builder.frontend import instructions as ins
from builder.frontend.durations import parse_duration
from builder.frontend.ports import parse_ports
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.words import expand_text
from layers.values import replace

_WHERE = SourceRange(1, 1)
_TIMES = {
    "interval": "interval_ns",
    "timeout": "timeout_ns",
    "start-period": "start_period_ns",
    "start-interval": "start_interval_ns",
}
_FIELD_OF_TIME = {
    "interval_ns": "Interval",
    "timeout_ns": "Timeout",
    "start_period_ns": "StartPeriod",
    "start_interval_ns": "StartInterval",
    "retries": "Retries",
}
EXTRA = ("comment", "created-by", "history-comment", "hostname", "domainname")
"""Texts that are kept until the image is made; hostname, domainname and comment are for Docker's format alone."""


def config_change(field: str, text: str) -> Change:
    """A change of one field. Raises: UsageError for a field that there is not; later, for a text that means nothing."""
    if field in EXTRA:
        return lambda draft: _extra(draft, field, text)
    make = _FIELDS.get(field)
    if make is None:
        raise UsageError(f"there is no field {field!r}", hint=f"there are {', '.join([*_FIELDS, *EXTRA])}")
    return lambda draft: make(draft, text)


def healthcheck_change(test: str | None, options: Mapping[str, str]) -> Change:
    """HEALTHCHECK: `test` is NONE, `CMD …`, `CMD-SHELL …`, a shell's command, or "" for none at all.

    `options` are interval, timeout, start-period, start-interval and retries; without `test` they change what is
    there. Raises, when applied: UsageError.
    """
    return lambda draft: _healthcheck(draft, test, options)


def instruction_change(text: str) -> Change:
    """A change that is written as an instruction. Raises: ParseError; UsageError if it makes files."""
    from builder.changes import check_changes

    check_changes([text])
    parsed = ins.parse_instruction(text)
    return lambda draft: draft.dispatcher.apply(draft.state, parsed)


def _literal(draft: Draft, made: ins.Instruction) -> None:
    draft.dispatcher.apply(draft.state, made, literal=True)


def _parsed(draft: Draft, text: str) -> None:
    """An instruction that checks and normalises what it is given, by way of its text."""
    if "\n" in text:
        raise UsageError(f"{text!r}: one line is expected")
    draft.dispatcher.apply(draft.state, ins.parse_instruction(text))


def _at(text: str) -> dict[str, Any]:
    return {"range": _WHERE, "original": text, "source": SourceFile("config", text)}


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or "\0" in text:
        raise UsageError(f"--{flag} {text!r}: expected NAME=VALUE, or NAME- to remove it")
    return name, value


def _removes(text: str) -> str | None:
    """What a text with a `-` at its end removes, "" for everything; None if it removes nothing."""
    return text[:-1] if text.endswith("-") and "=" not in text else None


def _env(draft: Draft, text: str) -> None:
    gone = _removes(text)
    if gone is not None:
        for name in list(draft.state.image_env) if gone == "" else [gone]:
            draft.state.image_env.pop(name, None)
        return
    name, value = _pair("env", text)
    pair = ins.Pair(name, expand_text(value, draft.state.env))
    _literal(draft, ins.Env(pairs=(pair,), **_at(f"ENV {text}")))


def _label(draft: Draft, text: str) -> None:
    gone = _removes(text)
    if gone is not None:
        _drop(draft, "Labels", gone)
        return
    _literal(draft, ins.Label(pairs=(ins.Pair(*_pair("label", text)),), **_at(f"LABEL {text}")))


def _unset_label(draft: Draft, text: str) -> None:
    _drop(draft, "Labels", text)


def _drop(draft: Draft, table: str, key: str) -> None:
    """Take a key, or with "" every key, out of a table of the config."""
    kept = dict(draft.state.config.get(table) or {})
    kept.pop(key, None)
    draft.state.config[table] = kept if key else {}


def _port(draft: Draft, text: str) -> None:
    gone = _removes(text)
    if gone is None:
        _parsed(draft, f"EXPOSE {text}")
        return
    for port in parse_ports([gone]) if gone else [""]:
        _drop(draft, "ExposedPorts", port)


def _volume(draft: Draft, text: str) -> None:
    gone = _removes(text)
    if gone is not None:
        _drop(draft, "Volumes", gone)
        return
    if not text:
        raise UsageError("--volume: a path is missing")
    _literal(draft, ins.Volume(paths=(text,), **_at(f"VOLUME {text}")))


def _annotation(draft: Draft, text: str) -> None:
    gone = _removes(text)
    if gone is None:
        name, value = _pair("annotation", text)
        draft.annotations[name] = value
    elif gone:
        draft.annotations.pop(gone, None)
    else:
        draft.annotations.clear()


def _unset_annotation(draft: Draft, text: str) -> None:
    draft.annotations.pop(text, None)


def _words(flag: str, text: str) -> tuple[str, ...]:
    """A JSON array of strings, or words as a shell splits them. Raises: UsageError."""
    try:
        if text.lstrip().startswith("["):
            words = json.loads(text)
            if isinstance(words, list) and all(isinstance(word, str) for word in words):
                return tuple(words)
            raise UsageError(f"--{flag} {text!r}: expected an array of strings")
        return tuple(shlex.split(text))
    except ValueError as e:
        raise UsageError(f"--{flag} {text!r}: {e}") from e


def _cmd(draft: Draft, text: str) -> None:
    if not text.strip():
        draft.state.config.pop("Cmd", None)
        return
    _literal(draft, ins.Cmd(args=_words("cmd", text), shell=False, **_at(f"CMD {text}")))


def _entrypoint(draft: Draft, text: str) -> None:
    if not text.strip():
        draft.state.config.pop("Entrypoint", None)
        return
    array = text.lstrip().startswith("[")
    args = _words("entrypoint", text) if array else (text,)
    _literal(draft, ins.Entrypoint(args=args, shell=not array, **_at(f"ENTRYPOINT {text}")))


def _shell(draft: Draft, text: str) -> None:
    words = _words("shell", text)
    if not words:
        draft.state.config.pop("Shell", None)
        return
    _literal(draft, ins.Shell(args=words, **_at(f"SHELL {text}")))


def _user(draft: Draft, text: str) -> None:
    if not text:
        draft.state.config.pop("User", None)
        return
    _literal(draft, ins.User(user=text, **_at(f"USER {text}")))


def _workingdir(draft: Draft, text: str) -> None:
    if not text:
        draft.state.config.pop("WorkingDir", None)
        return
    _literal(draft, ins.Workdir(path=text, **_at(f"WORKDIR {text}")))


def _stop_signal(draft: Draft, text: str) -> None:
    if not text:
        draft.state.config.pop("StopSignal", None)
        return
    _parsed(draft, f"STOPSIGNAL {text}")


def _onbuild(draft: Draft, text: str) -> None:
    if text == "-":
        draft.state.config.pop("OnBuild", None)
        return
    _parsed(draft, f"ONBUILD {text}")


def _author(draft: Draft, text: str) -> None:
    draft.state.author = text or None


def _extra(draft: Draft, field: str, text: str) -> None:
    if text:
        draft.extra[field] = text
    else:
        draft.extra.pop(field, None)


def _os_feature(draft: Draft, text: str) -> None:
    gone = _removes(text)
    features = [f for f in draft.state.platform.os_features if gone != "" and f not in {gone, text}]
    draft.state.platform = replace(draft.state.platform, os_features=(*features, *([text] if gone is None else [])))


def _platform(field: Literal["os", "architecture", "os_version", "variant"]) -> Callable[[Draft, str], None]:
    def apply(draft: Draft, text: str) -> None:
        if not text and field in {"os", "architecture"}:
            raise UsageError(f"--{field}: a value is missing")
        changed: dict[str, Any] = {field: text}
        draft.state.platform = replace(draft.state.platform, **changed)

    return apply


def _healthcheck(draft: Draft, test: str | None, options: Mapping[str, str]) -> None:
    if test == "":
        draft.state.config.pop("Healthcheck", None)
        return
    before = draft.state.config.get("Healthcheck") or {}
    values: dict[str, Any] = {}
    if test is None:
        if not before.get("Test"):
            raise UsageError("--healthcheck-…: there is no health check to change", hint="give --healthcheck, too")
        words = tuple(before["Test"])
        values = {name: int(before.get(key) or 0) for name, key in _FIELD_OF_TIME.items()}
    else:
        words = _test(test)
    for name, text in options.items():
        if name == "retries":
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise UsageError(f"--healthcheck-retries {text!r}: expected a number")
            values["retries"] = int(text)
            continue
        try:
            values[_TIMES[name]] = parse_duration(f"{text}s" if text.isdigit() else text)
        except ParseError as e:
            raise UsageError(f"--healthcheck-{name} {text!r}: {e.message}", hint=e.hint) from e
        if values[_TIMES[name]] < 0:
            raise UsageError(f"--healthcheck-{name} {text!r}: time goes forward")
    _literal(draft, ins.Healthcheck(test=words, **values, **_at(f"HEALTHCHECK {test or ''}")))


def _test(text: str) -> tuple[str, ...]:
    word, _, rest = text.strip().partition(" ")
    if word == "NONE" and not rest:
        return ("NONE",)
    if word == "CMD" and rest.strip():
        return ("CMD", *_words("healthcheck", rest))
    return ("CMD-SHELL", rest.strip() if word == "CMD-SHELL" and rest.strip() else text.strip())


_FIELDS: dict[str, Callable[[Draft, str], None]] = {
    "annotation": _annotation,
    "arch": _platform("architecture"),
    "author": _author,
    "cmd": _cmd,
    "entrypoint": _entrypoint,
    "env": _env,
    "label": _label,
    "onbuild": _onbuild,
    "os": _platform("os"),
    "os-feature": _os_feature,
    "os-version": _platform("os_version"),
    "port": _port,
    "shell": _shell,
    "stop-signal": _stop_signal,
    "unsetannotation": _unset_annotation,
    "unsetlabel": _unset_label,
    "user": _user,
    "variant": _platform("variant"),
    "volume": _volume,
    "workingdir": _workingdir,
}
