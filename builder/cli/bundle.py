"""`pybuild bundle`: an image as a bundle for OCI runtimes."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser, Namespace
from pathlib import Path

from builder.cli.options import key_value, store_root


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
    add("-t", "--tty", action="store_true", help="a terminal")
    add("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="an environment variable")
    add("-w", "--workdir", metavar="DIR", help="the working directory")
    add("-u", "--user", metavar="USER[:GROUP]", help="who the command runs as")
    add("--entrypoint", metavar="COMMAND", help="in place of the image's; a JSON array, or one word; empty: none")
    add("--hostname", metavar="NAME", help="its host name")
    add(
        "--network",
        choices=["none", "host"],
        default="none",
        help="a network namespace of its own (default), or the host's",
    )
    add("--read-only", action="store_true", help="the root file system read-only")
    add("--privileged", action="store_true", help="all capabilities, no filter, nothing masked")
    add("image", metavar="IMAGE", help="an image of the store")
    add("directory", metavar="DIR", help="where to: it is made, or empty")
    add("command", nargs=REMAINDER, metavar="COMMAND", help="the command and its arguments (default: the image's)")


def run(verb: str, options: Namespace) -> int:
    from builder.cli.run import entrypoint
    from builder.container.bundle import write_bundle
    from builder.container.create import find_image
    from builder.container.options import ContainerOptions
    from builder.opening import open_store, prepare_namespaces
    from layers.oci import Platform

    wanted = ContainerOptions(
        image=options.image,
        command=tuple(options.command),
        entrypoint=None if options.entrypoint is None else entrypoint(options.entrypoint),
        env=tuple(key_value(text, "-e") for text in options.env),
        workdir=options.workdir,
        user=options.user,
        hostname=options.hostname,
        network=options.network,
        read_only=options.read_only,
        privileged=options.privileged,
        tty=options.tty,
    )
    platform = Platform.parse(options.platform) if options.platform else None
    directory = Path(options.directory).absolute()
    prepare_namespaces()
    with open_store(store_root(options)) as store:
        write_bundle(store, find_image(store, options.image, None, platform), directory, wanted)
    return 0
