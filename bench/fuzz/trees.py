"""Random Containerfiles, built in every way of isolating RUN and stacking layers: the images must be one.

    python bench/fuzz/trees.py FIRST LAST [--user NAME] [--base oci-layout://DIR:TAG]

Each seed is a Containerfile of COPY, ADD, RUN, WORKDIR, USER and VOLUME over a few names that get in each
other's way, and its context. It is built without cache and with SOURCE_DATE_EPOCH as root by overlay, as
copies, in a chroot and by runc where it is installed, and with --user as that user, with subordinate ids
and with a single one; image IDs are compared. Lines that fail the first way are taken out before. What
differs is kept in a temporary directory. Left out, for they differ rightly: hardlinks that a later step writes
to (an overlay breaks them, a copy does not), and with a single id who is not root (nothing is refused him).
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
EPOCH = "1700000000"
NAMES = ("a", "b", "c", "d d", "é", ".h")
OWNERS = ("0:0", "1:33", "1000:1000", "33", "daemon", ":100")
MODES = (0o644, 0o755, 0o604, 0o4755, 0o444)


class Case:
    """One seed's Containerfile and context. `users`: whether it has steps of others than root."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.users = bool(seed % 2)

    def path(self, depth: int = 3) -> str:
        return "/".join(self.random.choice(NAMES) for _ in range(self.random.randint(1, depth)))

    def write(self, place: Path) -> None:
        context = place / "context"
        context.mkdir(parents=True)
        for _ in range(self.random.randint(3, 12)):
            path = context / self.path()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._entry(path)
            except OSError:
                continue  # a name that is something else already
        with tarfile.open(context / "t.tar", "w") as archive:
            self._fill(archive)
        for path in [*context.rglob("*"), context]:
            os.utime(path, (1600000000, 1600000000), follow_symlinks=False)
        (place / "Containerfile").write_text("\n".join(self.lines(context)) + "\n")

    def _entry(self, path: Path) -> None:
        kind = self.random.random()
        if kind < 0.6:
            with path.open("x") as stream:
                stream.write(self.random.choice(["", "x\n", "y" * 5000]))
            path.chmod(self.random.choice(MODES))
        elif kind < 0.8:
            path.mkdir(exist_ok=True)
            path.chmod(self.random.choice([0o755, 0o1777, 0o2755]))
        else:
            path.symlink_to(self.random.choice(["a", "../b", "/w/a", "nowhere", "."]))

    def _fill(self, archive: tarfile.TarFile) -> None:
        names: list[str] = []
        kinds = [tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
        for _ in range(self.random.randint(1, 6)):
            member = tarfile.TarInfo(self.path())
            member.type, member.mode = self.random.choice(kinds), self.random.choice([0o644, 0o755, 0o6755])
            member.uid, member.gid = self.random.choice([0, 1, 33, 5000]), self.random.choice([0, 33, 100])
            member.mtime = self.random.choice([1, 1500000000, 1650000000])
            data = b"tar" * self.random.randint(0, 9)
            if any(f"{member.name}/".startswith(f"{n}/") or n.startswith(f"{member.name}/") for n in names):
                continue
            if member.type == tarfile.SYMTYPE:
                member.linkname = self.random.choice(["a", "../x", "/etc/passwd"])
            member.size = len(data) if member.type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
            names.append(member.name)

    def lines(self, context: Path) -> list[str]:
        sources = [".", "*", *sorted(name.replace(" ", "?") for name in os.listdir(context))]
        found = ["FROM base AS one", "WORKDIR /w", self.random.choice(["COPY . /w/", "RUN touch z"])]
        found += [self._step(sources, "") for _ in range(self.random.randint(2, 6))]
        if self.random.random() < 0.5:
            found += [f"FROM {self.random.choice(['base', 'one'])}", "USER 0", "WORKDIR /w"]
            found += [self._step(sources, "one") for _ in range(self.random.randint(2, 6))]
        return found

    def _step(self, sources: list[str], stage: str) -> str:
        kind = self.random.random()
        if kind < 0.5:
            return f"RUN {' ; '.join(self._command() for _ in range(self.random.randint(1, 6)))} ; true"
        if kind < 0.75:
            return self._copy(sources, stage)
        if kind < 0.83:
            return f"ADD {self.random.choice(['', '--chown=7:8 '])}t.tar {self.random.choice(['./', '/w/a/', '/z'])}"
        if kind < 0.9 and self.users:
            return f"USER {self.random.choice(['0', '1', 'daemon', '1000:100', '0:33', 'root'])}"
        if kind < 0.97:
            return f"WORKDIR {self.random.choice(['/w', '/w/a', 'sub', '../w', '/w/b/c', '/new/sub'])}"
        return "VOLUME /w/a"

    def _copy(self, sources: list[str], stage: str) -> str:
        flags = [
            self.random.choice([f"--chown={owner}" for owner in ("1:33", "5:6", "1000")] + [""] * 6),
            self.random.choice([f"--chmod={mode}" for mode in ("755", "4711", "u=rwX,go=rX", "a+x")] + [""] * 8),
            self.random.choice(["--link", *[""] * 4]),
            self.random.choice(["--exclude=a", "--exclude=**/b", "--exclude=.*", *[""] * 9]),
        ]
        source = self.random.choice(sources)
        if stage and self.random.random() < 0.4:
            flags, source = [f"--from={stage}", *flags], self.random.choice(["/w/*", "/w/.", "/w"])
        target = self.random.choice(["./", "/w/a/", "/w/b", "/w/c/d/", "x/", "/y", "/w"])
        return " ".join(filter(None, ["COPY", *flags, source, target]))

    def _command(self) -> str:
        one, two = f"'{self.path()}'", f"'{self.path()}'"
        owner, mode = self.random.choice(OWNERS), self.random.choice(["644", "4755", "2711", "u+x,g-w", "000", "1777"])
        commands = [
            f"mkdir -p {one}", f"mkdir -m {mode} {one}", f"rm -rf {one}", f"rm -rf {one} && mkdir {one}",
            f"rm -f {one} && echo n > {one}", f"echo {mode} > {one}", f"echo more >> {one}", f"truncate -s 9999 {one}",
            f"mv {one} {two}", f"mv -T {one} {two}", f"cp -a {one} {two}", f"cp -r {one} {two}", f"cp -a {one} /new",
            f"ln -s {two} {one}", f"ln -sf /w/{two} {one}", f"ln -sfn . {one}", f"mkfifo {one}", f"touch -d @15 {one}",
            f"chmod {mode} {one}", f"chmod -R g+w {one}", f"chown {owner} {one}", f"chown -R {owner} {one}",
            f"chown -h {owner} {one}", f"umask {self.random.choice(['077', '002', '000'])}", f"cd {one}", "cd /w",
            f"id -u >> {one}", f"ls -A {one} > {two}", f"stat -c '%u %g %a %s %F' {one} > {two}", "rm -rf ./* ./.h",
            f"rmdir {one}",
        ]  # fmt: skip
        return self.random.choice(commands)


def ways(work: Path, user: str | None, case: Case) -> dict[str, tuple[list[str], Path]]:
    """The flags and the store of each way of building, those of the ordinary user behind `setpriv`."""
    found = {
        "overlay": (["--storage-driver=overlay"], work / "overlay"),
        "native": (["--storage-driver=native"], work / "native"),
        "chroot": (["--isolation=chroot"], work / "chroot"),
    }
    if shutil.which("runc"):
        found["runc"] = (["--isolation=oci", "--runtime=runc"], work / "overlay")
    if user:
        found["rootless"] = (["--isolation=rootless"], work / "user" / "rootless")
        if not case.users:
            found["single"] = (["--isolation=single"], work / "user" / "single")
    return found


def image_of(place: Path, base: str, flags: list[str], store: Path, user: str | None) -> str:
    """The image's ID, or `failed`."""
    command = [sys.executable, "-m", "builder", "--root", str(store), "build", "-q", "--no-cache", *flags]
    command += ["--build-context", f"base={base}", "-f", f"{place}/Containerfile", f"{place}/context"]
    paths = filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    environ |= {"SOURCE_DATE_EPOCH": EPOCH, "PYBUILD_CONFIG": ""}
    if user:
        command = ["setpriv", "--reuid", user, "--regid", user, "--init-groups", *command]
    done = subprocess.run(command, env=environ, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, check=False)
    (place / f"{store.name}.log").write_bytes(done.stderr)
    return done.stdout.decode().strip() if done.returncode == 0 else "failed"


def mend(place: Path, base: str, flags: list[str], store: Path) -> None:
    """Take the lines out of a seed's Containerfile that fail, such as a file over a directory."""
    file = place / "Containerfile"
    while image_of(place, base, flags, store, None) == "failed":
        where = re.search(r"Containerfile:(\d+)", (place / f"{store.name}.log").read_text())
        lines = file.read_text().splitlines()
        if where is None or lines[int(where[1]) - 1].startswith("FROM"):
            sys.exit(f"{place}: {(place / f'{store.name}.log').read_text()}")
        del lines[int(where[1]) - 1]
        file.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--user", help="an ordinary user with subordinate ids, who can read the checkout and Python")
    parser.add_argument("--base", help="the base image (default: a busybox made here)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pybuild-trees-"))
    work.chmod(0o755)
    base = options.base
    if base is None:
        maker = [sys.executable, f"{CHECKOUT}/Containerfile.examples/make_base.py", "busybox", f"{work}/base"]
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        base = f"oci-layout://{work}/base:busybox"
    if options.user:
        (work / "user").mkdir()
        shutil.chown(work / "user", options.user)
    different = 0
    for seed in range(options.first, options.last + 1):
        case, place = Case(seed), work / f"seed-{seed}"
        case.write(place)
        mend(place, base, *ways(work, None, case)["overlay"])
        found = {
            name: image_of(place, base, flags, store, options.user if name in {"rootless", "single"} else None)
            for name, (flags, store) in ways(work, options.user, case).items()
        }
        same = len({*found.values()}) == 1
        different += not same
        print(seed, *({*found.values()} if same else found.items()), "" if same else f"<-- {place}", flush=True)
        if same:
            shutil.rmtree(place)
    if not different:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{different} of {options.last - options.first + 1} differ", f"(kept: {work})" if different else "")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
