"""What an image may have `run` make of its config: volumes and ports of a bounded number, at places of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.container import bundle, create
from builder.container.health import Health
from builder.container.lifecycle import signal_number
from builder.container.options import ContainerOptions, Port, VolumeMount
from builder.container.records import ContainerError
from layers.image import Image
from layers.oci import ImageConfig
from layers.snapshot import Mount


def mounts(tmp_path: Path, *targets: str, options: ContainerOptions | None = None) -> list[str]:
    tree = tmp_path / "tree"
    tree.mkdir(exist_ok=True)
    config: dict[str, Any] = {"Volumes": {target: {} for target in targets}}
    made: list[str] = []
    found, _ = create._mounts(
        tmp_path, config, options or ContainerOptions(image="i"), Mount("bind", (tree,), readonly=True), made
    )
    assert len(made) == len(found)
    return [mount.target for mount in found]


def test_volumes_are_told_apart_by_where_they_are(tmp_path: Path) -> None:
    assert mounts(tmp_path, "/../../etc", "/etc/", "/./etc/.", "//etc") == ["/etc"]


@pytest.mark.parametrize("target", ["/", "/..", "/./", "//", "/a/../..", "", "etc", "../etc"])
def test_no_volume_in_place_of_the_root(tmp_path: Path, target: str) -> None:
    with pytest.raises(ContainerError, match=r"nothing can be mounted at /|not absolute"):
        mounts(tmp_path, target)
    assert not (tmp_path / "volumes").exists()


@pytest.mark.parametrize("target", ["/proc", "/proc/sys/", "/tmp/../proc/self"])
def test_no_volume_of_an_image_in_the_kernels_files(tmp_path: Path, target: str) -> None:
    with pytest.raises(ContainerError, match="/proc"):
        mounts(tmp_path, target)


def test_volumes_have_a_bound(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="20000 volumes"):
        mounts(tmp_path, *(f"/v{number}" for number in range(20_000)))
    assert not (tmp_path / "volumes").exists()


def test_two_spellings_of_a_target_are_one(tmp_path: Path) -> None:
    twice = ContainerOptions(image="i", mounts=(VolumeMount("tmpfs", "/a/b"), VolumeMount("tmpfs", "/a/./b/")))
    with pytest.raises(ContainerError, match="two mounts"):
        mounts(tmp_path, options=twice)


def exposed(*texts: str, **options: Any) -> list[list[str | int]]:
    return create._exposed({"ExposedPorts": {text: {} for text in texts}}, ContainerOptions(image="i", **options))


def test_ports_that_are_published_already_are_not_again() -> None:
    assert exposed("80/tcp", "80", "53/udp", "90-91", ports=(Port("", 1, 53, "udp"),)) == [
        ["", 0, 80, "tcp"],
        ["", 0, 90, "tcp"],
        ["", 0, 91, "tcp"],
    ]


@pytest.mark.parametrize("text", ["abc/tcp", "99999/udp", "80/x\x1b", "", "-1", "9" * 5000, "0-65535/tcp"])
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(ContainerError, match="exposes"):
        exposed(text)


@pytest.mark.parametrize("time", [10**18, -(10**18), 1, 0])
def test_times_of_a_health_check(time: int) -> None:
    health = Health(["CMD", "true"], {"Interval": time, "Timeout": time, "StartPeriod": time, "Retries": 10**18})
    assert health.document()["Status"] == "starting"


@pytest.mark.parametrize(
    "text", ["SIGJUNK\x1b[2J", "99", "0", "-1", "9" * 5000, "RTMIN+99", "RTMAX-²", "RTMIN+9999999", "_DFL", "Signals"]
)
def test_a_stop_signal_that_is_none(text: str) -> None:
    told: list[str] = []
    assert create._stop_signal({"StopSignal": text}, ContainerOptions(image="i"), told.append) == "SIGTERM"
    assert len(told) == 1 and told[0].isprintable()
    with pytest.raises(ContainerError, match="there is no signal"):
        create._stop_signal({"StopSignal": text}, ContainerOptions(image="i", stop_signal=text), told.append)


@pytest.mark.parametrize(
    ("text", "number"),
    [("term", 15), ("SIGKILL", 9), (" 3 ", 3), ("SIGRTMIN+3", 37), ("RTMAX-1", 63), ("RTMIN", 34), ("64", 64)],
)
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number
    assert create._stop_signal({"StopSignal": text}, ContainerOptions(image="i"), pytest.fail) == text


def test_a_label_gives_no_runtime_an_order() -> None:
    config = ImageConfig.build({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}})
    orders = {
        "run.oci.seccomp.plugins": "/tmp/evil.so",
        "run.oci.hooks.stderr": "/etc/cron.d/evil",
        "org.systemd.property.ExecStopPost": "['evil']",
        "org.criu.config": "/tmp/evil",
        "io.katacontainers.config.hypervisor.path": "/tmp/evil",
    }
    labels = {"maintainer": "me", "run": "x", **orders}
    image = Image(config.descriptor, None, config)  # type: ignore[arg-type]
    found = bundle._annotations(image, {"Labels": labels})
    assert {key: value for key, value in found.items() if key in labels} == {"maintainer": "me", "run": "x"}
