"""Sandboxes without namespaces or mounts: the process that starts them, and the one that keeps each.

For root without CAP_SYS_ADMIN, as in Docker's and Kubernetes' containers. The bare zygote forks a
*keeper* for each request. The keeper puts into the image's tree what elsewhere would be mounted
(/dev, /etc/hosts, secrets, caches), forks the command into a chroot, waits for its end, kills what the
command left running (it is their subreaper) and takes everything out again, so that neither the files
nor the times of their directories enter the layer. The keeper itself stays outside the chroot.

What cannot be had so: see `bare`. Datagrams and descriptors are the zygote's, as told there.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import gc
import json
import os
import resource
import select
import signal
import stat
from typing import Any, NoReturn

from builder.sandbox import cgroup, channel, rootfs, setup, zygote
from builder.sandbox.channel import Socket
from layers import linux
from layers.trees import copy_tree, remove_tree

END = signal.SIGUSR1
"""Tells a keeper to end its sandbox; SIGKILL would leave no one to clean up."""
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_PROC_FILES = (
    *("cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "uptime", "version"),
    *("sys/kernel/osrelease", "sys/kernel/ostype", "sys/kernel/random/uuid", "sys/kernel/version"),
    *("sys/kernel/cap_last_cap", "sys/kernel/ngroups_max", "sys/kernel/pid_max", "sys/vm/overcommit_memory"),
)
"""Of a /proc that cannot be mounted: what does not depend on the process, as it was at the start."""
_MAX_PROC_BYTES = 1 << 20
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


# ---- the bare zygote --------------------------------------------------------------------------


def serve(server: Socket) -> NoReturn:
    """The bare zygote's whole life, in the process just forked. Never returns."""
    status = 70
    try:
        gc.disable()
        with contextlib.suppress(OSError):
            os.setsid()
        for number in zygote.STOPPED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.umask(0)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        linux.close_all_but([server.fileno()])
        os.chdir("/")
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        _Bare(server).loop()
        status = 0
    except BaseException as e:  # noqa: BLE001 - the process boundary: the launcher reads this as its epitaph
        zygote.tell(server, zygote.error_message("zygote", getattr(e, "errno", None), None, f"{type(e).__name__}: {e}"))
    finally:
        os._exit(status)


def fork() -> int:
    """fork(2), for a process of one thread."""
    return os.fork()


def main(fd: int) -> NoReturn:
    """The bare zygote for a launcher with threads, in an interpreter of its own."""
    server = Socket(fileno=fd)
    os.set_inheritable(fd, False)
    serve(server)


class _Bare:
    def __init__(self, server: Socket) -> None:
        self.server = server
        self.keepers: dict[int, Socket] = {}

    def loop(self) -> None:
        """Serve until the launcher is gone, then end every sandbox."""
        wake = _wake_on(signal.SIGCHLD)
        poll = select.poll()
        poll.register(self.server, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            for fd, _event in poll.poll():
                if fd == wake:
                    os.read(wake, 4096)
                    self.reap(os.WNOHANG)
                elif not self.accept():
                    for pid in self.keepers:
                        os.kill(pid, END)
                    while self.keepers:
                        self.reap(0)
                    return

    def accept(self) -> bool:
        """Take one request; False at the end of the socket."""
        data, fds = channel.receive(self.server, zygote.MAX_REQUEST_BYTES, 8)
        if not fds:
            return bool(data)
        control = Socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            self.server.close()
            for other in self.keepers.values():
                other.close()
            _keep(zygote.parse(data, fds), control, fds[1:4])
        for fd in fds[1:]:
            os.close(fd)
        self.keepers[pid] = control
        return True

    def reap(self, options: int) -> None:
        """Bury keepers. One that was killed could not end its sandbox: what it left comes to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, options)
            except ChildProcessError:
                return
            if pid == 0:
                return
            control = self.keepers.pop(pid, None)
            if control is not None:
                if status != 0:
                    end_all(set(self.keepers))
                # A keeper that ended in peace has said so already, and nobody reads this.
                zygote.tell(control, json.dumps({"exit": status, **usage()}).encode())
                control.close()
            if options == 0:
                return


def _wake_on(number: signal.Signals) -> int:
    """A descriptor that is readable after the signal."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(number, lambda _number, _frame: None)
    return read


def usage() -> dict[str, Any]:
    """What the ended children of this process used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "max_rss_bytes": used.ru_maxrss * 1024,
        "read_bytes": used.ru_inblock * 512,
        "written_bytes": used.ru_oublock * 512,
    }


def end_all(spared: set[int]) -> None:
    """Kill all descendants of this process but those spared and theirs, and reap them.

    First all are stopped, so that none starts another meanwhile.
    """
    stopped: set[int] = set()
    while found := _descendants(spared) - stopped:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= found
    while found := _descendants(spared):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _descendants(spared: set[int]) -> set[int]:
    """The processes beneath this one that live, by /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
                # The command's name, in parentheses, may hold anything.
                state, parent = stream.read().rpartition(b")")[2].split()[:2]
                if state not in {b"Z", b"X"} or int(parent) == os.getpid():
                    children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    todo = [os.getpid()]
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in spared and pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


# ---- the keeper -------------------------------------------------------------------------------


def _keep(request: dict[str, Any], control: Socket, stdio: list[int]) -> NoReturn:
    """The keeper's whole life. Exits with 0 when all is told and cleaned up. Never returns."""
    status = 70
    try:
        kind = Keeper
        if "runtime" in request:
            from builder.sandbox.runtime import RuntimeKeeper

            kind = RuntimeKeeper
        kind(request, control).run(stdio)
        status = 0
    except BaseException as e:  # noqa: BLE001 - the process boundary: whatever it is, it must be told
        zygote.tell(control, zygote.error_message("keeper", None, None, f"{type(e).__name__}: {e}"))
    finally:
        os._exit(status)


class Keeper:
    """Keeps one sandbox. `place`, `become` and `clean` say what kind of sandbox it is."""

    def __init__(self, request: dict[str, Any], control: Socket) -> None:
        self.request = request
        self.control = control
        self.ending = False
        self.command = 0
        self.places: Places | None = None

    def run(self, stdio: list[int]) -> None:
        parent = os.getppid()
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        linux.prctl(linux.PR_SET_PDEATHSIG, END)
        wake = _wake_on(signal.SIGCHLD)
        signal.signal(END, lambda _number, _frame: self.end())
        for number in _PASSED_ON:
            signal.signal(number, lambda received, _frame: self.pass_on(received))
        pidfd = linux.pidfd_open(os.getpid())
        channel.send(self.control, b'{"started": true}', [pidfd])
        os.close(pidfd)
        if os.getppid() != parent:
            return  # the zygote died before it could be watched
        group = None
        try:
            if self.request.get("limits"):
                group = cgroup.create(self.request["limits"], f"{os.getpid()}-{os.urandom(4).hex()}-1")
            self.place()
            message = self.guard(stdio, group, wake)
        except cgroup.CgroupError as e:
            message = _error("cgroup", e, e.hint)
        except setup.SetupError as e:
            message = zygote.error_message(e.operation, e.errno, e.path, e.words)
        except OSError as e:
            message = _error("place", e)
        try:
            end_all(set())
            self.clean()
        except OSError as e:
            message = _error("cleaning up", e)
        if group:
            group.remove()
        zygote.tell(self.control, message)

    def place(self) -> None:
        """Get the tree ready. Raises: OSError, and `clean` is called all the same."""
        self.places = Places(self.request["root"], self.request["scratch"])
        for step in self.request["places"]:
            self.places.put(**step)
        self.places.settle()

    def become(self, group: cgroup.Group | None) -> int:
        """In the child, with its descriptors: be the command. Returns a status only where it cannot."""
        if group:
            cgroup.join([path for _hierarchy, path in group.directories])
        programs = {int(number): binascii.a2b_base64(text) for number, text in self.request["programs"].items()}
        sandbox = setup.Sandbox(-1, programs)
        assert self.places
        sandbox.root_fd = self.places.root_fd
        setup.execute(sandbox, [["chroot", {}], *self.request["operations"]])
        linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
        return setup.become(self.request["args"], self.request["env"])

    def clean(self) -> None:
        """Undo what `place` did. Raises: OSError."""
        if self.places:
            self.places.remove()

    def guard(self, stdio: list[int], group: cgroup.Group | None, wake: int) -> bytes:
        """Run the command; the message about its end."""
        if self.ending:
            return json.dumps({"exit": signal.SIGKILL, **usage()}).encode()
        self.command = os.fork()
        if self.command == 0:
            self.descend(stdio, group)
        for fd in stdio:
            os.close(fd)
        status = self.wait(wake)
        # While its processes live, more may be counted.
        end_all(set())
        message = {"exit": status, **usage()}
        if group:
            result = group.result()
            message["oom_kills"] = result.oom_kills
            message["max_rss_bytes"] = result.peak_memory_bytes or message["max_rss_bytes"]
        return json.dumps(message).encode()

    def descend(self, stdio: list[int], group: cgroup.Group | None) -> NoReturn:
        """The child's whole life."""
        status = 125
        try:
            signal.set_wakeup_fd(-1)
            for number in (END, signal.SIGCHLD, *_PASSED_ON, *zygote.STOPPED_SIGNALS):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            for fd, source in enumerate(stdio):
                os.dup2(source, fd)
            status = self.become(group)
        except setup.SetupError as e:
            zygote.tell(self.control, zygote.error_message(e.operation, e.errno, e.path, e.words))
        except BaseException as e:  # noqa: BLE001 - the process boundary: whatever it is, it must be told
            zygote.tell(self.control, zygote.error_message("setup", None, None, f"{type(e).__name__}: {e}"))
        finally:
            os._exit(status)

    def wait(self, wake: int) -> int:
        """Until the command ends; meanwhile reap orphans, and end all when nobody cares any more."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while True:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self.command:
                    self.command = 0
                    return status
                if pid == 0:
                    break
            for fd, _event in poll.poll():
                if fd == wake:
                    os.read(wake, 4096)
                elif not self.heard():
                    poll.unregister(self.control)
                    self.end()

    def heard(self) -> bool:
        """Whether the launcher is still there. Its wishes are not for us: there is no freezer."""
        with contextlib.suppress(OSError):
            return bool(self.control.recv(64))
        return False

    def end(self) -> None:
        self.ending = True
        if self.command:
            os.kill(self.command, signal.SIGKILL)

    def pass_on(self, number: int) -> None:
        if self.command:
            os.kill(self.command, number)


def run_program(argv: list[str]) -> int:
    """Run a program without a word to its end, in a keeper; its wait status. Raises: OSError."""
    return os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)[1]


def _error(operation: str, e: OSError, hint: str | None = None) -> bytes:
    return zygote.error_message(
        operation, e.errno, None if e.filename is None else str(e.filename), e.strerror or str(e), hint
    )


# ---- what is put into the tree for a while ----------------------------------------------------


class Places:
    """Things put into an image's tree, over what is there, and taken out again without a trace.

    What is covered waits in a directory beside the tree. A directory that things were put into gets its
    times back, or keeps those that the command gave it. The tree may have been changed by the command,
    a hostile one: everything goes by descriptors of directories, and no link is followed.
    """

    def __init__(self, root: str, scratch: str) -> None:
        self.root_fd = os.open(root, _DIRECTORY)
        self._aside = f"{scratch}/aside-{os.urandom(6).hex()}"
        self._aside_fd = -1
        self._undo: list[tuple[int, str, str | None, str | None]] = []
        """(directory, name, what it covers, where it comes from) each."""
        self._made: list[tuple[int, str]] = []
        self._directories: dict[tuple[int, int], tuple[int, tuple[int, int]]] = {}
        self._settled: dict[tuple[int, int], int] = {}

    def put(self, kind: str, target: str, **arguments: Any) -> None:
        """One thing. Raises: OSError naming the target."""
        try:
            parent, name = self._clear(target)
            getattr(self, f"_put_{kind}")(parent, name, **arguments)
        except OSError as e:
            if not isinstance(e.filename, str):
                e.filename = target
            raise

    def settle(self) -> None:
        """All is in place: from now on, changes are the command's."""
        for key, (fd, _before) in self._directories.items():
            self._settled[key] = os.fstat(fd).st_mtime_ns

    def remove(self) -> None:
        """Take everything out again. Raises: OSError."""
        seen = {key: os.fstat(fd) for key, (fd, _before) in self._directories.items()}
        for parent, name, aside, home in reversed(self._undo):
            with contextlib.suppress(FileNotFoundError):  # the directory is gone, and the covered with it
                if home is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(name, home, src_dir_fd=parent)
                remove_tree(f"/proc/self/fd/{parent}/{name}")
                if aside is not None:
                    os.rename(aside, name, src_dir_fd=self._aside_fd, dst_dir_fd=parent)
        for parent, name in reversed(self._made):
            with contextlib.suppress(OSError):  # it stays if the command put something there
                os.rmdir(name, dir_fd=parent)
        for key, (fd, before) in self._directories.items():
            now = seen[key]
            changed = now.st_mtime_ns != self._settled.get(key, now.st_mtime_ns)
            os.utime(fd, ns=(now.st_atime_ns, now.st_mtime_ns) if changed else before)
        if self._aside_fd >= 0:
            remove_tree(self._aside)

    def _clear(self, target: str) -> tuple[int, str]:
        """Make way at a path: (its directory, its name). Raises: OSError."""
        parts, exists = rootfs.walk(self.root_fd, target)
        if not parts:
            raise OSError(errno.EBUSY, "nothing can be put over the whole image", target)
        for depth in range(1, len(parts)):
            parent = self._directory(parts[: depth - 1])
            with contextlib.suppress(FileExistsError):
                os.mkdir(parts[depth - 1], 0o755, dir_fd=parent)
                self._made.append((parent, parts[depth - 1]))
        parent, name, aside = self._directory(parts[:-1]), parts[-1], None
        if exists:
            if self._aside_fd < 0:
                os.mkdir(self._aside, 0o700)
                self._aside_fd = os.open(self._aside, _DIRECTORY)
            aside = str(len(self._undo))
            os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=self._aside_fd)
        self._undo.append((parent, name, aside, None))
        return parent, name

    def _directory(self, parts: list[str]) -> int:
        fd = rootfs.open_in(self.root_fd, "/".join(parts), _DIRECTORY)
        status = os.fstat(fd)
        known = self._directories.setdefault(
            (status.st_dev, status.st_ino), (fd, (status.st_atime_ns, status.st_mtime_ns))
        )
        if known[0] != fd:
            os.close(fd)
        return known[0]

    def _put_dev(self, parent: int, name: str) -> None:
        os.mkdir(name, 0o755, dir_fd=parent)
        dev = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            for node, (major, minor) in _DEVICES.items():
                os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(major, minor), dir_fd=dev)
            os.close(os.open("null", os.O_RDWR | os.O_CLOEXEC, dir_fd=dev))
            os.mkdir("shm", 0o1777, dir_fd=dev)
        except PermissionError as e:
            words = "devices cannot be made or opened here (CAP_MKNOD is missing, or the file system is nodev)"
            raise OSError(e.errno, words, "/dev") from e
        finally:
            os.close(dev)

    def _put_proc(self, parent: int, name: str) -> None:
        os.mkdir(name, 0o555, dir_fd=parent)
        proc = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            for path in _PROC_FILES:
                try:
                    with open(f"/proc/{path}", "rb") as stream:
                        data = stream.read(_MAX_PROC_BYTES)
                except OSError:
                    continue
                rootfs.make_in(proc, path.split("/"), is_file=True)
                with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=proc), "wb") as copy:
                    copy.write(data)
        finally:
            os.close(proc)

    def _put_directory(self, parent: int, name: str, mode: int, uid: int = 0, gid: int = 0) -> None:
        os.mkdir(name, 0o700, dir_fd=parent)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(f"/proc/self/fd/{parent}/{name}", mode)

    def _put_file(self, parent: int, name: str, data: str, mode: int, uid: int, gid: int) -> None:
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent)
        with open(fd, "wb") as stream:
            stream.write(binascii.a2b_base64(data))
            stream.flush()
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)

    def _put_moved(self, parent: int, name: str, source: str) -> None:
        """A directory of ours that nobody else needs meanwhile."""
        os.rename(source, name, dst_dir_fd=parent)
        self._undo[-1] = (*self._undo[-1][:3], source)

    def _put_link(self, parent: int, name: str, to: str) -> None:
        """Another place of what was moved: it can be in one alone."""
        os.symlink(to, name, dir_fd=parent)

    def _put_copy(self, parent: int, name: str, source: str, subpath: str | None) -> None:
        """A copy of a host's file or directory, or of a part of another tree."""
        if subpath is None:
            fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
        else:
            top = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fd = rootfs.open_in(top, subpath)
            finally:
                os.close(top)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                os.mkdir(name, 0o700, dir_fd=parent)
                copy_tree(fd, f"/proc/self/fd/{parent}/{name}")
            elif stat.S_ISREG(status.st_mode):
                self._copy_file(f"/proc/self/fd/{fd}", parent, name, status)
            else:
                # An agent's socket: another name of it serves as well.
                os.link(source, name, dst_dir_fd=parent)
        finally:
            os.close(fd)

    @staticmethod
    def _copy_file(source: str, parent: int, name: str, status: os.stat_result) -> None:
        with (
            open(source, "rb", buffering=0) as old,
            open(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=parent), "wb") as new,
        ):
            while os.sendfile(new.fileno(), old.fileno(), None, 1 << 30):
                pass
            os.fchown(new.fileno(), status.st_uid, status.st_gid)
            os.fchmod(new.fileno(), stat.S_IMODE(status.st_mode))
            os.utime(new.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
