"""What `pybuild` alone prints: the commands by what they are about, a line each."""

from __future__ import annotations

from builder.cli.main import VERBS

SECTIONS: dict[str, str] = {
    "build images": "build bake plan verify lock cache builds shell executor",
    "Containerfiles and contexts": "check outline targets parse context",
    "move images": "push pull copy sync save load",
    "the local store": "images tag untag rmi inspect history diff du prune fsck",
    "file systems": "unpack import export image cat bundle",
    "change an image where it is": "mutate append rebase flatten",
    "registries": "login logout tags catalog digest manifest blob delete artifact validate ratelimit registry serve",
    "containers": "run create start exec attach ps logs top stats events port wait stop kill restart pause unpause"
    " update rename cp rm container volume",
    "images by hand": "from add config mount unmount umount containers commit modify",
    "this machine": "doctor unshare completion",
}


def overview() -> str:
    """The whole text."""
    width = max(map(len, VERBS))
    lines = [
        "usage: pybuild [--root DIR] [--debug] COMMAND …",
        "       pybuild -f Containerfile -t NAME [CONTEXT]",
        "",
        "A daemonless OCI image builder and registry client.",
    ]
    for title, verbs in SECTIONS.items():
        lines += ["", title, *(f"  {verb:<{width}}  {VERBS[verb].help}" for verb in verbs.split())]
    return "\n".join([*lines, "", "`pybuild COMMAND --help` tells more."])
