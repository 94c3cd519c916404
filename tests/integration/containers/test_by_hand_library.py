"""`builder.container`: an image built by hand from a Python program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from builder import container
from builder.errors import ContextError
from builder.sandbox.launcher import Launcher
from layers.store import Store
from tests.support.machine import need_mounts


@pytest.mark.root
def test_an_image_by_calls(tmp_path: Path) -> None:
    need_mounts()
    busybox = shutil.which("busybox")
    if os.geteuid() or busybox is None:
        pytest.skip("needs root and busybox")
    request = container.step_request(epoch_s=10**9)
    with Launcher.start() as launcher, Store.open(tmp_path / "store") as store:
        record = container.create_working(store, None, "scratch", name="mine")
        with container.open_working(store, "mine") as work:
            container.transfer(work, container.Transfer((busybox,), "/bin/sh"), request)
            command = container.Command(("/bin/sh", "-c", "echo $A > /made; exit $B"), env=(("A", "a"), ("B", "0")))
            assert container.run_step(work, command, request, launcher).code == 0
            failing = command._replace(env=(("A", "b"), ("B", "5")))
            assert container.run_step(work, failing, request, launcher).code == 5
            with pytest.raises(ContextError, match="absent"):
                container.transfer(work, container.Transfer(("/absent",), "/x"), request)
            changes = [
                container.config_change("cmd", '["sh"]'),
                container.instruction_change("LABEL a=$X"),
                container.healthcheck_change("NONE", {}),
            ]
            container.configure(work, changes, request)
            place = container.mount(work)
            assert (place / "made").read_text() == "a\n"
            assert container.unmount(work)
            name = "docker.io/library/mine:1"
            made = container.commit_working(work, container.ImageOptions(names=(name,), epoch_s=10**9))
            again = container.commit_working(work, container.ImageOptions(names=(name,), epoch_s=10**9))
            assert made == again
        image = container.find_image(store, "mine:1", None)
        assert image.config.config["Cmd"] == ["sh"]
        assert image.config.config["Healthcheck"] == {"Test": ["NONE"]}
        assert len(image.layers) == 2
        assert container.remove(store, record.id) == record.id
        assert list(container.every(store.root)) == []
