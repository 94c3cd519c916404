"""Exit codes, and that nothing secret or unprintable gets into a message."""

from __future__ import annotations

import pytest

from registry import errors
from registry.errors import printable, redact_url


def test_exit_codes_are_distinct_per_class() -> None:
    classes = (errors.AuthError, errors.NotFoundError, errors.RateLimitError, errors.NetworkError, errors.ServerError)
    assert [c.exit_code for c in classes] == [3, 4, 5, 6, 7]
    assert all(issubclass(c, errors.RegistryError) for c in classes)
    assert errors.InvalidReference.exit_code == errors.ConfigError.exit_code == 2


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/v2/x?_state=secret&digest=a", "https://h/v2/x?…"),
        ("https://user:pw@h:5000/v2/", "https://h:5000/v2/"),
        ("https://us@er:pw@h/x#frag", "https://h/x"),
        ("http://h", "http://h"),
        ("h/v2/x", "h/v2/x"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert errors.ServerError("x", url=url).url == shown


def test_printable() -> None:
    assert printable("a\x1b[31mb\r\n\tc\u202e") == "a [31mb c"
    assert len(printable("x" * 10_000)) == 300
