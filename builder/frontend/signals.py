"""The signals that STOPSIGNAL may name: Linux's, whatever machine builds the image."""

from __future__ import annotations

from builder.errors import ParseError
from builder.frontend.spelling import did_you_mean

_NAMES = (
    "ABRT ALRM BUS CHLD CLD CONT FPE HUP ILL INT IO IOT KILL PIPE POLL PROF PWR QUIT SEGV STKFLT STOP SYS "
    "TERM TRAP TSTP TTIN TTOU URG USR1 USR2 VTALRM WINCH XCPU XFSZ"
)


def check_signal(text: str) -> None:
    """Accept any number but 0, or a name with or without SIG, in any case.

    Raises: ParseError without a place.
    """
    digits = text[1:] if text[:1] in ("+", "-") else text
    if digits.isascii() and digits.isdigit() and len(digits) < 19:
        if int(digits):
            return
        raise ParseError(f"invalid signal: {text}")
    known = _known()
    if text.upper().removeprefix("SIG") not in known:
        names = ["SIG" + name for name in known]
        wrong = text if text.upper().startswith("SIG") else "SIG" + text
        raise ParseError(f"invalid signal: {text}{did_you_mean(wrong, names)}")


def _known() -> list[str]:
    low = [f"RTMIN+{i}" for i in range(1, 16)]
    high = [f"RTMAX-{i}" for i in range(1, 15)]
    return [*_NAMES.split(), "RTMIN", *low, "RTMAX", *high]
