"""The flags about registries, read."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from builder.cli.options import add_registry_options, add_retry_options, has_registry_options, registry_options
from builder.errors import UsageError
from registry.client import RegistryClient


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    add_registry_options(parser)
    add_retry_options(parser)
    return parser.parse_args(words)


def test_without_flags_nothing_is_loaded() -> None:
    assert not has_registry_options(parsed())


@pytest.mark.parametrize("words", [("--retry", "2"), ("--retry-delay", "1s"), ("--tls-verify=false",), ("--no-creds",)])
def test_a_flag_is_noticed(words: tuple[str, ...]) -> None:
    assert has_registry_options(parsed(*words))


def test_retries_reach_the_client() -> None:
    options = registry_options(parsed("--retry", "2", "--retry-delay", "1500ms"))
    assert options.retry is not None
    assert (options.retry.attempts, options.retry.base_s) == (3, 1.5)
    with RegistryClient(options, environ={}) as client:
        assert client._wire.policy == options.retry
    with pytest.raises(UsageError):
        registry_options(parsed("--retry", "-1"))
