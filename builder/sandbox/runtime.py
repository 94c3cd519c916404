"""The keeper of a sandbox that an OCI runtime makes: mounts its root, writes its bundle, cleans up.

It has a mount namespace of its own, which takes the root along when it goes, however it goes.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import socket
from typing import Any

from builder.sandbox import cgroup, rootfs
from builder.sandbox.keeper import Keeper, run_program
from layers import linux
from layers.trees import remove_tree


class RuntimeKeeper(Keeper):
    """See `Keeper`. The request is `oci.bundle`'s."""

    def __init__(self, request: dict[str, Any], control: socket.socket) -> None:
        super().__init__(request, control)
        self._bundle = f"{request['scratch']}/bundle-{os.urandom(6).hex()}"
        self._id = f"pybuild-{os.urandom(8).hex()}"
        self._undo: list[dict[str, Any]] = []
        self._mounted: list[str] = []

    def place(self) -> None:
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
        os.mkdir(self._bundle, 0o700)
        arguments = self.request["root"]
        root = rootfs.mount_root(**arguments)
        self._undo = root.undo
        os.close(root.fd)
        config = self.request["config"]
        config["root"]["path"] = arguments["upper"] or arguments["lower"][0]
        self._mounted.append(config["root"]["path"])
        mounts = config["mounts"][-len(self.request["sources"]) :] if self.request["sources"] else []
        for number, (mount, source) in enumerate(zip(mounts, self.request["sources"], strict=True)):
            if source:
                mount["source"] = self._source(f"{self._bundle}/{number}", **source)
        with open(f"{self._bundle}/config.json", "w", encoding="utf-8", errors="surrogateescape") as stream:
            json.dump(config, stream, ensure_ascii=False)

    def _source(
        self,
        place: str,
        path: str | None = None,
        file: str | None = None,
        tree: dict[str, Any] | None = None,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        subpath: str = "/",
    ) -> str:
        """Make the source of a bind; its path."""
        if file is not None:
            with open(place, "xb") as stream:
                stream.write(binascii.a2b_base64(file))
                os.fchown(stream.fileno(), uid, gid)
                os.fchmod(stream.fileno(), mode)
        elif tree is not None:
            fd = rootfs.detached(**tree)
            os.mkdir(place, 0o700)
            linux.move_mount(fd, "", linux.AT_FDCWD, place, linux.MOVE_MOUNT_F_EMPTY_PATH)
            self._mounted.append(place)
            part = rootfs.open_in(fd, subpath)
            place = os.readlink(f"/proc/self/fd/{part}")
            os.close(part)
            os.close(fd)
        return path or place

    def become(self, group: cgroup.Group | None) -> int:
        argv = [*self._runtime("run"), "--bundle", self._bundle, self._id]
        os.execve(argv[0], argv, os.environ)  # noqa: S606 - a program of the host's

    def _runtime(self, verb: str) -> list[str]:
        return [self.request["runtime"], "--root", f"{self._bundle}/state", verb]

    def clean(self) -> None:
        if os.path.isdir(f"{self._bundle}/state/{self._id}"):
            run_program([*self._runtime("delete"), "--force", self._id])
        for path in reversed(self._mounted):
            with contextlib.suppress(OSError):
                linux.umount2(path, linux.MNT_DETACH)
        rootfs.undo(self._undo)
        remove_tree(self._bundle)
