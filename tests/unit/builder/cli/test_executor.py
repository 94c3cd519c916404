"""kaniko's flags: each is translated, without a meaning here, or refused."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from builder.cli import executor
from builder.errors import UsageError

KANIKO = [
    "azure-container-registry-config", "bucket", "build-arg", "cache", "cache-copy-layers", "cache-dir", "cache-repo",
    "cache-run-layers", "cache-ttl", "cleanup", "compressed-caching", "compression", "compression-level", "context",
    "context-sub-path", "custom-platform", "customPlatform", "destination", "digest-file", "dockerfile", "force",
    "force-build-metadata", "git", "ignore-path", "ignore-var-run", "image-download-retry", "image-fs-extract-retry",
    "image-name-tag-with-digest-file", "image-name-with-digest-file", "insecure", "insecure-pull",
    "insecure-registry", "kaniko-dir", "label", "log-format", "log-timestamp", "no-push", "no-push-cache",
    "oci-layout-path", "push-retry", "push-ignore-immutable-tag-errors", "registry-certificate",
    "registry-client-cert", "registry-map", "registry-mirror", "reproducible", "single-snapshot",
    "skip-default-registry-fallback", "skip-push-permission-check", "skip-tls-verify", "skip-tls-verify-pull",
    "skip-tls-verify-registry", "skip-unused-stages", "snapshot-mode", "snapshotMode", "tar-path", "tarPath",
    "target", "upload-tar", "upload-tar-retry", "use-new-run", "verbosity", "whitelist-var-run",
]  # fmt: skip
"""The flags of the executor of Chainguard's fork, as of the end of 2025."""


def translate(*words: str, environ: dict[str, str] | None = None) -> executor.Translation:
    parser = ArgumentParser(allow_abbrev=False)
    executor.configure("executor", parser)
    return executor.translate(parser.parse_args(words), environ or {})


def test_every_flag_is_known() -> None:
    assert sorted(flag.name for flag in executor.FLAGS) == sorted(KANIKO)


def test_gitlab() -> None:
    """The command of GitLab's documentation."""
    found = translate(
        "--context", "/builds/group/app", "--dockerfile", "/builds/group/app/Dockerfile",
        "--destination", "registry.example.com/group/app:v1", "--cache=true", "--cleanup",
    )  # fmt: skip
    assert found.arguments == [
        "-t", "registry.example.com/group/app:v1", "-f", "/builds/group/app/Dockerfile",
        "--cache-from", "type=registry,ref=registry.example.com/group/app/cache,ignore-error=true",
        "--cache-ttl", "336h", "--cache-to", "type=registry,ref=registry.example.com/group/app/cache,mode=max",
        "--push", "--progress=plain",
        "/builds/group/app",
    ]  # fmt: skip
    assert found.notes == ("--cleanup has no effect: a build leaves nothing behind",)
    assert found.registries == ""


def test_tekton() -> None:
    """The command of the Tekton catalogue's task."""
    found = translate(
        "--dockerfile=./Dockerfile", "--context=/workspace/source/./", "--destination=localhost:5000/app",
        "--digest-file=/tekton/results/IMAGE_DIGEST", "--skip-tls-verify=true", "--single-snapshot", "-v=debug",
    )  # fmt: skip
    assert found.arguments == [
        "-t", "localhost:5000/app", "-f", "./Dockerfile", "--squash", "--no-cache", "--push", "--progress=plain",
        "/workspace/source/./",
    ]  # fmt: skip
    assert found.registries.splitlines() == [
        "[[registry]]", 'prefix = "localhost:5000"', 'location = "localhost:5000"', "insecure = true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, context, stdin",
    [
        ((), "/workspace/", ""),
        (("-c", "dir:///src", "--context-sub-path", "app"), "/src/app", ""),
        (("-c", "tar://stdin"), "-", ""),
        (("-c", "tar:///a/b.tar.gz"), "-", "/a/b.tar.gz"),
        (("-c", "git://github.com/o/r"), "https://github.com/o/r.git", ""),
        (("-c", "git://github.com/o/r.git#refs/heads/main"), "https://github.com/o/r.git#refs/heads/main", ""),
        (("-c", "git://g.com/o/r#refs/heads/main#0123", "--context-sub-path", "s"), "https://g.com/o/r.git#0123:s", ""),
        (("-c", "git://g.com/o/r", "--git", "branch=dev,single-branch=true"), "https://g.com/o/r.git#dev", ""),
        (("-c", "https://example.com/c.tar.gz"), "https://example.com/c.tar.gz", ""),
    ],
)
def test_contexts(words: tuple[str, ...], context: str, stdin: str) -> None:
    found = translate("--no-push", *words)
    assert found.arguments[-1] == context
    assert found.stdin == stdin


def test_mirrors() -> None:
    found = translate(
        "--no-push", "--registry-mirror", "mirror.example", "--registry-map", "quay.io=a.example/q;ghcr.io=b.example",
        "--insecure-registry", "b.example", environ={"KANIKO_REGISTRY_MIRROR": "second.example"},
    )  # fmt: skip
    assert found.registries.splitlines() == [
        "[[registry]]", 'prefix = "b.example"', 'location = "b.example"', "insecure = true",
        "[[registry]]", 'prefix = "docker.io"', 'location = "docker.io"',
        "[[registry.mirror]]", 'location = "mirror.example"', "[[registry.mirror]]", 'location = "second.example"',
        "[[registry]]", 'prefix = "ghcr.io"', 'location = "ghcr.io"',
        "[[registry.mirror]]", 'location = "b.example"', "insecure = true",
        "[[registry]]", 'prefix = "quay.io"', 'location = "quay.io"',
        "[[registry.mirror]]", 'location = "a.example/q"',
    ]  # fmt: skip
    alone = translate("--no-push", "--registry-mirror", "m.example", "--skip-default-registry-fallback")
    assert alone.registries.splitlines() == ["[[registry]]", 'prefix = "docker.io"', 'location = "m.example"']


def test_the_rest_of_what_is_translated() -> None:
    found = translate(
        "-d", "r.example/a:1", "-d", "r.example/a:2", "--build-arg", "A", "--build-arg", "B=2", "--label", "l=1",
        "--target", "t", "--custom-platform", "linux/arm64", "--reproducible", "--compression", "zstd",
        "--compression-level", "3", "--tar-path", "/o.tar", "--oci-layout-path", "/o", "--push-retry", "3",
        "--insecure-pull", "--cache", "--cache-repo", "oci:/c", "--no-push-cache", "--cache-ttl", "6h",
        "--verbosity", "error", environ={"A": "1"},
    )  # fmt: skip
    assert found.arguments == [
        "-t", "r.example/a:1", "-t", "r.example/a:2", "-f", "Dockerfile", "--build-arg", "A", "--build-arg", "B=2",
        "--target", "t", "--platform", "linux/arm64", "--label", "l=1", "--timestamp", "0", "--compression", "zstd",
        "--compression-level", "3", "--cache-from", "type=local,src=/c,ignore-error=true", "--cache-ttl", "6h",
        "--push",
        "-o", "type=docker,dest=/o.tar", "-o", "type=oci,tar=false,dest=/o", "--retry", "3", "--tls-verify=false",
        "--progress=quiet", "/workspace/",
    ]  # fmt: skip


def test_credentials_of_git_are_never_arguments() -> None:
    environ = {"GIT_USERNAME": "me", "GIT_PASSWORD": "hunter2"}
    found = translate("--no-push", "-c", "git://g.com/o/r", environ=environ)
    assert "id=GIT_AUTH_HEADER,env=GIT_AUTH_HEADER" in found.arguments
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    "words",
    [
        (), ("--cache", "--no-push"), ("--no-push", "--upload-tar", "http://x"), ("--no-push", "-b", "bucket"),
        ("--no-push", "-c", "s3://b/c.tar"), ("--no-push", "-c", "gs://b/c.tar"),
        ("--no-push", "-c", "https://a.blob.core.windows.net/c"), ("--no-push", "--registry-map", "a"),
        ("--no-push", "--registry-mirror", 'a"\nx'), ("--no-push", "--push-ignore-immutable-tag-errors"),
        ("--no-push", "--registry-certificate", "a=/a", "--registry-certificate", "b=/b"),
        ("--no-push", "-c", "git://g.com/r", "--git", "insecure-skip-tls=true"),
        ("--no-push", "-v", "loud"), ("--no-push", "--log-format", "xml"), ("--no-push", "--push-retry", "-1"),
        ("--no-push", "--registry-certificate", "a"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        translate(*words)


def test_what_is_the_default_needs_no_word() -> None:
    words = ("--ignore-var-run=true", "--skip-unused-stages", "--compressed-caching=true", "--log-timestamp=false")
    assert translate("--no-push", *words).notes == ()
    assert len(translate("--no-push", "--snapshot-mode=redo", "--use-new-run", "--ignore-path=/busybox").notes) == 3


def test_no_secret_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The translated command stands in logs that many may read."""
    done: list[list[str]] = []

    def build(words: list[str]) -> int:
        done.append(words)
        return 1

    monkeypatch.setattr("builder.cli.main.main", build)
    monkeypatch.setenv("TOKEN", "hidden-1")
    parser = ArgumentParser(allow_abbrev=False)
    parser.set_defaults(root=None, debug=False)
    executor.configure("executor", parser)
    words = ["--context", "git://user:hidden-2@git.example/a.git", "--no-push", "--build-arg", "TOKEN"]
    assert executor.run("executor", parser.parse_args([*words, "--build-arg", "NONE"])) == 1
    assert "https://user:hidden-2@git.example/a.git" in done[0]
    shown = capsys.readouterr().err
    assert "--build-arg TOKEN --build-arg NONE= " in shown
    assert "https://***@git.example/a.git" in shown
    assert "hidden" not in shown
