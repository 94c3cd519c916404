"""A build whose image may not be pushed ends before its first step."""

from __future__ import annotations

from pathlib import Path

from tests.support.cli import Pybuild, write_context
from tests.support.registries import RegistryServer


def test_a_push_that_is_not_allowed_is_told_before_the_build(
    pybuild: Pybuild, tmp_path: Path, password_registry: RegistryServer, busybox_base: str
) -> None:
    context = write_context(tmp_path / "c", f"FROM {busybox_base}\nRUN echo this must not run\n")
    name = f"{password_registry.host}/app:1"
    refused = pybuild.build(context, "-t", name, "--push", "--no-creds", check=False)
    assert refused.status == 3
    assert "this must not run" not in refused.stderr
    assert f"pybuild login {password_registry.host}" in refused.stderr
    pybuild.build(context, "-t", name, "--push", "--creds", "tester:s3cret")
    # The upload that asked was cancelled.
    assert [r for r in password_registry.requests_seen() if r.startswith("DELETE /v2/app/blobs/uploads/")]
    # Where nothing is to be run, nothing is asked.
    posts = [r for r in password_registry.requests_seen() if r.startswith("POST")]
    pybuild.build(context, "-t", name, "--push", "--creds", "tester:s3cret")
    assert [r for r in password_registry.requests_seen() if r.startswith("POST")] == posts
