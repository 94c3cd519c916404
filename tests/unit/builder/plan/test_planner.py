"""From text to graph: stages, arguments, triggers, contexts, history; with a resolver that knows three images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.errors import PlanError
from builder.frontend.instructions import parse_containerfile
from builder.frontend.source import SourceFile
from builder.plan.graph import BuildGraph, CopyOp, MkdirOp, ResolvedImage, RunOp, SourceOp
from builder.plan.planner import plan
from builder.plan.request import BuildRequest
from layers.errors import NameNotFound
from layers.oci import Descriptor, Digest, ImageConfig, Manifest, Platform

LAYER = Descriptor(media_type="application/vnd.oci.image.layer.v1.tar+gzip", digest=Digest.of(b"layer"), size_bytes=5)


class Images:
    """A resolver that keeps count."""

    def __init__(self, **configs: dict[str, Any]) -> None:
        self.configs = configs
        self.asked: list[str] = []

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        self.asked.append(name)
        if name not in self.configs:
            raise NameNotFound(f"no image {name}")
        document = {
            **platform.to_json(),
            "config": self.configs[name],
            "rootfs": {"type": "layers", "diff_ids": [Digest.of(b"diff")]},
        }
        config = ImageConfig.build(document)
        manifest = Manifest.build(config=config.descriptor, layers=[LAYER])
        return ResolvedImage(name, manifest.descriptor.digest, manifest, config)

    def resolve_layout(self, location: str, platform: Platform) -> ResolvedImage:
        return self.resolve_image(location, platform)


def graph_of(text: str, images: Images | None = None, **request: Any) -> BuildGraph:
    source = SourceFile("Containerfile", text)
    asked = BuildRequest(containerfile=source, context=Path("."), **request)
    return plan(asked, parse_containerfile(source), images or Images())


def config_of(graph: BuildGraph) -> dict[str, Any]:
    config: dict[str, Any] = graph.images[0].document["config"]
    return config


def runs(graph: BuildGraph) -> list[RunOp]:
    return [step.op for step in graph.steps if isinstance(step.op, RunOp)]


def test_stages_that_nothing_needs_are_neither_resolved_nor_planned() -> None:
    images = Images(a={}, b={})
    graph = graph_of("FROM a AS unused\nRUN x\nFROM nosuch AS other\nFROM b\nRUN y\n", images)
    assert images.asked == ["b"]
    assert [op.args[-1] for op in runs(graph)] == ["y"]


def test_equal_steps_of_two_stages_are_one() -> None:
    graph = graph_of(
        "FROM a AS one\nRUN x\nFROM a AS two\nRUN x\nFROM scratch\nCOPY --from=one /f /\nCOPY --from=two /f /\n",
        Images(a={}),
    )
    assert len(runs(graph)) == 1
    assert sum(isinstance(step.op, SourceOp) for step in graph.steps) == 1


def test_inputs_precede_their_users() -> None:
    text = "FROM a AS s0\n" + "".join(f"FROM a AS s{i}\nCOPY --from=s{i - 1} /f /{i}\n" for i in range(1, 30))
    for step in graph_of(text, Images(a={})).steps:
        assert all(i < step.number for i in (step.parent, *step.inputs) if i is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM scratch AS x\nCOPY --from=later /f /\nFROM scratch AS later\nFROM x\n", "it needs to be defined before"),
        ("FROM scratch\nCOPY --from=7 /f /\n", "invalid stage index 7"),
        ("ARG x\nFROM $x\n", "should not be blank"),
        ("FROM --platform=linux/ a\n", "failed to parse platform"),
        ("FROM scratch\nRUN --security=insecure x\n", "not allowed"),
        ("FROM scratch\nRUN --device=vendor.com/gpu x\n", "--device is not supported"),
        ("FROM scratch\nRUN --mount=type=tmpfs,target=/ x\n", "invalid mount target"),
        ("FROM scratch\nCOPY --chmod=64a f /\n", "invalid chmod parameter"),
        ("FROM scratch\nCOPY https://example.org/f /\n", "can't be a URL"),
        ("FROM scratch\nADD --checksum=sha256:00 f /\n", "checksum requires"),
    ],
)
def test_what_cannot_be_planned_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        graph_of(text, Images(a={}))
    assert message in caught.value.message
    assert caught.value.range is not None
    assert "^" in caught.value.render()


def test_an_unknown_target_names_the_nearest_stage() -> None:
    with pytest.raises(PlanError) as caught:
        graph_of("FROM scratch AS builder\n", target="bilder")
    assert "bilder" in caught.value.message
    assert "builder" in (caught.value.hint or "")


def test_arguments_and_variables_take_precedence_as_in_buildkit() -> None:
    text = "ARG G=global\nFROM a\nARG G\nARG D=default\nENV E=$D-$G\nARG D\nRUN x\n"
    (run,) = runs(graph_of(text, Images(a={"Env": ["PATH=/p", "D=base"]}), build_args={"D": "given"}))
    assert dict(run.env) == {"PATH": "/p", "D": "given", "G": "global", "E": "given-global"}


def test_an_argument_before_from_is_unknown_in_a_stage_that_does_not_ask_for_it() -> None:
    (run,) = runs(graph_of("ARG G=1\nFROM a\nRUN x\n", Images(a={})))
    assert "G" not in dict(run.env)


def test_proxies_reach_the_command_but_not_the_history() -> None:
    graph = graph_of("FROM a\nRUN x\n", Images(a={}), build_args={"http_proxy": "http://proxy"})
    (run,) = runs(graph)
    assert run.proxy == (("http_proxy", "http://proxy"),)
    assert "proxy" not in "".join(entry.created_by for entry in graph.images[0].history)


def test_triggers_of_the_base_run_first_and_are_not_inherited() -> None:
    graph = graph_of("FROM a\nRUN second\n", Images(a={"OnBuild": ["RUN first", "ENV A=1"]}))
    assert [op.args[-1] for op in runs(graph)] == ["first", "second"]
    assert "A=1" in config_of(graph)["Env"]
    assert "OnBuild" not in config_of(graph)
    assert "ONBUILD" in next(step.name for step in graph.steps if isinstance(step.op, RunOp))


def test_triggers_of_a_stage_of_this_file_run_in_its_children_alone() -> None:
    graph = graph_of("FROM a AS base\nONBUILD RUN trigger\nFROM base\nRUN own\n", Images(a={}))
    assert [op.args[-1] for op in runs(graph)] == ["trigger", "own"]


def test_entrypoint_clears_the_inherited_command_only() -> None:
    images = Images(a={"Cmd": ["old"]})
    assert "Cmd" not in config_of(graph_of('FROM a\nENTRYPOINT ["e"]\n', images))
    assert config_of(graph_of('FROM a\nCMD ["c"]\nENTRYPOINT ["e"]\n', images))["Cmd"] == ["c"]


def test_workdirs_are_relative_to_each_other_and_the_root_makes_no_layer() -> None:
    graph = graph_of("FROM a\nWORKDIR x\nWORKDIR ../y\nWORKDIR /\n", Images(a={"WorkingDir": "/base"}))
    assert [step.op.path for step in graph.steps if isinstance(step.op, MkdirOp)] == ["/base/x", "/base/y"]
    assert config_of(graph)["WorkingDir"] == "/"


def test_a_named_context_takes_the_place_of_an_image_or_a_stage() -> None:
    contexts = {"base": "docker-image://b", "files": "dir"}
    graph = graph_of(
        "FROM nosuch AS base\nFROM base\nCOPY --from=files f /\n",
        Images(b={"Labels": {"from": "b"}}),
        contexts=contexts,
    )
    assert config_of(graph)["Labels"] == {"from": "b"}
    assert [step.op.context for step in graph.steps if isinstance(step.op, CopyOp)] == ["files"]


def test_the_request_has_the_last_word_on_the_config() -> None:
    graph = graph_of(
        "FROM a\nLABEL l=file k=kept gone=1\nENV V=file\n",
        Images(a={}),
        labels={"l": "flag"},
        unset_labels=("gone",),
        env={"V": "flag"},
        unset_env=("PATH",),
    )
    assert config_of(graph)["Labels"] == {"l": "flag", "k": "kept"}
    assert config_of(graph)["Env"] == ["V=flag"]


def test_several_platforms_are_planned_each_with_its_arguments() -> None:
    graph = graph_of(
        "FROM a\nARG TARGETARCH\nRUN x\n",
        Images(a={}),
        platforms=(Platform("linux", "amd64"), Platform("linux", "arm64")),
    )
    assert [dict(run.env)["TARGETARCH"] for run in runs(graph)] == ["amd64", "arm64"]
    assert [str(image.platform) for image in graph.images] == ["linux/amd64", "linux/arm64"]
