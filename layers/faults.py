"""Named fault points: where a test makes the process die, or a call fail, to prove a crash window.

`PYBUILD_FAULT=POINT[@N][=ERRNO],…` kills the process with SIGKILL the N-th time (first by default)
that it passes POINT, or raises that OSError there. Unset, a point costs one test of a constant:
callers write `if faults.ARMED: faults.reach("store.commit.before-rename")`. For tests only; no
user's documentation names it. The environment is read once, at import, because a point must not
cost more than that.
"""

from __future__ import annotations

import os

_SPEC = os.environ.get("PYBUILD_FAULT", "")
ARMED = bool(_SPEC)
_passed: dict[str, int] = {}


def reach(point: str) -> None:
    """Die or fail here if the environment asked for it.

    Raises: OSError of the errno that was asked for.
    """
    _passed[point] = _passed.get(point, 0) + 1
    for entry in _SPEC.split(","):
        place, _, action = entry.strip().partition("=")
        name, _, turn = place.partition("@")
        if name != point or _passed[point] != int(turn or 1):
            continue
        if not action:
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        import errno

        number = getattr(errno, action)
        raise OSError(number, f"{os.strerror(number)} (fault point {point})")
