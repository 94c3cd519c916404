"""`pybuild registry explain NAME`: where a name leads, which setting says so, and what answers there."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from builder.cli.actions import Action, add_actions, check_action, end_actions
from builder.cli.options import add_registry_options, registry_options

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.reference import Reference

_COMMON = frozenset({"tls_verify", "creds", "cert_dir", "authfile", "no_creds", "registries_conf", "signature_policy"})
_ACTIONS = {
    "explain": Action(
        "NAME", "tell the endpoints of a name, in order, with what set each and what answers",
        frozenset({"json", "push", "no_probe"}),
    ),
}  # fmt: skip


def configure(verb: str, parser: ArgumentParser) -> None:
    add_actions(parser, _ACTIONS)
    add = parser.add_argument
    add("--push", action="store_true", help="the endpoints of a push")
    add("--no-probe", action="store_true", help="do not ask the network")
    add("--json", action="store_true", help="print JSON")
    add_registry_options(parser)
    end_actions(parser, _ACTIONS)


def run(verb: str, options: Namespace) -> int:
    from registry.client import RegistryClient
    from registry.retry import RetryPolicy

    check_action(verb, options, _ACTIONS, _COMMON)
    text = options.names[0].removeprefix("docker://")
    # A probe is to tell what is wrong now, not to wait until it is right.
    with RegistryClient(registry_options(options), policy=RetryPolicy(attempts=1)) as client:
        names = client.hosts.resolve_name(text, interactive=True)
        document = {
            "name": text,
            "set by": client.hosts.name_origin(text),
            "means": [_explained(client, ref.with_default_tag(), options) for ref in names],
            "files": list(client.hosts.names.files),
        }
    if options.json:
        print(json.dumps(document, indent=2))
        return 0
    _show(document)
    return 0


def _explained(client: RegistryClient, ref: Reference, options: Namespace) -> dict[str, Any]:
    from layers.errors import PybuildError
    from registry.credentials import CredentialStore
    from registry.errors import ConfigError

    result: dict[str, Any] = {"reference": str(ref), "endpoints": []}
    try:
        client.hosts.policy.check_docker(ref)
        result["policy"] = f"accepted ({client.hosts.policy.origin or 'there is no policy.json'})"
    except ConfigError as e:
        result["policy"] = str(e)
    try:
        endpoints = client.resolve_endpoints(ref, for_pull=not options.push)
    except ConfigError as e:
        result["error"] = str(e)
        return result
    store = CredentialStore(os.environ, authfile=options.authfile, helpers=lambda: client.hosts.conf.credential_helpers)
    for endpoint in endpoints:
        try:
            found = (
                None
                if options.no_creds
                else client.hosts.options.creds or store.find(endpoint.registry, endpoint.repository)
            )
            who = f"{found.username or 'a token'} ({found.origin or '--creds'})" if found else "none"
        except PybuildError as e:
            who = str(e)
        entry = {
            "url": f"{' or '.join(endpoint.schemes)}://{endpoint.host}/v2/{endpoint.repository}",
            "mirror": endpoint.mirror,
            "set by": endpoint.origin,
            "tls": _tls(endpoint),
            "credentials": who,
        }
        if not options.no_probe:
            entry["probe"] = client.probe(endpoint)
        result["endpoints"].append(entry)
    return result


def _tls(endpoint: Any) -> str:
    if not endpoint.tls.verify:
        return "not verified"
    parts = ["verified"]
    if endpoint.tls.ca_files:
        parts.append("also by " + ", ".join(endpoint.tls.ca_files))
    if endpoint.tls.client_cert:
        parts.append(f"with the client certificate {endpoint.tls.client_cert}")
    return ", ".join(parts)


def _show(document: dict[str, Any]) -> None:
    files = document["files"]
    print(f"{document['name']}   (read: {', '.join(files) if files else 'no registries.conf'})")
    if document["set by"]:
        print(f"a short name: {document['set by']}")
    for meaning in document["means"]:
        print(f"{meaning['reference']}\n  policy: {meaning['policy']}")
        if "error" in meaning:
            print(f"  {meaning['error']}")
        for number, endpoint in enumerate(meaning["endpoints"], 1):
            print(f"  {number}. {endpoint['url']}{' (mirror)' if endpoint['mirror'] else ''}")
            for key in ("set by", "tls", "credentials", "probe"):
                if key in endpoint:
                    print(f"     {key}: {endpoint[key]}")
