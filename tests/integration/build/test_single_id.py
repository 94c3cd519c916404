"""Builds of an ordinary user without subordinate ids: owners are recorded, and come out as in a root's build."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.build.test_unprivileged import EPOCH, EVERYTHING
from tests.support.accounts import Account
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_mounts

pytestmark = [pytest.mark.root, pytest.mark.rootless]

# What programs see of owners and ids goes into the files, and so into the digest.
SIGHT = r"""
FROM {base} AS tool
RUN mkdir -p /home/dev && echo dev:x:1000:1000::/home/dev:/bin/sh >> /etc/passwd && \
    echo 'dev:x:1000:' >> /etc/group && echo 'staff:x:50:dev' >> /etc/group && chown dev:dev /home/dev && \
    mkdir /group && chown 0:50 /group && chmod 2775 /group && cp /bin/busybox /setuid && chown 1000:50 /setuid && \
    chmod 6755 /setuid && ln -s nowhere /dangling && chown -h 7:8 /dangling && mkfifo /pipe && chown 9:10 /pipe && \
    mknod /disk b 8 1 && chown 0:6 /disk && chmod 660 /disk
RUN touch /group/file && mkdir /group/folder && ln -s x /group/link && mkfifo /group/pipe && \
    mknod /group/null c 1 3 && touch /group/folder/file && (umask 077; touch /group/private) && \
    touch /moved && chown 11:12 /moved && ln /moved /second && mv /moved /group/moved && \
    chown :13 /second && chown 14 /group/folder
RUN chmod 6755 /group/file && chown 3 /group/file && \
    (su dev -c 'chown 0 /home/dev; chown dev /group; mknod /home/dev/n c 1 3; chgrp staff /home/dev && id') > /who 2>&1
RUN cd /home/dev && \
    su dev -c 'touch a && mkdir b && (umask 007; echo x > b/c) && ln -s a d && mkfifo e && cp -a b f && chgrp 50 a' && \
    su dev -c id >> /who; /setuid id >> /who; id >> /who
USER dev
WORKDIR /home/dev/work/deep
RUN (id; id -u; test -O . && echo mine; touch mine; test -O mine && echo mine) > who; \
    stat -c '%u %g %a %n' . mine / /group >> who; \
    touch /group/of-dev; set -C; echo new > exclusive; set +C; echo again >> exclusive; cp who copied; \
    stat -c '%u %g %n' * > list
USER 1234:4321
RUN touch /tmp/numbers && stat -c '%u %g' /tmp/numbers > /tmp/seen
USER root
RUN cd /home && tar -cf /t.tar dev && mkdir /untarred && tar -C /untarred -xpf /t.tar && rm /t.tar && \
    cp -a /home/dev /copied && cp -r /home/dev /taken && find / -xdev -user dev | sort > /found && \
    find / -xdev ! -group root ! -path /proc ! -path /sys -exec stat -c '%u:%g %a %t %T %F %n' {{}} + | sort >> /found
RUN mkdir -p /jail/bin && cp /bin/busybox /jail/bin && cd /jail/bin && ln -s busybox sh && ln -s busybox chown && \
    chroot /jail /bin/sh -c 'echo x > /in && /bin/chown 21:22 /in && cd /bin && chown 23 sh' && \
    stat -c '%u %g %n' /jail/* /jail/bin/* > /jail/seen
FROM {base}
COPY --from=tool / /
COPY --from=tool --chown=77:88 /group /given
COPY --chown=5 file /file
RUN find /home /group /given /file /disk /pipe /dangling -exec stat -c '%F %u %g %a %n' {{}} + | sort > /seen
"""


class SingleId(Pybuild):
    """`pybuild` of a user who has no program to get at subordinate ids.

    Not /etc/subuid is hidden: that is another file, without a mount over it, once another worker adds a user.
    """

    def argv(self, *arguments: str | Path) -> list[str]:
        hide = 'mount --bind /dev/null "$(command -v newuidmap)" && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", hide, "sh", *super().argv(*arguments)]


@pytest.fixture
def single(rootless_user: Account) -> Iterator[SingleId]:
    need_mounts()
    root = rootless_user.home / "store-single"
    yield SingleId(root, account=rootless_user)
    shutil.rmtree(root, ignore_errors=True)


def digest(pybuild: Pybuild, context: Path, *flags: str) -> str:
    (context / "secret").write_text("hidden")
    return pybuild.build(context, "-q", f"--secret=id=s,src={context}/secret", *flags, env=EPOCH).text.strip()


def test_the_same_image_as_a_root_build(
    single: SingleId, pybuild: Pybuild, busybox_base: str, rootless_user: Account
) -> None:
    files = {"file": "of the context\n", ".dockerignore": "secret\n"}
    context = write_context(rootless_user.home / "c", EVERYTHING.format(base=busybox_base), files)
    (context / "file").chmod(0o644)
    try:
        found = digest(single, context)
        assert found == digest(pybuild, context)
        again = single.build(context, "--progress=plain", f"--secret=id=s,src={context}/secret", env=EPOCH)
        assert again.text.strip() == found and "DONE" not in again.stderr.split("RUN", 1)[1]
    finally:
        shutil.rmtree(context)


def test_no_tier_takes_the_snapshots_of_another(single: SingleId, busybox_base: str, rootless_user: Account) -> None:
    text = f"FROM {busybox_base}\nRUN touch /a && chown 33:34 /a\nRUN stat -c '%u %g' /a > /seen\n"
    context = write_context(rootless_user.home / "o", text)
    subordinate = Pybuild(single.root, account=rootless_user)
    try:
        found = digest(subordinate, context)
        assert digest(single, context) == digest(subordinate, context, "--isolation=single") == found
        assert digest(subordinate, context, "--isolation=rootless") == found
    finally:
        shutil.rmtree(context)


def test_what_programs_see_of_owners(
    single: SingleId, pybuild: Pybuild, busybox_base: str, rootless_user: Account
) -> None:
    files = {"file": "of the context\n", ".dockerignore": "secret\n"}
    context = write_context(rootless_user.home / "s", SIGHT.format(base=busybox_base), files)
    try:
        assert digest(single, context, "--verify-layers") == digest(pybuild, context)
    finally:
        shutil.rmtree(context)


@pytest.mark.network
@pytest.mark.slow
def test_debian_packages(single: SingleId, pybuild: Pybuild, debian_base: str, rootless_user: Account) -> None:
    install = "apt-get update && apt-get install -y --no-install-recommends adduser cron sudo at rsync libcap2-bin"
    clean = "rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/apt /var/cache/ldconfig/aux-cache"
    context = write_context(
        rootless_user.home / "d",
        f"FROM {debian_base}\nRUN {install} && {clean}\n"
        "RUN cp /bin/true /t && setcap cap_net_raw+ep /t && useradd -m u && adduser --system --group s && "
        "echo 'u ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/u && touch -d @0 /etc/shadow /etc/passwd\n"
        "RUN rm -rf /var/log\nUSER u\nWORKDIR /home/u\nRUN sudo -u s touch /tmp/s\n"
        "RUN sudo install -o s -g games -m 4750 /bin/true /i\n"
        "USER root\nRUN rsync -a /home/u/ /v && setpriv --reuid u --regid u --clear-groups touch /tmp/w && "
        "find / -xdev ! -user root ! -path /proc ! -path /sys -exec stat -c '%U %G %a %n' {} + | sort > /found\n",
    )
    try:
        assert digest(single, context) == digest(pybuild, context)
    finally:
        shutil.rmtree(context)


TAKEN = """
import os, sys
from layers import linux
linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
listener = linux.seccomp_listener(bytes.fromhex("060000000000ff7f"))
if os.fork() == 0:
    os.execv(sys.executable, [sys.executable, "-m", "builder", *sys.argv[1:]])
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_where_nobody_can_be_asked(single: SingleId, busybox_base: str, rootless_user: Account) -> None:
    """Under somebody's filter that has a listener there can be no other: said, and nothing faked."""
    context = write_context(rootless_user.home / "t", f"FROM {busybox_base}\nRUN chown 3:4 /tmp\n")
    argv = [str(rootless_user.python), "-c", TAKEN, "--root", str(single.root), "build", str(context)]
    try:
        done = rootless_user.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "supervise" in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr
        doctor = rootless_user.run([*argv[:5], "doctor"], capture_output=True, text=True, check=False).stdout
        assert "seccomp" in doctor and "RUN mknod of them is refused" in doctor
    finally:
        shutil.rmtree(context)


def test_what_leaves_the_store(single: SingleId, busybox_base: str, rootless_user: Account) -> None:
    """A directory of the user's has the user's files; what else is known of them stays with them."""
    context = write_context(rootless_user.home / "l", f"FROM {busybox_base}\nRUN touch /a && chown 33:34 /a\n")
    target = rootless_user.home / "rootfs"
    try:
        single.build(context, "-t", "left:1")
        said = single.run("unpack", "left:1", target).stderr
        assert said.count("user.pybuild.owner") == 1, said
        assert os.getxattr(target / "a", "user.pybuild.owner") == b"33:34"
        assert (target / "a").stat().st_uid == rootless_user.uid
        single.run("fsck")
    finally:
        shutil.rmtree(context)
        shutil.rmtree(target, ignore_errors=True)


def test_it_is_for_ordinary_users(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN true\n")
    result = pybuild.build(context, "--isolation=single", check=False)
    assert result.status == 1 and "isolation single" in result.stderr and "hint: " in result.stderr


def test_doctor_chooses_it(single: SingleId) -> None:
    found = single.run("doctor", "--json").json()
    assert found["chosen"] == "single"


def test_containers_and_what_is_executed_in_them(single: SingleId, busybox_base: str, rootless_user: Account) -> None:
    script = "touch /made && chown 33:34 /made && stat -c %u:%g /made && id -u"
    single.run("run", "-d", "--name", "c", "--network", "host", busybox_base, "sleep", "1000")
    try:
        assert single.run("exec", "c", "sh", "-c", script).text.split() == ["33:34", "0"]
        script = "touch /tmp/mine && stat -c %u:%g /tmp/mine && id -G && chown 0 /tmp/mine"
        found = single.run("exec", "-u", "7:8", "c", "sh", "-c", script, check=False)
        assert (found.status, found.text.split()) == (1, ["7:8", "8"])
        single.run("commit", "c", "committed:1")
    finally:
        single.run("rm", "-f", "c")
    context = write_context(rootless_user.home / "e", "FROM committed:1\nRUN stat -c %u:%g /made /tmp/mine > /seen\n")
    try:
        single.build(context, "-o", f"type=tar,dest={rootless_user.home}/out.tar")
        with tarfile.open(rootless_user.home / "out.tar") as tar:
            seen = tar.extractfile("seen")
            assert seen is not None and seen.read().split() == [b"33:34", b"7:8"]
            assert (tar.getmember("made").uid, tar.getmember("tmp/mine").gid) == (33, 8)
    finally:
        shutil.rmtree(context)
