"""The flags that `build` and `run` share, read."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import pytest

from builder.cli import sandboxflags
from builder.errors import UsageError
from builder.plan.request import ResourceLimits
from builder.sandbox.spec import Resources


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    sandboxflags.add_sandbox_options(parser)
    sandboxflags.add_limit_options(parser)
    return parser.parse_args(words)


def test_limits_have_the_same_form_for_a_build_and_a_container() -> None:
    options = parsed(
        "-m", "64m", "--memory-swap", "-1", "--cpus", "1.5", "--pids-limit", "9", "--cpuset-cpus", "0",
        "--device-read-bps", "/dev/vda:1m", "--device-write-iops=/dev/vda:7", "--hugetlb-limit", "2MB:64m",
    )  # fmt: skip
    for made in (sandboxflags.limits(options, Resources), sandboxflags.limits(options, ResourceLimits)):
        assert (made.memory_bytes, made.memory_swap_bytes, made.pids) == (64 << 20, -1, 9)
        assert (made.cpu_period_us, made.cpu_quota_us) == (100_000, 150_000)
        assert made.io == (("rbps", "/dev/vda", 1 << 20), ("wiops", "/dev/vda", 7))
        assert made.hugetlb == (("2MB", 64 << 20),)


def test_no_flag_is_no_limit() -> None:
    assert sandboxflags.limits(parsed(), Resources) == Resources()


@pytest.mark.parametrize(
    "words",
    [("--cpus", "1", "--cpu-quota", "5"), ("--device-read-bps", "/dev/vda"), ("--hugetlb-limit", "2MB:lots")],
)
def test_a_limit_that_says_nothing_clear(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        sandboxflags.limits(parsed(*words), Resources)


def test_hosts() -> None:
    options = parsed("--add-host", "db:192.0.2.1", "--add-host=six=[2001:db8::1]", "--add-host", "me:host-gateway")
    assert sandboxflags.added_hosts(options) == (
        ("db", "192.0.2.1"), ("six", "2001:db8::1"), ("me", "127.0.0.1"),
    )  # fmt: skip
    for words in (("--add-host", "db"), ("--add-host", ":192.0.2.1"), ("--add-host", "a b:192.0.2.1"),
                  ("--no-hosts", "--add-host", "db:192.0.2.1")):  # fmt: skip
        with pytest.raises(UsageError):
            sandboxflags.added_hosts(parsed(*words))


def test_ulimits() -> None:
    options = parsed("--ulimit", "nofile=1024:2048", "--ulimit", "core=0", "--ulimit", "nproc=-1")
    assert sandboxflags.ulimits(options) == (("nofile", 1024, 2048), ("core", 0, 0), ("nproc", -1, -1))
    for text in ("nofile", "files=1", "nofile=many", "nofile=9:8", "nofile=-1:8"):
        with pytest.raises(UsageError):
            sandboxflags.ulimits(parsed("--ulimit", text))


def test_name_servers_and_words_of_resolv_conf() -> None:
    assert sandboxflags.name_servers(parsed("--dns", "192.0.2.53")) == ("192.0.2.53",)
    with pytest.raises(UsageError):
        sandboxflags.name_servers(parsed("--dns", "ns.example"))
    with pytest.raises(UsageError, match="one word"):
        sandboxflags.one_line(["a\nnameserver 192.0.2.66"], "--dns-search")


@pytest.mark.parametrize("text", ["/etc/passwd", "/dev/../etc/x", "/dev/null:/etc", "/dev/null:/dev/../x", "/dev/no"])
def test_what_is_no_device_of_this_machine(text: str) -> None:
    with pytest.raises(UsageError):
        sandboxflags.devices(parsed("--device", text))
    assert sandboxflags.devices(parsed("--device", "/dev/null:rw")) == ("/dev/null",)
    assert sandboxflags.devices(parsed("--device", "/dev/null:/dev/nil:r")) == ("/dev/null:/dev/nil",)
