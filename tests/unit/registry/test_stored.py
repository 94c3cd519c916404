"""Images of the store by what people call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from layers.errors import NameNotFound
from layers.store import Store
from registry.stored import find_image


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("nobody", None),
        ("team/app:1", None),
        ("host.example:5000/team/app:1", "docker://host.example:5000/team/app:1"),
        ("docker.io/library/debian", "docker://docker.io/library/debian"),
        ("0123456789ab", None),
    ],
)
def test_a_missing_image_that_a_registry_may_have(tmp_path: Path, name: str, registry: str | None) -> None:
    with Store.open(tmp_path / "store") as store, pytest.raises(NameNotFound, match=name) as caught:
        find_image(store, name)
    hint = caught.value.hint or ""
    assert hint.startswith("`pybuild images`")
    assert (f"; {registry} is the registry's" in hint) if registry else "docker://" not in hint
