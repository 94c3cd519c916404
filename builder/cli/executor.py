"""`pybuild executor`: kaniko's flags, translated into a build of pybuild's own, which is shown and then done.

Every flag of kaniko's executor is in the table below: translated, without a meaning here (said on
stderr), or refused with the reason. Nothing of the container that it runs in gets into the image, and
nothing of it is overwritten.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from builder.cli.options import InvalidValue, boolean
from builder.errors import UsageError

Kind = Literal["text", "list", "number", "switch"]


class Flag(NamedTuple):
    """A flag of kaniko's. `note` is what is said where it has no effect, `refusal` why it is an error."""

    name: str
    kind: Kind = "text"
    short: str = ""
    note: str = ""
    refusal: str = ""
    default: str = ""
    """What it may always be without a word."""
    help: str = ""


_LEVELS = ("trace", "debug", "info", "warn", "warning", "error", "fatal", "panic")
_HEADER = "GIT_AUTH_HEADER"
_SNAPSHOT = "changes come from an overlay, not from looking at all files"
_ISOLATED = "the container's own files never get into the image"

FLAGS: tuple[Flag, ...] = (
    Flag("dockerfile", short="-f", help="the Dockerfile, in the context or by its path"),
    Flag("context", short="-c", help="the build context: dir://, tar:// (- is stdin), git://, https://"),
    Flag("context-sub-path", help="the directory of the context that is built"),
    Flag("destination", "list", "-d", help="where the image is pushed; may be given again"),
    Flag("no-push", "switch", help="build, and push nothing"),
    Flag("tar-path", help="write the image there, as `docker save` does"),
    Flag("tarPath", help="the same"),
    Flag("oci-layout-path", help="write the image there as an OCI layout"),
    Flag("digest-file", help="write the image's digest there"),
    Flag("image-name-with-digest-file", help="write NAME@DIGEST there"),
    Flag("image-name-tag-with-digest-file", help="write NAME:TAG@DIGEST there"),
    Flag("build-arg", "list", help="KEY=VALUE of an ARG"),
    Flag("label", "list", help="KEY=VALUE, a label of the image"),
    Flag("target", help="build this stage instead of the last"),
    Flag("custom-platform", help="OS/ARCH of the image"),
    Flag("customPlatform", help="the same"),
    Flag("single-snapshot", "switch", help="make one layer of all new ones"),
    Flag("reproducible", "switch", help="take the times out of the image"),
    Flag("compression", help="of layers: gzip or zstd"),
    Flag("compression-level", "number", help="the codec's own scale; -1 is its default"),
    Flag("cache", "switch", help="find steps again that were built before (default: false)"),
    Flag("cache-repo", help="the repository of the cache (default: the destination's, with /cache)"),
    Flag("no-push-cache", "switch", help="read the cache, and write nothing to it"),
    Flag("cache-ttl", help="how old a cached step may be, such as 336h"),
    Flag("insecure", "switch", help="push by plain http"),
    Flag("skip-tls-verify", "switch", help="push without verifying TLS"),
    Flag("insecure-pull", "switch", help="pull by plain http"),
    Flag("skip-tls-verify-pull", "switch", help="pull without verifying TLS"),
    Flag("insecure-registry", "list", help="a registry that is reached by plain http"),
    Flag("skip-tls-verify-registry", "list", help="a registry whose TLS is not verified"),
    Flag("registry-certificate", "list", help="HOST=FILE, the CA of a registry"),
    Flag("registry-client-cert", "list", help="HOST=CERT,KEY for a registry"),
    Flag("registry-mirror", "list", help="a mirror of Docker Hub"),
    Flag("registry-map", "list", help="HOST=OTHER;…: other places for a registry"),
    Flag("skip-default-registry-fallback", "switch", help="ask the mirrors alone"),
    Flag("push-retry", "number", help="so many more tries of a push"),
    Flag("image-download-retry", "number", help="so many more tries of a pull"),
    Flag("git", help="branch=…,single-branch=…,recurse-submodules=… of a git context"),
    Flag("verbosity", short="-v", help="trace to panic: how much is told"),
    Flag("log-format", help="text, color or json"),
    Flag("cache-dir", note="base images are kept in pybuild's own store"),
    Flag("cache-copy-layers", "switch", note="every kind of step is cached"),
    Flag("cache-run-layers", "switch", note="every kind of step is cached", default="true"),
    Flag("compressed-caching", "switch", note="memory does not grow with the layer", default="true"),
    Flag("cleanup", "switch", note="a build leaves nothing behind"),
    Flag("force", "switch", note=_ISOLATED),
    Flag("force-build-metadata", "switch", note="metadata needs no layers"),
    Flag("ignore-path", "list", note=_ISOLATED),
    Flag("ignore-var-run", "switch", note=_ISOLATED, default="true"),
    Flag("whitelist-var-run", "switch", note=_ISOLATED, default="true"),
    Flag("image-fs-extract-retry", "number", note="what was fetched is whole"),
    Flag("kaniko-dir", note="the store is where --root or PYBUILD_ROOT says"),
    Flag("log-timestamp", "switch", note="progress tells the time that each step took", default="false"),
    Flag("skip-push-permission-check", "switch", note="it is one request before the first step"),
    Flag("skip-unused-stages", "switch", note="stages that nothing needs are never built", default="true"),
    Flag("snapshot-mode", note=_SNAPSHOT),
    Flag("snapshotMode", note=_SNAPSHOT),
    Flag("use-new-run", "switch", note=_SNAPSHOT),
    Flag("azure-container-registry-config", refusal="put the credentials into config.json, or a helper's name"),
    Flag("bucket", short="-b", refusal="there is no client for buckets: fetch the tar, and give --context tar://FILE"),
    Flag("push-ignore-immutable-tag-errors", "switch", refusal="an image that was not pushed is an error"),
    Flag("upload-tar", refusal="write it with --tar-path, and send it with curl"),
    Flag("upload-tar-retry", "number", refusal="there is no --upload-tar"),
)


class Translation(NamedTuple):
    """The build that the flags mean: its arguments, and the files that it needs besides."""

    arguments: list[str]
    registries: str = ""
    """A registries.conf, "" if none is needed."""
    certificates: dict[str, str] = {}  # noqa: RUF012 - never changed
    """What to copy into a directory of certificates, by the name there."""
    stdin: str = ""
    """A file to read the context from."""
    notes: tuple[str, ...] = ()


def configure(verb: str, parser: ArgumentParser) -> None:
    for flag in FLAGS:
        names = [f"--{flag.name}", *([flag.short] if flag.short else [])]
        told = flag.help or (f"without effect: {flag.note}" if flag.note else f"refused: {flag.refusal}")
        if flag.kind == "switch":
            parser.add_argument(*names, nargs="?", const=True, type=boolean, metavar="BOOL", help=told)
        elif flag.kind == "list":
            parser.add_argument(*names, action="append", default=[], metavar="VALUE", help=told)
        elif flag.kind == "number":
            parser.add_argument(*names, type=int, metavar="N", help=told)
        else:
            parser.add_argument(*names, metavar="VALUE", help=told)


def run(verb: str, options: Namespace) -> int:
    from builder.cli.main import main

    translation = translate(options, os.environ)
    for note in translation.notes:
        print(f"note: {note}", file=sys.stderr)
    with ExitStack() as stack:
        place = Path(stack.enter_context(_directory()))
        own = ["--root", options.root] if options.root else []
        own += ["--debug"] if options.debug else []
        if translation.registries:
            (place / "registries.conf").write_text(translation.registries)
            own += ["--registries-conf", str(place / "registries.conf")]
            for line in translation.registries.splitlines():
                print(f"note: registries.conf: {line}", file=sys.stderr)
        if translation.certificates:
            _copy_certificates(translation.certificates, place / "certificates")
            own += ["--cert-dir", str(place / "certificates")]
        redirect = f" < {shlex.quote(translation.stdin)}" if translation.stdin else ""
        print(f"+ pybuild build {shlex.join(_shown(translation.arguments))}{redirect}", file=sys.stderr)
        if translation.stdin:
            _read_from(translation.stdin)
        if os.environ.get("GIT_PASSWORD"):
            os.environ.setdefault(_HEADER, _basic(os.environ.get("GIT_USERNAME", ""), os.environ["GIT_PASSWORD"]))
        metadata = place / "metadata.json"
        status = main(["build", *own, "--metadata-file", str(metadata), *translation.arguments])
        if status == 0:
            _write_digests(options, metadata)
    return status


def _shown(arguments: list[str]) -> list[str]:
    """What may be read in a log: a repository's URL without the token that is often in it."""
    from urllib.parse import urlsplit

    def shown(word: str) -> str:
        user = word.partition("://")[2].partition("/")[0].rpartition("@")[0]
        return word.replace(f"{user}@", "***@", 1) if user and urlsplit(word).scheme else word

    return [shown(word) for word in arguments]


def _directory() -> AbstractContextManager[str]:
    from tempfile import TemporaryDirectory

    return TemporaryDirectory(prefix="pybuild-executor-")


def _basic(user: str, password: str) -> str:
    from base64 import b64encode

    return f"basic {b64encode(f'{user}:{password}'.encode()).decode()}"


def _read_from(name: str) -> None:
    try:
        fd = os.open(name, os.O_RDONLY)
    except OSError as e:
        raise UsageError(f"--context tar://{name}: {e.strerror}") from e
    os.dup2(fd, 0)
    os.close(fd)


def _copy_certificates(files: Mapping[str, str], target: Path) -> None:
    target.mkdir()
    for name, source in files.items():
        try:
            (target / name).write_bytes(Path(source).read_bytes())
        except OSError as e:
            raise UsageError(f"cannot read the certificate {source}: {e.strerror}") from e


def _write_digests(options: Namespace, metadata: Path) -> None:
    """The files that later steps of a pipeline read: a digest, and the names with it."""
    import json

    from registry.reference import Reference

    digest = json.loads(metadata.read_bytes())["containerimage.digest"]
    names = [Reference.parse(name).with_default_tag() for name in options.destination]
    texts = {
        options.digest_file: digest,
        options.image_name_with_digest_file: "".join(f"{name.repository}@{digest}\n" for name in names),
        options.image_name_tag_with_digest_file: "".join(f"{name.canonical()}@{digest}\n" for name in names),
    }
    for path, text in texts.items():
        if path:
            try:
                Path(path).write_text(text)
            except OSError as e:
                raise UsageError(f"cannot write {path}: {e.strerror}") from e


# The translation


def translate(options: Namespace, environ: Mapping[str, str]) -> Translation:
    """What kaniko's flags, and its variables in `environ`, mean here. Raises: UsageError."""
    notes = _unneeded(options)
    no_push = bool(options.no_push)
    if "KANIKO_NO_PUSH" in environ:
        try:
            no_push = boolean(environ["KANIKO_NO_PUSH"])
        except InvalidValue as e:
            raise UsageError(f"KANIKO_NO_PUSH: {e}") from e
    if not no_push and not options.destination:
        raise UsageError("there is no --destination", hint="or say --no-push")
    context, stdin = _context(options)
    arguments = [word for name in options.destination for word in ("-t", name)]
    arguments += _inputs(options, context, environ)
    arguments += _image(options)
    arguments += _cache(options, no_push)
    if options.destination and not no_push:
        arguments.append("--push")
    tar = options.tar_path or options.tarPath
    if tar:
        arguments += ["-o", f"type=docker,dest={tar}"]
    if options.oci_layout_path:
        arguments += ["-o", f"type=oci,tar=false,dest={options.oci_layout_path}"]
    tries = max(options.push_retry or 0, options.image_download_retry or 0)
    if min(options.push_retry or 0, options.image_download_retry or 0) < 0:
        raise UsageError("--push-retry and --image-download-retry are numbers of tries")
    if tries:
        arguments += ["--retry", str(tries)]
    if options.insecure_pull or options.skip_tls_verify_pull:
        arguments.append("--tls-verify=false")
    arguments += _logging(options)
    return Translation(
        [*arguments, context],
        _registries(options, environ),
        _certificates(options),
        stdin,
        tuple(notes),
    )


def _unneeded(options: Namespace) -> list[str]:
    notes = []
    for flag in FLAGS:
        value = getattr(options, flag.name.replace("-", "_"))
        if value is None or value == []:
            continue
        if flag.refusal:
            raise UsageError(f"--{flag.name} is not possible: {flag.refusal}")
        if flag.note and str(value).lower() != flag.default:
            notes.append(f"--{flag.name} has no effect: {flag.note}")
    return notes


def _context(options: Namespace) -> tuple[str, str]:
    """The context as `build` takes it, and the file to be read on stdin."""
    text = options.context or "/workspace/"
    scheme, separator, rest = text.partition("://")
    sub = options.context_sub_path or ""
    if not separator or scheme == "dir":
        place = rest if separator else text
        return os.path.join(place, sub) if sub else place, ""
    if scheme == "tar":
        if sub:
            raise UsageError("--context-sub-path is not possible for a tar", hint="put the sub-directory into the tar")
        return "-", "" if rest == "stdin" else rest
    if scheme == "git":
        return _repository(rest, sub, options.git or ""), ""
    if scheme in {"http", "https"} and "blob.core.windows.net" not in rest.partition("/")[0]:
        if sub:
            raise UsageError("--context-sub-path is not possible for a download")
        return text, ""
    raise UsageError(
        f"--context {text}: there is no client for such storage", hint="fetch the tar, and give --context tar://FILE"
    )


def _repository(text: str, sub: str, git: str) -> str:
    """`HOST/PATH[#REF][#COMMIT]` by https, as kaniko fetches it; `git` is its flag of that name."""
    where, *references = text.split("#")
    branch = ""
    for field in filter(None, git.split(",")):
        key, _, value = field.partition("=")
        if key == "branch":
            branch = value
        elif key not in {"single-branch", "recurse-submodules"}:
            raise UsageError(f"--git {field} is not possible")
    method = os.environ.get("GIT_PULL_METHOD", "https")
    if method not in {"http", "https"}:
        raise UsageError(f"GIT_PULL_METHOD={method} is not possible", hint="there are https and http")
    where = where if where.endswith(".git") else f"{where}.git"
    fragment = (references[-1] if references else branch) + (f":{sub}" if sub else "")
    return f"{method}://{where}{'#' if fragment else ''}{fragment}"


def _inputs(options: Namespace, context: str, environ: Mapping[str, str]) -> list[str]:
    arguments = ["-f", options.dockerfile or "Dockerfile"]
    for text in options.build_arg:
        # A name alone takes its value from the environment, an empty one if it has none.
        # By its name, as what is done is shown, and may be a secret's value.
        arguments += ["--build-arg", text if "=" in text or text in environ else f"{text}="]
    if ".git" in context and environ.get("GIT_TOKEN"):
        arguments += ["--secret", "id=GIT_AUTH_TOKEN,env=GIT_TOKEN"]
    elif ".git" in context and environ.get("GIT_PASSWORD"):
        arguments += ["--secret", f"id=GIT_AUTH_HEADER,env={_HEADER}"]
    for flag, value in (
        ("--target", options.target),
        ("--platform", options.custom_platform or options.customPlatform),
    ):
        arguments += [flag, value] if value else []
    return arguments


def _image(options: Namespace) -> list[str]:
    arguments = [word for text in options.label for word in ("--label", text)]
    if options.single_snapshot:
        arguments.append("--squash")
    if options.reproducible:
        arguments += ["--timestamp", "0"]
    if options.compression:
        arguments += ["--compression", options.compression]
    if options.compression_level is not None and options.compression_level >= 0:
        arguments += ["--compression-level", str(options.compression_level)]
    return arguments


def _cache(options: Namespace, no_push: bool) -> list[str]:
    """kaniko's cache is off unless asked for, and lies in a registry."""
    if not options.cache:
        return ["--no-cache"]
    repository = options.cache_repo
    if not repository:
        if no_push or not options.destination:
            raise UsageError("--cache with --no-push needs --cache-repo")
        from registry.reference import Reference

        repository = f"{Reference.parse(options.destination[0]).repository}/cache"
    if repository.startswith("oci:"):
        place = repository.removeprefix("oci:")
        refs = f"type=local,src={place}", f"type=local,dest={place},mode=max"
    else:
        refs = f"type=registry,ref={repository}", f"type=registry,ref={repository},mode=max"
    arguments = ["--cache-from", f"{refs[0]},ignore-error=true", "--cache-ttl", options.cache_ttl or "336h"]
    if not options.no_push_cache:
        arguments += ["--cache-to", refs[1]]
    return arguments


def _logging(options: Namespace) -> list[str]:
    if options.log_format not in {None, "text", "color", "json"}:
        raise UsageError(f"--log-format {options.log_format}: there are text, color and json")
    if options.verbosity not in {None, *_LEVELS}:
        raise UsageError(f"--verbosity {options.verbosity}: there are {', '.join(_LEVELS)}")
    if options.log_format == "json":
        return ["--progress=rawjson"]
    if options.verbosity in {"warn", "warning", "error", "fatal", "panic"}:
        return ["--progress=quiet"]
    return ["--progress=plain"]


def _registries(options: Namespace, environ: Mapping[str, str]) -> str:
    """Mirrors and insecure registries as a registries.conf."""
    from registry.reference import Reference

    insecure = {*options.insecure_registry, *options.skip_tls_verify_registry}
    if options.insecure or options.skip_tls_verify:
        insecure |= {Reference.parse(name).domain for name in options.destination}
    mirrors: dict[str, list[str]] = {}
    maps = [
        part for text in [*options.registry_map, environ.get("KANIKO_REGISTRY_MAP", "")] for part in text.split(";")
    ]
    for text in filter(None, maps):
        original, separator, other = text.partition("=")
        if not separator or not other:
            raise UsageError(f"--registry-map {text}: expected ORIGINAL=MIRROR")
        mirrors.setdefault(original, []).append(other)
    for text in [*options.registry_mirror, environ.get("KANIKO_REGISTRY_MIRROR", "")]:
        if text:
            mirrors.setdefault("docker.io", []).append(text)
    lines: list[str] = []
    for original in sorted({*mirrors, *insecure}):
        own = "docker.io" if original in {"index.docker.io", "registry-1.docker.io"} else original
        others = list(mirrors.get(original, []))
        location = own
        if options.skip_default_registry_fallback and others:
            location = others.pop()
        lines += ["[[registry]]", f'prefix = "{_quoted(own)}"', f'location = "{_quoted(location)}"']
        if {own, location} & insecure:
            lines.append("insecure = true")
        for other in others:
            lines += ["[[registry.mirror]]", f'location = "{_quoted(other)}"']
            if other.partition("/")[0] in insecure:
                lines.append("insecure = true")
    return "".join(f"{line}\n" for line in lines)


def _quoted(host: str) -> str:
    if not host or any(c in '"\\' or c.isspace() or not c.isprintable() for c in host):
        raise UsageError(f"{host!r} is no registry")
    return host


def _certificates(options: Namespace) -> dict[str, str]:
    hosts: set[str] = set()
    files: dict[str, str] = {}
    for text in options.registry_certificate:
        host, _, path = text.partition("=")
        if not path:
            raise UsageError(f"--registry-certificate {text}: expected HOST=CERTIFICATE")
        hosts.add(host)
        files[f"{len(files)}.crt"] = path
    for text in options.registry_client_cert:
        host, _, paths = text.partition("=")
        certificate, separator, key = paths.partition(",")
        if not separator:
            raise UsageError(f"--registry-client-cert {text}: expected HOST=CERTIFICATE,KEY")
        hosts.add(host)
        files |= {"client.cert": certificate, "client.key": key}
    if len(hosts) > 1 or "" in hosts:
        raise UsageError(
            "certificates of several registries are not possible as flags",
            hint="put them into /etc/containers/certs.d/HOST:PORT/",
        )
    return files
