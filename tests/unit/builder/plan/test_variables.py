"""Variables and their snapshots: equal to the copies that they stand for, and cheaper."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from builder.plan.variables import Snapshot, Variables

NAMES = st.sampled_from([f"v{i}" for i in range(200)])
CHANGES = st.lists(st.tuples(NAMES, st.sampled_from(["", "1", "2"])), max_size=300)


@given(CHANGES, st.integers(1, 50))
def test_a_snapshot_is_what_a_copy_would_be(changes: list[tuple[str, str]], every: int) -> None:
    variables, plain = Variables(), dict[str, str]()
    taken: list[tuple[Snapshot, list[tuple[str, str]]]] = []
    for number, (name, value) in enumerate(changes):
        variables[name] = plain[name] = value
        if number % every == 0:
            taken.append((variables.snapshot(), list(plain.items())))
    taken.append((variables.snapshot(), list(plain.items())))
    for snapshot, wanted in taken:
        assert list(snapshot) == wanted
        assert len(snapshot) == len(wanted)
        assert snapshot == Snapshot(wanted)
        assert hash(snapshot) == hash(Snapshot(wanted))
        assert snapshot.digest() == Snapshot(wanted).digest()


@given(CHANGES, CHANGES)
def test_digests_differ_where_the_content_does(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    a, b = Snapshot(dict(one).items()), Snapshot(dict(other).items())
    assert (a.digest() == b.digest()) == (list(a) == list(b))


def test_a_value_does_not_run_into_the_next_name() -> None:
    assert Snapshot([("a", "b=c")]).digest() != Snapshot([("a", "b"), ("c", "")]).digest()
    assert Snapshot([("a", "1\nb=2")]).digest() != Snapshot([("a", "1"), ("b", "2")]).digest()


def test_what_did_not_change_is_shared() -> None:
    variables = Variables((f"v{i}", "x") for i in range(1000))
    before = variables.snapshot()
    assert variables.snapshot() is before
    variables["v500"] = "x"
    assert variables.snapshot() is before
    variables["v500"] = "y"
    after = variables.snapshot()
    other = [one is not two for one, two in zip(before._blocks, after._blocks, strict=True)]
    assert sum(other) == 1
    assert dict(before)["v500"] == "x"
    assert dict(after)["v500"] == "y"


def test_variables_are_looked_up_like_a_dict() -> None:
    variables = Variables({"a": "1"})
    variables.update({"b": "2"})
    assert (variables["a"], variables.get("b"), variables.get("c"), "c" in variables) == ("1", "2", None, False)
    assert list(Variables(variables).snapshot()) == [("a", "1"), ("b", "2")]
