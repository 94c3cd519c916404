"""Foreign platforms: what runs here, and the error where nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.errors import SandboxError
from builder.plan.graph import MkdirOp, RunOp, Step
from builder.plan.variables import Snapshot
from builder.solve.emulation import can_run, emulator, require_runnable
from layers.oci import Platform

FOREIGN = Platform("linux", "riscv64")


def _step(platform: Platform, *, run: bool = True) -> Step:
    op = RunOp(("true",), Snapshot(), "/", "") if run else MkdirOp("/w", "")
    return Step(number=0, op=op, parent=None, inputs=(), name="[1/1] RUN true", stage="", platform=platform)


def _register(directory: Path, flags: str, state: str = "enabled") -> None:
    (directory / "qemu-riscv64").write_text(f"{state}\ninterpreter /usr/bin/qemu-riscv64-static\nflags: {flags}\n")


def test_the_hosts_own_platform_runs(tmp_path: Path) -> None:
    require_runnable([_step(Platform.host())], directory=str(tmp_path))


def test_a_foreign_run_without_an_emulator_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(SandboxError) as caught:
        require_runnable([_step(FOREIGN), _step(FOREIGN)], directory=str(tmp_path))
    assert "linux/riscv64" in caught.value.message
    assert "and 1 more" in caught.value.message
    assert "binfmt" in (caught.value.hint or "")


def test_foreign_steps_that_run_nothing_are_fine(tmp_path: Path) -> None:
    require_runnable([_step(FOREIGN, run=False)], directory=str(tmp_path))


def test_an_emulator_counts_if_it_is_enabled_and_kept_open(tmp_path: Path) -> None:
    _register(tmp_path, "OCF")
    assert can_run(FOREIGN, directory=str(tmp_path))
    assert emulator(FOREIGN, directory=str(tmp_path)) == "/usr/bin/qemu-riscv64-static"
    _register(tmp_path, "OC")
    assert not can_run(FOREIGN, directory=str(tmp_path))
    _register(tmp_path, "OCF", state="disabled")
    assert not can_run(FOREIGN, directory=str(tmp_path))


def test_another_operating_system_never_runs(tmp_path: Path) -> None:
    assert not can_run(Platform("windows", Platform.host().architecture), directory=str(tmp_path))
