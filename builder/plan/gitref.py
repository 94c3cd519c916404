"""Tells what kind of source an ADD names: a path, a URL, a git repository. Pure.

The rules are BuildKit's: an http(s) URL is a repository when its path ends in `.git`; `git://`,
`ssh://` and `user@host:path` always are one; `github.com/…` without a scheme is a path.
"""

from __future__ import annotations

import re

_SCP_LIKE = re.compile(r"[A-Za-z0-9_.\-]+@[A-Za-z0-9.\-]+:[^/].*|[A-Za-z0-9_.\-]+@[A-Za-z0-9.\-]+:/.*")


def is_git_source(source: str) -> bool:
    """Whether `source` is a git repository, with or without `#ref:subdir`."""
    scheme, separator, rest = source.partition("://")
    if separator:
        if scheme in {"git", "ssh", "git+ssh"}:
            return True
        path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")[2]
        return scheme in {"http", "https"} and path.endswith(".git")
    return _SCP_LIKE.match(source) is not None


def is_http_source(source: str) -> bool:
    """Whether `source` is a file to download."""
    return source.startswith(("http://", "https://")) and not is_git_source(source)
