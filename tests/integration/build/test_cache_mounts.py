"""Cache mounts of one RUN among themselves, and of several RUNs at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context

TWICE = "--mount=type=cache,id=x,sharing={},target=/one --mount=type=cache,id=x,sharing={},target=/two/deep"


@pytest.mark.parametrize("isolation", ["auto", "chroot"])
@pytest.mark.parametrize("sharing", ["locked", "private", "shared"])
def test_the_same_id_twice_is_one_directory(
    pybuild: Pybuild, busybox_base: str, tmp_path: Path, sharing: str, isolation: str
) -> None:
    script = "echo kept > /one/file && cat /two/deep/file && echo more >> /two/deep/file && wc -l < /one/file"
    text = f"FROM {busybox_base}\nRUN {TWICE.format(sharing, sharing)} {script}\nRUN test ! -e /one -a ! -e /two\n"
    text += "RUN --mount=type=cache,id=x,target=/x test $(wc -l < /x/file) = 2\n"
    store = Pybuild(tmp_path / "store")
    store.build(write_context(tmp_path / "c", text), f"--isolation={isolation}", "--timeout=200s")


def test_the_strictest_holds(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """One RUN with a lock and without: the other waits until it has ended."""
    mixed = TWICE.format("shared", "locked")
    busy = "test ! -e /one/busy && touch /one/busy && sleep 0.3 && rm /one/busy"
    stages = [f"FROM {busybox_base} AS s{n}\nRUN {mixed} : {n} && {busy} && touch /made\n" for n in range(3)]
    text = "".join(stages) + f"FROM {busybox_base}\n"
    text += "".join(f"COPY --from=s{n} /made /made{n}\n" for n in range(3))
    pybuild.build(write_context(tmp_path / "c", text), "--timeout=200s")


def test_two_runs_that_want_the_same_locks(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    """In opposite orders: neither holds what the other waits for."""
    stages = []
    for number in range(6):
        first, second = ("a", "b") if number % 2 else ("b", "a")
        mounts = " ".join(f"--mount=type=cache,sharing=locked,id={id},target=/{id}" for id in (first, second))
        stages.append(f"FROM {busybox_base} AS s{number}\nRUN {mounts} : {number}; echo x >> /a/n; cp /a/n /made\n")
    text = "".join(stages) + f"FROM {busybox_base}\n"
    text += "".join(f"COPY --from=s{number} /made /made{number}\n" for number in range(6))
    text += "RUN test $(cat /made? | sort | wc -l) = 21\n"
    pybuild.build(write_context(tmp_path / "c", text), "--timeout=200s")


def test_a_lock_is_given_back_when_the_step_cannot_begin(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    locked = "--mount=type=cache,sharing=locked,id=x,target=/x"
    text = f"FROM {busybox_base}\nRUN {locked} --mount=type=secret,id=none,required=true true\n"
    assert "none" in pybuild.build(write_context(tmp_path / "c", text), check=False).stderr
    pybuild.build(write_context(tmp_path / "d", f"FROM {busybox_base}\nRUN {locked} true\n"), "--timeout=200s")
