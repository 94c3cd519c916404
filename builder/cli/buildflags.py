"""The flags of `build`, in the groups in which its help shows them; `builder.cli.buildrequest` reads them."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from builder.cli.options import (
    add_additional_stores,
    add_registry_options,
    add_retry_options,
    boolean,
    duration,
)
from builder.cli.sandboxflags import add_limit_options, add_sandbox_options


def add_build_options(parser: ArgumentParser) -> None:
    """The context and all flags."""
    parser.add_argument(
        "context", nargs="?", default=None, metavar="CONTEXT",
        help="a directory (default: the working directory), a tarball's or git repository's URL, or - for a tar on "
        "stdin",
    )  # fmt: skip
    _add_inputs(parser)
    _add_image(parser)
    _add_layers(parser)
    _add_outputs(parser)
    _add_cache(parser)
    _add_progress(parser)
    _add_run(parser)
    add_sandbox_options(parser)
    add_limit_options(parser, manager=True)
    add_registry_options(parser)
    add_retry_options(parser)


def _add_inputs(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("what is built").add_argument
    add("-f", "--file", action="append", default=[], metavar="FILE",
        help="the Containerfile; - is stdin, a URL is fetched, several are one (default: the context's)")  # fmt: skip
    add("--target", metavar="STAGE", help="build this stage (default: the last)")
    add("--from", dest="base", metavar="IMAGE", help="begin the first stage from this image instead")
    add("--platform", action="append", default=[], metavar="OS/ARCH",
        help="target platforms, by commas; several make an index (default: this machine's)")  # fmt: skip
    add("--os", metavar="OS", help="of a single target platform (default: linux)")
    add("--arch", metavar="ARCH", help="its processor, such as arm64 (default: this machine's)")
    add("--variant", metavar="VARIANT", help="the processor's variant, such as v7")
    add("--build-arg", action="append", default=[], metavar="KEY[=VALUE]",
        help="value of an ARG; without =VALUE that of the environment variable")  # fmt: skip
    add("--build-arg-file", action="append", default=[], metavar="FILE", help="a file of KEY=VALUE lines")
    add("--build-context", action="append", default=[], metavar="NAME=VALUE",
        help="another context: a directory, docker-image://…, oci-layout://…, https://…")  # fmt: skip
    add("--ignorefile", metavar="FILE", help="use this instead of .containerignore or .dockerignore")
    add("--pull", nargs="?", const="always", default="missing", metavar="POLICY",
        help="fetch base images: always, missing, never, newer (default: missing; --pull alone: always)")  # fmt: skip
    add_additional_stores(parser, add)
    add("--locked", action="store_true", help="use what the lock file pins, and nothing else (see `pybuild lock`)")
    add("--lock-file", metavar="FILE", help="the lock file (default: the Containerfile's name with .lock)")
    add("--source-policy-file", action="append", default=[], metavar="FILE",
        help="which images, URLs and repositories may be used, as BuildKit's JSON")  # fmt: skip
    add("--cpp-flag", action="append", default=[], metavar="FLAG",
        help="a flag for cpp(1), which reads *.in files first, such as -DNAME=1")  # fmt: skip
    add("--check", action="store_true", help="lint the Containerfile instead of building it")
    add("--call", choices=["build", "check", "outline", "targets"], default="build",
        help="do this instead of building (default: build)")  # fmt: skip


def _add_image(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the image").add_argument
    add("-t", "--tag", action="append", default=[], metavar="NAME", help="name of the image; may be given again")
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the image")
    add("--annotation", action="append", default=[], metavar="[LEVEL:]KEY=VALUE",
        help="an annotation; levels: manifest (default), manifest-descriptor (both also as manifest[OS/ARCH]), "
        "index")  # fmt: skip
    add("--env", action="append", default=[], metavar="KEY[=VALUE]",
        help="an environment variable of the image; without =VALUE the caller's")  # fmt: skip
    add("--unsetenv", action="append", default=[], metavar="KEY", help="take a variable out of the image")
    add("--unsetlabel", action="append", default=[], metavar="KEY", help="take a label out of the image")
    add("--inherit-labels", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="take over the base image's labels (default: true)")  # fmt: skip
    add("--format", default="oci", choices=["oci", "docker"], help="media types of the image (default: oci)")
    add("--timestamp", type=int, metavar="SECONDS",
        help="time of everything new, in seconds since 1970 (default: SOURCE_DATE_EPOCH, else now)")  # fmt: skip
    add("--rewrite-timestamp", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
        help="with --timestamp, no file of a new layer is newer (default: true)")  # fmt: skip
    add("--omit-history", action="store_true", help="leave the history out of the config")


def _add_layers(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("its layers").add_argument
    add("--compression", default="gzip", choices=["gzip", "zstd", "none", "uncompressed", "estargz", "zstd:chunked"],
        help="of new layers (default: gzip)")  # fmt: skip
    add("--compression-level", type=int, metavar="N", help="gzip 1 to 9, zstd 1 to 22 (default: fast)")
    add("--force-compression", action="store_true", help="compress the base image's layers so, too")
    add("--squash", action="store_true", help="make one layer of all new ones")
    add("--squash-all", action="store_true", help="make one layer of the whole image")
    add("--fold", action="store_true", help="store no data again that a lower layer of this build has (chown -R)")
    add("--verify-layers", action="store_true", help="read each new layer back and compare it with the tree")
    add("--secret-gate", nargs="?", const=True, type=boolean, default=False, metavar="BOOL",
        help="refuse an image that holds a --secret's value, or whose build printed it (default: false)")  # fmt: skip
    # What scripts for others say, and what holds here anyway: nothing else is taken.
    for name in ("--rm", "--force-rm"):
        add(name, nargs="?", const=True, type=boolean, default=True, help=SUPPRESS)
    for name in ("--provenance", "--sbom"):
        add(name, nargs="?", const="true", default="false", metavar="BOOL", help=SUPPRESS)
    # buildah's default-off cache switch
    add("--layers", nargs="?", const=True, type=boolean, default=True, help=SUPPRESS)


def _add_outputs(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("where it goes, besides the local store").add_argument
    add("-o", "--output", action="append", default=[], metavar="type=TYPE[,dest=PATH][,name=NAME]",
        help="registry, oci, docker, tar, local, squashfs or image; a word alone is a directory, - a tar on stdout; "
        "may be given again")  # fmt: skip
    add("--push", action="store_true", help="send the image to the registry of its names")
    add("--load", action="store_true", help="give the image to the Docker daemon")
    add("--iidfile", metavar="FILE", help="write the image id there")
    add("--metadata-file", metavar="FILE", help="write what was built there, as JSON")


def _add_cache(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the cache").add_argument
    add("--no-cache", action="store_true", help="run every step")
    add("--no-cache-filter", action="append", default=[], metavar="STAGE", help="run every step of these stages")
    add("--cache-ttl", type=duration, metavar="DURATION", help="do not use results older than this, such as 12h")
    add("--cache-to", action="append", default=[], metavar="type=registry|local|inline[,ref=NAME][,mode=min|max]",
        help="write the steps' results there, for other machines")  # fmt: skip
    add("--cache-from", action="append", default=[], metavar="type=registry|local[,ref=NAME]",
        help="take steps' results from there")  # fmt: skip
    add("--cache-mounts", nargs="?", const=True, type=boolean, default=False, metavar="BOOL",
        help="let the contents of cache mounts travel with --cache-to and --cache-from (default: false)")  # fmt: skip
    add("--explain", action="store_true", help="tell before running why each step is found or not")


def _add_progress(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("progress").add_argument
    add("-j", "--jobs", type=int, default=0, metavar="N", help="steps at once (default: one a processor)")
    add("--progress", default=None, choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="how it is shown (default: BUILDKIT_PROGRESS, else auto: tty on a terminal, plain elsewhere)")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="print the image id alone")
    add("--logfile", metavar="FILE", help="append progress to this file instead of showing it")
    add("--summary", nargs="?", const=True, type=boolean, default=None, metavar="BOOL",
        help="tell at the end where the time went (default: on a terminal)")  # fmt: skip
    add("--timeline", metavar="FILE", help="draw the build as a chart (.svg, .html), or write its trace (.json)")
    add("--on-error", default="stop", metavar="stop|shell|capsule[=FILE]",
        help="when a RUN fails: stop (default), open a shell in its sandbox, or keep all in a file for "
        "`pybuild shell`")  # fmt: skip


def _add_run(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("the world of RUN").add_argument
    add("--secret", action="append", default=[], metavar="id=ID[,src=FILE|env=NAME]",
        help="a secret for RUN --mount=type=secret")  # fmt: skip
    add("--ssh", action="append", default=[], metavar="default|ID[=SOCKET|KEY,…]",
        help="an ssh agent, or keys, for RUN --mount=type=ssh")  # fmt: skip
    add("--allow", action="append", default=[], metavar="ENTITLEMENT",
        help="what RUN may ask for: security.insecure, device, device=CDI-NAME; network.host always may")  # fmt: skip
    add("-v", "--volume", action="append", default=[], metavar="HOST:CTR[:ro]",
        help="bind a directory of the host for every RUN")  # fmt: skip
    add("--mount", action="append", default=[], metavar="type=TYPE,…",
        help="a mount for every RUN, as RUN --mount has it")  # fmt: skip
    add("--default-mounts-file", metavar="FILE", help="read this instead of mounts.conf")
    add("--timeout", type=duration, metavar="DURATION", help="kill a RUN that takes longer, such as 10m")
    add("--network", "--net", default="default", choices=["default", "host", "none", "private"],
        help="the network of RUN: the host's (default), none, or private, one of its own behind NAT")  # fmt: skip
    add("--isolation", default="auto", choices=["auto", "pivot", "chroot", "rootless", "single", "oci"],
        help="how RUN is isolated (default: the best that works here, see `pybuild doctor`)")  # fmt: skip
    add("--runtime", metavar="NAME", help="the runtime of --isolation oci: runc, crun, … or a path")
    add("--storage-driver", default="auto", choices=["auto", "overlay", "fuse-overlayfs", "native"],
        help="how layers are stacked: by the kernel, a program, as copies (default: the first that works)")  # fmt: skip
