"""`pybuild login` and `logout`: credentials where docker and podman keep theirs."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace

from builder.cli.options import boolean
from builder.errors import UsageError

_MAX_PASSWORD_BYTES = 64 << 10


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("registry", metavar="REGISTRY[/PATH]", nargs="?", help="a host, or a part of it (default: docker.io)")
    add("--authfile", metavar="FILE", help="the credentials file (also REGISTRY_AUTH_FILE)")
    if verb == "logout":
        add("-a", "--all", action="store_true", help="forget the credentials for every registry")
        return
    add("-u", "--username", metavar="NAME", help="the user (default: it is asked for)")
    add(
        "-p",
        "--password",
        metavar="PASSWORD",
        help="the password, visible to other processes: better use --password-stdin",
    )
    add("--password-stdin", action="store_true", help="read the password from stdin")
    add("--get-login", action="store_true", help="print the user name that is known, and no more")
    add("--explain", action="store_true",
        help="tell where credentials are looked for, what is found, and whether the registry takes it")  # fmt: skip
    add("--json", action="store_true", help="print the explanation as JSON")
    add("--tls-verify", nargs="?", const=True, type=boolean, metavar="BOOL",
        help="ask for verified TLS (default: true, but for localhost and what registries.conf exempts)")  # fmt: skip
    add("--cert-dir", metavar="DIR", help="CA (*.crt) and client certificates (*.cert, *.key)")


def run(verb: str, options: Namespace) -> int:
    from registry.credentials import CredentialStore

    store = CredentialStore(os.environ, authfile=options.authfile)
    if verb == "logout" and options.all:
        if options.registry:
            raise UsageError("--all and a registry exclude each other")
        for place in store.erase_all():
            print(f"Removed login credentials from {place}")
        return 0
    key = (options.registry or "docker.io").removeprefix("https://").removeprefix("http://").rstrip("/")
    if verb == "logout":
        removed = store.erase(key)
        if not removed:
            raise UsageError(f"not logged in to {key}")
        for place in removed:
            print(f"Removed login credentials for {key} from {place}")
        return 0
    if options.explain:
        return _explain(key, options)
    if options.json:
        raise UsageError("--json goes with --explain")
    if options.get_login:
        known = store.find(key)
        if known is None:
            raise UsageError(f"not logged in to {key}")
        print(known.username)
        return 0
    return _login(store, key, options)


def _explain(key: str, options: Namespace) -> int:
    """Print each place in order, and the registry's word; the status is that of what went wrong."""
    from layers.errors import PybuildError
    from registry.client import RegistryClient
    from registry.credentials import CredentialStore
    from registry.hosts import RegistryOptions

    if options.username or options.password or options.password_stdin:
        raise UsageError("--explain is about the credentials that are known already")
    registry, _, path = key.partition("/")
    choices = RegistryOptions(tls_verify=options.tls_verify, cert_dir=options.cert_dir, authfile=options.authfile)
    steps: list[dict[str, str]] = []
    status, used = 0, ""
    with RegistryClient(choices) as client:
        store = CredentialStore(
            os.environ, authfile=options.authfile, helpers=lambda: client.hosts.conf.credential_helpers
        )
        try:
            for lookup in store.lookups(registry, path):
                steps.append({"place": lookup.place, "found": "not asked: the one above is taken"})
                if used:
                    continue
                found = lookup.ask()
                steps[-1]["found"] = lookup.otherwise or "nothing"
                if found is not None:
                    used = lookup.place
                    steps[-1]["found"] = f"user {found.username}, a password" if found.username else "an identity token"
            client.ping(registry, path)
            verdict = "accepts them" if used else "answers without credentials"
        except PybuildError as e:
            if steps and not used and steps[-1]["found"].startswith("not asked"):
                # Whatever command needs them fails here, too: no place after it is asked.
                steps[-1]["found"] = f"failed: {e}"
                verdict = "not asked"
            else:
                verdict = str(e)
            status = int(e.exit_code)
    if options.json:
        print(json.dumps({"registry": key, "places": steps, "used": used or None, "verdict": verdict}, indent=2))
        return status
    for number, step in enumerate(steps, 1):
        print(f"{number}. {step['place']}: {step['found']}")
    print(f"{registry}: {verdict}")
    return status


def _login(store: object, key: str, options: Namespace) -> int:
    from registry.client import RegistryClient
    from registry.credentials import Credential, CredentialStore
    from registry.hosts import RegistryOptions

    assert isinstance(store, CredentialStore)
    if options.password_stdin and options.password:
        raise UsageError("--password and --password-stdin exclude each other")
    user = options.username
    if options.password_stdin:
        if not user:
            raise UsageError("--password-stdin needs --username")
        password = sys.stdin.read(_MAX_PASSWORD_BYTES).rstrip("\r\n")
    else:
        if not user or not options.password:
            if not sys.stdin.isatty():
                raise UsageError("cannot ask for credentials here", hint="use --username and --password-stdin")
            import getpass

            user = user or input(f"Username for {key}: ")
            password = options.password or getpass.getpass("Password: ")
        else:
            password = options.password
    credential = Credential(username=user, password=password)
    registry, _, path = key.partition("/")
    choices = RegistryOptions(tls_verify=options.tls_verify, cert_dir=options.cert_dir, creds=credential)
    with RegistryClient(choices) as client:
        client.ping(registry, path)
    store.save(key, credential)
    print("Login Succeeded")
    return 0
