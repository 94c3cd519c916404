"""The digest of what a COPY would take, the part of its cache key that its sources decide.

It covers names, types, modes, owners (as the copy will set them), contents, link targets, device
numbers, extended attributes and hard links; never times. Only what the copy would touch is looked
at. Contents are read once: `StatsCache` remembers digests by a file's identity and times, so that
a rebuild reads nothing that has not changed. Files with extended attributes are not remembered,
which is how a hit can stand for "and has none".

What is hashed is a line for each entry: a letter for its kind, its name and, if it has one, its
target, each ended by a NUL, which neither can hold; then mode, owner, digest and attributes. The lines
are kept with the digest: `--explain` reads from them what the copy takes.
"""

from __future__ import annotations

import os
import stat as stat_
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from builder.errors import ContextError
from builder.solve import rootpath
from builder.solve.copyoptions import CopyOptions, chmod_function, resolve_in, selection
from builder.solve.filedata import foreign
from builder.solve.sourcetree import Directory, SourceTree, never_cancelled
from layers.errors import Cancelled
from layers.ownership import CAPABILITY
from layers.records import FileStat
from layers.sha import sha256
from layers.values import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib

_BATCH = 2000  # lines whose digests are asked for at a time: bounds memory
_CHUNK = 1024 * 1024
_KEPT_FILES = 200_000  # of more, nobody is told one by one: bounds memory
_RUN_FILES = 16
_RUN_BYTES = 4 * 1024 * 1024
_ENCODING = sys.getfilesystemencoding()
_LETTERS = {stat_.S_IFLNK: b"l", stat_.S_IFIFO: b"p", stat_.S_IFSOCK: b"s", stat_.S_IFBLK: b"b", stat_.S_IFCHR: b"c"}
_KINDS = {
    b"f": "file", b"d": "directory", b"l": "symlink", b"p": "fifo", b"s": "socket", b"b": "block", b"c": "character",
}  # fmt: skip
_OWNER = rb"([0-7]+) ([0-9]+) ([0-9]+)"
_ATTRIBUTES = rb"(?: [^\0]+\0[0-9a-f]{64})*"
_LINE = (
    rb"(?:S\n|T[^\0]*\0\n|(?:(d)([^\0]*)\0|(f)([^\0]*)\0|([lpsbc])([^\0]*)\0([^\0]*)\0)"
    + _OWNER
    + rb"(?: =[^\0]*\0)?(?: ([0-9a-f]{64}))?"
    + _ATTRIBUTES
    + rb"\n)"
)
_THREADED_BYTES = 8 * 1024 * 1024  # below this, starting threads costs more than it brings


class StatsCache(Protocol):
    """Digests (sha256, 32 bytes) of files that have not changed since; `layers.records` has one."""

    def get_many(self, stats: Sequence[FileStat]) -> list[bytes | None]: ...

    def put_many(self, items: Iterable[tuple[FileStat, bytes]], *, observed_ns: int) -> None: ...


class ContentEntry(NamedTuple):
    """One line of `--explain`. `value` is a file's digest, a symlink's target or a device's number."""

    path: str
    kind: str
    mode: int
    uid: int
    gid: int
    value: str


class ContentKey(NamedTuple):
    """`digest` is hexadecimal sha256; `read_bytes` counts what was hashed of the `size_bytes` of all `files`.

    `lines` are what was digested, in parts; None of very many files.
    """

    digest: str
    files: int
    read_bytes: int
    size_bytes: int
    lines: tuple[bytes, ...] | None

    def entries(self) -> Iterator[ContentEntry] | None:
        """What is taken, one by one; None of very many files."""
        return None if self.lines is None else _entries(self.lines)


def content_key(
    source_fd: int,
    sources: Iterable[str],
    options: CopyOptions,
    *,
    stats_cache: StatsCache | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> ContentKey:
    """The digest of what `fileops.copy` would take of `sources` with `options`.

    Thread-safe if `stats_cache` is. Raises: ContextError, as the copy would, for what is not there.
    """
    tree = SourceTree(source_fd, options.ignore, context=options.reset_owner)
    key = _Hasher(tree, options, stats_cache, cancelled=cancelled)
    for source in sources:
        key.start_source()
        for path in resolve_in(tree, source, options):
            key.add_source(path)
    return key.finish()


def _entries(lines: Iterable[bytes]) -> Iterator[ContentEntry]:
    import re

    line = re.compile(_LINE)
    for part in lines:
        at = 0
        while at < len(part):
            match = line.match(part, at)
            assert match is not None  # as `_Hasher` wrote it
            at = match.end()
            folder, folder_path, file, file_path, other, path, value, mode, uid, gid, digest = match.groups()
            kind = folder or file or other
            if kind is not None:
                name = next(p for p in (folder_path, file_path, path) if p is not None)
                shown = os.fsdecode(value or digest or b"")
                yield ContentEntry(os.fsdecode(name), _KINDS[kind], int(mode, 8), int(uid), int(gid), shown)


# A line of the digest, which for a file still lacks its digest: the line, what the cache is asked for
# (None: the line is whole), the directory, the name. A plain tuple, because there is one for each of a
# hundred thousand files.
_Pending = tuple[bytes, "FileStat | None", str, str]


class _Hasher:
    """Feeds the digest in walking order, a batch of files at a time."""

    def __init__(
        self,
        tree: SourceTree,
        options: CopyOptions,
        cache: StatsCache | None,
        *,
        cancelled: Callable[[], bool],
    ) -> None:
        self.tree = tree
        self.options = options
        self.cache = cache
        self.cancelled = cancelled
        self.digest: hashlib._Hash | None = None
        self.lines: list[bytes] | None = []
        self.pending: list[_Pending] = []
        self.links: dict[tuple[int, int], str] = {}
        self.files = 0
        self.read_bytes = 0
        self.size_bytes = 0
        self.owner = options.owner or ((0, 0) if options.reset_owner else None)
        self.chmod = chmod_function(options.mode)
        self.selection = selection(options)

    def start_source(self) -> None:
        self._line(b"S\n")

    def finish(self) -> ContentKey:
        self._flush()
        assert self.digest is not None
        lines = None if self.lines is None else tuple(self.lines)
        return ContentKey(self.digest.hexdigest(), self.files, self.read_bytes, self.size_bytes, lines)

    def add_source(self, path: str) -> None:
        """Add all that the copy of one resolved source path takes."""
        followed = rootpath.resolve(self.tree.root_fd, path, follow_last=self.options.follow_symlinks)
        status = self.tree.lstat(followed)
        if status is None:
            raise rootpath.not_found(path)
        self.links.clear()
        try:
            self._line(b"T%s\0\n" % os.fsencode(os.path.basename(path)))
            if stat_.S_ISDIR(status.st_mode):
                self._add_tree(followed)
            else:
                directory, name = os.path.split(followed)
                fd = rootpath.open_directory(self.tree.root_fd, directory)
                try:
                    self._add(fd, directory, name, "", status)
                finally:
                    os.close(fd)
        except OSError as e:
            raise ContextError(f"cannot read {rootpath.shown(followed)}: {e.strerror}") from e

    def _add_tree(self, top: str) -> None:
        shown: list[Directory] = []  # the directories open now whose own line was written
        walk = self.tree.walk(top, self.selection, cancelled=self.cancelled)
        try:
            for directory, leaving in walk:
                if leaving:
                    if shown and shown[-1] is directory:
                        shown.pop()
                    continue
                if directory.included or directory.entries:
                    self._add_directories(directory, shown)
                if not directory.entries:
                    continue
                place = f"{top}/{directory.path}" if top and directory.path else top or directory.path
                prefix = f"{directory.path}/" if directory.path else ""
                self._add_files(directory, place, prefix)
        finally:
            walk.close()

    def _add_directories(self, directory: Directory, shown: list[Directory]) -> None:
        """Add a directory, and those above it that so far had nothing selected in them."""
        chain: list[Directory] = []
        here: Directory | None = directory
        while here is not None and here not in shown[len(shown) - 1 :]:
            chain.append(here)
            here = here.parent
        for item in reversed(chain):
            shown.append(item)
            if item.parent is None and self.options.copy_dir_contents:
                continue  # its contents are copied, itself is not
            uid, gid = self.owner or (item.stat.st_uid, item.stat.st_gid)
            mode = item.stat.st_mode
            mode = self.chmod(mode, True) if self.chmod else stat_.S_IMODE(mode)
            attributes = _attributes(item.fd)
            self._line(b"d%s\0%o %d %d%s\n" % (os.fsencode(item.path), mode, uid, gid, attributes))

    def _add_files(self, directory: Directory, place: str, prefix: str) -> None:
        """Add the entries of a directory. What most of them are, plain files, is dealt with right here."""
        head = b"f" + os.fsencode(prefix)
        owner, chmod, pending = self.owner, self.chmod, self.pending
        for name, status in directory.entries:
            mode = status.st_mode
            if mode & 0o170000 != stat_.S_IFREG or status.st_nlink != 1:
                self._add(directory.fd, place, name, prefix, status)
                continue
            uid, gid = owner or (status.st_uid, status.st_gid)
            bits = chmod(mode, False) if chmod else mode & 0o7777
            line = b"%s%s\0%o %d %d" % (head, name.encode(_ENCODING, "surrogateescape"), bits, uid, gid)
            pending.append((line, file_stat(status), place, name))
            self.files += 1
            if len(pending) >= _BATCH:
                self._flush()

    def _line(self, line: bytes) -> None:
        self.pending.append((line, None, "", ""))
        if len(self.pending) >= _BATCH:
            self._flush()

    def _add(self, fd: int, directory: str, name: str, prefix: str, status: os.stat_result) -> None:
        """Add a non-directory, `name` in the open directory `fd`, which is at canonical path `directory`."""
        mode = status.st_mode
        bits = self.chmod(mode, False) if self.chmod else mode & 0o7777
        uid, gid = self.owner or (status.st_uid, status.st_gid)
        path = prefix + name
        if stat_.S_ISREG(mode):
            self.files += 1
            first = b""
            if status.st_nlink > 1:
                identity = (status.st_dev, status.st_ino)
                known = self.links.setdefault(identity, path)
                if known is not path:
                    first = b" =%s\0" % os.fsencode(known)
            key = file_stat(status)
            line = b"f%s\0%o %d %d%s" % (os.fsencode(path), bits, uid, gid, first)
            self.pending.append((line, key, directory, name))
            if len(self.pending) >= _BATCH:
                self._flush()
            return
        attributes = _attributes(f"/proc/self/fd/{fd}/{name}")
        if stat_.S_ISLNK(mode):
            bits, value = 0o777, os.readlink(name, dir_fd=fd)
        else:
            value = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        names = b"%s\0%s\0" % (os.fsencode(path), os.fsencode(value))
        letter = _LETTERS.get(stat_.S_IFMT(mode), b"c")
        self._line(b"%s%s%o %d %d%s\n" % (letter, names, bits, uid, gid, attributes))

    def _flush(self) -> None:
        """Look up or read the digests of the batch, and feed all of its lines."""
        wanted = [item for item in self.pending if item[1] is not None]
        self.size_bytes += sum([item[1].size_bytes for item in wanted if item[1] is not None])
        values: list[bytes | None] = [None] * len(wanted)
        if wanted and self.cache is not None:
            values = self.cache.get_many([item[1] for item in wanted if item[1] is not None])
        missing = [index for index, value in enumerate(values) if value is None]
        attributes: dict[int, bytes] = {}
        if missing:
            if self.cancelled():
                raise Cancelled
            self._read(wanted, values, missing, attributes)
        lines: list[bytes] = []
        index = -1
        for line, key, _, _ in self.pending:
            if key is None:
                lines.append(line)
            else:
                index += 1
                value = values[index] or b""
                lines.append(b"%s %s%s\n" % (line, value.hex().encode(), attributes.get(index, b"")))
        if self.digest is None:
            self.digest = _hasher_for(len(lines))
        text = b"".join(lines)
        self.digest.update(text)
        if self.files > _KEPT_FILES:
            self.lines = None
        elif self.lines is not None:
            self.lines.append(text)
        self.pending.clear()

    def _read(
        self, wanted: list[_Pending], values: list[bytes | None], missing: list[int], attributes: dict[int, bytes]
    ) -> None:
        """Hash the files that no one knows, into `values` and `attributes`, and remember them."""
        observed_ns = time.time_ns()
        fresh: list[tuple[FileStat, bytes]] = []
        hashed = _hash_files(self.tree.root_fd, [wanted[index] for index in missing])
        for index, (value, extended, size, final) in zip(missing, hashed, strict=True):
            self.read_bytes += size
            values[index] = value
            if extended:
                attributes[index] = extended
            elif final == wanted[index][1]:  # else it was changed while it was read
                fresh.append((final, value))
        if fresh and self.cache is not None:
            self.cache.put_many(fresh, observed_ns=observed_ns)


def _hasher_for(lines: int) -> hashlib._Hash:
    """OpenSSL's is worth its loading from some thousand lines on."""
    if lines < _BATCH:
        return sha256()
    import hashlib

    return hashlib.sha256()


def file_stat(status: os.stat_result) -> FileStat:
    """What identifies the regular file of `status` for as long as it does not change."""
    return FileStat(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _attributes(target: int | str) -> bytes:
    """The extended attributes of an open file, or of a special one at a path: "" or " name=digest ...", sorted."""
    try:
        if isinstance(target, int):
            names = os.listxattr(target)
        else:
            names = os.listxattr(target, follow_symlinks=False)
    except OSError:
        return b""
    found: list[bytes] = []
    for name in sorted(names):
        if foreign(name) or (name == CAPABILITY and not isinstance(target, int)):
            continue
        try:
            value = (
                os.getxattr(target, name)
                if isinstance(target, int)
                else os.getxattr(target, name, follow_symlinks=False)
            )
        except OSError:
            continue
        found.append(b" %s\0%s" % (os.fsencode(name), sha256(value).hexdigest().encode()))
    return b"".join(found)


_Hashed = tuple[bytes, bytes, int, FileStat]


def _hash_files(root_fd: int, items: list[_Pending]) -> list[_Hashed]:
    """For each file its digest, its attributes, the bytes read, and its stat as it is after the reading."""
    size = sum(item[1].size_bytes for item in items if item[1] is not None)
    if size < _THREADED_BYTES or len(items) < 2:
        return _hash_run(root_fd, items)
    from builder.solve.crew import Crew

    # Files go out in runs of neighbours: the longer a run, the fewer directories are opened twice.
    results: dict[int, list[_Hashed]] = {}
    with Crew(eager=0) as crew:
        start = run_bytes = 0
        for at, item in enumerate(items, 1):
            run_bytes += item[1].size_bytes if item[1] is not None else 0
            if at - start == _RUN_FILES or run_bytes >= _RUN_BYTES or at == len(items):
                crew.submit(_HashRun(root_fd, items[start:at], results, start))
                start, run_bytes = at, 0
    return [hashed for start in sorted(results) for hashed in results[start]]


class _HashRun:
    """Some of the files to hash, as a task."""

    def __init__(self, root_fd: int, items: list[_Pending], results: dict[int, list[_Hashed]], start: int) -> None:
        self._root_fd = root_fd
        self._items = items
        self._results = results
        self._start = start

    def run(self) -> None:
        self._results[self._start] = _hash_run(self._root_fd, self._items)

    def drop(self) -> None:
        """Nothing is held."""


def _hash_run(root_fd: int, items: list[_Pending]) -> list[_Hashed]:
    found: list[_Hashed] = []
    directory: str | None = None
    fd = -1
    try:
        for _, _, place, name in items:
            if place != directory:
                if fd >= 0:
                    os.close(fd)
                    fd = -1
                fd = rootpath.open_directory(root_fd, place)
                directory = place
            try:
                found.append(_hash_file(fd, name))
            except OSError as e:
                raise ContextError(f"cannot read {rootpath.shown(f'{place}/{name}')}: {e.strerror}") from e
    finally:
        if fd >= 0:
            os.close(fd)
    return found


def _hash_file(directory_fd: int, name: str) -> _Hashed:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
    try:
        import hashlib

        digest = hashlib.sha256()
        size = 0
        while True:
            data = os.read(fd, _CHUNK if size else 65536)
            if not data:
                break
            size += len(data)
            digest.update(data)
        return digest.digest(), _attributes(fd), size, file_stat(os.fstat(fd))
    finally:
        os.close(fd)
