"""Build files: several builds described in one document, as `docker buildx bake` and compose files have them.

Read are bake's HCL and JSON (in the latter `${NAME}` of its variables, but no expressions) and the `build`
sections of compose files, `x-bake` included. Several files are laid over one another.
Everything becomes `Target`s with all that they inherit; nothing is built here, and nothing read but the
documents.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from builder.errors import UsageError
from layers.values import NamedTuple

MAX_FILE_BYTES = 8 << 20
_MAX_TARGETS = 1000
_MAX_VALUES = 100_000
_MAPS = ("args", "contexts", "extra-hosts", "labels")
_LISTS = (
    "annotations", "cache-from", "cache-to", "entitlements", "no-cache-filter", "output", "platforms", "secret", "ssh",
    "tags", "ulimits",
)  # fmt: skip
_SINGLE = ("call", "context", "dockerfile", "dockerfile-inline", "network", "shm-size", "target")
_SWITCHES = ("no-cache", "pull")
_ADDED = ("annotations", "cache-from", "cache-to")
"""Lists of which a later file's entries come to the earlier ones; other lists are replaced."""
_UNBUILT = ("description", "inherits", "matrix", "name")
_COMPOSE = {
    "additional_contexts": "contexts", "args": "args", "cache_from": "cache-from", "cache_to": "cache-to",
    "context": "context", "dockerfile": "dockerfile", "dockerfile_inline": "dockerfile-inline",
    "entitlements": "entitlements", "extra_hosts": "extra-hosts", "labels": "labels", "network": "network",
    "no_cache": "no-cache", "platforms": "platforms", "pull": "pull", "secrets": "secret", "shm_size": "shm-size",
    "ssh": "ssh", "tags": "tags", "target": "target", "ulimits": "ulimits",
}  # fmt: skip
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)(?:(:?[-?+])([^{}]*))?\})")


class Target(NamedTuple):
    """One build: bake's attributes by their names, each a string, a bool, a list or a map of strings."""

    name: str
    attributes: Mapping[str, Any]

    def needs(self) -> list[str]:
        """The targets whose images are contexts of this one."""
        values = self.attributes.get("contexts", {}).values()
        return [value.removeprefix("target:") for value in values if value.startswith("target:")]


class BakeFile(NamedTuple):
    """Everything that the documents describe, not yet resolved."""

    targets: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]

    def selected(self, names: Sequence[str], overrides: Sequence[str] = ()) -> list[Target]:
        """The targets that `names` (default: "default") stand for, and what those build upon, which comes first.

        `overrides` are `TARGET.KEY[.NAME]=VALUE`. Raises: UsageError (unknown, circular).
        """
        found: dict[str, Target] = {}
        for name in names or ["default"]:
            for member in self._members(name, (), {}):
                self._add(member, overrides, found, ())
        return list(found.values())

    def _members(self, name: str, above: tuple[str, ...], known: dict[str, list[str]]) -> list[str]:
        if name in above:
            raise UsageError(f"group {name} contains itself")
        if name in self.groups:
            if name not in known:  # or groups of groups would be gone through as often as there are ways to them
                lists = [self._members(member, (*above, name), known) for member in self.groups[name]]
                known[name] = list(dict.fromkeys([member for members in lists for member in members]))
            return known[name]
        if name not in self.targets:
            from builder.frontend.spelling import did_you_mean

            spelled = did_you_mean(name, [*self.targets, *self.groups])
            raise UsageError(f"there is no target {name!r}{spelled}", hint="`pybuild bake --list`")
        return [name]

    def _add(self, name: str, overrides: Sequence[str], found: dict[str, Target], above: tuple[str, ...]) -> None:
        if name in found:
            return
        if name in above:
            raise UsageError(f"target {name} needs itself: {' -> '.join((*above, name))}")
        attributes = self._inherited(name, (), {})
        for text in overrides:
            _override(name, attributes, text)
        target = Target(name, {k: v for k, v in attributes.items() if k not in _UNBUILT})
        for other in target.needs():
            if other not in self.targets:
                raise UsageError(f"target {name}: its context target:{other} is no target")
            self._add(other, overrides, found, (*above, name))
        found[name] = target

    def _inherited(self, name: str, above: tuple[str, ...], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if name in above:
            raise UsageError(f"target {name} inherits from itself: {' -> '.join((*above, name))}")
        if name not in self.targets:
            raise UsageError(f"target {above[-1]} inherits from {name!r}, which is no target")
        if name in known:
            return known[name]
        own = self.targets[name]
        merged: dict[str, Any] = {}
        for parent in own.get("inherits", []):
            _lay_over(merged, self._inherited(parent, (*above, name), known))
        _lay_over(merged, own)
        known[name] = merged
        return merged


def parse_files(texts: Iterable[tuple[str, str]], environ: Mapping[str, str]) -> BakeFile:
    """The documents as one, later ones over earlier ones; each is (name, text).

    Variables have the values of `environ`, else their defaults. Raises: UsageError.
    """
    whole = BakeFile({}, {})
    for name, text in texts:
        try:
            part = _hcl(text, environ) if name.endswith(".hcl") else _parsed(name, text, environ)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as e:
            raise UsageError(f"{name} is no build file: {e}{' is missing' * isinstance(e, KeyError)}") from e
        for target, attributes in part.targets.items():
            _lay_over(whole.targets.setdefault(target, {}), attributes)
        whole.groups.update(part.groups)
        if len(whole.targets) > _MAX_TARGETS:
            raise UsageError(f"{name}: more than {_MAX_TARGETS} targets")
    return whole


def _parsed(name: str, text: str, environ: Mapping[str, str]) -> BakeFile:
    document = json.loads(text) if name.endswith(".json") else _yaml(text)
    if not isinstance(document, dict):
        raise TypeError("expected a map at the top")
    return _compose(document, environ) if "services" in document else _bake(document, environ)


def _yaml(text: str) -> Any:
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(str(e).replace("\n", " ")) from e
    _written_out(document, {})
    return document


def _written_out(value: Any, sizes: dict[int, int]) -> int:
    """How many values a document is with its aliases written out: a few lines may mean more than memory holds.

    Raises: ValueError if that is too many, or without end.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = _MAX_VALUES  # what is within itself has no end
        items = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_written_out(item, sizes) for item in items)
    if sizes[id(value)] >= _MAX_VALUES:
        raise ValueError(f"with its aliases written out it has more than {_MAX_VALUES} values")
    return sizes[id(value)]


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if key in _MAPS:
            below[key] = {**below.get(key, {}), **value}
        elif key in _ADDED:
            below[key] = list(dict.fromkeys([*below.get(key, []), *value]))
        else:
            below[key] = value


# bake's own files


class _Section(NamedTuple):
    """A target that is not evaluated yet: its matrix, and what it is in a scope of variables."""

    matrix: Callable[[Mapping[str, Any]], Mapping[str, Sequence[Any]]]
    attributes: Callable[[Mapping[str, Any]], Mapping[str, Any]]


def _bake(document: Mapping[str, Any], environ: Mapping[str, str]) -> BakeFile:
    unknown = set(document) - {"target", "group", "variable"}
    if unknown:
        raise ValueError(f"unknown section {sorted(unknown)[0]!r}: there are target, group and variable")
    variables: dict[str, Any] = {}
    for name, entry in (document.get("variable") or {}).items():
        default = (entry or {}).get("default")
        variables[name] = environ.get(name, "" if default is None else _text(_replaced(_text(default), variables.get)))
    groups = {
        name: [str(member) for member in entry.get("targets", [])]
        for name, entry in (document.get("group") or {}).items()
    }

    def section(entry: Mapping[str, Any]) -> _Section:
        return _Section(lambda _scope: entry.get("matrix") or {}, lambda scope: _resolved(entry, _texts(scope)))

    sections = {name: section(entry) for name, entry in (document.get("target") or {}).items()}
    return _assembled(sections, groups, variables)


def _texts(scope: Mapping[str, Any]) -> Callable[[str], str | None]:
    return lambda name: _text(scope[name]) if name in scope else None


def _hcl(text: str, environ: Mapping[str, str]) -> BakeFile:
    from builder.hcl import Block, Function, parse_hcl, truth
    from builder.hclfunctions import FUNCTIONS

    functions: dict[str, Function] = dict(FUNCTIONS)
    body = parse_hcl(text, functions)
    variables: dict[str, Any] = {}
    for name, value in body.attributes.items():
        variables[name] = value(variables)
    sections: dict[str, _Section] = {}
    groups: dict[str, list[str]] = {}

    def section(block: Block) -> _Section:
        attributes = block.body.attributes
        matrix = attributes.get("matrix")
        return _Section(
            lambda scope: {} if matrix is None else matrix(scope),
            lambda scope: {key: value(scope) for key, value in attributes.items() if key != "matrix"},
        )

    for block in body.blocks:
        name = block.labels[0] if len(block.labels) == 1 else ""
        attributes = block.body.attributes
        if not name or block.type not in {"variable", "group", "target", "function"}:
            raise ValueError(f"{block.type} {' '.join(block.labels)}: there are variable, group, target, function")
        if block.type == "function":
            functions[name] = _own_function(name, attributes)
        elif block.type == "variable":
            default = attributes["default"](variables) if "default" in attributes else None
            given = environ.get(name)
            if given is None:
                variables[name] = "" if default is None else default
            else:
                typed = (
                    truth if isinstance(default, bool) else type(default) if isinstance(default, (int, float)) else str
                )
                variables[name] = typed(given)
        elif block.type == "group":
            groups[name] = [str(member) for member in attributes["targets"](variables)]
        else:
            if block.body.blocks:
                raise ValueError(f"target {name}: {block.body.blocks[0].type} is no attribute")
            sections[name] = section(block)
    return _assembled(sections, groups, variables)


def _own_function(name: str, attributes: Mapping[str, Callable[[Mapping[str, Any]], Any]]) -> Callable[..., Any]:
    """A function that the file defines; it sees its parameters alone."""
    result = attributes.get("result")
    if result is None or set(attributes) - {"params", "variadic_params", "result"}:
        raise ValueError(f"function {name}: it has params, variadic_params and a result")
    # Names of parameters are written without quotes.
    names = attributes["params"](_Echo()) if "params" in attributes else []
    rest = attributes["variadic_params"](_Echo()) if "variadic_params" in attributes else None

    def call(*values: Any) -> Any:
        if len(values) < len(names) or (len(values) > len(names) and rest is None):
            raise ValueError(f"it takes {len(names)} values, not {len(values)}")
        scope = dict(zip(names, values, strict=False))
        if rest is not None:
            scope[rest] = list(values[len(names) :])
        return result(scope)

    return call


class _Echo(dict[str, Any]):
    """A scope in which every name means itself."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return name


def _assembled(
    sections: Mapping[str, _Section], groups: dict[str, list[str]], variables: Mapping[str, Any]
) -> BakeFile:
    targets: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        axes = section.matrix(variables)
        names = []
        for number, combination in enumerate(_matrix(axes)):
            attributes = _attributes(name, section.attributes({**variables, **combination}))
            names.append(attributes.get("name") or (f"{name}-{number}" if axes else name))
            targets[names[-1]] = attributes
            if len(targets) > _MAX_TARGETS:
                raise ValueError(f"more than {_MAX_TARGETS} targets")
        if axes:
            groups[name] = names  # the plain name stands for all of them
    return BakeFile(targets, groups)


def _matrix(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    total = 1
    for values in axes.values():
        total *= len(values)
    if total > _MAX_TARGETS:
        raise ValueError(f"a matrix of {total} targets")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _attributes(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entry.items():
        spelled = {"cache_from": "cache-from", "cache_to": "cache-to", "no_cache": "no-cache", "secrets": "secret"}
        key = spelled.get(key, key)
        if value is None:
            continue
        if key in _MAPS:
            found[key] = {str(k): _text(v) for k, v in value.items() if v is not None}
        elif key in _LISTS:
            found[key] = [text for v in ([value] if isinstance(value, str) else value) if (text := _fields(v))]
        elif key in _SWITCHES:
            found[key] = _switch(value)
        elif key in (*_SINGLE, "name", "description"):
            found[key] = _text(value)
        elif key == "inherits":
            found[key] = list(map(str, value))
        elif key == "attest" and not value:
            continue
        elif key != "matrix":
            raise ValueError(f"target {name}: {key!r} is not possible")
    return found


def _fields(value: Any) -> str:
    """An entry of a list: a text, or an object of fields, as `type=registry,ref=...`."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_text(v)}" for key, v in value.items())
    return _text(value)


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in {"true", "1", "false", "0"}:
        return str(value).lower() in {"true", "1"}
    raise ValueError(f"{value!r}: expected true or false")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{value!r}: expected a text")


# compose files


def _compose(document: Mapping[str, Any], environ: Mapping[str, str]) -> BakeFile:
    targets: dict[str, dict[str, Any]] = {}
    for service, entry in (document.get("services") or {}).items():
        if not isinstance(entry, Mapping) or entry.get("build") is None:
            continue
        values = _resolved(entry, environ.get)
        build = values["build"] if isinstance(values["build"], Mapping) else {"context": values["build"]}
        attributes: dict[str, Any] = {}
        for key, value in build.items():
            if key in {"x-bake", "privileged", "provenance", "sbom"} or value is None:
                continue
            if key not in _COMPOSE:
                raise ValueError(f"service {service}: build.{key} is not possible")
            attributes[_COMPOSE[key]] = _compose_value(_COMPOSE[key], value, environ, document)
        if values.get("image"):
            attributes["tags"] = [str(values["image"]), *attributes.get("tags", [])]
        attributes = _attributes(service, attributes)
        _lay_over(attributes, _attributes(service, build.get("x-bake") or {}))
        targets[str(service).replace(".", "_")] = attributes
    return BakeFile(targets, {"default": list(targets)})


def _compose_value(key: str, value: Any, environ: Mapping[str, str], document: Mapping[str, Any]) -> Any:
    """What compose allows besides what bake does: lists for maps, names of the document's secrets."""
    if key in _MAPS and isinstance(value, list):
        pairs = [str(text).partition(":" if key == "extra-hosts" and "=" not in str(text) else "=") for text in value]
        return {name: text if sign else environ.get(name) for name, sign, text in pairs}
    if key == "args":
        return {name: environ.get(name) if text is None else text for name, text in value.items()}
    if key == "secret":
        return [_compose_secret(item, document) for item in value]
    if key == "ssh" and isinstance(value, Mapping):
        return [f"{name}={path}" if path else name for name, path in value.items()]
    if key == "ulimits":
        return [
            f"{name}={v['soft']}:{v['hard']}" if isinstance(v, Mapping) else f"{name}={v}" for name, v in value.items()
        ]
    return value


def _compose_secret(item: Any, document: Mapping[str, Any]) -> str:
    source = str(item["source"] if isinstance(item, Mapping) else item)
    id = str(item.get("target") or source) if isinstance(item, Mapping) else source
    known = (document.get("secrets") or {}).get(source)
    if not isinstance(known, Mapping):
        raise TypeError(f"secret {source!r} is not among the document's secrets")
    if known.get("environment"):
        return f"id={id},env={known['environment']}"
    if known.get("file"):
        return f"id={id},src={known['file']}"
    raise ValueError(f"secret {source!r} has neither file nor environment")


# Variables and overrides


def _resolved(value: Any, lookup: Callable[[str], str | None]) -> Any:
    """A copy in which the variables of all texts have their values."""
    if isinstance(value, str):
        return _replaced(value, lookup)
    if isinstance(value, Mapping):
        return {key: _resolved(item, lookup) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, lookup) for item in value]
    return value


def _replaced(text: str, lookup: Callable[[str], str | None]) -> str:
    def one(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name, operator, word = match[2] or match[3], match[4] or "", match[5] or ""
        value = lookup(name)
        missing = value is None or (operator.startswith(":") and not value)
        match operator[-1:]:
            case "-":
                return word if missing else str(value)
            case "+":
                return "" if missing else word
            case "?" if missing:
                raise ValueError(f"variable {name}: {word or 'is not set'}")
        return value or ""

    if "${" in text and not _VARIABLE.search(text):
        raise ValueError(f"{text!r}: such an expression is possible in HCL alone")
    for found in re.finditer(r"\$\{[^}]*\}", text):
        if not _VARIABLE.fullmatch(found[0]):
            raise ValueError(f"{found[0]}: possible in HCL alone")
    return _VARIABLE.sub(one, text)


def _override(name: str, attributes: dict[str, Any], text: str) -> None:
    """Apply `PATTERN.KEY[.NAME]=VALUE` if it is about this target. Raises: UsageError."""
    path, separator, value = text.partition("=")
    pattern, _, rest = path.partition(".")
    key, _, entry = rest.partition(".")
    key = {"platform": "platforms", "secrets": "secret", "no_cache": "no-cache"}.get(key, key)
    append = key.endswith("+") or path.endswith("+")
    key, entry = key.rstrip("+"), entry.rstrip("+")
    known = (*_MAPS, *_LISTS, *_SINGLE, *_SWITCHES, "push", "load")
    if not separator or key not in known or (key in _MAPS) != bool(entry):
        raise UsageError(f"--set {text}: expected TARGET.KEY=VALUE", hint="such as --set '*.args.VERSION=2'")
    if not fnmatch.fnmatchcase(name, pattern):
        return
    if key in _MAPS:
        attributes[key] = {**attributes.get(key, {}), entry: value}
    elif key in _LISTS:
        values = value.split(",") if key in {"tags", "platforms"} else [value]
        attributes[key] = [*(attributes.get(key, []) if append else []), *values]
    elif key in {"push", "load"}:
        attributes["output"] = [f"type={'registry' if key == 'push' else 'docker'}"] if _switch(value) else []
    else:
        attributes[key] = _switch(value) if key in _SWITCHES else value
