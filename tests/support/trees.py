"""Recording a file tree as a comparable value: from the outside, and from inside a sandbox.

`record` walks a directory on the host. `WITNESS` is the same in perl, which Debian's minimal base
has, so that a RUN can say what it sees; `parse_witness` reads its output into the same form.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SKIPPED = frozenset(
    (b"proc", b"sys", b"dev", b"run/.containerenv", b"etc/hosts", b"etc/resolv.conf", b"etc/hostname", b"witness")
)
"""Never compared: mount points of the sandbox, and the witness itself."""


class Entry(NamedTuple):
    """What a name stands for. `checksum` is the sum of the content's bytes; `mtime_s` 0 for directories."""

    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    checksum: int
    target: bytes
    rdev: int
    mtime_s: int
    first_name: bytes
    """The first name of a hardlink group, in byte order."""
    xattrs: tuple[tuple[bytes, bytes], ...]


KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def record(root: Path, *, skip: Iterable[bytes] = ()) -> dict[bytes, Entry]:
    """Every name under `root`, relative to it, with what it stands for."""
    skipped = SKIPPED | set(skip)
    top = os.fsencode(root)
    found: dict[bytes, Entry] = {}
    groups: dict[tuple[int, int], bytes] = {}
    for folder, folders, files in os.walk(top):
        prefix = os.path.relpath(folder, top)
        kept = []
        for name in sorted(folders + files):
            relative = name if prefix == b"." else prefix + b"/" + name
            if relative in skipped:
                continue
            if name in folders:
                kept.append(name)
            info = os.lstat(folder + b"/" + name)
            found[relative] = _entry(folder + b"/" + name, relative, info, groups)
        folders[:] = kept
    return {name: _named(entry, name, groups, top) for name, entry in found.items()}


def _entry(path: bytes, relative: bytes, info: os.stat_result, groups: dict[tuple[int, int], bytes]) -> Entry:
    kind = KINDS[stat.S_IFMT(info.st_mode)]
    key = (info.st_dev, info.st_ino)
    if kind != "dir":
        groups[key] = min(groups.get(key, relative), relative)
    checksum = 0
    if kind == "file":
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                checksum = (checksum + sum(chunk)) & 0xFFFFFFFF
    names = [os.fsencode(n) for n in os.listxattr(path, follow_symlinks=False)]
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
        size_bytes=info.st_size if kind == "file" else 0,
        checksum=checksum,
        target=os.readlink(path) if kind == "link" else b"",
        rdev=info.st_rdev if kind in {"char", "block"} else 0,
        mtime_s=0 if kind == "dir" else int(info.st_mtime_ns // 1_000_000_000),
        first_name=relative,
        xattrs=tuple((n, os.getxattr(path, n, follow_symlinks=False)) for n in sorted(names) if _kept(n)),
    )


def _kept(xattr: bytes) -> bool:
    user = xattr.startswith(b"user.") and not xattr.startswith(b"user.overlay.")
    return user or xattr == b"security.capability"


def _named(entry: Entry, name: bytes, groups: dict[tuple[int, int], bytes], top: bytes) -> Entry:
    if entry.kind == "dir":
        return entry
    info = os.lstat(top + b"/" + name)
    return entry._replace(first_name=groups[info.st_dev, info.st_ino])


WITNESS = r"""
use strict;
my ($llist, $lget) = (`uname -m` =~ /x86_64/) ? (195, 192) : (12, 9);
my %skip = map { $_ => 1 } qw(SKIPPED);
my (%first, @rows);
sub xattrs {
    my ($path) = @_;
    my $names = "\0" x 4096;
    my $n = syscall($llist, $path, $names, 4096);
    return "" if $n <= 0;
    my @out;
    for my $name (sort split /\0/, substr($names, 0, $n)) {
        next unless ($name =~ /^user\./ && $name !~ /^user\.overlay\./) || $name eq "security.capability";
        my $value = "\0" x 4096;
        my $m = syscall($lget, $path, $name, $value, 4096);
        push @out, unpack("H*", $name) . "=" . unpack("H*", substr($value, 0, $m)) if $m >= 0;
    }
    return join ",", @out;
}
sub walk {
    my ($prefix) = @_;
    opendir(my $dir, "/$prefix") or die "opendir /$prefix: $!";
    my @names = sort grep { $_ ne "." && $_ ne ".." } readdir $dir;
    closedir $dir;
    for my $name (@names) {
        my $path = $prefix eq "" ? $name : "$prefix/$name";
        next if $skip{$path};
        my ($dev, $ino, $mode, undef, $uid, $gid, $rdev, $size, undef, $mtime) = lstat "/$path"
            or die "lstat /$path: $!";
        my $kind = $mode & 0170000;
        my ($sum, $target) = (0, "");
        if ($kind == 0100000) {
            open(my $file, "<:raw", "/$path") or die "open /$path: $!";
            while (read $file, my $chunk, 1 << 20) { $sum = ($sum + unpack "%32C*", $chunk) % 2**32 }
            close $file;
        }
        $target = readlink "/$path" if $kind == 0120000;
        my $key = "$dev:$ino";
        if ($kind != 0040000) { $first{$key} = $path if !defined $first{$key} || $path lt $first{$key} }
        push @rows, [$path, $kind, $mode & 07777, $uid, $gid, $kind == 0100000 ? $size : 0, $sum, $target,
            ($kind == 0020000 || $kind == 0060000) ? $rdev : 0, $kind == 0040000 ? 0 : $mtime, $key, xattrs("/$path")];
        walk($path) if $kind == 0040000;
    }
}
walk("");
open(my $out, ">:raw", "/witness") or die;
for my $row (@rows) {
    my @r = @$row;
    my $first = $r[1] == 0040000 ? $r[0] : $first{$r[10]};
    my ($name, $target, $group) = map { unpack "H*", $_ } $r[0], $r[7], $first;
    print $out join("\t", $name, @r[1 .. 6], $target, @r[8, 9], $group, $r[11]), "\n";
}
close $out;
""".replace("SKIPPED", " ".join(sorted(name.decode() for name in SKIPPED)))


def parse_witness(text: str) -> dict[bytes, Entry]:
    """What the witness wrote into /witness."""
    found = {}
    for line in text.splitlines():
        name, kind, mode, uid, gid, size, checksum, target, rdev, mtime, first, xattrs = line.split("\t")
        pairs = [pair.split("=") for pair in xattrs.split(",") if pair]
        found[bytes.fromhex(name)] = Entry(
            kind=KINDS[int(kind)],
            mode=int(mode),
            uid=int(uid),
            gid=int(gid),
            size_bytes=int(size),
            checksum=int(checksum),
            target=bytes.fromhex(target),
            rdev=int(rdev),
            mtime_s=int(mtime),
            first_name=bytes.fromhex(first),
            xattrs=tuple((bytes.fromhex(n), bytes.fromhex(v)) for n, v in pairs),
        )
    return found


def differences(want: dict[bytes, Entry], got: dict[bytes, Entry], *, limit: int = 20) -> list[str]:
    """Where two trees differ, in words."""
    out = []
    for name in sorted(want.keys() | got.keys()):
        if name not in got:
            out.append(f"{name!r}: missing")
        elif name not in want:
            out.append(f"{name!r}: not wanted")
        elif want[name] != got[name]:
            fields = [
                f"{field} {a!r} became {b!r}"
                for field, a, b in zip(Entry._fields, want[name], got[name], strict=True)
                if a != b
            ]
            out.append(f"{name!r}: {', '.join(fields)}")
    return out[:limit]
