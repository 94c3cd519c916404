"""The monitor: starts a container, stays with it, keeps its log, tells its end, starts it again by its policy.

One thread, one loop over descriptors: the sandbox's control socket, its output, the monitor's own
socket (`control`), and in the foreground the caller's terminal and signals (`front`). It holds the
container's lock; the zygote dies with it, and the kernel kills the container with the zygote.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from builder.container import codec, control, events
from builder.container.attach import Audience
from builder.container.front import Front
from builder.container.logs import MAX_BYTES, LogWriter
from builder.container.options import Port, Restart
from builder.container.records import ContainerError, Record
from builder.container.starting import ContainerLauncher
from builder.errors import SandboxError
from builder.sandbox.launcher import ExitStatus, Launcher, Running
from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.container.health import Health
    from builder.container.reach import Publisher
    from builder.sandbox.spec import SandboxSpec

_READ_BYTES = 1 << 16
_BACKOFF_S, _MAX_BACKOFF_S, _STEADY_S = 0.1, 60.0, 10.0
_FORCED_AFTER = 3
_DRAIN_S = 1.0
_LONGEST_WAIT_S = 3600.0


class Monitor:
    """One container's life, from start to its last end. `run` gives the command's status."""

    def __init__(self, record: Record, launcher: Launcher, front: Front | None = None, ready_fd: int = -1) -> None:
        self._record = record
        self._launcher = launcher
        if isinstance(launcher, ContainerLauncher):
            launcher.root = record.root
        self._front = front
        self._ready_fd = ready_fd
        self._log = LogWriter(record.path("log"), int(record.settings.get("log_bytes", MAX_BYTES)))
        self._server = control.listen(record.directory)
        self._audience = Audience()
        self._running: Running | None = None
        self._outputs: dict[int, int] = {}
        self._terminal = -1
        self._input = -1
        """Where what the caller types goes, or -1."""
        self._typed = b""
        """What was typed and not yet taken: waiting for that would keep us from reading what is said."""
        self._stopping = False
        self._lives = False
        """Whether its start was told, and its end not yet."""
        self._kill_at: float | None = None
        self._interrupts = 0
        self._publisher: Publisher | None = None
        self._health: Health | None = None
        self._signals = -1
        self._engaged = contextlib.ExitStack()
        self._poller = select.poll()

    def run(self) -> int:
        """Raises: SandboxError, ContainerError where the container cannot be started at all."""
        restarts = 0
        backoff_s = _BACKOFF_S
        try:
            with contextlib.ExitStack() as stack:
                if self._front is not None:
                    self._engaged = stack
                    self._signals = stack.enter_context(self._front.engaged(self._caught))
                while True:
                    began = time.monotonic()
                    self._reload()
                    self._start(restarts)
                    status = self._attend()
                    again = self._wants_restart(status, restarts)
                    self._ended(status, "restarting" if again else "exited")
                    if not again:
                        return status.code
                    backoff_s = _BACKOFF_S if time.monotonic() - began > _STEADY_S else backoff_s
                    if not self._rest(backoff_s):
                        self._record.save_end(status="exited")
                        return status.code
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                    restarts += 1
        except PybuildError as e:
            failed = {"status": "exited", "exit_code": 125, "error": str(e), "pid": 0, "finished_ns": time.time_ns()}
            self._record.save_end(**failed)
            if self._lives:
                events.of_container(self._record, "die", exitCode=125)
            raise
        finally:
            self._close()

    def _start(self, restarts: int) -> None:
        from builder.container.health import health_of

        settings = self._record.settings
        tty = bool(settings["tty"])
        window = self._front.window() if self._front is not None and tty else tuple(settings["window"])
        spec = codec.decode(settings["sandbox"], terminal=(window[0], window[1]) if tty else None)
        if settings["ports"] and self._publisher is None:
            from builder.container.reach import Publisher

            self._publisher = Publisher([Port(*port) for port in settings["ports"]])
        self._record.save_state(
            status="starting", pid=0, exit_code=0, error="", oom_killed=False, started_ns=time.time_ns(),
            finished_ns=0, restarts=restarts, health=None,
        )  # fmt: skip
        pipes: list[int] = []
        try:
            stdin, ours = self._stdin(tty, pipes)
            out_r, out_w = _pipe(pipes)
            err_r, err_w = _pipe(pipes)
            self._running = self._launch(spec, stdin, out_w, err_w)
            if tty:
                self._terminal = self._running.take_terminal()
                os.set_blocking(self._terminal, False)
                self._outputs = {self._terminal: 1}
                self._input = self._terminal
            else:
                self._outputs = {out_r: 1, err_r: 2}
                self._input = ours
                pipes = [fd for fd in pipes if fd not in {out_r, err_r, ours}]
        finally:
            for fd in pipes:
                os.close(fd)
        if settings.get("runtime"):
            from builder.sandbox.oci import OciRunning

            assert isinstance(self._running, OciRunning)
            self._running.await_command()
            self._record.state["runtime"] = self._running.place
        pid = self._running.pid
        if self._publisher is not None and pid:
            self._publisher.start(pid)
        ports = [list(port) for port in self._publisher.ports] if self._publisher is not None else []
        self._record.save_state(status="running", pid=pid, ports=ports)
        if settings.get("timeout_s"):
            self._kill_at = time.monotonic() + float(settings["timeout_s"])
        if settings.get("pid_file"):
            self._write_pid(settings["pid_file"], pid)
        events.of_container(self._record, "start")
        self._lives = True
        self._health = health_of(settings)
        if self._ready_fd >= 0:
            self._await_setup()
            os.write(self._ready_fd, b"ok")
            # Closed, yet its number not free: whoever made it may still think that it is his.
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, self._ready_fd, inheritable=False)
            os.close(null)
            self._ready_fd = -1

    def _write_pid(self, path: str, pid: int) -> None:
        """Raises: ContainerError."""
        try:
            with open(path, "w", encoding="ascii") as stream:
                stream.write(f"{pid}\n")
        except OSError as e:
            raise ContainerError(f"--pidfile {path}: {e.strerror}") from e

    def _launch(self, spec: SandboxSpec, stdin: int | None, stdout: int, stderr: int) -> Running:
        if not self._record.settings.get("joins"):
            return self._launcher.run(spec, stdin_fd=stdin, stdout_fd=stdout, stderr_fd=stderr)
        from builder.container.joining import joined
        from layers.values import replace

        with joined(self._record) as found:
            # A namespace that the other shares with the host is the host's.
            shared = tuple((kind, "joined" if kind in found else "host") for kind, _ in spec.shared)
            spec = replace(spec, shared=shared)  # type: ignore[arg-type]
            return self._launcher.run(spec, stdin_fd=stdin, stdout_fd=stdout, stderr_fd=stderr, joined=found)

    def _await_setup(self) -> None:
        """Wait until the command has taken the place of the setup. Raises: SandboxError where that failed."""
        assert self._running is not None
        deadline = time.monotonic() + 10
        pid = self._running.pid
        while time.monotonic() < deadline and self._running.poll(0.001) is None:
            if _is_command(pid):
                return

    def _stdin(self, tty: bool, pipes: list[int]) -> tuple[int | None, int]:
        """(the container's stdin, where we write to it or -1)."""
        if tty or not self._record.settings["stdin"]:
            return None, -1
        if self._front is not None and not self._front.is_terminal:
            return self._front.input_fd, -1  # a file or a pipe is the container's own
        read, write = _pipe(pipes)
        os.set_blocking(write, False)
        return read, write

    # The loop

    def _attend(self) -> ExitStatus:
        """Until the container has ended, and all that it said is read."""
        assert self._running is not None
        # The end of a short command may have been taken in while it was waited for; no message tells it twice.
        status = self._running.poll(0)
        drained_by = None if status is None else time.monotonic() + _DRAIN_S
        poller = self._poller = select.poll()
        if status is None:
            poller.register(self._running, select.POLLIN)
        poller.register(self._server, select.POLLIN)
        for fd in self._outputs:
            poller.register(fd, select.POLLIN)
        typed = -1
        if self._front is not None:
            poller.register(self._signals, select.POLLIN)
            if self._input >= 0 and self._front.stdin:
                typed = self._front.input_fd
                poller.register(typed, select.POLLIN)
        while status is None or self._outputs:
            timeout_s = self._timeout(drained_by)
            for fd, visitor in self._audience.visitors.items():
                poller.register(fd, (select.POLLOUT if visitor.waiting else 0) | (0 if self._typed else select.POLLIN))
            for fd, event in poller.poll(None if timeout_s is None else max(0, timeout_s * 1000)):
                if event & select.POLLOUT and fd == self._input:
                    self._hand_on()
                    if not self._typed:
                        self._watch_input(poller, typed, waiting=False)
                    if event == select.POLLOUT:
                        continue
                if fd in self._audience.visitors:
                    if not self._attended(fd, event):
                        poller.unregister(fd)
                        self._audience.dismiss(fd)
                    elif self._typed:
                        self._watch_input(poller, typed, waiting=True)
                elif fd in self._outputs:
                    if not self._read(fd):
                        poller.unregister(fd)
                        self._forget(fd)
                elif fd == self._server.fileno():
                    self._serve()
                elif fd == self._signals and self._front is not None:
                    self._front.take_signals(fd)
                elif fd == typed:
                    if not self._type():
                        poller.unregister(fd)
                        typed = -1
                    elif self._typed:
                        self._watch_input(poller, typed, waiting=True)
                elif status is None and fd == self._running.fileno():
                    status = self._running.poll(0)
                    if status is not None:
                        poller.unregister(fd)
                        drained_by = time.monotonic() + _DRAIN_S
            if drained_by is not None and time.monotonic() > drained_by:
                for fd in list(self._outputs):
                    self._forget(fd)
            self._on_time()
        return status

    def _timeout(self, drained_by: float | None) -> float | None:
        """Seconds until something is due."""
        due = [at for at in (drained_by, self._kill_at) if at is not None]
        if self._health is not None and drained_by is None:
            due.append(self._health.due_at)
        # What an image names as its interval may be centuries, for which poll(2) has no number.
        return min(min(due) - time.monotonic(), _LONGEST_WAIT_S) if due else None

    def _on_time(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._kill(signal.SIGKILL)
        if self._health is not None and now >= self._health.due_at and self._record.state["status"] == "running":
            before = self._health.document()
            self._health.step(self._record)
            if self._health.document()["Status"] != before["Status"]:
                events.of_container(self._record, f"health_status: {self._health.document()['Status']}")
            if self._health.document() != before:
                with contextlib.suppress(ContainerError):
                    self._record.save_state(health=self._health.document())

    def _read(self, fd: int) -> bool:
        """Take what was said; False at its end."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:  # EIO: nobody has the terminal's other end any more
            return False
        if not data:
            return False
        stream = self._outputs[fd]
        self._log.write(stream, data)
        if self._front is not None:
            self._front.show(stream, data)
        for gone in self._audience.show(stream, data):
            self._poller.unregister(gone)
        return True

    def _attended(self, fd: int, event: int) -> bool:
        """Something about an attached client; False once it is gone."""
        if event & select.POLLOUT and not self._audience.flush(fd):
            return False
        if not event & ~select.POLLOUT:
            return True
        frame = self._audience.hear(fd)
        if frame is None:
            return False
        if frame[:1] == b"i" and self._input >= 0:
            self._typed += frame[1:]
            self._hand_on()
        elif frame[:1] == b"w":
            self._resize(*(int(word) for word in frame[1:].split()[:2]))
        return True

    def _resize(self, rows: int, columns: int) -> None:
        from builder.sandbox import terminal

        if self._terminal >= 0:
            with contextlib.suppress(OSError):
                terminal.resize(self._terminal, rows, columns)

    def _forget(self, fd: int) -> None:
        del self._outputs[fd]
        if fd == self._terminal:
            self._terminal = self._input = -1
        os.close(fd)

    def _watch_input(self, poller: select.poll, typed: int, *, waiting: bool) -> None:
        """Wait for room for what was typed, or for more to be typed."""
        if self._input >= 0:
            events = select.POLLIN if self._input in self._outputs else 0
            poller.register(self._input, events | (select.POLLOUT if waiting else 0))
        if typed >= 0:
            poller.register(typed, 0 if waiting else select.POLLIN)

    def _type(self) -> bool:
        """Take what was typed; False at its end."""
        assert self._front is not None
        try:
            data = os.read(self._front.input_fd, 4096)
        except OSError:
            data = b""
        if self._input < 0:
            return False
        if self._front.keys is not None:
            data, left = self._front.keys.feed(data)
            if left:
                self._typed += data
                self._hand_on()
                self._leave()
                return False
            if not data:
                return True  # perhaps the beginning of the keys
        if not data and self._input == self._terminal:
            data, ended = b"\x04", True  # a terminal has a character for the end of a file
        else:
            ended = not data
        self._typed += data
        self._hand_on()
        if ended and self._input >= 0 and self._input != self._terminal:
            os.close(self._input)
            self._input = -1
        return not ended and self._input >= 0

    def _leave(self) -> None:
        """Give the caller his terminal back and go on as a process of our own."""
        from builder.container import lifecycle

        assert self._front is not None
        events.of_container(self._record, "detach")
        if self._health is not None:
            self._health.close()  # a check that runs is a child of this process
        self._poller.unregister(self._signals)
        self._engaged.close()
        self._front.left = True
        self._front.leaving()
        lifecycle.go_on_alone()
        self._front, self._signals = None, -1

    def _hand_on(self) -> None:
        """Give the container what it takes of what was typed."""
        try:
            while self._typed and self._input >= 0:
                self._typed = self._typed[os.write(self._input, self._typed) :]
        except BlockingIOError:
            pass
        except OSError:
            self._typed = b""
            if self._input != self._terminal:
                os.close(self._input)
                self._input = -1

    def _caught(self, number: int) -> None:
        """A signal to us is one to the container."""
        if number == signal.SIGWINCH:
            if self._front is not None:
                self._resize(*self._front.window())
            return
        if number in {signal.SIGINT, signal.SIGTERM}:
            self._interrupts += 1
            self._stopping = True
        # The first process of a container ignores what it has no handler for.
        self._kill(signal.SIGKILL if self._interrupts >= _FORCED_AFTER else number)

    def _kill(self, number: int) -> None:
        if self._running is None:
            return
        if number == signal.SIGKILL:
            self._running.kill()
        else:
            self._running.signal(number)

    # Requests

    def _serve(self) -> None:
        try:
            client = control.accept(self._server)
        except OSError:
            return
        client.settimeout(1)
        request = control.receive(client)
        found: dict[str, Any] = {}
        error: Exception | None = None
        if request is not None:
            try:
                found = self._obey(request)
                if request["do"] == "attach":
                    control.answer(client, None)
                    self._audience.admit(client)
                    return
            except (PybuildError, OSError, KeyError, TypeError, ValueError) as e:
                error = e
            control.answer(client, error, **found)
        client.close()

    def _obey(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what was asked for; what is to be said besides that it was done."""
        match request["do"]:
            case "signal":
                if request.get("final"):
                    self._stopping = True
                events.of_container(self._record, "kill", signal=int(request["number"]))
                self._kill(int(request["number"]))
            case "stop":
                self._stopping = True
                self._unfreeze()
                events.of_container(self._record, "kill", signal=int(request["number"]))
                self._kill(int(request["number"]))
                at = time.monotonic() + float(request["timeout_s"])
                self._kill_at = at if self._kill_at is None else min(at, self._kill_at)  # --timeout goes on
            case "pause":
                self._freeze(True)
            case "resume":
                self._freeze(False)
            case "window":
                self._resize(int(request["rows"]), int(request["columns"]))
            case "figures":
                from builder.container import figures

                return {"figures": figures.measure(self._pid())._asdict()}
            case "processes":
                from builder.container import figures

                return {"pids": list(figures.members(self._pid()))}
            case "limits":
                from builder.sandbox import cgroup

                cgroup.change(self._pid(), dict(request["limits"]))
            case "attach":
                self._pid()
            case other:
                raise ValueError(f"unknown request {other!r}")
        return {}

    def _pid(self) -> int:
        """The first process, seen from here. Raises: ContainerError if there is none just now."""
        pid = self._running.pid if self._running is not None else 0
        if not pid:
            raise ContainerError("it does not run just now")
        return pid

    def _freeze(self, frozen: bool) -> None:
        """Raises: SandboxError, ContainerError."""
        paused = self._record.state["status"] == "paused"
        if paused == frozen or self._running is None:
            raise ContainerError(f"it is {'paused already' if frozen else 'not paused'}")
        try:
            if frozen:
                self._running.pause()
            else:
                self._running.resume()
        except SandboxError as e:
            words = str(e).removeprefix("cannot set up the sandbox: freezer: ")
            raise ContainerError(f"it cannot be {'paused' if frozen else 'resumed'}: {words}", hint=e.hint) from e
        self._record.save_state(status="paused" if frozen else "running")
        events.of_container(self._record, "pause" if frozen else "unpause")

    def _unfreeze(self) -> None:
        if self._record.state["status"] == "paused":
            self._freeze(False)

    # The end

    def _reload(self) -> None:
        """Others may have renamed it meanwhile, or changed its limits and its policy."""
        self._record.settings = Record(self._record.directory).load().settings

    def _wants_restart(self, status: ExitStatus, restarts: int) -> bool:
        with contextlib.suppress(ContainerError):
            self._reload()
        policy = Restart(*self._record.settings["restart"])
        if self._stopping or policy.name == "no":
            return False
        if policy.name == "on-failure":
            return status.code != 0 and (not policy.max_retries or restarts < policy.max_retries)
        return True

    def _ended(self, status: ExitStatus, word: str) -> None:
        self._record.save_end(
            status=word, exit_code=status.code, oom_killed=status.oom_killed, pid=0, finished_ns=time.time_ns()
        )
        if status.oom_killed:
            events.of_container(self._record, "oom")
        events.of_container(self._record, "die", exitCode=status.code)
        self._lives = False
        self._audience.close()
        self._kill_at = None
        if self._running is not None:
            self._running.close()
            self._running = None
        if self._health is not None:
            self._health.close()
            self._health = None
        if self._input >= 0:
            os.close(self._input)
            self._input = -1
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _rest(self, seconds: float) -> bool:
        """Wait before the next start; False if somebody wants it stopped."""
        until = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._server, select.POLLIN)
        if self._signals >= 0:
            poller.register(self._signals, select.POLLIN)
        while not self._stopping and (left := until - time.monotonic()) > 0:
            for fd, _event in poller.poll(left * 1000):
                if fd == self._server.fileno():
                    self._serve()
                elif self._front is not None:
                    self._front.take_signals(fd)
        return not self._stopping

    def _close(self) -> None:
        for fd in list(self._outputs):
            self._forget(fd)
        if self._publisher is not None:
            self._publisher.close()
        if self._running is not None:
            self._running.close()
        if self._health is not None:
            self._health.close()
        self._audience.close()
        self._server.close()
        with contextlib.suppress(OSError):
            os.unlink(self._record.path("control"))
        self._log.close()


def _pipe(pipes: list[int]) -> tuple[int, int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    pipes += [read, write]
    return read, write


def _is_command(pid: int) -> bool:
    """Whether a sandbox's first process has executed the command: it is no copy of ours any more."""
    try:
        theirs, ours = os.stat(f"/proc/{pid}/exe"), os.stat("/proc/self/exe")
        return (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino) or _is_waiting(pid)
    except OSError:
        return False


def _is_waiting(pid: int) -> bool:
    """Whether it is the small PID 1 of `--init` (or an interpreter like ours), which has a child."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as stream:
            return bool(stream.read().strip())
    except OSError:
        return False
