"""Credentials in the environment: pybuild's own variables, Docker's, and those of a GitLab job.

    PYBUILD_REGISTRY, PYBUILD_REGISTRY_USER, PYBUILD_REGISTRY_PASSWORD    one registry, or a path in it
    DOCKER_AUTH_CONFIG                                                    a config.json, whole
    CI_REGISTRY, CI_REGISTRY_USER, CI_REGISTRY_PASSWORD or CI_JOB_TOKEN   GitLab's registry, where GITLAB_CI is set
    CI_DEPENDENCY_PROXY_SERVER, …_USER, …_PASSWORD                        its proxy of Docker Hub

The first two come before the files, GitLab's after them. Each is bound to a registry by its name: what
is meant for one is never offered to another. Caller: `registry.credentials`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from registry.errors import ConfigError

DOCKER_AUTH_CONFIG = "DOCKER_AUTH_CONFIG"
_OWN = "PYBUILD_REGISTRY"
_JOB_USER = "gitlab-ci-token"


def own_credential(environ: Mapping[str, str], keys: Collection[str]) -> tuple[str, str] | None:
    """User and password for what one of `keys` names. Raises: ConfigError for variables that are not complete."""
    user, password = environ.get(f"{_OWN}_USER"), environ.get(f"{_OWN}_PASSWORD")
    place = environ.get(_OWN)
    if not place:
        if user or password:
            raise ConfigError(
                f"{_OWN}_USER and {_OWN}_PASSWORD are for no registry", hint=f"set {_OWN} to its host, too"
            )
        return None
    if place.removeprefix("https://").rstrip("/") not in keys:
        return None
    if not user or not password:
        raise ConfigError(f"{_OWN} needs both {_OWN}_USER and {_OWN}_PASSWORD")
    return user, password


def docker_config(environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The document in DOCKER_AUTH_CONFIG. Raises: ConfigError, which quotes nothing of it."""
    text = environ.get(DOCKER_AUTH_CONFIG)
    if not text:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"{DOCKER_AUTH_CONFIG} is not a JSON object")
    return document


def gitlab_credentials(environ: Mapping[str, str], registry: str) -> Iterator[tuple[str, str, str]]:
    """What a GitLab job has for a registry: the variable that names it, user, password."""
    if not environ.get("GITLAB_CI"):
        return
    for name, alternative in (("CI_REGISTRY", "CI_JOB_TOKEN"), ("CI_DEPENDENCY_PROXY", "")):
        variable = name if alternative else f"{name}_SERVER"
        host = environ.get(variable, "")
        if not host or host.removesuffix(":443") != registry.removesuffix(":443"):
            continue
        user, password = environ.get(f"{name}_USER", ""), environ.get(f"{name}_PASSWORD", "")
        if not (user and password):
            user, password = _JOB_USER, environ.get(alternative, "")
        if password:
            yield variable, user, password
