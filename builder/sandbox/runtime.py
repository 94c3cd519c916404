"""The keeper of a sandbox that an OCI runtime makes: mounts its root, writes its bundle, cleans up.

It has a mount namespace of its own, which takes the root along when it goes, however it goes. The
runtime creates and starts the container; its first process, an orphan then, is the keeper's own to wait
for, and so its status and what its control groups counted are seen before the runtime deletes them.
https://github.com/opencontainers/runtime-spec/blob/main/runtime.md
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import signal
import socket
from typing import Any

from builder.sandbox import cgroup, channel, rootfs, setup, terminal, zygote
from builder.sandbox.channel import Socket
from builder.sandbox.keeper import Keeper, end_all, run_program, usage
from layers import linux
from layers.trees import remove_tree

_MAX_LOG_BYTES = 1 << 20
_CONSOLE_S = 10.0
_MISSING = {
    "executable file not found": 127,
    "executable file `": 127,
    "no such file or directory": 127,
    "exec format error": 126,
    "permission denied": 126,
}
"""How runc and crun say that the command is missing in the image, or is no program."""


class RuntimeKeeper(Keeper):
    """See `Keeper`. The request is `oci.bundle`'s."""

    def __init__(self, request: dict[str, Any], control: Socket) -> None:
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
        config = self.request["config"]
        process = config["process"]
        rootfs.make_workdir(root.fd, process["cwd"], [process["user"]["uid"], process["user"]["gid"]])
        os.close(root.fd)
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

    def guard(self, stdio: list[int], group: cgroup.Group | None, wake: int) -> bytes:
        """See `Keeper.guard`. Raises: OSError, SetupError with the runtime's words."""
        log, pid_file = f"{self._bundle}/log", f"{self._bundle}/pid"
        console = self._console() if self.request["config"]["process"]["terminal"] else None
        argv = self._argv("create", "--bundle", self._bundle, "--pid-file", pid_file, *(console or ("", []))[1])
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        if not self.ending:
            self.command = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
            status = self.wait(wake)
            if status and not self.ending:
                return self._refused(_last_error(log), stdio[2])
        for fd in stdio:
            os.close(fd)
        if self.ending:
            return json.dumps({"exit": signal.SIGKILL, **usage()}).encode()
        with open(pid_file, encoding="ascii") as stream:
            self.command = int(stream.read())
        if console is not None:
            self._hand_over(console[0])
        counted = self._groups(self.command)
        place = {"path": self.request["runtime"], "root": f"{self._bundle}/state", "id": self._id}
        zygote.tell(self.control, json.dumps({"runtime": place, "pid": self.command}).encode())
        if run_program(self._argv("start")):
            raise setup.SetupError("runtime", None, self.request["runtime"], _last_error(log) or "it cannot start it")
        status = self.wait(wake)
        end_all(set())
        result = counted.result()
        peak = {} if result.peak_memory_bytes is None else {"max_rss_bytes": result.peak_memory_bytes}
        return json.dumps({"exit": status, **usage(), "oom_kills": result.oom_kills, **peak}).encode()

    def _console(self) -> tuple[socket.socket, list[str]]:
        """Where the runtime brings the terminal's master, and the flags that say so. Raises: OSError."""
        # By descriptor: a socket's path has room for 107 bytes.
        directory = f"/proc/{os.getpid()}/fd/{os.open(self._bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}"
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(f"{directory}/console")
        server.listen(1)
        server.settimeout(_CONSOLE_S)
        return server, ["--console-socket", f"{directory}/console"]

    def _hand_over(self, server: socket.socket) -> None:
        """Pass the master on. Raises: OSError."""
        with server, server.accept()[0] as client:
            _name, fds = channel.receive(client, 4096, 1)
        if not fds:
            raise setup.SetupError("terminal", None, self.request["runtime"], "the runtime brought no terminal")
        channel.send(self.control, terminal.MESSAGE, fds)
        os.close(fds[0])

    def _refused(self, words: str, stderr_fd: int) -> bytes:
        """The message of a container that could not be created. Raises: SetupError but for a missing command."""
        for text, status in _MISSING.items():
            if text in words:
                os.write(stderr_fd, f"{self.request['config']['process']['args'][0]}: {words}\n".encode())
                return json.dumps({"exit": status << 8, **usage()}).encode()
        raise setup.SetupError("runtime", None, self.request["runtime"], words or "it cannot create the container")

    def _groups(self, pid: int) -> cgroup.Group:
        """The control groups that the runtime made; only to be looked at."""
        group = cgroup.Group()
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", encoding="utf-8") as stream:
            found = cgroup.detect(own=stream.read())
            group.directories = [(each, each.own) for each in found if os.path.basename(each.own) == self._id]
        return group

    def _argv(self, verb: str, *options: str) -> list[str]:
        log = ("--log", f"{self._bundle}/log", "--log-format", "json")
        return [self.request["runtime"], "--root", f"{self._bundle}/state", *log, verb, *options, self._id]

    def clean(self) -> None:
        if os.path.isdir(f"{self._bundle}/state/{self._id}"):
            run_program(self._argv("delete", "--force"))
        for path in reversed(self._mounted):
            with contextlib.suppress(OSError):
                linux.umount2(path, linux.MNT_DETACH)
        rootfs.undo(self._undo)
        remove_tree(self._bundle)


def _last_error(path: str) -> str:
    """What a runtime logged last as an error, without its own preamble."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as stream:
        return _error_in(stream.read(_MAX_LOG_BYTES))
    return ""


def _error_in(log: str) -> str:
    words = ""
    for line in log.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            words = row["msg"] if row["level"] in {"error", "fatal"} else words
    return " ".join(str(words).split())


def missing_status(log: str) -> int | None:
    """The status of a command that is missing, or no program, by what the runtime logged; None if it is neither."""
    words = _error_in(log)
    return next((status for text, status in _MISSING.items() if text in words), None)
