"""The process of one command: what the installed scripts and `python -m builder` run around `main`.

Here is what a process of our own may do and a library may not: collect garbage less often, put off
imports of other packages' that a command hardly ever needs (`builder.cli.deferred`), and end without
taking the interpreter apart. Python programs call `main`, which does none of it.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in `builder.cli.main`
if TYPE_CHECKING:
    from typing import NoReturn

_ALLOCATIONS = 50_000
"""Between collections; 700 is Python's own. What imports make stays: looking through it is 5 ms of 100."""


ours = False
"""Whether the process ends with the command, by `program`: what the kernel takes back need not be given back before."""


def program() -> NoReturn:
    """Run the command that the process was started for, and end the process with its status."""
    global ours  # noqa: PLW0603 - of the process, as this function is
    import gc

    from builder.cli.main import main

    ours = True
    gc.set_threshold(_ALLOCATIONS)
    if sys.stdout is not None and sys.stdout.isatty():
        from builder.cli.screen import Screen

        sys.stdout = Screen(sys.stdout)
    if len(sys.argv) > 2:  # not for `--version`: whoever asks a registry names something
        from builder.cli import deferred

        deferred.install()
    try:
        status = main()
        sys.stdout.flush()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    _end(status)


def _end(status: int) -> NoReturn:
    """End the process. Tearing down the modules of a registry command takes 12 ms, and nobody looks."""
    threading = sys.modules.get("threading")
    if sys.gettrace() or sys.getprofile() or (threading and _is_busy(threading.enumerate())):
        raise SystemExit(status)
    try:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        # As Python itself has it where the last words find no room, or no reader.
        status = status or 120
    os._exit(status)


def _is_busy(threads: list[object]) -> bool:
    """Whether a thread runs that Python would wait for."""
    return any(not getattr(t, "daemon", True) for t in threads[1:])
