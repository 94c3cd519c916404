"""A program with threads that uses pybuild as a library; run by test_library.py, as root and as an ordinary user."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import builder
from builder import BuildRequest, Cancelled, Output, PybuildError, RegistryOptions, SourceFile, StepError


class Recorder:
    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)


def request(text: str, **more: object) -> BuildRequest:
    return BuildRequest(containerfile=SourceFile("Containerfile", text), context=None, environ={}, **more)  # type: ignore[arg-type]


def main(base: str, place: str, registry: str) -> None:
    root = Path(place) / "store"
    uid = os.getuid()
    idle = threading.Event()
    background = [threading.Thread(target=idle.wait) for _ in range(3)]
    for thread in background:
        thread.start()
    failures: list[BaseException] = []

    def guarded(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as e:  # noqa: BLE001 - a thread cannot fail the test by itself
            failures.append(e)

    def build() -> None:
        recorder = Recorder()
        result = builder.build(
            request(f"FROM {base}\nRUN echo out; echo made > /made\n", tags=("lib:1",)), root=root, events=recorder
        )
        assert result.executed == 1, result
        assert result.tags, result
        logs = b"".join(e.data for e in recorder.events if isinstance(e, builder.VertexLog))
        assert b"out" in logs, logs

    def fail() -> None:
        try:
            builder.build(request(f"FROM {base}\nRUN exit 9\n"), root=root)
        except StepError as e:
            assert (e.exit_status, e.exit_code) == (9, 9)
            assert e.range is not None
            assert e.source is not None
        else:
            raise AssertionError("a failing step passed")

    def cancel() -> None:
        until = time.monotonic() + 1.5
        try:
            builder.build(
                request(f"FROM {base}\nRUN sleep 100000\n"), root=root, cancelled=lambda: time.monotonic() > until
            )
        except Cancelled:
            pass
        else:
            raise AssertionError("a cancelled build passed")

    workers = [threading.Thread(target=guarded, args=(work,)) for work in (build, fail, cancel)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    if failures:
        raise failures[0]
    push = request(
        f"FROM {base}\nRUN echo out; echo made > /made\n",
        tags=("lib:1",),
        outputs=(Output("registry", name=f"{registry}/lib/user:{uid}"),),
    )
    result = builder.build(push, root=root, registry=RegistryOptions(tls_verify=False))
    assert result.executed == 0, result
    (output,) = result.outputs
    assert output.digest == result.descriptor.digest
    plan = builder.plan_build(push, root=root)
    assert plan.count("hit") == len(plan.steps)
    try:
        builder.build(request("FROM\n"), root=root)
    except PybuildError as e:
        assert type(e) is builder.ParseError, e
    else:
        raise AssertionError("nonsense passed")
    assert os.getuid() == uid, "the library turned its caller into somebody else"
    assert threading.active_count() == 1 + len(background)
    idle.set()
    print("all is well")


if __name__ == "__main__":
    main(*sys.argv[1:])
