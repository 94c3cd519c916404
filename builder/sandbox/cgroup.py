"""Control groups: a sandbox's limits, its out-of-memory kills and its peak memory, on v1, v2 and hybrids.

The zygote makes a group before the clone and removes it after the end; the sandbox's first process
puts itself in. Group directories are named `pybuild-…` and locked (flock) by their zygote, so that
`sweep` can tell those of a dead one. A limit that the machine cannot apply is an error.

Only `layers.linux`'s stdlib is needed: the zygote imports this. cgroups(7),
https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time

from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PREFIX = "pybuild-"
_MAX_SHARES, _MIN_SHARES = 262144, 2
_DELEGATE = "run under `systemd-run --user --scope -p Delegate=yes`, or as root"
_REMOVE_TRIES = 200
_FREEZE_TRIES = 1000
_PARENT_TRIES = 5
_MARKS = ("trusted.pybuild", "user.pybuild")
"""Attributes, the first that can be set, of groups that were made to hold others."""


class CgroupError(OSError):
    """A limit cannot be applied; `filename` is what was tried, `hint` what may help."""

    def __init__(self, number: int, words: str, path: str | None = None, hint: str | None = None) -> None:
        super().__init__(number, words, path)
        self.hint = hint


class Hierarchy(NamedTuple):
    """One mounted hierarchy: where this process is in it, and what it controls. v2 has version 2."""

    version: int
    controllers: tuple[str, ...]
    mount_point: str
    own: str
    """The directory of this process's own group."""


class Setting(NamedTuple):
    """A value for a file of a controller; a missing file is an error unless `optional`."""

    controller: str
    file: str
    value: str
    optional: bool = False


class Result(NamedTuple):
    """What a group counted."""

    oom_kills: int
    peak_memory_bytes: int | None


class Group:
    """The directories made for one sandbox, one per hierarchy."""

    def __init__(self) -> None:
        self.directories: list[tuple[Hierarchy, str]] = []
        self._locks: list[int] = []
        self._parents: list[str] = []

    def add(self, hierarchy: Hierarchy, path: str) -> None:
        """Make and lock a directory. Raises: OSError."""
        while True:
            os.mkdir(path, 0o755)
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # before it was locked, another's sweep took it for a dead one's
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)  # a sweep holds it for a moment, and removes it
            if os.path.exists(path):
                break
            os.close(lock)
        self.directories.append((hierarchy, path))
        self._locks.append(lock)

    def add_beneath(self, hierarchy: Hierarchy, parent: Parent, name: str) -> None:
        """Make a directory beneath a parent, which is made too, unless it is there. Raises: OSError."""
        for attempt in range(_PARENT_TRIES):
            try:
                self._parents.append(parent.make(hierarchy))
                sweep(self._parents[-1])
                self.add(hierarchy, f"{self._parents[-1]}/{name}")
                return
            except FileNotFoundError:
                # Another sandbox's end has just removed it.
                if attempt == _PARENT_TRIES - 1:
                    raise

    def result(self) -> Result:
        """What was counted so far."""
        kills, peak = 0, None
        for hierarchy, path in self.directories:
            if "memory" in hierarchy.controllers:
                events = "memory.events" if hierarchy.version == 2 else "memory.oom_control"
                kills = _field(f"{path}/{events}", "oom_kill")
                text = _read(f"{path}/{'memory.peak' if hierarchy.version == 2 else 'memory.max_usage_in_bytes'}")
                peak = int(text) if text.isdigit() else None
        return Result(kills, peak)

    def freeze(self, frozen: bool) -> None:
        """Stop or continue every process, and wait until it is so. Raises: CgroupError, OSError."""
        for hierarchy, path in self.directories:
            if "freezer" in hierarchy.controllers:
                state = "FROZEN" if frozen else "THAWED"
                _write(f"{path}/freezer.state", state)
                _await(f"{path}/freezer.state", state)
                return
        for hierarchy, path in self.directories:
            if hierarchy.version == 2:
                _write(f"{path}/cgroup.freeze", str(int(frozen)))
                _await(f"{path}/cgroup.events", f"frozen {int(frozen)}")
                return
        raise CgroupError(errno.ENOENT, "it runs in no control group that can be frozen", hint=_DELEGATE)

    def remove(self) -> None:
        """Remove the directories; the kernel may need a moment after the last process. Never raises OSError."""
        for _hierarchy, path in reversed(self.directories):
            for _ in range(_REMOVE_TRIES):
                try:
                    os.rmdir(path)
                except OSError as e:
                    if e.errno != errno.EBUSY:
                        break
                    time.sleep(0.002)
                else:
                    break
        for lock in self._locks:
            os.close(lock)
        for path in self._parents:
            _remove_marked(path)
        self.directories, self._locks, self._parents = [], [], []


class Parent(NamedTuple):
    """Where `--cgroup-parent` is in a hierarchy: the groups that lead to it, and what has to be switched on in each."""

    top: str
    parts: tuple[str, ...]
    controllers: tuple[str, ...] = ()

    def make(self, hierarchy: Hierarchy) -> str:
        """The parent's directory; what is missing is made, and marked. Raises: OSError."""
        path = self.top
        for part in self.parts:
            self._switch_on(hierarchy, path)
            path = f"{path}/{part}"
            try:
                os.mkdir(path, 0o755)
            except FileExistsError:
                continue
            for name in _MARKS:
                with contextlib.suppress(OSError):
                    os.setxattr(path, name, b"1")
                    break
            if hierarchy.version == 1 and "cpuset" in hierarchy.controllers:
                _inherit_cpuset(path)
        self._switch_on(hierarchy, path)
        return path

    def _switch_on(self, hierarchy: Hierarchy, path: str) -> None:
        if hierarchy.version == 2:
            enabled = _read(f"{path}/cgroup.subtree_control").split()
            absent = [name for name in self.controllers if name not in enabled and name != "freezer"]
            if absent:
                _write(f"{path}/cgroup.subtree_control", " ".join(f"+{name}" for name in absent))

    def nearest(self) -> str:
        """What of it there is."""
        path = self.top
        for part in self.parts:
            if not os.path.isdir(f"{path}/{part}"):
                break
            path = f"{path}/{part}"
        return path


def _parent_in(hierarchy: Hierarchy, text: str, controllers: list[str]) -> Parent:
    """Raises: CgroupError where nothing can be made beneath this process's own groups."""
    top = hierarchy.mount_point if text.startswith("/") else _base(hierarchy, controllers)
    return Parent(top, tuple(part for part in text.split("/") if part), tuple(controllers))


def _remove_marked(path: str) -> None:
    """Remove a directory that `Parent` made, and those above it, as far as they are empty. Never raises OSError."""
    with contextlib.suppress(OSError):
        while any(name in _MARKS for name in os.listxattr(path)):
            os.rmdir(path)
            path = os.path.dirname(path)


def _await(path: str, line: str) -> None:
    for _ in range(_FREEZE_TRIES):
        if line in _read(path).splitlines():
            return
        time.sleep(0.002)
    raise CgroupError(errno.EBUSY, "the processes do not freeze: some wait in the kernel", path)


def create(resources: dict[str, Any], name: str, hierarchies: list[Hierarchy] | None = None) -> Group:
    """Make groups with these limits (`Resources` as a dict, None left out). Raises: CgroupError; nothing is left."""
    found = hierarchies if hierarchies is not None else detect()
    group = Group()
    try:
        settings: dict[str, list[Setting]] = {}
        by_controller: dict[str, Hierarchy] = {}
        resources = dict(resources)
        parent = resources.pop("cgroup_parent", None)
        at_hand = _at_hand(found, parent) if resources.pop("accounting", False) or parent else {}
        if parent and not at_hand:
            raise CgroupError(errno.EACCES, "this user may make no group there", parent, _DELEGATE)
        for controller in sorted({_CONTROLLER_OF[key] for key in resources}):
            hierarchy = by_controller[controller] = _hierarchy(found, controller)
            wanted = {key: value for key, value in resources.items() if _CONTROLLER_OF[key] == controller}
            settings[controller] = plan(hierarchy.version, controller, wanted)
        needed = frozenset(by_controller.values())
        for controller in at_hand.keys() - by_controller.keys():
            by_controller[controller] = at_hand[controller]
            settings[controller] = []
        for hierarchy in dict.fromkeys(by_controller.values()):
            controllers = [name for name, home in by_controller.items() if home == hierarchy]
            try:
                if parent:
                    group.add_beneath(hierarchy, _parent_in(hierarchy, parent, controllers), f"{PREFIX}{name}")
                    continue
                base = _base(hierarchy, controllers)
                sweep(base)
                group.add(hierarchy, f"{base}/{PREFIX}{name}")
            except OSError:
                if hierarchy in needed or parent:
                    raise
        for controller, rows in settings.items():
            path = next((path for place, path in group.directories if place == by_controller[controller]), None)
            if path is None:
                continue
            if controller == "cpuset" and by_controller[controller].version == 1:
                _inherit_cpuset(path)
            for row in rows:
                _apply(path, row)
    except OSError as e:
        group.remove()
        if isinstance(e, CgroupError):
            raise
        raise CgroupError(e.errno or errno.EIO, f"{e.strerror}", e.filename, _hint(e)) from e
    return group


def _at_hand(found: list[Hierarchy], parent: str | None) -> dict[str, Hierarchy]:
    """By controller, where groups for accounting can be made. Of those that cannot none is missed."""
    places: dict[str, Hierarchy] = {}
    for controller in _ACCOUNTED:
        with contextlib.suppress(OSError):
            hierarchy = _hierarchy(found, controller)
            place = _parent_in(hierarchy, parent, [controller]).nearest() if parent else _base(hierarchy, [controller])
            if os.access(place, os.W_OK):
                places[controller] = hierarchy
    return places


def of_process(pid: int) -> list[tuple[Hierarchy, str]]:
    """The groups that were made for a process's sandbox, as seen from here. Raises: OSError if it is gone."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as stream:
        text = stream.read()
    if PREFIX not in text:
        return []
    return [(h, h.own) for h in detect(own=text) if os.path.basename(h.own).startswith(PREFIX)]


def change(pid: int, resources: dict[str, Any]) -> None:
    """Set limits (as for `create`) of the groups of a process that runs. Raises: CgroupError, OSError."""
    places = of_process(pid)
    for controller in sorted({_CONTROLLER_OF[key] for key in resources}):
        names = {*_NAMES.get(controller, (controller,))}
        place = next(((h, path) for h, path in places if names & {*h.controllers}), None)
        if place is None:
            raise CgroupError(
                errno.ENOENT,
                f"it was started in no group of the {controller} controller",
                hint="limits of an ordinary user's containers need a delegated cgroup v2",
            )
        hierarchy, path = place
        wanted = {key: value for key, value in resources.items() if _CONTROLLER_OF[key] == controller}
        rows = plan(hierarchy.version, controller, wanted)
        try:
            for row in rows:
                _apply(path, row)
        except CgroupError:
            # Memory may not exceed memory and swap at any time: what grows is set in the other order.
            for row in reversed(rows):
                _apply(path, row)


def join(directories: list[str]) -> None:
    """Put this process, of one thread, into the groups. Raises: OSError."""
    for path in directories:
        # v1 moves a thread at once. For a process the kernel stops all forks and exits of the machine first: 12 ms.
        _write(f"{path}/tasks" if os.path.exists(f"{path}/tasks") else f"{path}/cgroup.procs", "0")


def sweep(base: str) -> None:
    """Remove the groups that dead zygotes left in a directory. Never raises OSError."""
    with contextlib.suppress(OSError):
        for name in os.listdir(base):
            if not name.startswith(PREFIX):
                continue
            with contextlib.suppress(OSError):
                fd = os.open(f"{base}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rmdir(f"{base}/{name}")
                finally:
                    os.close(fd)


def sweep_all() -> None:
    """`sweep` wherever groups are made. Never raises OSError."""
    for hierarchy in detect():
        with contextlib.suppress(OSError):
            sweep(_base(hierarchy, []))


# ---- what to write ----------------------------------------------------------------------------

_ACCOUNTED = ("cpu", "cpuacct", "cpuset", "freezer", "io", "memory", "pids")
"""What `Resources(accounting=True)` wants groups of, each where it can be had."""
_CONTROLLER_OF = {
    "memory_bytes": "memory",
    "memory_swap_bytes": "memory",
    "cpu_shares": "cpu",
    "cpu_period_us": "cpu",
    "cpu_quota_us": "cpu",
    "cpuset_cpus": "cpuset",
    "cpuset_mems": "cpuset",
    "pids": "pids",
    "io": "io",
    "hugetlb": "hugetlb",
    "freezer": "freezer",
}
_NAMES = {"io": ("io", "blkio")}
"""Controllers that v1 calls otherwise."""
_V1_IO = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}


def plan(version: int, controller: str, resources: dict[str, Any]) -> list[Setting]:
    """The files to write, in order, for one controller's limits. Raises: CgroupError for impossible ones."""
    if controller == "memory":
        return _plan_memory(version, resources.get("memory_bytes"), resources.get("memory_swap_bytes"))
    if controller == "cpu":
        return _plan_cpu(version, resources)
    if controller == "cpuset":
        return [
            Setting("cpuset", f"cpuset.{kind}", resources[f"cpuset_{kind}"])
            for kind in ("cpus", "mems")
            if f"cpuset_{kind}" in resources
        ]
    if controller == "io":
        return _plan_io(version, resources["io"])
    if controller == "hugetlb":
        suffix = "max" if version == 2 else "limit_in_bytes"
        return [Setting("hugetlb", f"hugetlb.{size}.{suffix}", str(limit)) for size, limit in resources["hugetlb"]]
    if controller == "freezer":
        return []
    pids = resources["pids"]
    return [Setting("pids", "pids.max", "max" if pids < 1 else str(pids))]


def _plan_memory(version: int, memory: int | None, both: int | None) -> list[Setting]:
    if both is not None and both >= 0 and (memory is None or both < memory):
        raise CgroupError(errno.EINVAL, "the limit of memory and swap together must not be below that of memory")
    settings = []
    if version == 2:
        if memory is not None:
            settings.append(Setting("memory", "memory.max", str(memory)))
        if both is not None:
            settings.append(Setting("memory", "memory.swap.max", "max" if both < 0 else str(both - (memory or 0))))
        elif memory is not None:
            # As much swap again, where it is counted: Docker's default.
            settings.append(Setting("memory", "memory.swap.max", str(memory), optional=True))
        return settings
    if memory is not None:
        settings.append(Setting("memory", "memory.limit_in_bytes", str(memory)))
    if both is not None:
        settings.append(Setting("memory", "memory.memsw.limit_in_bytes", str(both)))
    elif memory is not None:
        settings.append(Setting("memory", "memory.memsw.limit_in_bytes", str(2 * memory), optional=True))
    return settings


def _plan_cpu(version: int, resources: dict[str, Any]) -> list[Setting]:
    shares, period, quota = (resources.get(f"cpu_{name}") for name in ("shares", "period_us", "quota_us"))
    settings = []
    if version == 2:
        if shares is not None:
            shares = min(max(shares, _MIN_SHARES), _MAX_SHARES)
            weight = 1 + (shares - _MIN_SHARES) * 9999 // (_MAX_SHARES - _MIN_SHARES)
            settings.append(Setting("cpu", "cpu.weight", str(weight)))
        if period is not None or quota is not None:
            bound = "max" if quota is None or quota < 0 else str(quota)
            settings.append(Setting("cpu", "cpu.max", f"{bound} {100_000 if period is None else period}"))
        return settings
    if shares is not None:
        settings.append(Setting("cpu", "cpu.shares", str(shares)))
    if period is not None:
        settings.append(Setting("cpu", "cpu.cfs_period_us", str(period)))
    if quota is not None:
        settings.append(Setting("cpu", "cpu.cfs_quota_us", str(quota)))
    return settings


def _plan_io(version: int, limits: list[tuple[str, str, int]]) -> list[Setting]:
    settings = []
    for what, path, limit in limits:
        try:
            status = os.stat(path)
        except OSError as e:
            raise CgroupError(e.errno or errno.ENOENT, f"{e.strerror}", path) from e
        if not stat.S_ISBLK(status.st_mode):
            raise CgroupError(errno.ENOTBLK, "not a block device", path)
        device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if version == 2:
            settings.append(Setting("io", "io.max", f"{device} {what}={limit}"))
        else:
            settings.append(Setting("io", _V1_IO[what], f"{device} {limit}"))
    return settings


def _apply(directory: str, setting: Setting) -> None:
    path = f"{directory}/{setting.file}"
    try:
        _write(path, setting.value)
    except FileNotFoundError as e:
        if not setting.optional:
            raise CgroupError(
                errno.ENOENT, f"this kernel's {setting.controller} controller has no {setting.file}", path
            ) from e
    except OSError as e:
        if not setting.optional:
            raise CgroupError(
                e.errno or errno.EIO, f"cannot set {setting.file} to {setting.value}: {e.strerror}", path
            ) from e


def _inherit_cpuset(path: str) -> None:
    """A v1 cpuset starts empty and takes no process until both files are set."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        _write(f"{path}/{name}", _read(f"{os.path.dirname(path)}/{name}"))


# ---- where to write ---------------------------------------------------------------------------


def detect(mountinfo: str | None = None, own: str | None = None) -> list[Hierarchy]:
    """The mounted hierarchies, from the texts of /proc/self/mountinfo and /proc/self/cgroup."""
    mountinfo = _read("/proc/self/mountinfo") if mountinfo is None else mountinfo
    own = _read("/proc/self/cgroup") if own is None else own
    places: dict[frozenset[str], str] = {}
    for line in own.splitlines():
        _number, names, path = line.split(":", 2)
        places[frozenset(names.split(",")) - {""}] = path
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not kind or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        root, mount_point = fields[3], fields[4]
        if kind[0] == "cgroup2":
            place = places.get(frozenset(), "/")
            directory = _below(mount_point, root, place)
            controllers = tuple(_read(f"{mount_point}/cgroup.controllers").split())
            found.append(Hierarchy(2, controllers, mount_point, directory))
            continue
        options = set(kind[2].split(","))
        for group, place in places.items():
            if group and group <= options:
                directory = _below(mount_point, root, place)
                found.append(Hierarchy(1, tuple(sorted(group)), mount_point, directory))
    return found


def _below(mount_point: str, root: str, place: str) -> str:
    """Where group `place` is seen, when `root` is what is mounted at the mount point."""
    inside = place.removeprefix(root) if root != "/" and place.startswith(root) else place
    path = os.path.normpath(f"{mount_point}/{inside}")
    # In a cgroup namespace made after the process moved, its place starts with `/..`.
    return path if path.startswith(mount_point) and os.path.isdir(path) else mount_point


def _hierarchy(found: list[Hierarchy], controller: str) -> Hierarchy:
    for hierarchy in sorted(found, key=lambda h: h.version):
        if set(_NAMES.get(controller, (controller,))) & set(hierarchy.controllers):
            return hierarchy
        if controller == "freezer" and hierarchy.version == 2:
            return hierarchy  # no controller there: every group can be frozen
    raise CgroupError(
        errno.ENOENT,
        f"no mounted cgroup hierarchy has the {controller} controller",
        hint="mount it, or leave out the limit",
    )


def writable(hierarchy: Hierarchy) -> bool:
    """Whether a group could be made in this hierarchy."""
    if hierarchy.version == 1:
        return os.access(hierarchy.own, os.W_OK)
    try:
        return bool(_base(hierarchy, []))
    except OSError:
        return False


def undelegated(hierarchy: Hierarchy, controller: str) -> str | None:
    """What would give a group made here a controller that it could not have; None where it could."""
    try:
        if hierarchy.version == 2:
            _require(_base(hierarchy, []), [controller])
    except CgroupError as e:
        return e.hint
    return None


def _base(hierarchy: Hierarchy, controllers: list[str]) -> str:
    """Where a group can be made: in v2, the nearest ancestor without processes that we may write to."""
    if hierarchy.version == 1:
        return hierarchy.own
    path = hierarchy.own
    while path.startswith(hierarchy.mount_point):
        is_root = path == hierarchy.mount_point and not os.path.exists(f"{path}/cgroup.type")
        empty = is_root or not _read(f"{path}/cgroup.procs")
        if empty and os.access(f"{path}/cgroup.procs", os.W_OK) and os.access(path, os.W_OK):
            enabled = _read(f"{path}/cgroup.subtree_control").split()
            absent = [name for name in controllers if name not in enabled and name != "freezer"]
            if absent:
                _require(path, absent)
                _write(f"{path}/cgroup.subtree_control", " ".join(f"+{name}" for name in absent))
            return path
        path = os.path.dirname(path)
    raise CgroupError(
        errno.EACCES,
        "no cgroup is delegated to this user, or all that are hold processes",
        hierarchy.own,
        hint=_DELEGATE,
    )


def _require(path: str, controllers: list[str]) -> None:
    """Raises: CgroupError where a group was not given a controller: systemd gives users but some of them."""
    given = _read(f"{path}/cgroup.controllers").split()
    missing = [name for name in controllers if name not in given]
    if missing:
        grant = "systemctl edit user@.service, with Delegate=cpu cpuset io memory pids in [Service], then log in again"
        # Of others than these systemd knows nothing.
        mends = "/user@" in path and set(missing) <= {"cpu", "cpuset", "io", "memory", "pids"}
        hint = f"as root: {grant}" if mends else _DELEGATE
        raise CgroupError(errno.ENOENT, f"the controllers delegated here lack {' and '.join(missing)}", path, hint)


def _hint(error: OSError) -> str | None:
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "limits need a cgroup that this user may write to: run as root, or with a delegated cgroup v2"
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _write(path: str, value: str) -> None:
    # One unbuffered write: the kernel takes each write as a whole command.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as e:
        e.filename = path
        raise
    finally:
        os.close(fd)


def _field(path: str, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
