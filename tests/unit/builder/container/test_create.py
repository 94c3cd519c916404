"""What a container is made of: the image's config with what was asked for, and its settings as JSON and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.container import codec
from builder.container.create import argv, merged_config
from builder.container.options import ContainerOptions, Healthcheck, Port
from builder.container.records import ContainerError
from builder.sandbox.spec import Resources, SandboxMount, SandboxSpec
from layers.snapshot import Mount

IMAGE: dict[str, Any] = {
    "Entrypoint": ["/entry"],
    "Cmd": ["default"],
    "Env": ["PATH=/bin", "A=1"],
    "User": "web",
    "WorkingDir": "/srv",
    "Labels": {"a": "1"},
    "ExposedPorts": {"80/tcp": {}},
    "Volumes": None,
}


def merged(**options: object) -> dict[str, object]:
    return merged_config(IMAGE, ContainerOptions(image="i", **options))  # type: ignore[arg-type]


def test_the_images_config_is_kept_where_nothing_else_is_said() -> None:
    config = merged()
    assert argv(config) == ("/entry", "default")
    assert config["User"] == "web"
    assert "Volumes" not in config


def test_a_command_takes_the_place_of_the_images() -> None:
    assert argv(merged(command=("x", "y"))) == ("/entry", "x", "y")
    assert argv(merged(entrypoint=("/other",))) == ("/other",)
    assert argv(merged(entrypoint=(), command=("x",))) == ("x",)
    with pytest.raises(ContainerError, match="no command"):
        argv(merged(entrypoint=()))


def test_environment_labels_ports_and_health() -> None:
    config = merged(env=(("A", "2"), ("B", "="), ("A", "3")), unset_env=("PATH",), labels=(("b", ""),))
    assert config["Env"] == ["A=3", "B=="]
    assert config["Labels"] == {"a": "1", "b": ""}
    assert merged(ports=(Port("", 1, 53, "udp"),))["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}
    assert merged(no_healthcheck=True)["Healthcheck"] == {"Test": ["NONE"]}
    health = merged(health=Healthcheck(("CMD", "x"), interval_s=1.5))["Healthcheck"]
    assert isinstance(health, dict)
    assert (health["Interval"], health["Retries"]) == (1_500_000_000, 3)


def test_a_sandbox_survives_the_way_through_json() -> None:
    import json

    spec = SandboxSpec(
        args=("a", "b"),
        root=Mount("overlay", (Path("/l1"), Path("/l2")), Path("/u"), Path("/w"), False, "user"),
        env=(("A", "1"),),
        mounts=(
            SandboxMount("bind", "/t", Path("/s"), readonly=True),
            SandboxMount("tmpfs", "/x", mode=0o1777, size_bytes=5),
            SandboxMount("file", "/f", b"\0\xff"),
        ),
        files={"/etc/hosts": b"127.0.0.1\n", "/etc/other": Path("/o")},
        add_hosts=(("n", "1.2.3.4"),),
        rlimits=(("nofile", 1, 2),),
        resources=Resources(memory_bytes=5, io=(("rbps", "/dev/x", 1),), accounting=True),
        seccomp=Path("/p.json"),
        stubs=Path("/stubs"),
    )
    assert codec.decode(json.loads(json.dumps(codec.encode(spec)))) == spec
    assert codec.decode(codec.encode(spec), terminal=(24, 80)).terminal == (24, 80)
