"""Our cheap NamedTuple and dataclass behave as those of the stdlib, as far as they go."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Mapping
from typing import cast

import pytest

from layers.values import NamedTuple, dataclass, field, replace


class Point(NamedTuple):
    """A point."""

    x: int
    y: int = 2

    def sum(self) -> int:
        return self.x + self.y


class Loud(NamedTuple):
    text: str = ""

    def __repr__(self) -> str:
        return self.text.upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box."""

    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    secret: str = field(default="s", repr=False)

    @classmethod
    def named(cls, name: str) -> Box:
        return cls(name=name)


@dataclass(frozen=True, slots=True)
class Pair:
    first: int
    second: int = 0


def test_a_named_tuple_is_a_tuple_with_names() -> None:
    point = Point(1)
    assert point == (1, 2) == Point(x=1, y=2)
    assert point.sum() == 3
    x, y = point
    assert (x, y, point[0], hash(point)) == (1, 2, 1, hash((1, 2)))
    assert repr(point) == "Point(x=1, y=2)"
    assert repr(Loud("a")) == "A"
    assert Point.__doc__ == "A point."
    assert point._fields == ("x", "y")
    assert point._asdict() == {"x": 1, "y": 2}
    assert point._replace(y=5) == (1, 5)
    assert Point._make([7, 8]) == (7, 8)
    match point:
        case Point(a, b):
            assert (a, b) == (1, 2)


@pytest.mark.parametrize("value", [Point(1), Box(name="b", tags={"k": "v"}), Pair(3)])
def test_values_can_be_copied_and_pickled(value: object) -> None:
    assert copy.copy(value) == value
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="missing"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Point(1, 2, 3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="unexpected"):
        Point(1)._replace(z=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Box("name")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Box(name="n", other=1)  # type: ignore[call-arg]


def test_the_first_values_are_as_all_others() -> None:
    class Row(NamedTuple):
        a: int
        b: str = "b"

    @dataclass(frozen=True, slots=True)
    class Many:
        name: str
        items: list[int] = field(default_factory=list)

    for _ in range(6):
        assert Row(1) == Row(1, b="b") == Row(a=1, b="b") == (1, "b")
        assert Many("n") == Many(name="n", items=[])
        assert Many("n").items is not Many("n").items
        for wrong in ({}, {"a": 1, "c": 2}):
            with pytest.raises(TypeError):
                Row(**wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            Row(1, a=1)  # type: ignore[misc]
        with pytest.raises(TypeError):
            Many("n", name="n")  # type: ignore[misc]


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Point(1).x = 2  # type: ignore[misc]
    box = Box(name="n")
    with pytest.raises(AttributeError):
        box.name = "m"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del box.name
    with pytest.raises(AttributeError):
        box.other = 1  # type: ignore[attr-defined]


def test_a_dataclass_compares_hashes_and_shows_its_fields() -> None:
    assert Pair(1) == Pair(1, 0) != Pair(2)
    assert hash(Pair(1)) == hash(Pair(1))
    assert Pair(1) != cast("object", (1, 0))
    assert repr(Pair(1)) == "Pair(first=1, second=0)"
    assert "secret" not in repr(Box(name="n"))
    assert Box.named("n").tags == {}
    first, second = Box(name="a"), Box(name="b")
    assert first.tags is not second.tags


def test_the_functions_of_dataclasses_work() -> None:
    assert replace(Pair(1), second=4) == Pair(1, 4)
    assert dataclasses.replace(Pair(1), second=4) == Pair(1, 4)
    assert dataclasses.replace(Box(name="n"), name="m").name == "m"
    assert [f.name for f in dataclasses.fields(Box(name="n"))] == ["name", "tags", "secret"]
