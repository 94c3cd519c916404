"""Containers: what an image is for, and the way from a container back to an image. Typed calls for Python programs.

    from builder import container
    record = container.create_container(store, container.find_image(store, "debian", None), options)
    container.start_detached(record)

    records     what is known of a container on disk        options   what a caller asks of one
    create      options and an image -> a container          monitor   start, log, restart, tell the end
    lifecycle   start, stop, kill, pause, wait, remove       inside    further commands in a running one
    volumes     named volumes                                logs      what it said

Names are loaded when first used: a command pays for what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from builder.container.create import create_container, find_image
    from builder.container.lifecycle import (
        kill,
        pause,
        prune,
        remove,
        rename,
        run_foreground,
        start_detached,
        stop,
        unpause,
        wait,
    )
    from builder.container.options import ContainerOptions, Healthcheck, Port, Restart, VolumeMount
    from builder.container.records import ContainerError, NoSuchContainer, Record, every, find

_HOMES = {
    "create": ("create_container", "find_image"),
    "lifecycle": (
        *("kill", "pause", "prune", "remove", "rename", "run_foreground", "start_detached", "stop", "unpause", "wait"),
    ),
    "options": ("ContainerOptions", "Healthcheck", "Port", "Restart", "VolumeMount"),
    "records": ("ContainerError", "NoSuchContainer", "Record", "every", "find"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ContainerError",
    "ContainerOptions",
    "Healthcheck",
    "NoSuchContainer",
    "Port",
    "Record",
    "Restart",
    "VolumeMount",
    "create_container",
    "every",
    "find",
    "find_image",
    "kill",
    "pause",
    "prune",
    "remove",
    "rename",
    "run_foreground",
    "start_detached",
    "stop",
    "unpause",
    "wait",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
