"""Source policies: which images, downloads and repositories a build may use, and what stands in for them.

BuildKit's documents (`sourcepolicy/pb`, as JSON): rules with a selector of identifiers and an action.
ALLOW and DENY: of those that match, the last one counts. CONVERT changes the source, which is then
judged anew. Identifiers are `docker-image://docker.io/library/debian:bookworm`, `oci-layout://...`,
`https://...`, `git://host/path.git#ref` and `local://NAME`. A lock file (`builder.lock`) is a policy
of conversions to digests and commits, and `complete`: what it does not pin is refused. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from builder.errors import UsageError
from builder.frontend.gitref import GitRef, parse_git_ref
from layers.errors import PybuildError
from layers.regex import Found, compile_pattern
from layers.values import NamedTuple
from registry.reference import Reference

MAX_POLICY_BYTES = 4 << 20
_MAX_CONVERSIONS = 20
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

Action = Literal["ALLOW", "DENY", "CONVERT"]


class SourceDenied(Exception):
    """A policy forbids a source. The planner says where it is asked for."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Constraint(NamedTuple):
    """What an attribute of a source has to be for its rule to match."""

    key: str
    value: str
    condition: Literal["EQUAL", "NOTEQUAL", "MATCHES"] = "EQUAL"


class Rule(NamedTuple):
    """One rule. `match` tells how `selector` is read; `identifier` and `attributes` are what CONVERT sets."""

    action: Action
    selector: str
    match: Literal["WILDCARD", "EXACT", "REGEX"] = "WILDCARD"
    constraints: tuple[Constraint, ...] = ()
    identifier: str = ""
    attributes: tuple[tuple[str, str], ...] = ()

    def matches(self, source: Source) -> tuple[str, ...] | None:
        """A source's identifier and what the selector's groups are of it, None if it or an attribute does not match."""
        for constraint in self.constraints:
            value = source.attribute(constraint.key)
            if constraint.condition == "MATCHES":
                if _search(constraint.value, value) is None:
                    return None
            elif (value == constraint.value) != (constraint.condition == "EQUAL"):
                return None
        if self.selector == source.identifier:
            return (source.identifier,)
        if self.match == "REGEX":
            found = _search(self.selector, source.identifier)
            return None if found is None else tuple(group or "" for group in found.groups)
        return _wildcards(self.selector, source.identifier) if self.match == "WILDCARD" else None

    def to_json(self) -> dict[str, Any]:
        """As the document has it; only what is set."""
        selector: dict[str, Any] = {"identifier": self.selector}
        if self.match != "WILDCARD":
            selector["matchType"] = self.match
        if self.constraints:
            selector["constraints"] = [c._asdict() for c in self.constraints]
        document: dict[str, Any] = {"action": self.action, "selector": selector}
        updates: dict[str, Any] = {}
        if self.identifier:
            updates["identifier"] = self.identifier
        if self.attributes:
            updates["attrs"] = dict(self.attributes)
        if updates:
            document["updates"] = updates
        return document


class Source(NamedTuple):
    """A source as policies see it."""

    identifier: str
    attributes: tuple[tuple[str, str], ...] = ()

    def attribute(self, key: str) -> str:
        return dict(self.attributes).get(key, "")

    def changed(self, rule: Rule, groups: tuple[str, ...]) -> Source:
        """Itself with what a rule sets; `$1` and `${1}` are what the selector's groups matched."""

        def group(found: re.Match[str]) -> str:
            number = (found[1] or found[2]).lstrip("0") or "0"
            return groups[int(number)] if len(number) < 9 and int(number) < len(groups) else ""

        identifier = re.sub(r"\$(?:(\d+)|\{(\d+)\})", group, rule.identifier) or self.identifier
        return Source(identifier, tuple({**dict(self.attributes), **dict(rule.attributes)}.items()))


class Download(NamedTuple):
    """What ADD of a URL or a repository is to fetch instead; `checksum` is "" if none is asked for."""

    source: str
    checksum: str = ""


class SourcePolicy(NamedTuple):
    """Policies in the order in which they are asked. `complete` refuses what is not pinned after them."""

    policies: tuple[tuple[Rule, ...], ...] = ()
    complete: bool = False

    def image(self, name: str) -> str:
        """The image to use for `name`. Raises: SourceDenied."""
        reference = Reference.parse(name).with_default_tag()
        found = self._judge(Source(f"docker-image://{reference.canonical()}")).identifier
        if not found.startswith("docker-image://"):
            raise SourceDenied(
                f"the source policy makes {found} of an image", "an image can become another image alone"
            )
        if found == f"docker-image://{reference.canonical()}":
            found = f"docker-image://{name}"  # a short name keeps its meaning
        try:
            pinned = Reference.parse(found.removeprefix("docker-image://")).digest is not None
        except PybuildError as e:
            raise SourceDenied(f"the source policy makes {found} of {name}: {e.message}") from e
        self._require(pinned, f"image {reference.familiar()}")
        return found.removeprefix("docker-image://")

    def layout(self, location: str) -> None:
        """Refuse an OCI layout that is not to be used. Raises: SourceDenied."""
        self._judge(Source(f"oci-layout://{location}"))

    def local(self, name: str) -> None:
        """Refuse a directory that is not to be used; "" is the main context. Raises: SourceDenied."""
        self._judge(Source(f"local://{name or 'context'}"))

    def http(self, url: str, checksum: str = "") -> Download:
        """The file to use for a URL. Raises: SourceDenied."""
        attributes = (("http.checksum", checksum),) if checksum else ()
        found = self._judge(Source(url, attributes))
        if not found.identifier.startswith(("http://", "https://")):
            raise SourceDenied(f"the source policy makes {found.identifier} of the download {url}")
        wanted = found.attribute("http.checksum")
        self._require(bool(wanted), f"the download {url}")
        return Download(found.identifier, wanted)

    def git(self, text: str, checksum: str = "") -> Download:
        """The repository to use for a git reference. Raises: SourceDenied."""
        ref = parse_git_ref(text, known=True)
        assert ref is not None, "only repositories get here"
        before = git_source(ref)
        found = self._judge(before)
        if found != before:
            ref = _git_ref(found, ref)
        self._require(bool(_COMMIT.fullmatch(ref.ref) or checksum or ref.checksum), f"the repository {text}")
        return Download(text if found == before else _git_text(ref), checksum)

    def remote(self, text: str) -> str:
        """The URL or repository to use for one that is a context. Raises: SourceDenied."""
        return (self.http(text) if parse_git_ref(text) is None else self.git(text)).source

    def _require(self, pinned: bool, what: str) -> None:
        if self.complete and not pinned:
            raise SourceDenied(f"{what} is not in the lock file", "`pybuild lock` adds it")

    def _judge(self, source: Source) -> Source:
        for _ in range(_MAX_CONVERSIONS):
            changed = self._converted(source)
            if changed == source:
                return source
            source = changed
        raise SourceDenied(f"the source policy converts {source.identifier} without end")

    def _converted(self, source: Source) -> Source:
        """What the first conversion makes of it. Raises: SourceDenied."""
        for rules in self.policies:
            denied = False
            for rule in rules:
                match = rule.matches(source)
                if match is None:
                    continue
                if rule.action == "CONVERT":
                    changed = source.changed(rule, match)
                    if changed != source:
                        return changed
                else:
                    denied = rule.action == "DENY"
            if denied:
                raise SourceDenied(f'source "{source.identifier}" denied by policy')
        return source


def _wildcards(selector: str, text: str) -> tuple[str, ...] | None:
    """What each `*` of a selector stands for, the earlier the longer; the time is linear, where a regex's is not."""
    first, *rest = selector.split("*")
    if not rest:
        return (text,) if text == selector else None
    *inner, last = rest
    start, end = len(first), len(text) - len(last)
    if end < start or not text.startswith(first) or not text.endswith(last):
        return None
    groups: list[str] = []
    for word in reversed(inner):
        at = text.rfind(word, start, end)
        if at < 0:
            return None
        groups.append(text[at + len(word) : end])
        end = at
    return (text, text[start:end], *reversed(groups))


def git_source(ref: GitRef) -> Source:
    """How policies name a repository: without its scheme; that is in an attribute."""
    _, separator, rest = ref.remote.partition("://")
    where = rest if separator else ref.remote.replace(":", "/", 1)
    fragment = f"{ref.ref}:{ref.subdir}" if ref.subdir else ref.ref
    return Source(f"git://{where}{'#' if fragment else ''}{fragment}", (("git.fullurl", ref.remote),))


def _git_ref(source: Source, was: GitRef) -> GitRef:
    if not source.identifier.startswith("git://"):
        raise SourceDenied(f"the source policy makes {source.identifier} of the repository {was.remote}")
    where, _, fragment = source.identifier.removeprefix("git://").partition("#")
    ref, _, subdir = fragment.partition(":")
    remote = source.attribute("git.fullurl")
    if remote == was.remote and where != git_source(was).identifier.removeprefix("git://").partition("#")[0]:
        remote = f"https://{where}"
    return was._replace(remote=remote, ref=ref, subdir=subdir)


def _git_text(ref: GitRef) -> str:
    """A reference that parses back as this one."""
    options = {"keep-git-dir": ref.keep_git_dir, "submodules": ref.submodules}
    query = "&".join(f"{key}={str(value).lower()}" for key, value in options.items() if value is not None)
    fragment = f"{ref.ref}:{ref.subdir}" if ref.subdir else ref.ref
    return f"{ref.remote}{'?' if query else ''}{query}{'#' if fragment else ''}{fragment}"


def parse_policy(data: bytes, where: str) -> tuple[Rule, ...]:
    """The rules of a document. `where` names it in errors. Raises: UsageError."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or not isinstance(document.get("rules", []), list):
            raise TypeError('expected an object with "rules"')
        return tuple(_rule(_object(rule, "a rule")) for rule in document.get("rules", []))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UsageError(f"{where} is no source policy: {e}") from e


def _rule(document: Mapping[str, Any]) -> Rule:
    selector = _object(document.get("selector") or {}, "selector")
    updates = _object(document.get("updates") or {}, "updates")
    wanted = [_object(c, "a constraint") for c in selector.get("constraints") or []]
    if not all(c.get("key") for c in wanted):
        raise ValueError("a constraint has no key")
    constraints = tuple(
        Constraint(
            str(c["key"]), str(c.get("value", "")), _known(c.get("condition", "EQUAL"), "EQUAL", "NOTEQUAL", "MATCHES")
        )
        for c in wanted
    )
    rule = Rule(
        _known(document.get("action", "ALLOW"), "ALLOW", "DENY", "CONVERT"),
        str(selector.get("identifier") or ""),
        _known(selector.get("matchType", "WILDCARD"), "WILDCARD", "EXACT", "REGEX"),
        constraints,
        str(updates.get("identifier") or ""),
        tuple((str(k), str(v)) for k, v in _object(updates.get("attrs") or {}, "attrs").items()),
    )
    if not rule.selector:
        raise ValueError(f"a rule ({rule.action}) selects nothing")
    if rule.action == "CONVERT" and not rule.identifier and not rule.attributes:
        raise ValueError(f"the conversion of {rule.selector} says not what to")
    for pattern in [rule.selector] * (rule.match == "REGEX") + [
        c.value for c in constraints if c.condition == "MATCHES"
    ]:
        compile_pattern(pattern)
    return rule


def _search(pattern: str, text: str) -> Found | None:
    """Raises: UsageError for a text of so many characters that it would take too long."""
    try:
        return compile_pattern(pattern).search(text)
    except ValueError as e:
        raise UsageError(f"the source policy's {pattern[:80]!r} for {text[:80]!r}: {e}") from e


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is no object: {str(value)[:40]!r}")
    return value


def _known(value: Any, *words: str) -> Any:
    """One of `words`, or its number, as protobuf's JSON allows."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(words):
        return words[value]
    if value not in words:
        raise ValueError(f"{value!r}: expected {', '.join(words)}")
    return value


def read_policy(path: Path) -> tuple[Rule, ...]:
    """The rules of a file. Raises: UsageError."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_POLICY_BYTES + 1)
    except OSError as e:
        raise UsageError(f"cannot read the source policy {path}: {e.strerror}") from e
    if len(data) > MAX_POLICY_BYTES:
        raise UsageError(f"the source policy {path} is larger than {MAX_POLICY_BYTES >> 20} MiB")
    return parse_policy(data, str(path))


def policy_document(rules: Sequence[Rule]) -> bytes:
    """Rules as a document: one rule after the other, so that a change is a few lines of a diff."""
    return (json.dumps({"version": 1, "rules": [rule.to_json() for rule in rules]}, indent=2) + "\n").encode()
