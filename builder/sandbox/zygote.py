"""The zygote: a small single-threaded process that starts sandboxes and buries them.

Born of the launcher's process before that one starts threads, it is PID 1 of a PID namespace of its
own: when it goes, for whatever reason, the kernel kills every sandbox. It goes when its socket ends,
that is, when the launcher's process closes it or dies.

The first datagram (SOCK_SEQPACKET) names the *prelude*, the operations that most sandboxes begin with,
and the namespaces that they have. A spare child, which has done them already, waits for the next
request: that saves the clone, the page faults of a fresh copy and half of the setup, some 3 ms of 7; with
a private network, which a helper sets up meanwhile, some 30.
All other datagrams are one letter and JSON, S for a request that the spare can take (it brings the
rest of the operations), P for one of these with a filter that is new to the zygote, and D for one that
the spare cannot take; the JSON comes in a memfd where it is long; with descriptors
[control, stdin, stdout, stderr, memfd?, joined…, trees…]: namespaces of somebody else's, and the trees of
`operations.mount_outside`. Where sandboxes have no PID namespace of their own the zygote has none either,
and a `guard` each.

What happens is told on the control socket, one JSON object a datagram: `{"started": true}` with a
pidfd (by the guard, with the command's); `{"error": ...}` from the child itself, at most once, when its
setup fails; `{"exit": wait status, ...}` at the end. The other end may wish it to `end`, or to `freeze` or
`thaw`, answered by `{"done": true}` or `{"refused": error}`; its closing means that nobody cares any more:
the sandbox is killed.

Only `layers.linux`, `setup`, `guard` and cheap parts of the stdlib are imported.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import gc
import json
import os
import select
import signal
from _socket import SHUT_WR
from collections.abc import Sequence

from builder.sandbox import cgroup, channel, rootfs, setup, springboard
from builder.sandbox.channel import Socket
from layers import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_REQUEST_BYTES = 1 << 17
MAX_DESCRIPTORS = 64
STOPPED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP)


class _Child:
    """One running sandbox: its first process, and the socket that tells about it."""

    def __init__(self, pid: int, pidfd: int, control: Socket, undo_fd: int, group: cgroup.Group | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.control = control
        self.undo_fd = undo_fd
        self.group = group
        self.network = 0
        """The process that keeps the private network up, if any."""
        self.helpers: list[int] = []
        """The processes that answer for missing ids and devices."""
        self.asking: _Asking | None = None
        self.life: Socket | None = None
        """What its guard, if it has one, lives by."""
        self.mounts: os.stat_result | None = None
        """With a guard: its mount namespace."""

    def kill(self) -> None:
        """Kill everything in the sandbox. What is frozen by v1 would die only when it thaws."""
        with contextlib.suppress(OSError):
            if self.life:
                self.life.shutdown(SHUT_WR)
            else:
                linux.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            if self.group:
                self.group.freeze(False)

    def undo(self) -> None:
        """Remove what the setup left on disk for as long as the sandbox ran."""
        try:
            steps = os.read(self.undo_fd, MAX_REQUEST_BYTES)
        except BlockingIOError:
            steps = b""
        os.close(self.undo_fd)
        if steps:
            rootfs.undo(json.loads(steps))


class _Spare:
    """A child that waits, set up as far as the prelude goes, for a request on its socket."""

    network = 0
    """See `_Child.network`."""

    def __init__(self, pid: int, pidfd: int, requests: Socket, undo_fd: int, group: cgroup.Group | None) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.requests = requests
        self.undo_fd = undo_fd
        self.group = group
        self.helper = 0
        """See `_Child.helpers`."""
        self.asking: _Asking | None = None

    def discard(self) -> None:
        """Kill and reap it, and who would have answered it or keeps its network up."""
        with contextlib.suppress(OSError):
            linux.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        for pid in filter(None, (self.pid, self.helper, self.network)):
            os.waitpid(pid, 0)
        self.requests.close()
        os.close(self.pidfd)
        os.close(self.undo_fd)
        if self.asking:
            self.asking.close()
        if self.group:
            self.group.remove()


class _Asking:
    """Where a child may ask for devices: the socket by which its listener comes, then that."""

    def __init__(self, handover: Socket) -> None:
        self._handover: Socket | None = handover
        self.fd = handover.fileno()

    def hear(self, pid: int, event: int) -> int:
        """Something happened at `fd`, which is another one after that, or -1. Returns who was started to answer, or 0.

        Mostly nobody asks. Who does waits for the start of an answerer, once; where none can be had, mknod fails.
        """
        from builder.sandbox import nodes

        helper, listener = 0, -1
        with contextlib.suppress(OSError):
            if self._handover is not None:
                listener = nodes.receive(self._handover)
            elif event & select.POLLIN:
                helper = os.fork()
                if helper == 0:
                    nodes.serve(self.fd, pid)
        self.close()
        self.fd = listener
        return helper

    def close(self) -> None:
        """Idempotent."""
        if self._handover is not None:
            self._handover.close()
            self._handover = None
        elif self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class _Handover:
    """How a child's listener comes to a supervisor that is forked for it, or to us; or nothing of the kind."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind
        self.asking: Socket | None = None
        self.answering: Socket | None = None
        if kind is not None:
            self.asking, self.answering = channel.pair()

    def ours(self) -> int:
        """In the child: the end to hand over by, or -1."""
        if self.asking is None or self.answering is None:
            return -1
        self.answering.close()
        return self.asking.detach()

    def attend(self, pid: int) -> tuple[int, _Asking | None]:
        """In the zygote: start the supervisor of the child; its process, or 0, or what is to be watched."""
        if self.asking is None or self.answering is None:
            return 0, None
        if self.kind == "nodes":
            self.asking.close()
            return 0, _Asking(self.answering)
        from builder.sandbox import supervisor

        helper = os.fork()
        if helper == 0:
            supervisor.serve(self.answering, pid)
        self.asking.close()
        self.answering.close()
        return helper, None


def serve(server: Socket, *, alone: bool = True) -> NoReturn:
    """The zygote's whole life, in the process just cloned; `alone` in its PID namespace. Never returns."""
    status = 70
    try:
        _settle(server)
        if not alone:
            # What a guard that was killed leaves, comes here.
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        _rehearse()
        zygote = _Zygote(server)
        zygote.loop()
        zygote.clear()
        status = 0
    except BaseException as e:  # noqa: BLE001 - the process boundary: the launcher reads this as its epitaph
        tell(server, error_message("zygote", getattr(e, "errno", None), None, f"{type(e).__name__}: {e}"))
    finally:
        os._exit(status)


def main(fd: int, *, alone: bool = True) -> NoReturn:
    """The zygote for a launcher with threads: an interpreter of its own, that clones it and waits."""
    server = Socket(fileno=fd)
    os.set_inheritable(fd, False)
    try:
        pid, _pidfd = linux.clone(linux.CLONE_NEWNS | (linux.CLONE_NEWPID if alone else 0))
    except OSError as e:
        tell(server, error_message("clone", e.errno, None, e.strerror or str(e)))
        os._exit(1)
    if pid == 0:
        serve(server, alone=alone)
    server.close()
    os.waitpid(pid, 0)
    os._exit(0)


def _settle(server: Socket) -> None:
    """Leave the parent behind: its terminal, its signals, its descriptors, its mounts."""
    gc.disable()
    with contextlib.suppress(OSError):
        os.setsid()
    for number in STOPPED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0)  # the modes of mount points are ours to say, not the caller's shell's
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    linux.close_all_but([server.fileno()])
    # Mounts of the host still arrive; ours, and our unmounting, never reach it.
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    os.chdir("/")


def _rehearse() -> None:
    """Call once what every child will call, with arguments that change nothing.

    Symbols are looked up and caches filled here, while the launcher does something else, and not in
    each child anew: about 0.5 ms a sandbox.
    """
    linux.capset(*linux.capget())
    linux.prctl(linux.PR_GET_NO_NEW_PRIVS)
    os.close(linux.fsopen("tmpfs"))
    for call in (
        lambda: linux.mount("", "", "", 0, ""),
        lambda: linux.umount2(""),
        lambda: linux.pivot_root("", ""),
        lambda: linux.open_tree(-1, "-"),
        lambda: linux.move_mount(-1, "", -1, ""),
        lambda: linux.mount_setattr(-1, "-"),
        lambda: linux.fsconfig_set_string(-1, "", ""),
        lambda: linux.fsconfig_create(-1),
        lambda: linux.fsmount(-1),
        lambda: linux.seccomp_filter(b""),
        lambda: linux.close_range(1, 0),
    ):
        with contextlib.suppress(OSError):
            call()


class _Gate:
    """What a child waits at until its private network is up; `kind` says who sets it up, None for nobody."""

    def __init__(self, kind: str | None) -> None:
        self._kind = kind
        self._read = self._write = -1
        if kind is not None:
            # Now: the child will see no other file system than the image's.
            from builder.sandbox import network  # noqa: F401

            self._read, self._write = os.pipe2(os.O_CLOEXEC)

    def ours(self) -> int:
        """In the child: where to wait, or -1."""
        if self._kind is not None:
            os.close(self._write)
        return self._read

    def attend(self, zygote: _Zygote, pidfd: int, others: Sequence[int]) -> int:
        """In the zygote: start the helper of the child, which closes the others; its process, or 0."""
        if self._kind is None:
            return 0
        from builder.sandbox import network

        helper = os.fork()
        if helper == 0:
            zygote.let_go()
            for fd in (self._read, *others):
                os.close(fd)
            network.serve(pidfd, self._write, rootless=self._kind == "rootless")
        self.close()
        return helper

    def close(self) -> None:
        for fd in (self._read, self._write):
            if fd >= 0:
                os.close(fd)


class _Zygote:
    def __init__(self, server: Socket) -> None:
        self.server = server
        self.poll = select.poll()
        self.poll.register(server, select.POLLIN)
        self.groups = 0
        self.prelude: list[list[Any]] = []
        self.ahead: list[list[Any]] = []
        """What the spare does besides, of what each request asks for."""
        self.spare_flags = 0
        self.accounting = False
        self.supervise: str | None = None
        self.network: str | None = None
        """What sets the spare's network up, if it has one of its own."""
        self.spare: _Spare | None = None
        self.board: springboard.Springboard | None = None
        with contextlib.suppress(OSError):  # told by the sandbox that tries it again
            self.board = springboard.prepare()
        self.programs: dict[int, bytes] = {}
        self.by_pidfd: dict[int, _Child] = {}
        self.by_control: dict[int, _Child] = {}
        self.by_asking: dict[int, _Child] = {}

    def loop(self) -> None:
        """Serve until the launcher is gone."""
        while True:
            # Whose a descriptor was when it had something to tell: its number may be another's when that is heard.
            for fd, event, asked in [(*row, self.by_asking.get(row[0])) for row in self.poll.poll()]:
                if asked is not None:
                    if self.by_asking.get(fd) is asked:
                        self.hear(asked, event)
                elif fd == self.server.fileno():
                    if not self.accept():
                        return
                elif fd in self.by_pidfd:
                    self.bury(self.by_pidfd[fd])
                elif fd in self.by_control:
                    self.listen(self.by_control[fd])

    def clear(self) -> None:
        """Kill and bury every sandbox: the launcher is gone."""
        if self.spare and (self.spare.group or self.spare.network):
            self.spare.discard()
        children = list(self.by_pidfd.values())
        for child in children:
            child.kill()
        for child in children:
            self.bury(child)

    def accept(self) -> bool:
        """Take one request; False at the end of the socket."""
        data, fds = channel.receive(self.server, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if not fds:
            if data:
                hello = json.loads(data)
                self.prelude, self.spare_flags = hello["prelude"], hello["flags"]
                self.accounting, self.supervise = hello["accounting"], hello["supervise"]
                self.network = hello["network"]
                self.breed()
            return bool(data)
        control = Socket(fileno=fds[0])
        try:
            if data[:1] == b"D" or not self.hand_on(data, control, fds):
                request = parse(data, fds)
                if data[:1] != b"D":
                    request["operations"] = self.prelude + request["operations"]
                self.start(request, control, fds)
            elif data[:1] == b"P":
                self.learn(parse(data, fds))  # now: the sandbox does not wait for it
        except cgroup.CgroupError as e:
            tell(control, error_message("cgroup", e.errno, e.filename, e.strerror or str(e), e.hint))
            control.close()
        except OSError as e:
            tell(control, error_message("clone", e.errno, None, e.strerror or str(e)))
            control.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)
        if self.accounting:
            # A container is one sandbox: the next is not to be expected soon.
            if self.spare:
                self.spare.discard()
                self.spare = None
        elif self.spare is None:
            self.breed()
        return True

    def learn(self, request: dict[str, Any]) -> None:
        """Keep the filters that a request brings. That which asks for devices is installed ahead, too."""
        for number, program in request.get("programs", {}).items():
            self.programs[int(number)] = binascii.a2b_base64(program)
        if request.get("nodes") is not None:
            self.ahead = [["nodes", {"program": request["nodes"]}]]

    def breed(self) -> None:
        """Start the next spare. Where that fails, the next request tells why by failing too."""
        if not self.spare_flags:
            return
        group, ahead = self.make_group({"accounting": True}, own=True) if self.accounting else (None, [])
        requests, theirs = channel.pair()
        undo_read, undo_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        gate = _Gate(self.network)
        handover = _Handover(self.supervise)
        try:
            pid, pidfd = linux.clone(self.spare_flags)
        except OSError:
            gate.close()
            requests.close()
            os.close(undo_read)
            if group:
                group.remove()
        else:
            if pid == 0:
                requests.close()
                # Joining takes the kernel some 10 ms where nobody did lately: done here, nobody waits for it.
                sandbox = setup.Sandbox(undo_write, self.programs, gate.ours(), handover.ours())
                sandbox.board = self.board
                _wait_in_the_wings(theirs, sandbox, [*ahead, *self.prelude, *self.ahead])
            self.spare = _Spare(pid, pidfd, requests, undo_read, group)
            self.spare.helper, self.spare.asking = handover.attend(pid)
            self.spare.network = gate.attend(self, pidfd, (theirs.fileno(), undo_read, undo_write))
        theirs.close()
        os.close(undo_write)

    def hand_on(self, data: bytes, control: Socket, fds: list[int]) -> bool:
        """Let the spare take a request; False if there is none."""
        spare, self.spare = self.spare, None
        if spare is None:
            return False
        try:
            channel.send(spare.requests, data, fds)
        except OSError:
            spare.discard()
            return False
        spare.requests.close()
        child = _Child(spare.pid, spare.pidfd, control, spare.undo_fd, spare.group)
        child.network = spare.network
        child.helpers.extend(filter(None, (spare.helper,)))
        child.asking = spare.asking
        self.register(child)
        return True

    def make_group(self, limits: dict[str, Any], *, own: bool) -> tuple[cgroup.Group, list[list[Any]]]:
        """A group with limits, and the operation that enters it, perhaps as its own root. Raises: CgroupError."""
        self.groups += 1
        group = cgroup.create(limits, f"{os.getpid()}-{os.urandom(4).hex()}-{self.groups}")
        directories = [path for _hierarchy, path in group.directories]
        return group, [["cgroup", {"directories": directories, "own": own}]]

    def register(self, child: _Child) -> None:
        """Tell that it runs, unless a guard does, and watch it."""
        if child.life is None:
            with contextlib.suppress(OSError):
                channel.send(child.control, b'{"started": true}', [child.pidfd])
        self.by_pidfd[child.pidfd] = child
        self.by_control[child.control.fileno()] = child
        self.poll.register(child.pidfd, select.POLLIN)
        self.poll.register(child.control, select.POLLIN)
        self.watch(child)

    def watch(self, child: _Child) -> None:
        """Hear it ask for devices."""
        if child.asking and child.asking.fd >= 0:
            self.by_asking[child.asking.fd] = child
            self.poll.register(child.asking.fd, select.POLLIN)

    def unwatch(self, child: _Child) -> None:
        if child.asking and self.by_asking.pop(child.asking.fd, None):
            self.poll.unregister(child.asking.fd)

    def hear(self, child: _Child, event: int) -> None:
        """Its listener has come, or somebody asks."""
        assert child.asking is not None
        self.unwatch(child)
        helper = child.asking.hear(child.pid, event)
        child.helpers.extend(filter(None, (helper,)))
        self.watch(child)

    def start(self, request: dict[str, Any], control: Socket, fds: list[int]) -> None:
        self.learn(request)
        if request.get("programs") and self.spare and not self.accounting:
            # It was born without, and the next request may want it.
            self.spare.discard()
            self.spare = None
        group = None
        if limits := request.get("limits"):
            group, ahead = self.make_group(limits, own=bool(request["flags"] & linux.CLONE_NEWCGROUP))
            request["operations"] = ahead + request["operations"]
        undo_read, undo_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        gate = _Gate(request["network"])
        handover = _Handover(self.supervise)
        life = () if request["flags"] & linux.CLONE_NEWPID else channel.pair()
        try:
            pid, pidfd = linux.clone(request["flags"])
        except OSError:
            gate.close()
            os.close(undo_read)
            os.close(undo_write)
            if group:
                group.remove()
            raise
        if pid == 0:
            sandbox = setup.Sandbox(undo_write, self.programs, gate.ours(), handover.ours())
            sandbox.board = self.board
            if life:
                self.let_go()
                life[0].close()
                _leave_guard(control, life[1], joined_of(request, fds).get("pid"))
            _run(request, control, fds, sandbox)
        os.close(undo_write)
        child = _Child(pid, pidfd, control, undo_read, group)
        if life:
            child.life = life[0]
            with contextlib.suppress(OSError):
                child.mounts = os.stat(f"/proc/{pid}/ns/mnt")
        more = [end.fileno() for end in life]
        child.network = gate.attend(self, pidfd, (control.fileno(), undo_read, *fds[1:], *more))
        if life:
            life[1].close()
        helper, child.asking = handover.attend(pid)
        child.helpers.extend(filter(None, (helper,)))
        self.register(child)

    def let_go(self) -> None:
        """In a helper or a guard: close what is the zygote's, or the launcher would not see its end."""
        self.server.close()
        if self.spare:
            self.spare.requests.close()
            if self.spare.asking:
                self.spare.asking.close()
        for child in self.by_pidfd.values():
            for fd in {child.pidfd, child.control.fileno(), child.undo_fd}:
                os.close(fd)
            if child.life:
                child.life.close()
            if child.asking:
                child.asking.close()

    def bury(self, child: _Child) -> None:
        """Reap, and tell."""
        _pid, status, usage = os.wait4(child.pid, 0)
        if child.life:
            from builder.sandbox import guard

            told = guard.status_of(child.life)
            child.life.close()
            if told is None and child.mounts:
                guard.end_all(child.mounts)
            status = signal.SIGKILL if told is None else told
        child.undo()
        self.unwatch(child)
        if child.asking:
            child.asking.close()
        for helper in child.helpers:
            os.waitpid(helper, 0)
        message = {
            "exit": status,
            "user_s": usage.ru_utime,
            "system_s": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "read_bytes": usage.ru_inblock * 512,
            "written_bytes": usage.ru_oublock * 512,
        }
        if child.group:
            result = child.group.result()
            child.group.remove()
            message["oom_kills"] = result.oom_kills
            message["max_rss_bytes"] = result.peak_memory_bytes or message["max_rss_bytes"]
        self.poll.unregister(child.pidfd)
        os.close(child.pidfd)
        del self.by_pidfd[child.pidfd]
        if self.by_control.pop(child.control.fileno(), None):
            self.poll.unregister(child.control)
        tell(child.control, json.dumps(message).encode())
        child.control.close()
        if child.network:
            # It takes the network down, for which nobody has to wait but this process's own end.
            os.waitpid(child.network, 0)

    def listen(self, child: _Child) -> None:
        """A wish about a running sandbox; or the other end is gone, and so goes the sandbox."""
        wish = b""
        with contextlib.suppress(OSError):
            wish = child.control.recv(64)
        if not wish:
            self.poll.unregister(child.control)
            del self.by_control[child.control.fileno()]
            child.kill()
            return
        if wish == b"end":
            child.kill()
            return
        try:
            if child.group is None:
                raise cgroup.CgroupError(errno.ENOENT, "it was started without Resources(freezer=True)")
            child.group.freeze(wish == b"freeze")
            tell(child.control, b'{"done": true}')
        except OSError as e:
            hint = getattr(e, "hint", None)
            refusal = error_message("freezer", e.errno, e.filename, e.strerror or str(e), hint)
            tell(child.control, b'{"refused": ' + refusal + b"}")


def error_message(operation: str, number: int | None, path: str | None, words: str, hint: str | None = None) -> bytes:
    """An error as the launcher reads it."""
    return json.dumps({"error": operation, "errno": number, "path": path, "message": words, "hint": hint}).encode()


def tell(control: Socket, message: bytes) -> None:
    with contextlib.suppress(OSError):
        control.send(message)


def _leave_guard(control: Socket, life: Socket, pid_namespace: int | None) -> None:
    """In the child: be the guard, whose child alone returns; the zygote's own work is nobody's but the zygote's."""
    from builder.sandbox import guard

    try:
        guard.stay_behind(control, life, pid_namespace)
    except OSError as e:
        # Such as ENOMEM: the first process of the namespace that was to be joined has ended.
        tell(control, error_message("clone", e.errno, None, e.strerror or str(e)))
        os._exit(125)
    except BaseException:  # noqa: BLE001 - the process boundary
        os._exit(125)


def joined_of(request: dict[str, Any], fds: list[int]) -> dict[str, int]:
    """The descriptors of namespaces, and of what goes with them, that came with a request."""
    first = len(fds) - request["trees"] - len(request["joined"])
    return dict(zip(request["joined"], fds[first:], strict=False))


def parse(data: bytes, fds: list[int]) -> dict[str, Any]:
    if len(data) == 1:
        # Not by the descriptor's offset, which is shared with who handed it on and reads it, too.
        data = b"-" + os.pread(fds[4], os.fstat(fds[4]).st_size, 0)
    request: dict[str, Any] = json.loads(data[1:])
    return request


def _wait_in_the_wings(requests: Socket, sandbox: setup.Sandbox, prelude: list[list[Any]]) -> NoReturn:
    """The spare child: do the prelude, wait for a request, then be its sandbox. Never returns."""
    failure = None
    try:
        _reset_signals()
        setup.execute(sandbox, prelude)
        _rehearse()
    except setup.SetupError as e:
        failure = e
    try:
        data, fds = channel.receive(requests, MAX_REQUEST_BYTES, MAX_DESCRIPTORS)
        if data:
            request = parse(data, fds)
            for number, program in request.get("programs", {}).items():
                sandbox.programs[int(number)] = binascii.a2b_base64(program)
            _run(request, Socket(fileno=fds[0]), fds, sandbox, failure)
    finally:
        os._exit(125)


def _reset_signals() -> None:
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _run(
    request: dict[str, Any],
    control: Socket,
    fds: list[int],
    sandbox: setup.Sandbox,
    failure: setup.SetupError | None = None,
) -> NoReturn:
    """The child: set up, then become the command. Never returns."""
    status = 125
    try:
        if failure:
            raise failure
        os.setsid()
        _reset_signals()
        for fd, source in enumerate(fds[1:4]):
            os.dup2(source, fd)
        sandbox.trees = fds[len(fds) - request["trees"] :]
        sandbox.joined = joined_of(request, fds)
        if request.get("terminal"):
            # Now: the image has no such module.
            from builder.sandbox import terminal
        if request.get("trace"):
            tell(control, json.dumps({"trace": setup.trace(sandbox, request["operations"])}).encode())
        else:
            setup.execute(sandbox, request["operations"])
        linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
        if request.get("init"):
            _init()
        if request.get("terminal"):
            try:
                terminal.give(control, *request["terminal"])
            except OSError as e:
                raise setup.SetupError("terminal", e.errno, None, e.strerror or str(e)) from e
        status = setup.become(request["args"], request["env"], sandbox.board)
    except setup.SetupError as e:
        tell(control, error_message(e.operation, e.errno, e.path, e.words))
    except BaseException as e:  # noqa: BLE001 - the process boundary: whatever it is, it must be told
        tell(control, error_message("setup", None, None, f"{type(e).__name__}: {e}"))
    finally:
        os._exit(status)


def _init() -> None:
    """Stay behind as a small PID 1; returns in the child alone. Raises: SetupError."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        return
    linux.close_range(0)
    try:
        springboard.become_init(pid)
    except OSError as e:
        os.kill(pid, signal.SIGKILL)
        raise setup.SetupError("init", e.errno, None, e.strerror or str(e)) from e
