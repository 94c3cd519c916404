"""Flags that users of docker, buildah, podman, skopeo and kaniko know and pybuild has not: what to do instead.

A table of words for people, looked up only when a command line has already been refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PLATFORM = "--platform OS/ARCH[/VARIANT]"
_SIGNING = "pybuild neither signs nor checks signatures: cosign and notation sign what it has pushed"
_ENCRYPTION = "pybuild has no encrypted images: skopeo copy has them"
_CREDENTIALS = "--creds USER[:PASSWORD], or `pybuild login`"
ATTESTATIONS = "pybuild makes no attestations: `pybuild artifact attach` adds an SBOM or a provenance file to an image"
_LATEST = "name the container: `pybuild ps -lq` is the last one made"
_FILTERED = "give names: `pybuild ps -aq --filter …` lists them"
_BUILDER = "there is no daemon and no builder to choose: every command builds by itself"
_LAYOUT_BLOBS = "a layout has its blobs in itself: write to oci:DIR"
_SYNCED = "a YAML file says what is mirrored: `pybuild sync FILE DEST`"
_DAEMON = "DOCKER_HOST names the daemon"

_EVERYWHERE: Mapping[str, str] = {
    "--arch": _PLATFORM,
    "--os": _PLATFORM,
    "--variant": _PLATFORM,
    "--os-version": "--platform 'OS(VERSION)/ARCH'",
    "--os-feature": "--platform 'OS(VERSION+FEATURE)/ARCH'",
    "--override-arch": _PLATFORM,
    "--override-os": _PLATFORM,
    "--override-variant": _PLATFORM,
    "--sign-by": _SIGNING,
    "--sign-by-sigstore": _SIGNING,
    "--sign-by-sigstore-private-key": _SIGNING,
    "--sign-passphrase-file": _SIGNING,
    "--sign-identity": _SIGNING,
    "--remove-signatures": "signatures are copied only where --referrers or --digest-tags ask for them",
    "--disable-content-trust": _SIGNING,
    "--encryption-key": _ENCRYPTION,
    "--encrypt-layer": _ENCRYPTION,
    "--decryption-key": _ENCRYPTION,
    "--username": _CREDENTIALS,
    "--password": _CREDENTIALS,
    "--src-username": "--src-creds USER[:PASSWORD]",
    "--src-password": "--src-creds USER[:PASSWORD]",
    "--dest-username": "--dest-creds USER[:PASSWORD]",
    "--dest-password": "--dest-creds USER[:PASSWORD]",
    "--retry-times": "--retry N",
    "--daemon-host": _DAEMON,
    "--src-daemon-host": _DAEMON,
    "--dest-daemon-host": _DAEMON,
    "--shared-blob-dir": _LAYOUT_BLOBS,
    "--src-shared-blob-dir": _LAYOUT_BLOBS,
    "--dest-shared-blob-dir": _LAYOUT_BLOBS,
    "--disable-compression": "--compression none",
    "-D": "--compression none",
    "--dest-compress": "--compression gzip",
    "--dest-compress-format": "--compression FORMAT",
    "--dest-decompress": "--compression none",
    "--compression-format": "--compression FORMAT",
    "--additional-tag": "`pybuild copy` once more: what is there already is not sent again",
    "--latest": _LATEST,
    "--cidfile": _FILTERED,
    "--noheading": "--json or -q print no heading",
    "--signature-policy-file": "--signature-policy FILE",
    "--verbose": "--debug",
    "--log-level": "--debug",
    "--storage-opt": "--root says where the store is; a store has no size limit, PYBUILD_GC_KEEP is what it shrinks to",
    "--runtime-flag": "--runtime takes a name or a path: a script of yours can add flags to a runtime's",
}

_BUILDS: Mapping[str, str] = {
    "--attest": ATTESTATIONS,
    "--all-platforms": "--platform names them, by commas: `pybuild manifest inspect BASE` lists the base's",
    "--manifest": "--platform A,B -t NAME makes an index at once; `pybuild manifest add` puts images into one",
    "--builder": _BUILDER,
    "--compress": "no context is sent anywhere: COPY reads the directory itself",
    "--http-proxy": "RUN has the proxies of the environment; `env -u HTTP_PROXY … pybuild` takes them away",
    "--print": "--call=check, outline or targets",
    "--skip-unused-stages": "--target STAGE builds a stage that the last one does not need",
    "--logsplit": "--logfile FILE; `pybuild builds logs` has each build's",
    "--hooks-dir": "there are no OCI hooks: -v and --mount add files to every RUN",
    "--stdin": "a RUN has no standard input: --on-error=shell looks into a step",
    "--identity-label": "no label is added to images but those that are asked for",
    "--policy": "--source-policy-file FILE",
    "--resource": "--memory, --cpus, --cpu-shares, --cpuset-cpus, --pids-limit",
    "--save-stages": "--target STAGE -t NAME builds a stage as an image",
    "--destination": "-t NAME --push; `pybuild executor` takes kaniko's flags",
    "--context": "CONTEXT is the last word; `pybuild executor` takes kaniko's flags",
    "--dockerfile": "-f FILE; `pybuild executor` takes kaniko's flags",
}

_CONTAINERS: Mapping[str, str] = {
    "--gpus": "--device nvidia.com/gpu=all: a device by the name that a CDI file gives it (`nvidia-ctk cdi generate`)",
    "--device-cgroup-rule": "--device /dev/… gives a container a device",
    "--link": "containers reach each other over published ports (-p)",
    "--ip": "a container's address is chosen for it; -p publishes its ports",
    "--ip6": "a container's address is chosen for it; -p publishes its ports",
    "--mac-address": "a container's address is chosen for it",
    "--network-alias": "containers reach each other over published ports (-p)",
    "--volume-driver": "volumes are directories of the store; -v HOST:CTR takes any other",
    "--attach": "without -d stdout and stderr are shown; -i passes standard input",
    "-a": "without -d stdout and stderr are shown; -i passes standard input",
    "--sig-proxy": "signals are passed on; `pybuild run -d` and `attach` leave a container alone",
    "--kernel-memory": "--memory counts the kernel's part, too",
    "--memory-reservation": "--memory is the limit; nothing is reserved",
    "--memory-swappiness": "--memory-swap limits swap",
    "--oom-kill-disable": "--oom-score-adj N; a container over its --memory is killed",
    "--domainname": "--hostname NAME.DOMAIN",
    "--rmi": "`pybuild rmi IMAGE` afterwards",
    "--secret": "-v FILE:/run/secrets/NAME:ro",
    "--pod": "there are no pods: containers share networks by --network host",
    "--rootfs": "`pybuild import` makes an image of a directory's tar",
    "--uidmap": "as an ordinary user all of pybuild is in a user namespace; as root nothing is",
    "--gidmap": "as an ordinary user all of pybuild is in a user namespace; as root nothing is",
    "--systemd": "a container with systemd is not set up in any special way",
    "--blkio-weight": "--memory, --cpus, --cpu-shares, --cpuset-cpus and --pids-limit are the limits there are",
    "--annotation": "--label KEY=VALUE",
}

_OF: Mapping[str, Mapping[str, str]] = {
    "build": _BUILDS,
    "plan": _BUILDS,
    "verify": _BUILDS,
    "run": _CONTAINERS,
    "create": _CONTAINERS,
    "update": _CONTAINERS,
    "ps": {
        "--sort": "containers are listed by age, the newest first",
        "--size": "`pybuild du -v` tells what is on the disk",
        "-s": "`pybuild du -v`",
        "--watch": "`watch pybuild ps`",
    },
    "port": {"-l": _LATEST},
    "volume": dict.fromkeys(("--driver", "-d", "--opt", "-o"), _CONTAINERS["--volume-driver"]),
    "start": {"--sig-proxy": _CONTAINERS["--sig-proxy"]},
    "wait": {"--condition": "it waits for the end; `pybuild inspect --format '{{.State.Status}}'` tells the state"},
    "prune": {"--volumes": "`pybuild volume prune`"},
    "sync": {"--src": _SYNCED, "--dest": _SYNCED, "-s": _SYNCED, "-d": _SYNCED},
    "images": {
        "--tree": "`pybuild image tree NAME`",
        "--all": "every image is listed, those without a name as <none>; there are no images between",
        "-a": "every image is listed, those without a name as <none>; there are no images between",
        "--history": "`pybuild history NAME`",
        "-n": "--json or -q print no heading",
    },
    "inspect": {"--type": "a container's name comes before that of an image", "--size": "`pybuild du -v`"},
}


COMMANDS: Mapping[str, str] = {
    "bud": "`pybuild build`",
    "builder": "`pybuild build`; `pybuild cache prune`",
    "buildx": "`pybuild build`, `pybuild bake`; `pybuild manifest` for imagetools, `pybuild cache` for du and prune",
    "compose": "`pybuild bake` does the builds of a compose file; nothing starts its services",
    "info": "`pybuild doctor`",
    "list-tags": "`pybuild tags ls`",
    "ls": "`pybuild images`, `pybuild ps`, `pybuild tags ls`",
    "network": "a container has a network of its own: --network private|host|none of `pybuild run`",
    "search": "`pybuild catalog HOST` and `pybuild tags ls REPO`, where a registry allows it",
    "secret": "--secret of `pybuild build`",
    "standalone-sign": _SIGNING,
    "standalone-verify": _SIGNING,
    "sign": _SIGNING,
    "system": "`pybuild du`, `pybuild prune`, `pybuild doctor`, `pybuild events`",
    "trust": _SIGNING,
    "version": "`pybuild --version`",
}
"""Commands of other tools that pybuild has not under that name."""


def instead(verb: str, words: Iterable[str]) -> str | None:
    """A hint for the first of the refused words that other tools have a meaning for."""
    for word in words:
        flag = re.match(r"--[a-z][\w-]*|-\w", word)
        known = flag and (_OF.get(verb, {}).get(flag[0]) or _EVERYWHERE.get(flag[0]))
        if known:
            return known
    return None
