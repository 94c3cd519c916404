"""Builds as root of a container with Docker's defaults: no CAP_SYS_ADMIN, and a filter that refuses
unshare, setns, mount, pivot_root and namespaces. What comes out equals what root with namespaces makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.machine import CHECKOUT, need_root
from tests.support.waiting import PATIENCE_S, until

WRAPPER = CHECKOUT / "tests" / "support" / "unprivileged.py"
EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}

EVERYTHING = """
FROM {base} AS tool
RUN echo tool > /tool && mkdir /tree && echo leaf > /tree/leaf && chown -R 7:8 /tree
FROM {base}
RUN touch /a && chown 33:33 /a && chmod 6755 /a && ln /a /b && ln -s a /link && mknod /device c 1 3 && mkfifo /pipe
RUN echo someone:x:1234:1234::/home/someone:/bin/sh >> /etc/passwd && mkdir -m 1777 /shared && \\
    mkdir -p /home/someone && chown 1234:1234 /home/someone && echo mine > /home/someone/file && \\
    chown someone /home/someone/file
USER someone
RUN id -u > /home/someone/id && echo x > /dev/null && echo y > /tmp/y && test -w /dev/shm
USER root
RUN --mount=type=bind,from=tool,source=/tree,target=/mnt/tree --mount=type=bind,from=tool,source=/tool,target=/t \\
    cat /mnt/tree/leaf /t > /copied && stat -c %u:%g /mnt/tree/leaf >> /copied
RUN --mount=type=bind,target=/context,rw cp /context/file /from-context && rm /context/file
RUN --mount=type=secret,id=s,mode=0444 --mount=type=tmpfs,target=/scratch \\
    test "$(wc -c < /run/secrets/s)" = 6 && echo s > /scratch/s
RUN --mount=type=cache,target=/cache echo 1 >> /cache/count && wc -l < /cache/count > /count
RUN --mount=type=cache,target=/cache echo 1 >> /cache/count && wc -l < /cache/count >> /count
RUN --mount=type=cache,id=two,sharing=locked,target=/one --mount=type=cache,id=two,sharing=locked,target=/two \\
    echo 1 >> /one/count && cat /two/count >> /count
RUN rm -rf /home/someone/id /etc/motd && mkdir /home/someone/id
RUN cat /etc/resolv.conf /etc/hosts /proc/version >/dev/null
RUN sed -i s/x/y/ /etc/hosts; echo nameserver 1.2.3.4 > /etc/resolv.conf; rm -f /etc/hosts; rm -rf /proc/sys; true
COPY --chown=3:4 file /etc/hosts
RUN cat /etc/hosts > /hosts-in-run
USER 1234:50
WORKDIR /removed/deep
RUN echo x > of-the-user
USER root
RUN rm -r /removed
USER 1234:50
RUN touch again && stat -c '%n %u %g %a' . .. > /tmp/workdir
USER root
WORKDIR /
"""


class Unprivileged(Pybuild):
    """`pybuild` under the wrapper."""

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, str(WRAPPER), *super().argv(*arguments)]


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[Unprivileged]:
    need_root()
    root = tmp_path / "unprivileged-store"
    yield Unprivileged(root)
    shutil.rmtree(root, ignore_errors=True)


def digest(pybuild: Pybuild, context: Path, *flags: str) -> str:
    secret = context.parent / "secret"
    secret.write_text("hidden")
    return pybuild.build(context, "-q", f"--secret=id=s,src={secret}", *flags, env=EPOCH).text.strip()


def test_the_wrapper_is_what_it_says(unprivileged: Unprivileged) -> None:
    for command in (["unshare", "-m", "true"], ["unshare", "-U", "true"], ["mount", "-t", "tmpfs", "none", "/mnt"]):
        done = subprocess.run(
            [sys.executable, str(WRAPPER), *command], env=unprivileged.environ(), capture_output=True, check=False
        )
        assert done.returncode != 0, command


def test_every_tier_makes_the_same_image(
    unprivileged: Unprivileged, pybuild: Pybuild, busybox_base: str, tmp_path: Path
) -> None:
    context = write_context(tmp_path / "c", EVERYTHING.format(base=busybox_base), {"file": "of the context\n"})
    found = digest(unprivileged, context)
    # /etc/hosts of a RUN holds the host's names, so the last layer is the same only on one machine.
    assert found == digest(pybuild, context)
    assert found == digest(Pybuild(tmp_path / "native"), context, "--isolation=chroot")
    assert (context / "file").exists()
    # And again, from the cache.
    again = unprivileged.build(context, "--progress=plain", f"--secret=id=s,src={tmp_path}/secret", env=EPOCH)
    assert again.text.strip() == found and "RUN" in again.stderr and "DONE" not in again.stderr.split("RUN", 1)[1]


@pytest.mark.network
@pytest.mark.slow
def test_debian_packages_and_capabilities(
    unprivileged: Unprivileged, pybuild: Pybuild, pybuild_rootless: Pybuild, debian_base: str, tmp_path: Path
) -> None:
    install = "apt-get update && apt-get install -y --no-install-recommends libcap2-bin openssh-client"
    clean = "rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/apt /var/cache/ldconfig/aux-cache"
    context = write_context(
        tmp_path / "c",
        f"FROM {debian_base}\nRUN {install} && {clean}\n"
        "RUN cp /bin/true /t && setcap cap_net_raw+ep /t && useradd -m u && touch -d @0 /etc/shadow /etc/passwd\n",
    )
    found = digest(pybuild, context)
    assert digest(unprivileged, context) == found
    assert pybuild_rootless.account
    shutil.copytree(context, pybuild_rootless.account.home / "debian")
    assert digest(pybuild_rootless, pybuild_rootless.account.home / "debian") == found


def test_what_a_step_leaves_running_ends_with_it(unprivileged: Unprivileged, busybox_base: str, tmp_path: Path) -> None:
    mark = f"{os.getpid()}.25"
    left = f"(setsid nohup sleep 3600{mark} & ) ; nohup sh -c 'sleep 3600{mark} & wait' &"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN {left} sleep 0.1; echo went on\n")
    unprivileged.build(context)
    assert not running(f"3600{mark}")


def running(word: str) -> list[str]:
    """The command lines of living processes that hold a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in line and "pytest" not in line:
                found.append(line)
    return found


def test_a_step_that_takes_too_long(unprivileged: Unprivileged, busybox_base: str, tmp_path: Path) -> None:
    """The cache directory, which was in the image for the while, is back where it belongs."""
    context = write_context(
        tmp_path / "c",
        f"FROM {busybox_base}\nRUN --mount=type=cache,target=/c touch /c/here; trap '' TERM INT; sleep 3601\n",
    )
    result = unprivileged.build(context, "--timeout=4s", check=False)
    assert "it ran longer than 4 s" in result.stderr
    assert result.status == 137
    write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN --mount=type=cache,target=/c ls /c/here\n")
    unprivileged.build(context)
    assert not list(unprivileged.root.glob("snapshots/*/aside-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_pybuild_is_ended(
    unprivileged: Unprivileged, busybox_base: str, tmp_path: Path, number: signal.Signals
) -> None:
    mark = f"36{os.getpid()}.5"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN sleep {mark} & sleep {mark}\n")
    process = unprivileged.start("build", context)
    try:
        until(lambda: len(running(f"sleep {mark}")) >= 2)
        process.send_signal(number)
        status = process.wait(PATIENCE_S)
        assert status == (130 if number == signal.SIGINT else -9)
        until(lambda: not running(f"sleep {mark}"))
        assert not running(f"sleep {mark}")
    finally:
        process.kill()
        process.communicate()


def test_a_fork_bomb_ends(unprivileged: Unprivileged, busybox_base: str, tmp_path: Path) -> None:
    bomb = "f() { sleep 0.02; f & f & }; ulimit -u 200 2>/dev/null; f 2>/dev/null & sleep 0.3; exit 3"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN {bomb}\n")
    result = unprivileged.build(context, "--pids-limit=100", check=False)
    assert result.status in {1, 2, 3}


def test_the_containers_own_root_is_out_of_reach(unprivileged: Unprivileged, busybox_base: str, tmp_path: Path) -> None:
    """Links of the image lead nowhere else, what is placed or cleaned up included; no second chroot."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / "secret").write_text("hidden-words")
    context = write_context(
        tmp_path / "c",
        f"FROM {busybox_base}\nCOPY links /\n"
        f"RUN --mount=type=cache,target=/srv/{outside}/cache echo x > /etc/hosts; echo y > /srv/y; ls {outside}; true\n"
        "RUN --mount=type=tmpfs,target=/data/scratch touch /data/scratch/x && ! chroot / true\n"
        "RUN --mount=type=secret,id=s rm -rf /run/secrets && ln -s / /run/secrets\n",
    )
    links = context / "links"
    (links / "etc").mkdir(parents=True)
    (links / "etc/hosts").symlink_to(outside / "kept")
    (links / "data").symlink_to(outside)
    (links / "srv").symlink_to("/")
    unprivileged.build(context, f"--secret=id=s,src={tmp_path}/secret", "-t", "hostile:1")
    assert sorted(path.name for path in outside.iterdir()) == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    root = unprivileged.unpack("hostile:1", tmp_path / "rootfs")
    assert os.readlink(root / "etc/hosts") == f"{outside}/kept"
    assert os.readlink(root / "data") == str(outside)
    assert (root / "y").read_text() == "y\n"


def test_a_secret_that_the_command_replaced(unprivileged: Unprivileged, busybox_base: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("very-hidden-words")
    script = "cd /run/secrets && cp s t && mv t s && chmod 777 s && mkdir -p /run/mine && touch /run/mine/x"
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN --mount=type=secret,id=s {script}\n")
    unprivileged.build(context, f"--secret=id=s,src={tmp_path}/secret", "-t", "secret:1")
    root = unprivileged.unpack("secret:1", tmp_path / "rootfs")
    assert sorted(str(p.relative_to(root)) for p in root.glob("run/**/*")) == ["run/mine", "run/mine/x"]


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("RUN --network=none true", ()),
        ("RUN true", ("--network=private",)),
        ("RUN true", ("--volume=/var/tmp:/v",)),
        ("RUN true", ("--device=/dev/zero",)),
    ],
)
def test_what_a_chroot_cannot_do_is_refused(
    unprivileged: Unprivileged, busybox_base: str, tmp_path: Path, line: str, flags: tuple[str, ...]
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\n{line}\n")
    result = unprivileged.build(context, *flags, check=False)
    assert result.status == 1
    assert "isolation chroot" in result.stderr and "hint: " in result.stderr


def test_doctor_chooses_it(unprivileged: Unprivileged) -> None:
    found = unprivileged.run("doctor", "--json").json()
    assert found["chosen"] == "chroot"
    root = next(tier for tier in found["tiers"] if tier["tier"] == "root")
    assert "CAP_SYS_ADMIN" in root["missing"]


def test_an_ordinary_user_may_not(pybuild_rootless: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    assert pybuild_rootless.account
    context = write_context(pybuild_rootless.account.home / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild_rootless.build(context, "--isolation=chroot", check=False)
    assert result.status == 1 and "needs root" in result.stderr
    pybuild_rootless.build(context, "--isolation=rootless")


def test_root_is_not_rootless(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, "--isolation=rootless", check=False)
    assert result.status == 1 and "runs as root" in result.stderr


LIBRARY = """
import sys, threading
from pathlib import Path
from builder import BuildRequest, SourceFile, build
threading.Thread(target=threading.Event().wait, daemon=True).start()
text = f"FROM {sys.argv[2]}\\nRUN touch /made && chown 9:9 /made\\n"
result = build(BuildRequest(containerfile=SourceFile("Containerfile", text), context=None), root=Path(sys.argv[1]))
print(result.executed)
"""


def test_a_library_caller_with_threads(unprivileged: Unprivileged, busybox_base: str) -> None:
    argv = [sys.executable, str(WRAPPER), sys.executable, "-c", LIBRARY, str(unprivileged.root), busybox_base]
    done = subprocess.run(argv, env=unprivileged.environ(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
