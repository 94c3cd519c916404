"""`pybuild login` and `logout`: credentials where docker and podman keep theirs."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from builder.cli.options import boolean
from builder.errors import UsageError

_MAX_PASSWORD_BYTES = 64 << 10


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("registry", metavar="REGISTRY[/PATH]", nargs="?", help="(default: docker.io)")
    add("--authfile", metavar="FILE", help="the credentials file (also REGISTRY_AUTH_FILE)")
    if verb == "logout":
        add("-a", "--all", action="store_true", help="forget the credentials for every registry")
        return
    add("-u", "--username", metavar="NAME")
    add("-p", "--password", metavar="PASSWORD", help="visible to other processes: better use --password-stdin")
    add("--password-stdin", action="store_true", help="read the password from stdin")
    add("--get-login", action="store_true", help="print the user name that is known, and no more")
    add("--tls-verify", nargs="?", const=True, type=boolean, metavar="BOOL")
    add("--cert-dir", metavar="DIR")


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
    if options.get_login:
        known = store.find(key)
        if known is None:
            raise UsageError(f"not logged in to {key}")
        print(known.username)
        return 0
    return _login(store, key, options)


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
