"""Git repositories for ADD and for build contexts, fetched with the `git` program in an environment of our own.

Git sees none of the host's or the user's configuration, runs no hooks, asks nothing on a terminal
and speaks only http, https, ssh and git; files of the host cannot be its remotes. Credentials
travel in its environment, never in an argument that a process list would show, and stay out of
what is checked out. Reference: https://git-scm.com/docs/git#_environment_variables
"""

from __future__ import annotations

import base64
import os
import re
import select
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from builder.errors import ContextError
from builder.frontend.gitref import GitRef, parse_git_ref
from builder.solve import rootpath
from builder.solve.fetch import Secrets, no_secrets
from builder.solve.sourcetree import never_cancelled
from layers.errors import Cancelled
from layers.values import NamedTuple

if TYPE_CHECKING:
    import subprocess

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PASSED_ON = (
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
)
_OUTPUT_MAX_BYTES = 16 * 1024 * 1024
_CONFIG = (
    ("core.hooksPath", os.devnull),
    ("core.fsmonitor", "false"),
    ("core.symlinks", "true"),
    ("core.autocrlf", "false"),
    ("init.defaultBranch", "master"),
    ("advice.detachedHead", "false"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    ("transfer.fsckObjects", "false"),
    ("fetch.recurseSubmodules", "false"),
)


class GitTree(NamedTuple):
    """A checkout: `path` is the wanted directory of it, `commit` what it is of, `cache_key` what a step depends on.

    `committed_s` is the commit's time, in seconds since 1970.
    """

    path: Path
    commit: str
    cache_key: str
    committed_s: int


class GitSource(NamedTuple):
    """How to reach repositories.

    `ssh_socket` is an agent's, `known_hosts` the text of such a file, `environ` holds PATH and proxy variables.
    """

    secrets: Secrets = no_secrets
    ssh_socket: Path | None = None
    known_hosts: str | None = None
    environ: Mapping[str, str] = {}


class _Resolved(NamedTuple):
    """`commit`, the object that names it (an annotated tag, or itself), and the full name to fetch."""

    commit: str
    object: str
    name: str


def is_commit(ref: str) -> bool:
    """Whether `ref` is the full name of a commit."""
    return _COMMIT.fullmatch(ref) is not None


def _parse(source: str | GitRef, checksum: str | None) -> GitRef:
    """The reference, with the checksum of a flag in it. Raises: ContextError."""
    if isinstance(source, str):
        try:
            ref = parse_git_ref(source)
        except ValueError as e:
            raise ContextError(f"{source}: {e}") from e
        if ref is None:
            raise ContextError(f"{source}: not a reference to a git repository")
    else:
        ref = source
    if checksum:
        if ref.checksum and ref.checksum != checksum:
            raise ContextError(f"checksum mismatch {checksum!r} != {ref.checksum!r}")
        ref = ref._replace(checksum=checksum)
    if ref.checksum and not re.fullmatch("[0-9a-f]{7,64}", ref.checksum):
        raise ContextError(f"{ref.checksum!r} is not a commit", hint="give its hexadecimal name, at least 7 digits")
    return ref


def git_cache_key(commit: str, ref: GitRef, *, keep_git_dir: bool) -> str:
    """What a step that takes this tree depends on."""
    key = commit + (".git" if _keeps(ref, keep_git_dir) else "")
    key += ".nosubmodules" if ref.submodules is False else ""
    return f"{key}:{ref.subdir}" if ref.subdir else key


def _keeps(ref: GitRef, keep_git_dir: bool) -> bool:
    """Whether `.git` stays: what the reference says counts for more, and a subdirectory has none."""
    return (keep_git_dir if ref.keep_git_dir is None else ref.keep_git_dir) and not rootpath.clean(ref.subdir)


def resolve_git(
    source: str | GitRef,
    scratch: Path,
    access: GitSource | None = None,
    *,
    checksum: str | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> str:
    """The commit that `source` stands for now, by one question to the server.

    A full commit is not asked about. `scratch` is a directory for temporary files. Raises: ContextError; Cancelled.
    """
    ref = _parse(source, checksum)
    if is_commit(ref.ref):
        resolved = _Resolved(ref.ref, ref.ref, ref.ref)
    else:
        with _Git(ref.remote, scratch, access or GitSource(), cancelled) as git:
            resolved = _resolve(git, ref)
    _check(ref, resolved)
    return resolved.commit


def fetch_git(
    source: str | GitRef,
    dest: Path,
    *,
    keep_git_dir: bool = False,
    checksum: str | None = None,
    access: GitSource | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
) -> GitTree:
    """Check out `source` in a new directory in `dest`, which is the caller's to remove.

    `checksum` is a commit, or the beginning of one. Submodules come along unless the reference says
    no. With `keep_git_dir` the checkout keeps a shallow `.git`, unless a subdirectory is asked for.
    Raises: ContextError; Cancelled.
    """
    import tempfile

    ref = _parse(source, checksum)
    keep = _keeps(ref, keep_git_dir)
    tree = Path(tempfile.mkdtemp(prefix="git-", dir=dest)) / "tree"
    with _Git(ref.remote, tree.parent, access or GitSource(), cancelled) as git:
        resolved = _Resolved(ref.ref, ref.ref, ref.ref) if is_commit(ref.ref) else _resolve(git, ref)
        commit = resolved.commit
        _check(ref, resolved)
        tree.mkdir(mode=0o755)
        git.run("init", "--quiet", str(tree))
        git.directory = tree
        git.run("remote", "add", "origin", ref.remote)
        _fetch(git, commit, resolved.name)
        git.run("checkout", "--quiet", "--force", "--detach", commit)
        if ref.submodules is not False and (tree / ".gitmodules").is_file():
            git.run("submodule", "update", "--init", "--recursive", "--depth=1")
        committed_s = int(git.run("log", "-1", "--format=%ct", commit))
        if keep:
            git.run("remote", "set-url", "origin", _redacted(ref.remote))
            _tidy(tree / ".git")
    if not keep:
        _drop_git_directories(tree)
    key = git_cache_key(commit, ref, keep_git_dir=keep_git_dir)
    return GitTree(_subdirectory(tree, ref), commit, key, committed_s)


def _check(ref: GitRef, found: _Resolved) -> None:
    wanted = ref.checksum
    if wanted and not found.commit.startswith(wanted) and not found.object.startswith(wanted):
        raise ContextError(
            f"expected checksum to match {wanted}, got {found.commit}",
            hint=f"{ref.ref or 'the default branch'} of {_redacted(ref.remote)} has moved, or was tampered with",
        )


def _resolve(git: _Git, ref: GitRef) -> _Resolved:
    """What a name stands for: branches before tags, as in git itself."""
    name = ref.ref or "HEAD"
    if name.startswith("-"):
        raise ContextError(f"{name!r} is not a git reference")
    short = name.removeprefix("refs/")
    found: dict[str, str] = {}
    for line in git.run("ls-remote", ref.remote, name, f"{name}^{{}}").splitlines():
        commit, _, full = line.partition("\t")
        if is_commit(commit):
            found[full] = commit
    for candidate in (name, f"refs/{short}", f"refs/heads/{short}", f"refs/tags/{short}"):
        if candidate in found:
            return _Resolved(found.get(f"{candidate}^{{}}", found[candidate]), found[candidate], candidate)
    raise ContextError(
        f"repository {_redacted(ref.remote)} does not contain ref {name}",
        hint="branches, tags, full reference names and full commits can be given",
    )


def _fetch(git: _Git, commit: str, wanted: str) -> None:
    """Fetch one commit, shallow where the server can; else all there is, to look for it there."""
    refusals = ("not our ref", "unadvertised object", "--depth", "shallow", "not a valid object", "no such remote ref")
    # By its commit first: the name may have moved on since it was resolved.
    attempts: list[tuple[str, ...]] = [("--depth=1", "origin", commit)]
    if wanted != commit:
        attempts += [("--depth=1", "origin", wanted), ("origin", wanted)]
    attempts.append(("origin", "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"))
    for number, arguments in enumerate(attempts, 1):
        try:
            git.run("fetch", "--quiet", "--no-tags", "--force", *arguments)
        except ContextError as e:
            if number == len(attempts) or not any(word in e.message.lower() for word in refusals):
                raise
        else:
            return


def _subdirectory(tree: Path, ref: GitRef) -> Path:
    """The wanted directory, its symlinks resolved within the checkout."""
    subdir = rootpath.clean(ref.subdir)
    if not subdir:
        return tree
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = rootpath.resolve(fd, subdir)
        os.close(rootpath.open_directory(fd, path))
    except OSError as e:
        raise ContextError(f"{_redacted(ref.remote)}: subdirectory {ref.subdir!r}: {e.strerror}") from e
    finally:
        os.close(fd)
    return tree / path


def _drop_git_directories(tree: Path) -> None:
    """Remove `.git`, and the `.git` files of submodules."""
    shutil.rmtree(tree / ".git")
    for directory, names, files in os.walk(tree):
        if ".git" in files:
            (Path(directory) / ".git").unlink()
        if ".git" in names:
            names.remove(".git")


def _tidy(git_directory: Path) -> None:
    """What would differ from one checkout to the next, or tell of this machine, goes."""
    shutil.rmtree(git_directory / "hooks", ignore_errors=True)
    shutil.rmtree(git_directory / "logs", ignore_errors=True)
    for name in ("FETCH_HEAD", "ORIG_HEAD"):
        (git_directory / name).unlink(missing_ok=True)


def _redacted(remote: str) -> str:
    if "://" not in remote:
        return remote
    from registry.errors import redact_url

    return redact_url(remote)


class _Git:
    """The program, with its environment; a context manager that removes its private files."""

    def __init__(self, remote: str, scratch: Path, access: GitSource, cancelled: Callable[[], bool]) -> None:
        self.remote = remote
        self.access = access
        self.cancelled = cancelled
        self.directory: Path | None = None
        self.home = scratch / f".git-home-{os.getpid()}-{id(self)}"
        if remote.startswith("-") or any(c < " " for c in remote):
            raise ContextError(f"{remote!r} is not the address of a repository")

    def __enter__(self) -> _Git:
        self.home.mkdir(mode=0o700, parents=True)
        if self.access.known_hosts is not None:
            (self.home / "known_hosts").write_text(self.access.known_hosts)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in self.access.environ.items() if key in _PASSED_ON}
        environment.setdefault("PATH", os.defpath)
        ssh = f"ssh -F {os.devnull} -o BatchMode=yes"
        if self.access.known_hosts is not None:
            ssh += f" -o UserKnownHostsFile='{self.home}/known_hosts'"
        else:
            ssh += f" -o StrictHostKeyChecking=no -o UserKnownHostsFile={os.devnull}"
        environment |= {
            "HOME": str(self.home),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "http:https:ssh:git",
            "GIT_SSH_COMMAND": ssh,
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        if self.access.ssh_socket is not None:
            environment["SSH_AUTH_SOCK"] = str(self.access.ssh_socket)
        settings = list(_CONFIG)
        header = self._authorization()
        if header:
            parts = urlsplit(self.remote)
            host = parts.netloc.rpartition("@")[2]
            settings.append((f"http.{parts.scheme}://{host}/.extraHeader", f"Authorization: {header}"))
        environment["GIT_CONFIG_COUNT"] = str(len(settings))
        for number, (key, value) in enumerate(settings):
            environment[f"GIT_CONFIG_KEY_{number}"] = key
            environment[f"GIT_CONFIG_VALUE_{number}"] = value
        return environment

    def _authorization(self) -> str:
        """The Authorization header by the secrets GIT_AUTH_HEADER and GIT_AUTH_TOKEN, those for the host first."""
        if not self.remote.startswith(("http://", "https://")):
            return ""
        host = urlsplit(self.remote).netloc.rpartition("@")[2]
        for suffix in (f".{host}", ""):
            header = self.access.secrets(f"GIT_AUTH_HEADER{suffix}")
            if header is not None:
                text = header.decode("utf-8", "replace").strip()
            else:
                token = self.access.secrets(f"GIT_AUTH_TOKEN{suffix}")
                if token is None:
                    continue
                text = "basic " + base64.b64encode(b"x-access-token:" + token.strip()).decode()
            if not text.isprintable():
                raise ContextError(f"the secret for git at {host} is not one line of text")
            return text
        return ""

    def run(self, *arguments: str) -> str:
        """Run git and give its output. Raises: ContextError with its complaint; Cancelled."""
        import subprocess

        try:
            process = subprocess.Popen(
                ["git", *arguments],
                cwd=self.directory or self.home,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                umask=0o022,  # modes in the tree are git's, not the caller's
                start_new_session=True,
            )
        except FileNotFoundError as e:
            raise ContextError(
                f"fetching {_redacted(self.remote)} needs the program git, which is not on PATH", hint="install git"
            ) from e
        except OSError as e:
            raise ContextError(f"cannot start git: {e.strerror}") from e
        try:
            out, err = self._communicate(process)
        except BaseException:
            _kill(process)
            raise
        if process.returncode != 0:
            complaint = self._without_secrets(err.decode("utf-8", "replace").strip())
            raise ContextError(f"git {arguments[0]} of {_redacted(self.remote)} failed: {complaint[-4000:]}")
        return out.decode("utf-8", "replace")

    def _without_secrets(self, text: str) -> str:
        """A complaint of git, which names the remote as it was given, password and all."""
        return text.replace(self.remote, _redacted(self.remote))

    def _communicate(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        assert process.stdout is not None and process.stderr is not None
        gathered = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        poller = select.poll()
        for fd in gathered:
            poller.register(fd, select.POLLIN)
        left = set(gathered)
        try:
            while left:
                if self.cancelled():
                    raise Cancelled
                for fd, _ in poller.poll(200):
                    data = os.read(fd, 65536)
                    if not data:
                        poller.unregister(fd)
                        left.discard(fd)
                    elif len(gathered[fd]) < _OUTPUT_MAX_BYTES:
                        gathered[fd] += data
            while process.poll() is None:
                if self.cancelled():
                    raise Cancelled
                time.sleep(0.01)
            return bytes(gathered[process.stdout.fileno()]), bytes(gathered[process.stderr.fileno()])
        finally:
            process.stdout.close()
            process.stderr.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End git with the helpers that it started: it leads a session of its own."""
    import signal

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
