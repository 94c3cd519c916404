"""The same questions asked under runc with Docker's defaults and in our sandbox: what holds there holds here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from difflib import ndiff
from pathlib import Path

import pytest

from builder.sandbox import oci
from builder.sandbox.spec import DEFAULT_CAPABILITIES, MASKED_PATHS, READONLY_PATHS, SandboxSpec
from layers.snapshot import Mount
from tests.integration.sandbox.boxes import RootBox, UserBox
from tests.support.machine import need_tool

QUESTIONS = f"""
for n in CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs; do grep "^$n" /proc/self/status; done
for p in {" ".join(MASKED_PATHS)}; do
  if test -d $p; then echo "$p: $(ls $p | wc -l) entries"
  elif test -e $p; then echo "$p: $(head -c 16 $p | wc -c) bytes"; fi
done
for p in {" ".join(READONLY_PATHS)} /sys; do
  grep " $p " /proc/self/mountinfo | cut -d' ' -f6 | tail -n 1 | grep -o '^r[ow]' | head -n 1 | sed "s#^#$p: #"
done
for d in proc sys dev dev/pts dev/shm dev/mqueue; do
  grep " /$d " /proc/self/mountinfo | tail -n 1 | sed 's/.* - \\([a-z]*\\) .*/\\1/' | sed "s#^#$d is #"
done
for n in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$n; done
for n in fd stdin stdout stderr; do echo "$n -> $(readlink /dev/$n)"; done
for f in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/power/state /proc/irq/default_smp_affinity; do
  (echo x > $f) 2>/dev/null && echo "$f written" || echo "$f refused"
done
grep -E '^(Seccomp|Seccomp_filters|SigBlk):' /proc/self/status; umask; cat /proc/self/oom_score_adj
grep -E '^(Max open files|Max core file size|Max processes)' /proc/self/limits
for n in mnt uts pid ipc net user cgroup; do echo "$n $(readlink /proc/self/ns/$n)"; done
echo "init $(readlink /proc/1/exe)"; hostname; env | sort
find /sys/fs/cgroup -name cgroup.procs 2>/dev/null |
  while read f; do (echo 0 > $f) 2>/dev/null && echo "$f written"; done
grep -l . /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe 2>/dev/null
for f in kernel/core_pattern kernel/modprobe vm/overcommit_memory net/ipv4/ip_forward; do
  (echo x > /proc/sys/$f) 2>/dev/null && echo "$f written" || echo "$f refused"
done
cat /proc/keys 2>/dev/null | wc -l | sed 's/^0$/none/'
unshare -U true 2>/dev/null && echo "user namespace" || echo "no user namespace"
unshare -m true 2>/dev/null && echo "mount namespace" || echo "no mount namespace"
nsenter -t 1 -m true 2>/dev/null && echo entered || echo "no entering"
chroot / true && echo chroot; swapon /dev/null 2>/dev/null && echo swapped
insmod /bin/busybox 2>/dev/null && echo module || echo "no module"; dmesg 2>/dev/null | wc -l | sed 's/^[1-9].*/some/'
losetup -f 2>/dev/null
for f in /dev/mem /dev/kmsg /dev/sda /dev/vda /dev/fuse; do test -e $f && echo "$f is there"; done
ip link add dummy0 type dummy 2>/dev/null && echo "link made" || echo "no link"
ping -c 1 -w 1 127.0.0.1 | grep -c received
renice -n -5 $$ 2>/dev/null && echo niced || echo "not niced"
touch /chowned && chown 33:34 /chowned && stat -c %u:%g /chowned; mknod /null c 1 3 && echo "node made"
mount -t tmpfs none /mnt 2>/dev/null && echo mounted || echo "no mount"
hostname other 2>/dev/null && echo renamed || echo "no hostname"
mknod /dev/shm/disk b 254 0 2>/dev/null
test $(head -c 1 /dev/shm/disk 2>/dev/null | wc -c) = 1 && echo "disk read" || echo "no disk"
ls /proc | grep -c '^[0-9]' | sed 's/[1-9]/few/'
cat /proc/net/dev | grep -c :
ls -l /proc/self/fd | grep -c -e 'socket:' -e anon_inode
id
"""


def normal(answers: str) -> list[str]:
    """Without what differs between any two runs: the numbers of namespaces, which must differ from the host's."""
    lines = []
    for line in answers.splitlines():
        name, _, number = line.partition(" ")
        if number.startswith(f"{name}:["):
            line = f"{name} {'the host' if number == os.readlink(f'/proc/self/ns/{name}') else 'its own'}"
        lines.append(line)
    return lines


def under_runc(box: RootBox) -> str:
    """The answers of runc, configured as Docker does."""
    spec = SandboxSpec(args=("sh",), root=Mount("bind", (box.lower,)))
    bundle = box.base / "bundle"
    bundle.mkdir()
    subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    held = sorted(DEFAULT_CAPABILITIES)
    config["process"].update(
        terminal=False, args=["sh", "-c", QUESTIONS], env=["PATH=/bin", "HOME=/"], noNewPrivileges=False
    )
    config["linux"]["namespaces"] = [{"type": n} for n in ("pid", "network", "ipc", "uts", "mount", "cgroup")]
    config["linux"]["seccomp"] = oci.config(spec, [])["linux"]["seccomp"]
    config["process"]["capabilities"] = {"bounding": held, "effective": held, "permitted": held}
    config["root"] = {"path": "rootfs", "readonly": False}
    config["linux"]["maskedPaths"] = list(MASKED_PATHS)
    config["linux"]["readonlyPaths"] = list(READONLY_PATHS)
    (bundle / "config.json").write_text(json.dumps(config))
    shutil.copytree(box.lower, bundle / "rootfs", symlinks=True)
    (bundle / "rootfs/mnt").mkdir()
    name = f"pybuild-test-{os.getpid()}"
    command = ["runc", "run", "--bundle", str(bundle), name]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    if done.returncode:
        pytest.skip(f"runc does not run here: {done.stderr.strip()[-200:]}")
    return done.stdout


@pytest.fixture
def image_with_mnt(workplace: Path) -> Path:
    layer = workplace / "with-mnt"
    (layer / "mnt").mkdir(parents=True)
    return layer


def ours(box: RootBox | UserBox, with_mnt: Path) -> list[str]:
    root = box.overlay(with_mnt, box.lower)
    env = {"PATH": "/bin", "HOME": "/"}
    limits = (("nofile", 1024, 1024),)  # what `runc spec` says
    return normal(box.sh(QUESTIONS, root=root, network="none", hostname="runc", rlimits=limits, env=env).out)


def test_the_answers_are_runcs(root_box: RootBox, image_with_mnt: Path) -> None:
    need_tool("runc")
    theirs = normal(under_runc(root_box))
    assert "cgroup its own" in theirs and "Seccomp:\t2" in theirs
    assert not [line for line in ndiff(theirs, ours(root_box, image_with_mnt)) if line[0] in "+-"]


def test_and_so_are_an_ordinary_users(root_box: RootBox, user_box: UserBox, image_with_mnt: Path) -> None:
    """But for what being root of a user namespace means, as it does under rootless docker."""
    need_tool("runc")
    theirs = normal(under_runc(root_box))
    own = ours(user_box, image_with_mnt)
    differ = {line for line in ndiff(theirs, own) if line[0] in "+-"}
    # The second filter is that which asks for devices, as no user namespace makes any.
    filters = {"- Seccomp_filters:\t1", "+ Seccomp_filters:\t2"}
    assert differ == {"- user the host", "+ user its own", *filters}, differ
