"""What is known of a container, on disk: its settings, its state, its lock, its name.

    ROOT/containers/
      names/NAME            a link to the container's ID: taken by whoever makes it first
      ID/settings.json      what it is: written at its creation, rewritten by `rename`, `update`, `config`
      ID/state.json         how it is: written by whoever holds the lock
      ID/exit               the end, in space set aside at the start: it is told on a full disk too
      ID/lock               locked (flock) by the monitor for as long as it lives
      ID/control            the monitor's socket (builder.container.control)
      ID/log, log.1         what it said (builder.container.logs)
      ID/base/              manifest and config of its image

A state that says `running` while nobody holds the lock is that of a monitor that was killed, or of
a machine that went down: the container is dead with it, and `Record.status` says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXIT_ROOM_BYTES = 1024
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\Z")
LIVE = frozenset({"running", "paused", "starting", "stopping", "restarting"})


class ContainerError(PybuildError):
    """A container cannot do what was asked."""


class NoSuchContainer(ContainerError):
    """No container of that name or ID is in the store."""


class Record:
    """One container's directory. `settings` and `state` are as last read; nothing is cached behind them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = {}
        self.state: dict[str, Any] = {}

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def name(self) -> str:
        return str(self.settings.get("name", self.id[:12]))

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self.directory.parent.parent

    @property
    def working(self) -> bool:
        """Whether it is one of those that images are built in by hand."""
        return self.settings.get("kind") == "working"

    def path(self, name: str) -> Path:
        return self.directory / name

    # Reading

    def load(self) -> Record:
        """Read both documents. Raises: NoSuchContainer if it is gone, ContainerError if it is damaged."""
        self.settings = self._read("settings.json")
        self.refresh()
        return self

    def refresh(self) -> None:
        """Read the state anew. Raises: as `load`."""
        self.state = self._read("state.json")
        if self.state.get("status") in LIVE and not self.locked():
            # It may have ended between the two looks.
            self.state = self._read("state.json")
            if self.state.get("status") in LIVE:
                self.state.update(self._told_end())

    def _told_end(self) -> dict[str, Any]:
        """The end of a container whose last state was never written."""
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.path("exit").read_bytes().rstrip(b"\0 \n") or b"null")
            if isinstance(told, dict) and told.get("started_ns") == self.state.get("started_ns"):
                return told
        return {"status": "exited", "exit_code": 137, "pid": 0, "error": "its monitor was killed, and it died with it"}

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        try:
            document = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NoSuchContainer(f"no container {self.id[:12]}") from e
        except (OSError, ValueError) as e:
            raise ContainerError(f"{path} cannot be read: {e}", hint="remove the container with `rm -f`") from e
        if not isinstance(document, dict):
            raise ContainerError(f"{path} is damaged", hint="remove the container with `rm -f`")
        return document

    @property
    def status(self) -> str:
        """created, running, paused, restarting, exited."""
        status = str(self.state.get("status", "created"))
        return "running" if status in {"starting", "stopping"} else status

    @property
    def running(self) -> bool:
        return self.state.get("status") in LIVE and bool(self.state.get("pid"))

    # Writing

    def save_settings(self) -> None:
        """Raises: ContainerError."""
        write_document(self.path("settings.json"), self.settings)

    def save_state(self, **changes: Any) -> None:
        """Change the state; the lock's holder alone may. Raises: ContainerError."""
        self.state.update(changes)
        write_document(self.path("state.json"), self.state)

    def save_end(self, **changes: Any) -> None:
        """The last state of a run; on a full disk it goes to the room set aside. Never raises."""
        self.state.update(changes)
        try:
            write_document(self.path("state.json"), self.state)
        except ContainerError:
            keys = ("status", "exit_code", "pid", "error", "started_ns", "finished_ns", "oom_killed")
            data = json.dumps({key: self.state.get(key) for key in keys}).encode()
            with contextlib.suppress(OSError):
                fd = os.open(self.path("exit"), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(fd, data[:EXIT_ROOM_BYTES].ljust(EXIT_ROOM_BYTES), 0)
                finally:
                    os.close(fd)

    # Locking

    def lock(self, *, wait: bool = False) -> int | None:
        """Take the lock; its descriptor, or None if another has it. Raises: NoSuchContainer."""
        try:
            fd = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise NoSuchContainer(f"no container {self.id[:12]}") from e
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return fd
            except BlockingIOError:
                pass
            try:
                # Who only looks whether it is locked (`locked`) has a share of it for that moment.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            fcntl.flock(fd, fcntl.LOCK_UN)
            time.sleep(0.0005)

    def locked(self) -> bool:
        """Whether a monitor lives."""
        try:
            fd = os.open(self.path("lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no monitor has it; whether that came about in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if deadline is None:
            with contextlib.suppress(OSError):
                fd = os.open(self.path("lock"), os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH)
                finally:
                    os.close(fd)
            return True
        pause_s = 0.002
        while self.locked():
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(0.05, pause_s * 1.5)
        return True


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Replace a small file, whole or not at all. Raises: ContainerError."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(json.dumps(document, separators=(",", ":")).encode())
            while left:
                left = left[os.write(fd, left) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, FileNotFoundError):
            raise NoSuchContainer(f"no container {path.parent.name[:12]}: it was removed") from e
        raise ContainerError(f"{path}: cannot be written: {e.strerror}") from e


# The directory of all


def containers_dir(root: Path) -> Path:
    return root / "containers"


def check_name(name: str) -> str:
    """Raises: ContainerError for what is no name."""
    if not _NAME.match(name):
        raise ContainerError(f"{name!r} is no name for a container", hint="letters, digits and _ . - are allowed")
    return name


def create(root: Path, id: str, name: str) -> Record:
    """A new container's directory, its name taken. Raises: ContainerError if the name is in use."""
    top = containers_dir(root)
    record = Record(top / id)
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        (top / "names").mkdir(mode=0o700, exist_ok=True)
        record.directory.mkdir(mode=0o700)
        take_name(root, name, id)
    except BaseException as e:
        with contextlib.suppress(OSError):
            record.directory.rmdir()
        if isinstance(e, OSError):
            raise ContainerError(f"{e.filename}: {e.strerror}") from e
        raise
    return record


def take_name(root: Path, name: str, id: str) -> None:
    """Make `name` mean `id`. Raises: ContainerError if it is in use."""
    path = containers_dir(root) / "names" / check_name(name)
    for _ in range(2):
        try:
            os.symlink(id, path)
            return
        except FileExistsError:
            other = os.readlink(path)
            if (containers_dir(root) / other / "settings.json").exists() or not _abandoned(root, other):
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
    raise ContainerError(
        f"the name {name!r} is in use by container {os.readlink(path)[:12]}",
        hint=f"remove that one with `pybuild rm {name}`, or choose another name",
    )


def _abandoned(root: Path, id: str) -> bool:
    """Whether a container that has no settings is not just being made."""
    try:
        return time.time() - os.stat(containers_dir(root) / id).st_mtime > 60
    except OSError as e:
        return e.errno == errno.ENOENT


def drop_name(root: Path, name: str, id: str) -> None:
    """Give a name back, if it still means `id`."""
    path = containers_dir(root) / "names" / name
    with contextlib.suppress(OSError):
        if os.readlink(path) == id:
            os.unlink(path)


def drop_names(root: Path, id: str) -> None:
    """Give back all names of a container whose settings do not tell its own."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(containers_dir(root) / "names"):
            drop_name(root, name, id)


def every(root: Path, *, working: bool = False) -> Iterator[Record]:
    """All containers that run or ran, or all working ones, oldest first; damaged ones and those being made left out."""
    found = []
    for id in ids(root):
        with contextlib.suppress(ContainerError):
            record = Record(containers_dir(root) / id).load()
            if record.working == working:
                found.append(record)
    yield from sorted(found, key=lambda r: int(r.settings.get("created_ns", 0)))


def ids(root: Path) -> list[str]:
    try:
        return [name for name in os.listdir(containers_dir(root)) if name != "names"]
    except FileNotFoundError:
        return []


def find(root: Path, word: str, *, working: bool = False) -> Record:
    """The container that `word` names: a name, an ID, or the beginning of one.

    Raises: NoSuchContainer; ContainerError if the beginning fits several, or if it is a working container,
    which nothing can be started in, unless `working` says that it may be one.
    """
    record = _find(root, word)
    if record.working and not working:
        raise ContainerError(
            f"{word} is a working container: it is built, not started",
            hint="`run`, `copy`, `add`, `config`, `mount` and `commit` work on it",
        )
    return record


def _find(root: Path, word: str) -> Record:
    top = containers_dir(root)
    if _NAME.match(word):
        with contextlib.suppress(OSError):
            return Record(top / os.readlink(top / "names" / word)).load()
        fits = [id for id in ids(root) if id.startswith(word)]
        if len(fits) == 1:
            return Record(top / fits[0]).load()
        if fits:
            raise ContainerError(f"{word!r} is the beginning of {len(fits)} containers' IDs", hint="give more of it")
    raise NoSuchContainer(f"no container {word!r}", hint="`pybuild ps -a` lists what there is")


def is_container(root: Path, word: str) -> bool:
    """Whether `find` would find one by name or by a whole or short (12 digits at least) ID. Cheap."""
    if not _NAME.match(word):
        return False
    top = containers_dir(root)
    if os.path.lexists(top / "names" / word):
        return True
    return len(word) >= 12 and sum(id.startswith(word) for id in ids(root)) == 1


def is_working(root: Path, word: str) -> bool:
    """Whether `word` names a working container, as `is_container` finds it, or a damaged one, which may be one.

    Cheap where it names none.
    """
    if not is_container(root, word):
        return False
    try:
        return _find(root, word).working
    except NoSuchContainer:
        return False
    except ContainerError:
        return True  # who opens it is told what is wrong
