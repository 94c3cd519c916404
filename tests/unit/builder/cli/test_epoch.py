"""SOURCE_DATE_EPOCH and --timestamp, as every command but `build` reads them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from builder.cli.options import epoch_of
from builder.errors import UsageError


def test_the_flag_counts_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert epoch_of(Namespace()) is None
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "7")
    assert epoch_of(Namespace(timestamp=None)) == 7
    assert epoch_of(Namespace(timestamp=0)) == 0


@pytest.mark.parametrize("text", ["²", "-1", "1.5", "soon", "9" * 5000, "253402300800"])
def test_what_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        epoch_of(Namespace())
    with pytest.raises(UsageError, match="--timestamp"):
        epoch_of(Namespace(timestamp=-1))
