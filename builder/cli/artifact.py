"""`pybuild artifact`: files in registries as OCI artifacts, and what refers to an image."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.actions import Action, add_actions, check_action, end_actions
from builder.cli.options import add_registry_options, key_value, registry_options, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from registry.artifacts import ArtifactFile, ReferrerNode
    from registry.client import RegistryClient
    from registry.reference import Reference

_COMMON = frozenset({"tls_verify", "creds", "cert_dir", "authfile", "no_creds", "registries_conf", "signature_policy"})
_MAKES = frozenset({"artifact_type", "annotation", "media_type", "digestfile"})
_ACTIONS = {
    "push": Action("NAME FILE[:TYPE]…", "push files as one artifact", _MAKES, 2, None),
    "pull": Action("NAME", "write an artifact's files to a directory", frozenset({"output", "media_type", "keep_old"})),
    "attach": Action("IMAGE FILE[:TYPE]…", "push files that refer to an image", _MAKES, 2, None),
    "ls": Action("IMAGE", "list what refers to an image", frozenset({"artifact_type", "json"})),
    "tree": Action(
        "IMAGE", "show what refers to an image, and what refers to that", frozenset({"artifact_type", "json"})
    ),
    "inspect": Action("NAME", "print an artifact's manifest"),
    "rm": Action("NAME…", "delete artifacts from their registry", frozenset(), 1, None),
}


def configure(verb: str, parser: ArgumentParser) -> None:
    add_actions(parser, _ACTIONS)
    add = parser.add_argument
    add(
        "--artifact-type",
        "--type",
        metavar="TYPE",
        help="what kind of artifact it is; of ls and tree: list this kind only",
    )
    add("--annotation", "-a", action="append", default=[], metavar="KEY=VALUE", help="an annotation of the manifest")
    add("--media-type", "--file-type", action="append", default=[], metavar="TYPE",
        help="the files' type where FILE:TYPE does not say it; of pull: only files of this type")  # fmt: skip
    add("-o", "--output", metavar="DIR", help="where to (default: the working directory)")
    add("--keep-old", "-k", action="store_true", help="leave files that are there")
    add("--digestfile", metavar="FILE", help="write the artifact's digest there")
    add("--json", action="store_true", help="print JSON")
    add_registry_options(parser)
    end_actions(parser, _ACTIONS)


def run(verb: str, options: Namespace) -> int:
    from builder.cli.remote import reference_of
    from builder.places import open_places

    check_action(verb, options, _ACTIONS, _COMMON)
    with open_places(store_root(options), registry_options(options)) as places:
        client = places.source.client
        ref = reference_of(options.names[0])
        match options.action:
            case "push" | "attach":
                return _push(options, client, ref)
            case "pull":
                return _pull(options, client, ref)
            case "ls" | "tree":
                return _tree(options, client, ref)
            case "inspect":
                fetched = client.get_manifest(ref.with_default_tag())
                print(json.dumps(json.loads(fetched.raw), indent=2, ensure_ascii=False))
                return 0
            case _:
                for text in options.names:
                    client.delete_manifest(reference_of(text).with_default_tag())
                    print(reference_of(text))
                return 0


def _push(options: Namespace, client: RegistryClient, ref: Reference) -> int:
    from registry.artifacts import DEFAULT_ARTIFACT_TYPE, attach, push_artifact

    if len(options.media_type) > 1:
        raise UsageError(f"artifact {options.action} takes one --media-type", hint="write FILE:TYPE for each file")
    files = [_file(text, options.media_type[0] if options.media_type else "") for text in options.names[1:]]
    annotations = dict(key_value(a, "--annotation") for a in options.annotation)
    kind = options.artifact_type or DEFAULT_ARTIFACT_TYPE
    if options.action == "attach":
        pushed = attach(client, ref, files, artifact_type=kind, annotations=annotations)
    else:
        pushed = push_artifact(client, ref.with_default_tag(), files, artifact_type=kind, annotations=annotations)
    if options.digestfile:
        Path(options.digestfile).write_text(pushed.digest)
    print(pushed.digest)
    return 0


def _file(text: str, default_type: str) -> ArtifactFile:
    """`FILE` or `FILE:TYPE`; a colon is a part of the name where such a file exists."""
    from registry.artifacts import ArtifactFile

    path, colon, kind = text.rpartition(":")
    if not colon or "/" not in kind or Path(text).exists():
        path, kind = text, default_type
    return ArtifactFile(Path(path), kind)


def _pull(options: Namespace, client: RegistryClient, ref: Reference) -> int:
    from registry.artifacts import pull_artifact

    directory = Path(options.output or ".")
    for path in pull_artifact(client, ref, directory, media_types=options.media_type, overwrite=not options.keep_old):
        print(path)
    return 0


def _tree(options: Namespace, client: RegistryClient, ref: Reference) -> int:
    from registry.artifacts import tree
    from registry.errors import NotFoundError

    if options.action == "ls":
        found = client.head_manifest(ref.with_default_tag())
        if found is None:
            raise NotFoundError(f"there is no {ref}", status=404)
        referrers = client.referrers(ref, found.digest, options.artifact_type)
        if options.json:
            print(json.dumps([d.to_json() for d in referrers], indent=2))
        else:
            print("".join(f"{d.digest}  {d.artifact_type or d.media_type}\n" for d in referrers), end="")
        return 0
    node = tree(client, ref, options.artifact_type)
    if options.json:
        print(json.dumps(_document(node), indent=2))
    else:
        print(f"{ref.with_default_tag()}\n{node.descriptor.digest}")
        _draw(node, "")
    return 0


def _document(node: ReferrerNode) -> dict[str, Any]:
    return {**node.descriptor.to_json(), "referrers": [_document(n) for n in node.referrers]}


def _draw(node: ReferrerNode, indent: str) -> None:
    for n in node.referrers:
        last = n is node.referrers[-1]
        kind = n.descriptor.artifact_type or n.descriptor.media_type
        print(f"{indent}{'└' if last else '├'}── {kind}: {n.descriptor.digest}")
        _draw(n, indent + ("    " if last else "│   "))
