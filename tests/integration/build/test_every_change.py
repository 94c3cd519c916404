"""A tree with every kind of change a layer can hold: what umoci unpacks is what the sandbox saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.oracles import pushed_to_bundle
from tests.support.registries import RegistryServer
from tests.support.trees import WITNESS, differences, parse_witness, record

CREATE = r"""
use strict; use POSIX qw(mkfifo);
mkdir "/t"; chdir "/t" or die;
sub put { my ($name, $text) = @_; open(my $f, ">:raw", $name) or die "$name: $!"; print $f $text; close $f }
for my $dir (qw(keep opaque emptied dir-to-file dir-to-link mode-only owner-only moved-from deep)) { mkdir $dir or die }
put("keep/$_", "kept $_\n") for 1 .. 5;
put("opaque/old$_", "old\n") for 1 .. 3; mkdir "opaque/sub"; put("opaque/sub/x", "x");
put("emptied/$_", "gone") for 1 .. 3;
put("dir-to-file/inside", "inside"); put("dir-to-link/inside", "inside");
put("file-to-dir", "file"); put("file-to-link", "file"); symlink("keep/1", "link-to-file");
put("removed", "removed"); put("truncated", "long text" x 1000); put("appended", "one\n");
put("mode-file", "m"); put("owner-file", "o"); put("time-file", "t"); put("lower-hard", "hard");
link("keep/2", "hard-in-one-layer") or die;
put("moved-from/file", "moved");
symlink("/nowhere/at/all", "dangling"); symlink("keep", "link-to-dir");
mkfifo("fifo", 0640) or die; chmod 0640, "fifo";
put("deep/" . ("n" x 255), "long name");
my $path = "deep"; for my $n (1 .. 20) { $path .= "/" . ("d$n" x 12); mkdir $path or die "$path: $!" }
put("$path/leaf", "leaf");
"""

CHANGE = r"""
use strict;
chdir "/t" or die;
sub put { my ($name, $text) = @_; open(my $f, ">:raw", $name) or die "$name: $!"; print $f $text; close $f }
sub rm { system("rm", "-rf", "--", @_) == 0 or die }
rm("opaque"); mkdir "opaque"; put("opaque/new", "new"); put("opaque/old2", "again");
unlink "emptied/$_" for 1 .. 3;
rm("dir-to-file"); put("dir-to-file", "now a file");
rm("dir-to-link"); symlink("keep", "dir-to-link");
unlink "file-to-dir"; mkdir "file-to-dir"; put("file-to-dir/inside", "inside");
unlink "file-to-link"; symlink("keep/3", "file-to-link");
unlink "link-to-file"; put("link-to-file", "now a file");
unlink "removed"; put("truncated", ""); open(my $a, ">>", "appended"); print $a "two\n"; close $a;
chmod 0700, "mode-only"; chmod 0751, "mode-file"; chown 33, 34, "owner-only"; chown 1234, 5678, "owner-file";
utime 1000000000, 1000000000, "time-file";
link("lower-hard", "keep/hard-to-lower") or die; link("lower-hard", "another") or die;
put("setuid", "s"); chmod 04755, "setuid"; put("setgid", "s"); chmod 02755, "setgid";
mkdir "sticky"; chmod 01777, "sticky";
rename("moved-from", "moved-to") or system("mv", "moved-from", "moved-to") == 0 or die;
put("bytes-\xff\xfe-\x01\n-end", "odd name"); mkdir "caf\xe9"; put("caf\xe9/\xc3\xa9", "utf-8 within latin-1");
put("white space\tand\\backslash", "w"); put("-dash", "d"); put(".wh-almost", "not a whiteout");
put("sparse", ""); truncate "sparse", 10_000_000;
put("xattrs", "x");
my $set = (`uname -m` =~ /x86_64/) ? 188 : 5;
sub setxattr {
    my ($file, $name, $value) = @_;
    syscall($set, $file, $name, $value, length $value, 0) == 0 or die "setxattr $file $name: $!";
}
setxattr("xattrs", "user.test", "value\0with nul");
setxattr("xattrs", "user.long", "v" x 1000);
put("capable", "c"); chmod 0755, "capable";
setxattr("capable", "security.capability", pack("V5", 0x02000001, 1 << 10, 0, 0, 0));
if ($ENV{DEVICES}) {
    system("mknod", "null", "c", "1", "3") == 0 or die; chmod 0620, "null";
    system("mknod", "loop", "b", "7", "200") == 0 or die;
}
"""


@pytest.mark.slow
def test_what_umoci_unpacks_is_what_the_sandbox_saw(
    pybuild_each: Pybuild, debian_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    pybuild = pybuild_each
    devices = "" if pybuild.account else "1"  # a user namespace cannot make devices
    context = write_context(
        context_dir(pybuild, tmp_path) / "c",
        f"""
FROM {debian_base}
COPY create.pl change.pl witness.pl /
RUN perl /create.pl
RUN DEVICES={devices} perl /change.pl
RUN perl /witness.pl
""",
        {"create.pl": CREATE, "change.pl": CHANGE, "witness.pl": WITNESS},
    )
    pybuild.build(context, "-t", "every:1")
    who = "rootless" if pybuild.account else "root"
    target = f"{registry.host}/every-change/{who}:1"
    pybuild.run("push", "every:1", target)
    rootfs = pushed_to_bundle(target, tmp_path) / "rootfs"
    saw = parse_witness((rootfs / "witness").read_text())
    assert len([name for name in saw if name.startswith(b"t/")]) > 60
    assert saw[b"t/capable"].xattrs
    assert not differences(saw, record(rootfs))
    # pybuild's own unpacking is the exact inverse, too.
    if pybuild.account is None:
        ours = pybuild.unpack("every:1", tmp_path / "ours")
        assert not differences(saw, record(ours))


@pytest.mark.slow
def test_zstd_layers_hold_the_same(
    pybuild: Pybuild, busybox_base: str, registry: RegistryServer, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN seq 100000 > /numbers && ln /numbers /again\n")
    for compression in ("gzip", "zstd"):
        pybuild.build(context, "-t", f"{compression}:1", "--compression", compression, "--no-cache")
        pybuild.run("push", f"{compression}:1", f"{registry.host}/compression/{compression}:1")
    manifest = registry.manifest("compression/zstd", "1")
    assert manifest["layers"][-1]["mediaType"] == "application/vnd.oci.image.layer.v1.tar+zstd"
    assert registry.blob("compression/zstd", manifest["layers"][-1]["digest"])[:4] == b"\x28\xb5\x2f\xfd"
    trees = [record(pybuild.unpack(f"{kind}:1", tmp_path / kind)) for kind in ("gzip", "zstd")]
    contents = [{name: entry._replace(mtime_s=0) for name, entry in tree.items()} for tree in trees]
    assert not differences(contents[0], contents[1])
