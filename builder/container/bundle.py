"""`bundle`: an image as a runtime-spec bundle, config.json and rootfs, for runc, crun or any other OCI runtime.

The conversion is the image-spec's (conversion.md), the sandbox the same that `run` makes. What `run`
gives a container besides (hosts, resolv.conf, volumes, a network) is for whoever runs the bundle.
https://github.com/opencontainers/runtime-spec/blob/main/bundle.md
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.container import codec
from builder.container.create import merged_config, sandbox_spec
from builder.container.options import ContainerOptions
from builder.container.records import ContainerError
from builder.rootfs import image_mount, opened
from layers.snapshot import Mount

if TYPE_CHECKING:
    from layers.image import Image
    from layers.store import Store

_ANNOTATION = "org.opencontainers.image"
_ORDERS = (
    *("run.oci.", "module.wasm.", "org.systemd.property.", "org.criu."),
    *("io.katacontainers.", "dev.gvisor.", "io.kubernetes.", "io.containerd.", "io.podman."),
)
"""Annotations that runtimes obey: crun loads libraries by one, kata runs programs. No image's label is one of them."""


def write_bundle(store: Store, image: Image, directory: Path, options: ContainerOptions) -> None:
    """Write an image's bundle to a directory, which is made, or empty. What is half done is taken away.

    `options` as for `create_container`, without mounts and ports. Raises: ContainerError, ContextError,
    StoreError, SandboxError.
    """
    from layers.trees import copy_tree, remove_tree

    rootfs = directory / "rootfs"
    made = not directory.exists()
    try:
        # The set-id programs of an image are not for other users of this machine.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ContainerError(f"{directory} is not empty", hint="name a directory that is not there yet")
        rootfs.mkdir()
    except OSError as e:
        raise ContainerError(f"{directory}: {e.strerror}") from e
    try:
        _top, mount = image_mount(store, image)
        with opened(mount) as fd:
            status = os.stat(".", dir_fd=fd)
            os.chown(rootfs, status.st_uid, status.st_gid)
            os.chmod(rootfs, status.st_mode & 0o7777)
            copy_tree(fd, str(rootfs))
        document = config(store.root, image, rootfs, options)
        # Nor is what a runtime will do as our user for others to write, whatever the umask.
        fd = os.open(directory / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    except BaseException as e:
        remove_tree(str(rootfs))
        (directory / "config.json").unlink(missing_ok=True)
        if made:
            directory.rmdir()
        if isinstance(e, OSError):
            raise ContainerError(f"{e.filename or directory}: {e.strerror}") from e
        raise


def config(root: Path, image: Image, rootfs: Path, options: ContainerOptions) -> dict[str, Any]:
    """The bundle's config.json as a document. Raises: ContextError for an unknown user, ContainerError."""
    from builder.sandbox import oci
    from builder.sandbox.launcher import host_now

    settings = merged_config(dict(image.config.config), options)
    network = "none" if options.network == "default" else options.network
    hostname = options.hostname or str(image.image_id).partition(":")[2][:12]
    tree = Mount("bind", (rootfs.absolute(),))
    spec = sandbox_spec(root, settings, options, tree, hostname, network, [])
    spec = codec.decode(codec.encode(spec), files={}, terminal=options.window if options.tty else None)
    host = host_now()
    document = oci.config(spec, [], host)
    document["root"]["path"] = "rootfs"
    document["annotations"] = _annotations(image, settings)
    if host.rootless:
        linux = document["linux"]
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"], linux["gidMappings"] = _mapping("uid"), _mapping("gid")
        # Without a delegated group an ordinary user's runtime may set no limits.
        linux.pop("resources", None)
        # runc refuses them where the caller is not root.
        document["process"]["user"].pop("additionalGids", None)
    return document


def _mapping(kind: str) -> list[dict[str, int]]:
    """How this user namespace's ids lie in the one above, in which the runtime will be called."""
    rows = (line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines())
    return [{"containerID": int(a), "hostID": int(b), "size": int(c)} for a, b, c in rows]


def _annotations(image: Image, settings: dict[str, Any]) -> dict[str, str]:
    """What the image-spec's conversion keeps of a config that a runtime has no use for."""
    document = image.config.document
    found = {
        key: str(document[key]) for key in ("os", "architecture", "variant", "author", "created") if document.get(key)
    }
    if settings.get("StopSignal"):
        found["stopSignal"] = str(settings["StopSignal"])
    if settings.get("ExposedPorts"):
        found["exposedPorts"] = ",".join(sorted(settings["ExposedPorts"]))
    labels = {str(key): str(value) for key, value in (settings.get("Labels") or {}).items()}
    labels = {key: value for key, value in labels.items() if not key.startswith(_ORDERS)}
    return {**{f"{_ANNOTATION}.{key}": value for key, value in found.items()}, **labels}
