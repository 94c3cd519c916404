"""References to git repositories in ADD and as build contexts, and what sets them off from paths and URLs.

Pure. `https://host/repo.git#ref:subdir`, `git://...`, `ssh://...`, `user@host:path`, and the query
form `?ref=...&subdir=...` of BuildKit. An http(s) URL is a repository if its path ends in `.git`, or if
it is `known` to be one: `--keep-git-dir`, with whatever value, says so.
Reference: https://docs.docker.com/build/concepts/context/#git-repositories
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from layers.values import NamedTuple

_SCHEME = re.compile(r"[a-zA-Z0-9]+://")
_SCP_STYLE = re.compile(r"([a-zA-Z0-9_-]+@[a-zA-Z0-9.-]+):(.*?)(?:\?(.*?))?(?:#(.*))?", re.DOTALL)
_SCHEMES = frozenset({"http", "https", "ssh", "git"})
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})


class GitRef(NamedTuple):
    """A repository and what is wanted of it.

    `remote` is for git to fetch from. `ref` is a branch, tag, full reference name or commit, ""
    for the default branch; `checksum` a commit, or the beginning of one, to check against.
    `keep_git_dir` and `submodules` are None where the reference does not say. `like_a_path` marks
    `github.com/owner/repo`, which names a repository only where no path is expected.
    """

    remote: str
    ref: str = ""
    subdir: str = ""
    checksum: str = ""
    keep_git_dir: bool | None = None
    submodules: bool | None = None
    like_a_path: bool = False


def parse_git_ref(text: str, *, known: bool = False) -> GitRef | None:
    """Parse a reference to a repository; None if it is something else.

    Raises: ValueError for one that contradicts itself or has a query that is not known.
    """
    if text.startswith(("./", "../")) or any(c < " " or c == "\x7f" for c in text):
        return None
    like_a_path = text.startswith("github.com/")
    if like_a_path or _SCHEME.match(text):
        try:
            parts = urlsplit(f"https://{text}" if like_a_path else text)
            _ = parts.port
        except ValueError:
            return None
        if parts.scheme not in _SCHEMES or not parts.netloc:
            return None
        if parts.scheme in {"http", "https"} and not (known or like_a_path or parts.path.endswith(".git")):
            return None
        remote = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        query, fragment = parts.query, parts.fragment
    else:
        match = _SCP_STYLE.fullmatch(text)
        if match is None:
            return None
        remote = f"{match[1]}:{match[2]}"
        query, fragment = match[3] or "", match[4] or ""
    ref, _, subdir = fragment.partition(":")
    found = GitRef(remote, ref, subdir, like_a_path=like_a_path)
    return _with_query(found, query) if query else found


def is_git_source(text: str, *, known: bool = False) -> bool:
    """Whether an ADD source is a repository. A malformed one is: `parse_git_ref` tells what is wrong with it."""
    try:
        found = parse_git_ref(text, known=known)
    except ValueError:
        return True
    return found is not None and not found.like_a_path


def is_http_source(text: str) -> bool:
    """Whether an ADD source is a file to download."""
    return text.startswith(("http://", "https://")) and not is_git_source(text)


def _with_query(found: GitRef, query: str) -> GitRef:
    values: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in values:
            raise ValueError(f"query {key!r} has multiple values")
        if not value and key not in ("submodules", "keep-git-dir"):
            raise ValueError(f"query {key!r} has no value")
        values[key] = value
    if "checksum" in values and "commit" in values:
        raise ValueError("query 'checksum' and 'commit' mean the same: give one")
    ref, subdir = found.ref, found.subdir
    checksum = values.pop("checksum", values.pop("commit", ""))
    flags = {key: _flag(key, values.pop(key)) for key in ("keep-git-dir", "submodules") if key in values}
    if "ref" in values:
        ref = _agree("ref", ref, values.pop("ref"))
    if "subdir" in values:
        subdir = _agree("subdir", subdir, values.pop("subdir"))
    if "tag" in values and "branch" in values:
        raise ValueError("branch conflicts with tag")
    for key, prefix in (("tag", "refs/tags/"), ("branch", "refs/heads/")):
        if key in values:
            value = values.pop(key)
            ref = _agree("ref", ref, value if value.startswith(prefix) else prefix + value)
    if values:
        raise ValueError(f"unexpected query {next(iter(values))!r}")
    return found._replace(
        ref=ref or checksum,
        subdir=subdir,
        checksum=checksum,
        keep_git_dir=flags.get("keep-git-dir"),
        submodules=flags.get("submodules"),
    )


def _agree(what: str, old: str, new: str) -> str:
    if old and old != new:
        raise ValueError(f"{what} conflicts: {old!r} vs {new!r}")
    return new


def _flag(key: str, value: str) -> bool:
    if value in _TRUE or not value:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"invalid {key} value: {value!r}")
