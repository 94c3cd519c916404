"""CDI files: which device a name means, what it needs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.errors import SandboxError
from builder.sandbox import cdi

KIND = "vendor.example/device"


def write(directory: Path, name: str, *devices: dict[str, Any], **more: Any) -> str:
    directory.mkdir(exist_ok=True)
    document = {"cdiVersion": "0.6.0", "kind": KIND, "devices": list(devices), **more}
    (directory / name).write_text(json.dumps(document))
    return str(directory)


def device(name: str, **edits: Any) -> dict[str, Any]:
    return {"name": name, "containerEdits": edits}


def test_names() -> None:
    assert all(map(cdi.is_name, (f"{KIND}=a", f"{KIND}=*", KIND, "vendor.com/gpu=gpu:0", "a1/b=0")))
    assert not any(map(cdi.is_name, ("/dev/null", "device", f"{KIND}=", "a/b=c d", "a/../b=c", "1a/b=c")))


def test_what_a_device_needs_and_what_all_of_its_file_do(tmp_path: Path) -> None:
    node = {"path": "/dev/other", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3}
    mount = {"hostPath": str(tmp_path), "containerPath": "/data", "options": ["ro", "nosuid", "bind"]}
    one = device("one", env=["ONE=1"], deviceNodes=[node], mounts=[mount], additionalGids=[44])
    where = write(tmp_path / "d", "a.json", one, device("two", env=["TWO=2"]), containerEdits={"env": ["ALL=x"]})
    edits = cdi.find([f"{KIND}=one", f"{KIND}=two"], [where])
    assert edits.env == (("ALL", "x"), ("ONE", "1"), ("TWO", "2"))
    assert edits.nodes == ("/dev/null:/dev/other",) and edits.groups == (44,)
    assert [(m.target, m.readonly, m.recursive, m.is_file) for m in edits.mounts] == [("/data", True, False, False)]
    assert cdi.find([f"{KIND}=*"], [where]) == edits
    assert cdi.find([KIND], [where]).env == (("ALL", "x"), ("ONE", "1"))


def test_yaml_and_which_directory_counts(tmp_path: Path) -> None:
    first = write(tmp_path / "a", "x.json", device("d", env=["FROM=first"]), device("e", env=["E=1"]))
    (tmp_path / "b").mkdir()
    text = f"cdiVersion: '0.6.0'\nkind: {KIND}\ndevices:\n- name: d\n  containerEdits:\n    env: [FROM=second]\n"
    (tmp_path / "b" / "x.yaml").write_text(text)
    edits = cdi.find([f"{KIND}=*"], [first, str(tmp_path / "b"), str(tmp_path / "missing")])
    assert edits.env == (("FROM", "second"), ("E", "1"))


def test_a_device_that_is_described_twice_is_none(tmp_path: Path) -> None:
    where = write(tmp_path / "d", "a.json", device("x"))
    write(tmp_path / "d", "b.json", device("x"))
    with pytest.raises(cdi.NoSuchDevice) as caught:
        cdi.find([f"{KIND}=x"], [where])
    assert "is described twice" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"cdiVersion": "1", "kind": "x"}', "[" * 100_000, '{"a": 1e999}'])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, suffix: str) -> None:
    (tmp_path / f"bad.{suffix}").write_text(text)
    with pytest.raises(cdi.NoSuchDevice) as caught:
        cdi.find([f"{KIND}=x"], [str(tmp_path)])
    assert f"bad.{suffix}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        (
            {"hooks": [{"hookName": "createContainer", "path": "/bin/hook"}]},
            "the hook createContainer /bin/hook",
        ),
        ({"intelRdt": {"closID": "x"}}, "intelRdt"),
        ({"netDevices": [{"hostInterfaceName": "eth0"}]}, "netDevices"),
        ({"surprise": 1}, "surprise is not known"),
        ({"env": ["NOVALUE"]}, "'NOVALUE' is not NAME=VALUE"),
        ({"env": [{"a": 1}]}, "CDI device"),
        ({"deviceNodes": [{"path": "/etc/passwd"}]}, "not beneath /dev"),
        ({"deviceNodes": [{"path": "/dev/../etc/passwd"}]}, "not beneath /dev"),
        ({"deviceNodes": [{"path": "/dev/no-such-node"}]}, "No such file"),
        ({"deviceNodes": [{"path": "/dev/null", "major": 9}]}, "has not the major 9"),
        ({"deviceNodes": [{"path": "/dev/null", "uid": 12345}]}, "has not the uid 12345"),
        ({"mounts": [{"hostPath": "/no/such", "containerPath": "/x"}]}, "the host has no /no/such"),
        ({"mounts": [{"hostPath": "/", "containerPath": "x"}]}, "not absolute"),
        ({"mounts": [{"hostPath": "/", "containerPath": "/x", "type": "tmpfs"}]}, "type tmpfs"),
        ({"mounts": [{"hostPath": "/", "containerPath": "/x", "options": ["suid"]}]}, "option suid"),
        ({"additionalGids": [-1]}, "the group -1"),
        ({"additionalGids": "x"}, "the group 'x'"),
    ],
)
def test_what_nothing_here_does_is_refused_by_name(tmp_path: Path, edits: dict[str, Any], told: str) -> None:
    where = write(tmp_path / "d", "a.json", device("x", **edits), device("fine", env=["A=b"]))
    with pytest.raises(SandboxError, match=f"CDI device {KIND}=x") as caught:
        cdi.find([f"{KIND}=x"], [where])
    assert told in str(caught.value)
    assert cdi.find([f"{KIND}=fine"], [where]).env == (("A", "b"),)
