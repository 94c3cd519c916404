"""Build files: targets, what they inherit, variables, overrides, compose files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builder.bakefile import BakeFile, parse_files
from builder.errors import UsageError


def bake(document: dict[str, Any], **environ: str) -> BakeFile:
    return parse_files([("docker-bake.json", json.dumps(document))], environ)


def compose(text: str, **environ: str) -> BakeFile:
    return parse_files([("compose.yaml", text)], environ)


def attributes(whole: BakeFile, name: str, *overrides: str) -> dict[str, Any]:
    return dict(whole.selected([name], overrides)[-1].attributes)


def test_groups_and_the_order_of_what_is_needed() -> None:
    whole = bake(
        {
            "group": {"default": {"targets": ["app", "more"]}, "more": {"targets": ["tool"]}},
            "target": {"app": {"contexts": {"base": "target:base", "x": "dir"}}, "base": {}, "tool": {}},
        }
    )
    assert [t.name for t in whole.selected([])] == ["base", "app", "tool"]
    assert [t.name for t in whole.selected(["tool", "tool"])] == ["tool"]


def test_inheritance() -> None:
    whole = bake(
        {
            "target": {
                "a": {"args": {"A": "1", "B": "1"}, "tags": ["a"], "description": "d"},
                "b": {"args": {"B": 2, "C": True, "D": None}, "cache-from": [{"type": "registry", "ref": "r"}]},
                "c": {"inherits": ["a", "b"], "args": {"C": "3"}, "cache-from": ["type=inline"], "pull": True},
            }
        }
    )
    assert attributes(whole, "c") == {
        "args": {"A": "1", "B": "2", "C": "3"},
        "tags": ["a"],
        "cache-from": ["type=registry,ref=r", "type=inline"],
        "pull": True,
    }


def test_a_later_file_lies_over_an_earlier_one() -> None:
    texts = [
        ("a.json", '{"target": {"t": {"args": {"A": "1", "B": "1"}, "tags": ["x", "y"], "target": "one"}}}'),
        ("b.json", '{"target": {"t": {"args": {"B": "2"}, "tags": ["z"]}}, "group": {"default": {"targets": ["t"]}}}'),
    ]
    assert dict(parse_files(texts, {}).selected([])[0].attributes) == {
        "args": {"A": "1", "B": "2"}, "tags": ["z"], "target": "one",
    }  # fmt: skip


def test_variables_and_matrices() -> None:
    whole = bake(
        {
            "variable": {"TAG": {"default": "dev"}, "NAME": {"default": "app-${TAG}"}, "EMPTY": {}},
            "target": {
                "t": {"tags": ["${NAME}:$TAG", "$$x${EMPTY}"]},
                "m": {"name": "m-${v}-${w}", "matrix": {"v": ["1", "2"], "w": ["a"]}, "args": {"V": "${v}"}},
            },
        },
        TAG="7",
    )
    assert attributes(whole, "t")["tags"] == ["app-7:7", "$x"]
    assert [(t.name, t.attributes["args"]) for t in whole.selected(["m"])] == [
        ("m-1-a", {"V": "1"}), ("m-2-a", {"V": "2"}),
    ]  # fmt: skip


def test_overrides() -> None:
    whole = bake({"target": {"app": {"args": {"A": "1"}, "tags": ["x"]}, "web": {}}})
    changed = attributes(
        whole, "app", "*.args.B=2", "app.tags+=y,z", "web.tags=no", "app.platform=linux/amd64,linux/arm64",
        "app.no-cache=true", "app.output=type=oci,dest=o",
    )  # fmt: skip
    assert changed == {
        "args": {"A": "1", "B": "2"}, "tags": ["x", "y", "z"], "platforms": ["linux/amd64", "linux/arm64"],
        "no-cache": True, "output": ["type=oci,dest=o"],
    }  # fmt: skip
    for text in ("app.args=1", "app.tags.x=1", "app.nothing=1", "app", "app.tags"):
        with pytest.raises(UsageError, match="--set"):
            whole.selected(["app"], [text])


def test_a_compose_file() -> None:
    whole = compose(
        """
services:
  web:
    image: example/web:${TAG:-dev}
    build:
      context: ./web
      dockerfile: Other
      args: [A=1, FROM_OUTSIDE]
      additional_contexts: {base: "target:lib"}
      secrets: [token, {source: key, target: k}]
      extra_hosts: ["db:192.0.2.1"]
      ulimits: {nofile: {soft: 1, hard: 2}, nproc: 3}
      x-bake:
        tags: [example/web:more]
        platforms: linux/amd64
  lib.core:
    build: lib
  lib:
    build: {dockerfile_inline: "FROM scratch", labels: {l: 1}}
  only-run:
    image: postgres
secrets:
  token: {environment: TOKEN}
  key: {file: ./key}
""",
        FROM_OUTSIDE="yes",
    )
    assert whole.groups["default"] == ["web", "lib_core", "lib"]
    assert attributes(whole, "web") == {
        "context": "./web", "dockerfile": "Other", "args": {"A": "1", "FROM_OUTSIDE": "yes"},
        "contexts": {"base": "target:lib"}, "secret": ["id=token,env=TOKEN", "id=k,src=./key"],
        "extra-hosts": {"db": "192.0.2.1"}, "ulimits": ["nofile=1:2", "nproc=3"], "tags": ["example/web:more"],
        "platforms": ["linux/amd64"],
    }  # fmt: skip
    assert attributes(whole, "lib_core") == {"context": "lib"}
    assert attributes(whole, "lib") == {"dockerfile-inline": "FROM scratch", "labels": {"l": "1"}}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"nothing": {}}', '{"target": {"t": {"tagz": []}}}', '{"target": {"t": {"attest": ["x"]}}}',
        '{"target": {"t": {"pull": "maybe"}}}', '{"target": {"t": {"tags": ["${upper(x)}"]}}}', '{"target": [1]}',
        '{"target": {"t": {"args": [1]}}}', '{"target": {"t": {"matrix": {"a": 3}}}}',
        '{"target": {"t": {"tags": ["${X:?is needed}"]}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"x\.json is no build file"):
        parse_files([("x.json", text)], {})


@pytest.mark.parametrize(
    "text",
    [
        "a: [", "services: 3", "services: {a: {build: {nothing: 1}}}", "services: {a: {build: {secrets: [x]}}}", "1",
        "services: {a: {build: {secrets: [{target: x}]}}}", "services: {a: {build: {ulimits: {nofile: {hard: 5}}}}}",
        "a: &x [*x]\nservices: {a: {build: {tags: *x}}}", "services: &x {a: {build: {x-bake: *x}}}",
        "x0: &a0 [x]\n" + "".join(f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    ],
)  # fmt: skip
def test_a_damaged_compose_file_is_one_error(text: str) -> None:
    with pytest.raises(UsageError, match="is no build file"):
        compose(text)


def test_many_ways_to_the_same_target_take_no_time() -> None:
    targets = {"t0": {"tags": ["x"]}, **{f"t{n}": {"inherits": [f"t{n - 1}"] * 2} for n in range(1, 60)}}
    groups = {"g0": {"targets": ["t59"]}, **{f"g{n}": {"targets": [f"g{n - 1}"] * 2} for n in range(1, 60)}}
    assert attributes(bake({"target": targets, "group": groups}), "g59") == {"tags": ["x"]}


@pytest.mark.parametrize(
    "document, name",
    [
        ({"target": {"a": {}}}, "b"), ({"target": {"a": {}}}, "default"), ({"target": {"a": {"inherits": ["b"]}}}, "a"),
        ({"target": {"a": {"inherits": ["b"]}, "b": {"inherits": ["a"]}}}, "a"),
        ({"target": {"a": {"contexts": {"x": "target:a"}}}}, "a"),
        ({"target": {"a": {"contexts": {"x": "target:q"}}}}, "a"),
        ({"group": {"g": {"targets": ["g"]}}}, "g"),
    ],
)  # fmt: skip
def test_what_cannot_be_resolved(document: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError):
        bake(document).selected([name])
