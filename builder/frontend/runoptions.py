"""The comma-separated options of `RUN --mount` and `RUN --device`, and the notations of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.errors import ParseError
from builder.frontend.language import RunDevice, RunMount
from builder.frontend.spelling import did_you_mean

_TYPES = ("bind", "cache", "tmpfs", "secret", "ssh")
_SHARING = ("shared", "private", "locked")
_KEYS = (
    "type", "from", "source", "target", "readonly", "id", "sharing", "required", "size", "mode", "uid", "gid",
    "src", "dst", "destination", "ro", "rw", "readwrite", "env",
)  # fmt: skip
_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly", "rw": "readwrite"}
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_SIZE_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(" kmgtp")}
_SIZE_LETTERS = "bikmgtpBIKMGTP"


def check_mount(option: str) -> None:
    """What can be said of a --mount before its variables have values. Raises: ParseError without a place."""
    for field in split_csv(option, "mounts"):
        key, _, value = field.partition("=")
        dollar = value.find("$")
        if key.lower() == "from" and 0 <= dollar < len(value) - 1:
            raise ParseError("'from' doesn't support variable expansion, define alias stage instead")


def parse_mount(option: str, expand: Callable[[str], str]) -> RunMount:
    """Parse one --mount, expanding the value of each option.

    The order of options matters where BuildKit lets it: `required` and `size` ask for the type before them.
    Raises: ParseError without a place.
    """
    check_mount(option)
    mount = _Mount()
    for field in split_csv(option, "mounts"):
        key, equals, value = field.partition("=")
        mount.set(key.lower(), expand(value) if equals else None, field)
    return mount.finish()


class _Mount:
    """A mount being parsed."""

    def __init__(self) -> None:
        self.type = "bind"
        self.values: dict[str, Any] = {}

    def set(self, spelled: str, value: str | None, field: str) -> None:
        key = _ALIASES.get(spelled, spelled)
        if value is None and key not in ("readonly", "readwrite", "required"):
            if key not in _KEYS:
                raise ParseError(f"unexpected key '{spelled}' in '{field}'{did_you_mean(spelled, _KEYS)}")
            raise ParseError(f"invalid field '{field}' must be a key=value pair")
        if key in ("readonly", "readwrite"):
            on = True if value is None else _boolean(spelled, value)
            self.values["readonly"] = on if key == "readonly" else not on
        elif key == "required":
            self._only(spelled, "secret", "ssh")
            self.values[key] = True if value is None else _boolean(spelled, value)
        elif value is not None:
            self._set_value(key, spelled, value, field)

    def _set_value(self, key: str, spelled: str, value: str, field: str) -> None:
        if key == "type":
            self.type = value.lower()
            if self.type not in _TYPES:
                raise ParseError(f'unsupported mount type "{value}"{did_you_mean(value, _TYPES)}')
        elif key == "sharing":
            if value.lower() not in _SHARING:
                raise ParseError(f'unsupported sharing value "{value}"{did_you_mean(value, _SHARING)}')
            self.values[key] = value.lower()
        elif key == "size":
            self._only(spelled, "tmpfs")
            self.values["size_bytes"] = parse_size(value)
        elif key in ("mode", "uid", "gid"):
            self.values[key] = _unsigned(key, value, 8 if key == "mode" else 10)
        elif key in ("from", "source", "target", "id", "env"):
            self.values["from_" if key == "from" else key] = value
        else:
            raise ParseError(f"unexpected key '{spelled}' in '{field}'{did_you_mean(spelled, _KEYS)}")

    def _only(self, key: str, *types: str) -> None:
        if self.type not in types:
            raise ParseError(
                f"unexpected key '{key}' for mount type '{self.type}'",
                hint=f"type={types[0]} must stand before it" if self.type == "bind" else None,
            )

    def finish(self) -> RunMount:
        values, kind = self.values, self.type
        if kind in ("bind", "tmpfs"):
            for key in ("mode", "uid", "gid"):
                if key in values:
                    raise ParseError(f'{key} not allowed for "{kind}" type mounts')
        values.setdefault("readonly", kind not in ("cache", "tmpfs"))
        if kind == "secret":
            if values.get("from_"):
                raise ParseError("secret mount should not have a from")
            if "sharing" in values:
                raise ParseError("secret mount should not define sharing")
            if not (values.get("source") or values.get("target") or values.get("id")):
                raise ParseError("invalid secret mount. one of source, target required")
            if values.get("source") and values.get("id"):
                raise ParseError("both source and id can't be set")
        if "sharing" in values and kind != "cache":
            raise ParseError(f"invalid cache sharing set for {kind} mount")
        return RunMount(type=kind, **values)


def parse_device(option: str) -> RunDevice:
    """Parse one --device: a CDI name, bare or as `name=`, and `required`. Raises: ParseError without a place."""
    name, required = "", False
    for field in split_csv(option, "devices"):
        key, equals, value = field.partition("=")
        key = key.lower()
        if key == "required":
            required = _boolean(key, value) if equals else True
        elif key == "name" and equals:
            if name:
                raise ParseError(f"device name already set to {name}")
            name = value
        elif not name:
            name = field
        elif equals:
            raise ParseError(f"unexpected key '{key}' in '{field}'{did_you_mean(key, ('name', 'required'))}")
        else:
            raise ParseError(f"invalid field '{field}' must be a key=value pair")
    return RunDevice(name, required)


def split_csv(text: str, what: str) -> list[str]:
    """The fields of one CSV record; quotes double within quotes. Raises: ParseError without a place."""
    if '"' not in text:
        return text.split(",")
    fields: list[str] = []
    at = 0
    while True:
        if not text.startswith('"', at):
            end = text.find(",", at)
            field = text[at:] if end < 0 else text[at:end]
            if '"' in field:
                raise ParseError(f'failed to parse csv {what}: bare " in non-quoted field')
            fields.append(field)
        else:
            field, end = _quoted_field(text, at + 1, what)
            fields.append(field)
            end = end if end < len(text) else -1
        if end < 0:
            return fields
        at = end + 1


def _quoted_field(text: str, at: int, what: str) -> tuple[str, int]:
    """The field that a quote opened before `at`, and where it ends."""
    parts: list[str] = []
    while (quote := text.find('"', at)) >= 0:
        parts.append(text[at:quote])
        if text.startswith('"', quote + 1):
            parts.append('"')
            at = quote + 2
        elif quote + 1 == len(text) or text[quote + 1] == ",":
            return "".join(parts), quote + 1
        else:
            break
    raise ParseError(f'failed to parse csv {what}: extraneous or missing " in quoted-field')


def _boolean(key: str, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ParseError(f"invalid value for {key}: {value}", hint="true or false")


def _unsigned(key: str, value: str, base: int) -> int:
    if value and not value.strip("0123456789"[:base]) and len(value) <= 32:
        number = int(value, base)
        if number < 1 << 32:
            return number
    hint = "an octal number, such as 0600" if base == 8 else "a number; names have no meaning here"
    raise ParseError(f"invalid value {value} for {key}", hint=hint)


def parse_size(text: str) -> int:
    """Bytes from `64m`, `1.5GiB`, `100 KB`, `512`; units are powers of 1024. Raises: ParseError without a place."""
    number = text.rstrip(_SIZE_LETTERS)
    unit = text[len(number) :].lower()
    number = number.removesuffix(" ")
    plain = number.replace(".", "", 1)
    letter, tail = unit[:1] or " ", unit[1:]
    known = letter in _SIZE_UNITS and tail in ("", "b", "ib") if letter != "b" else not tail
    if not known or not (plain.isascii() and plain.isdigit()) or len(plain) > 18:
        raise ParseError(f"invalid value for size: {text}", hint="such as 64m or 1g")
    return int(float(number) * _SIZE_UNITS.get(letter, 1))
