"""Flags of build that change what a RUN may use: its network, devices and limits; and doctor, which tells."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from builder.sandbox import cgroup
from tests.integration.build.test_main_job import context_dir
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool


def log_of(pybuild: Pybuild, base: str, tmp_path: Path, command: str, *flags: str) -> str:
    context = write_context(tmp_path / "c", f"FROM {base}\nRUN {command}\n")
    return pybuild.build(context, "--no-cache", "--progress=plain", *flags).stderr


def test_a_network_of_its_own(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    need_tool("nft")
    command = "readlink /proc/self/ns/net; echo links: $(ls /sys/class/net)"
    log = log_of(pybuild, busybox_base, tmp_path, command, "--network=private")
    assert "links: eth0 lo" in log
    assert os.readlink("/proc/self/ns/net") not in log


def test_a_device_of_the_host(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse here")
    command = "test -c /dev/fuse; echo status $?"
    assert "status 1\n" in log_of(pybuild, busybox_base, tmp_path, command)
    assert "status 0\n" in log_of(pybuild, busybox_base, tmp_path, command, "--device=/dev/fuse")


def test_a_step_that_takes_too_long(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """Also while it holds its output open."""
    context = write_context(
        context_dir(pybuild_each, tmp_path) / "c", f"FROM {busybox_base}\nRUN echo begun; sleep 100000\n"
    )
    result = pybuild_each.build(context, "--timeout=3s", check=False)
    assert result.status == 137
    assert "it ran longer than 3 s" in result.stderr and "begun" in result.stderr


def test_what_is_written_to_a_bind_is_thrown_away(pybuild_each: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    script = "cat /c/sub/file && rm /c/sub/file && echo x > /c/new && stat -c %a:%u /c > /seen"
    text = f"FROM {busybox_base} AS tool\nRUN mkdir -m 700 /d && chown 5 /d && touch /d/gone\nFROM {busybox_base}\n"
    text += f"RUN --mount=type=bind,target=/c,rw {script}\n"
    text += "RUN --mount=type=bind,from=tool,source=/d,target=/c,rw rm /c/gone && stat -c %a:%u /c >> /seen\n"
    text += 'RUN test "$(cat /seen)" = "$(printf \'755:0\\n700:5\')" && test ! -e /c\n'
    context = write_context(context_dir(pybuild_each, tmp_path) / "c", text, {"sub/file": "content"})
    pybuild_each.build(context, "-t", "bound:1")
    assert (context / "sub/file").read_text() == "content" and not (context / "new").exists()


def test_huge_pages_are_limited_or_refused(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """Where no cgroup controller can, that is an error: no limit is dropped in silence."""
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, "--no-cache", "--hugetlb-limit=2MB:4m", check=False)
    known = any("hugetlb" in hierarchy.controllers for hierarchy in cgroup.detect())
    assert (result.status == 0) == known, result.stderr
    assert known or "hugetlb" in result.stderr


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--device-read-bps=/dev/null", "expected NAME:LIMIT"),
        ("--device-write-iops=/dev/null:many", "expected NAME:LIMIT"),
        ("--device=/etc/passwd", "no device"),
        ("--device=/dev/../etc/passwd", "no device"),
        ("--device=/dev/null:/etc/other", "beneath /dev"),
        ("--cpus=nan", "a number of processors"),
        ("--memory=9" + "9" * 400, "too large"),
        ("--shm-size=-1", "invalid size"),
        ("--timeout=9" + "9" * 400, "a hundred years"),
        ("--jobs=-1", "a number of steps"),
        ("--timestamp=99999999999999999999", "seconds since 1970"),
        ("--pull=perhaps", "always, missing, never or newer"),
        ("--output=type=image,push=perhaps", "true or false"),
        ("--platform=linux/", "invalid platform"),
        ("--annotation=manifest[]:a=b", "invalid platform"),
        ("--label==b", "expected KEY=VALUE"),
        ("--env==b", "expected KEY[=VALUE]"),
        ("--allow=everything", "security.insecure"),
        ("--cap-add=everything", "no such capability"),
        ("--security-opt=everything", "not possible"),
        ("--build-context=a=/nowhere", "not a directory"),
        ("--volume=/etc", "expected /HOST:/CONTAINER"),
        ("--volume=/etc:/", "expected /HOST:/CONTAINER"),
        ("--volume=etc:/x", "expected /HOST:/CONTAINER"),
        ("--volume=/nowhere:/x", "there is no /nowhere"),
        ("--volume=/etc:/x:O", "not possible"),
    ],
)
def test_nonsense_is_refused(pybuild: Pybuild, busybox_base: str, tmp_path: Path, flag: str, words: str) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, flag, check=False)
    assert (result.status, words in result.stderr) == (2, True), result.stderr


def test_doctor_names_every_tier(pybuild_each: Pybuild) -> None:
    found = pybuild_each.run("doctor", "--json").json()
    assert [tier["tier"] for tier in found["tiers"]] == ["root", "subordinate", "single", "chroot", "oci"]
    assert found["chosen"] == ("subordinate" if pybuild_each.account else "root")
    text = pybuild_each.run("doctor").text
    assert all(tier["title"] in text for tier in found["tiers"])
    missing = [tier["missing"] for tier in found["tiers"] if not tier["works"]]
    assert missing and all(words and words in text for words in missing)


def test_a_mount_for_every_run(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(
        tmp_path / "context",
        f"FROM {busybox_base}\nRUN cp /in/file /one && ! touch /in/file\nRUN cp /in/file /two && touch /cache/x\n"
        "RUN test -e /cache/x && cat /run/secrets/s > /three\n",
        {"file": "content"},
    )
    (tmp_path / "s").write_text("word")
    flags = ["--mount=type=bind,target=/in", "--mount=type=cache,target=/cache", "--mount=type=secret,id=s"]
    pybuild.build(context, *flags, "--secret", f"id=s,src={tmp_path / 's'}", "-t", "app:1")
    tree = pybuild.unpack("app:1", tmp_path / "tree")
    assert [(tree / name).read_text() for name in ("one", "two", "three")] == ["content", "content", "word"]
    assert not (tree / "in").exists()
    assert not (tree / "cache").exists()
    # It is part of what a step is.
    assert "CACHED" in pybuild.build(context, *flags, "--progress=plain").stderr
    assert pybuild.build(context, check=False).status == 1
    refused = pybuild.build(context, "--mount=type=nothing,target=/x", check=False)
    assert refused.status == 2
    assert "--mount" in refused.stderr


def test_what_mounts_conf_lets_every_run_see(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    secrets = tmp_path / "subscription"
    secrets.mkdir()
    (secrets / "key").write_text("word")
    (tmp_path / "one").write_text("alone")
    conf = tmp_path / "mounts.conf"
    conf.write_text(
        f"# of this machine\n{secrets}:/run/secrets\n{tmp_path}/missing:/elsewhere\n{tmp_path}/one:/run/one\n"
    )
    context = write_context(
        tmp_path / "context",
        f"FROM {busybox_base}\nRUN cat /run/secrets/key /run/one > /seen && ! touch /run/secrets/x\n",
    )
    pybuild.build(context, "--default-mounts-file", conf, "-t", "app:1")
    tree = pybuild.unpack("app:1", tmp_path / "tree")
    assert (tree / "seen").read_text() == "wordalone"
    assert not (tree / "run").exists() or not (tree / "run" / "secrets").exists()
    assert "CACHED" in pybuild.build(context, "--progress=plain").stderr, "a machine's own mounts change no step"
    conf.write_text("relative:/x\n")
    refused = pybuild.build(context, "--default-mounts-file", conf, check=False)
    assert refused.status == 2


def test_what_a_step_used_is_told(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """In its event, in the metadata and in the summary: processor, memory, input and output."""
    spin = "i=0; while test $i -lt 30000; do i=$((i+1)); done; dd if=/dev/zero of=/file bs=1M count=8 2>/dev/null; sync"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN {spin}\n")
    metadata = tmp_path / "metadata.json"
    log = pybuild.build(context, "--no-cache", "--progress=rawjson", f"--metadata-file={metadata}").stderr
    records = [json.loads(line) for line in log.splitlines() if line.startswith('{"vertexes"')]
    found = [vertex["usage"] for record in records for vertex in record["vertexes"] if "usage" in vertex]
    assert len(found) == 1
    assert found[0]["user_s"] + found[0]["system_s"] > 0.005
    assert found[0]["max_rss_bytes"] > 100_000 and found[0]["written_bytes"] >= 8 << 20
    step = json.loads(metadata.read_text())["pybuild.steps"]["list"][-1]
    assert step["written_bytes"] == found[0]["written_bytes"] and step["read_bytes"] == found[0]["read_bytes"]
    summary = pybuild.build(context, "--no-cache", "--summary").stderr
    assert re.search(r"cpu \d+\.\d", summary) and re.search(r"\d[0-9.]*Mi?B written", summary)
