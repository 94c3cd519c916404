"""The same questions asked under runc with Docker's defaults and in our sandbox: what holds there holds here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from builder.sandbox.spec import DEFAULT_CAPABILITIES, MASKED_PATHS, READONLY_PATHS
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
mount -t tmpfs none /mnt 2>/dev/null && echo mounted || echo "no mount"
hostname other 2>/dev/null && echo renamed || echo "no hostname"
mknod /dev/shm/disk b 254 0 2>/dev/null; (head -c 1 /dev/shm/disk) >/dev/null 2>&1 && echo "disk read" || echo "no disk"
ls /proc | grep -c '^[0-9]' | sed 's/[1-9]/few/'
cat /proc/net/dev | grep -c :
ls -l /proc/self/fd | grep -c -e 'socket:' -e anon_inode
id
"""


def under_runc(box: RootBox) -> str:
    """The answers of runc, configured as Docker does."""
    bundle = box.base / "bundle"
    bundle.mkdir()
    subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
    config = json.loads((bundle / "config.json").read_text())
    held = sorted(DEFAULT_CAPABILITIES)
    config["process"].update(terminal=False, args=["sh", "-c", QUESTIONS], env=["PATH=/bin"], noNewPrivileges=False)
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


def test_the_answers_are_runcs(root_box: RootBox, image_with_mnt: Path) -> None:
    need_tool("runc")
    theirs = under_runc(root_box)
    ours = root_box.sh(QUESTIONS, root=root_box.overlay(image_with_mnt, root_box.lower), network="none").out
    assert "CapEff" in theirs
    assert ours.splitlines() == theirs.splitlines()


def test_and_so_are_an_ordinary_users(
    root_box: RootBox, user_box: UserBox, image_with_mnt: Path, tmp_path: Path
) -> None:
    need_tool("runc")
    theirs = under_runc(root_box).splitlines()
    ours = user_box.sh(
        QUESTIONS, root=user_box.overlay(image_with_mnt, user_box.lower), network="none"
    ).out.splitlines()
    assert ours == theirs
