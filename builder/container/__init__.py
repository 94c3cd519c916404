"""Containers: what an image is for, and the way from a container back to an image. Typed calls for Python programs.

    from builder import container
    record = container.create_container(store, container.find_image(store, "debian", None), options)
    container.start_detached(record)

    records     what is known of a container on disk        options   what a caller asks of one
    create      options and an image -> a container          monitor   start, log, restart, tell the end
    lifecycle   start, stop, kill, pause, wait, remove       inside    further commands in a running one
    volumes     named volumes                                logs      what it said
    figures     what it uses, its processes                  events    what happened
    copying     files in and out, as trees and as tar        attach    seeing and typing from elsewhere
    commit      an image of it; inspect                      bundle    an image for OCI runtimes

Images by hand, without a Containerfile:

    record = container.create_working(store, container.find_image(store, "debian", None), "debian")
    with container.open_working(store, record.name) as work:
        container.run_step(work, container.Command(("apt-get", "update")), container.step_request(), launcher)
        container.configure(work, [container.config_change("env", "A=b")], container.step_request())
        container.commit_working(work, container.ImageOptions(names=("docker.io/library/mine:1",)))

    working     steps that are made whole or not at all      byhand    RUN, COPY, ADD and changes of the config
    mounting    the tree, for programs of the host           assemble  a working container -> an image

Names are loaded when first used: a command pays for what it needs.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.container.assemble import ImageOptions, commit_working
    from builder.container.bundle import write_bundle
    from builder.container.byhand import Command, Streams, Transfer, configure, run_step, step_request, transfer
    from builder.container.configuration import config_change, healthcheck_change, instruction_change
    from builder.container.copying import copy_in, copy_out, unpack_in, write_tar
    from builder.container.create import create_container, find_image
    from builder.container.figures import figures_of, processes_of
    from builder.container.inside import run_inside
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
        update,
        wait,
    )
    from builder.container.mounting import mount, unmount
    from builder.container.options import ContainerOptions, Healthcheck, Port, Restart, VolumeMount
    from builder.container.records import ContainerError, NoSuchContainer, Record, every, find
    from builder.container.working import WorkingContainer, create_working, open_working

_HOMES = {
    "bundle": ("write_bundle",),
    "copying": ("copy_in", "copy_out", "unpack_in", "write_tar"),
    "figures": ("figures_of", "processes_of"),
    "inside": ("run_inside",),
    "assemble": ("ImageOptions", "commit_working"),
    "byhand": ("Command", "Streams", "Transfer", "configure", "run_step", "step_request", "transfer"),
    "configuration": ("config_change", "healthcheck_change", "instruction_change"),
    "create": ("create_container", "find_image"),
    "lifecycle": (
        *("kill", "pause", "prune", "remove", "rename", "run_foreground", "start_detached", "stop", "unpause"),
        *("update", "wait"),
    ),
    "mounting": ("mount", "unmount"),
    "options": ("ContainerOptions", "Healthcheck", "Port", "Restart", "VolumeMount"),
    "records": ("ContainerError", "NoSuchContainer", "Record", "every", "find"),
    "working": ("WorkingContainer", "create_working", "open_working"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Command",
    "ContainerError",
    "ContainerOptions",
    "Healthcheck",
    "ImageOptions",
    "NoSuchContainer",
    "Port",
    "Record",
    "Restart",
    "Streams",
    "Transfer",
    "VolumeMount",
    "WorkingContainer",
    "commit_working",
    "config_change",
    "configure",
    "copy_in",
    "copy_out",
    "create_container",
    "create_working",
    "every",
    "figures_of",
    "find",
    "find_image",
    "healthcheck_change",
    "instruction_change",
    "kill",
    "mount",
    "open_working",
    "pause",
    "processes_of",
    "prune",
    "remove",
    "rename",
    "run_foreground",
    "run_inside",
    "run_step",
    "start_detached",
    "step_request",
    "stop",
    "transfer",
    "unmount",
    "unpack_in",
    "unpause",
    "update",
    "wait",
    "write_bundle",
    "write_tar",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
