"""Made-up ids obey the kernel's rules: the kernel is the judge, where it may be asked."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable

import pytest

from builder.sandbox.credentials import UNCHANGED, Credentials, Ids
from builder.sandbox.seccomp import supervised_program
from builder.sandbox.userns import in_child
from layers import linux

_IDS = (0, 33, 34, 1000, UNCHANGED)
_REAL: dict[str, Callable[..., None]] = {"set": os.setuid, "set_re": os.setreuid, "set_res": os.setresuid}
_ARGUMENTS = {"set": 1, "set_re": 2, "set_res": 3}


def _sequence(seed: int) -> list[tuple[str, list[int]]]:
    chance = random.Random(seed)
    calls = []
    for _ in range(6):
        name = chance.choice(list(_REAL))
        numbers = [chance.choice(_IDS[: 4 if name == "set" else 5]) for _ in range(_ARGUMENTS[name])]
        calls.append((name, numbers))
    return calls


def _of_the_kernel(calls: list[tuple[str, list[int]]]) -> str:
    """What each call leads to, as JSON."""
    said: list[list[int] | None] = []
    for name, numbers in calls:
        try:
            _REAL[name](*(-1 if number == UNCHANGED else number for number in numbers))
            said.append(list(os.getresuid()))
        except PermissionError:
            said.append(None)
    return json.dumps(said)


@pytest.mark.root
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_as_the_kernel_does(first: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for seed in range(first, first + 10):
        calls = _sequence(seed)
        said = in_child(lambda calls=calls: _of_the_kernel(calls))  # type: ignore[misc]
        assert said is not None
        who = Credentials()
        for (name, numbers), kernel in zip(calls, json.loads(said), strict=True):
            try:
                new = getattr(who.users, name)(*numbers, who.privileged)
            except PermissionError:
                assert kernel is None, (calls, who)
                continue
            who = who._replace(users=new)
            assert [who.users.real, who.users.effective, who.users.saved] == kernel, (calls, name, numbers)
            assert who.users.files == who.users.effective


def test_ids_of_file_access() -> None:
    assert Ids.all(0).set_files(12, True) == Ids(0, 0, 0, 12)
    assert Ids.all(5).set_files(12, False) == Ids.all(5)
    assert Ids(5, 6, 7, 8).set_files(7, False) == Ids(5, 6, 7, 7)
    assert Ids.all(5).set_files(UNCHANGED, True) == Ids.all(5)


def test_execution() -> None:
    who = Credentials(Ids(1000, 1000, 7, 8), Ids.all(50), (50, 60), keeping=True)
    assert who.privileged and not who.executing(None, None).privileged
    assert who.executing(None, None).users == Ids(1000, 1000, 1000, 1000)
    assert who.executing(0, 12).users == Ids(1000, 0, 0, 0)
    assert who.executing(0, 12).groups == Ids(50, 12, 12, 12)
    assert who.in_group(60) and who.in_group(50) and not who.in_group(12)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_supervisor_answers_all_that_it_is_asked(machine: str) -> None:
    from builder.sandbox import notified, seccomp, supervisor
    from builder.sandbox.syscalls import numbers

    assert len(supervised_program(machine)) % 8 == 0
    asked = {*seccomp.SUPERVISED.split(), "open", "openat", "prctl", "setrlimit", "getrlimit", "prlimit64"}
    for name in asked & set(numbers(machine)):
        assert hasattr(supervisor.Supervisor, f"do_{name}"), name
    answered = {name.removeprefix("do_") for name in vars(supervisor.Supervisor) if name.startswith("do_")}
    assert answered == asked
    assert machine in notified.STATUS


def test_a_status_as_the_kernel_writes_it() -> None:
    from builder.sandbox.notified import STATUS

    sizes = {"x86_64": 144, "aarch64": 128}
    st = os.stat("/")
    for machine, size in sizes.items():
        assert len(STATUS[machine](st)) == size
    if linux.machine() == "x86_64":
        data = STATUS["x86_64"](st)
        assert int.from_bytes(data[8:16], "little") == st.st_ino
        assert int.from_bytes(data[24:28], "little") == st.st_mode
