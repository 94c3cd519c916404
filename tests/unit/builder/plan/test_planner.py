"""From text to graph: stages, arguments, triggers, contexts, history; with a resolver that knows three images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builder.errors import ParseError, PlanError
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
        ("FROM scratch\nRUN --device=vendor.com/gpu x\n", "RUN --device=vendor.com/gpu is not allowed"),
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


def history_of(graph: BuildGraph) -> list[str]:
    return [entry.created_by for entry in graph.images[0].history]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ARG a=1\nARG b\nARG a=2\nRUN ls", ["ARG a=1", "ARG b", "ARG a=2", "RUN |2 a=2 b= /bin/sh -c ls # buildkit"]),
        ("ARG a=1\nENV a=env\nRUN x", ["ARG a=1", "ENV a=env", "RUN |1 a=env /bin/sh -c x # buildkit"]),
        ("ENV a=env\nARG a=1\nRUN x", ["ENV a=env", "ARG a=1", "RUN |1 a=1 /bin/sh -c x # buildkit"]),
        ('RUN ["ls", "-l a"]', ["RUN ls -l a # buildkit"]),
        ("RUN <<EOF\nx\nEOF", ["RUN /bin/sh -c x\n # buildkit"]),
        ('CMD ["a", "b\\"c"]', ['CMD ["a" "b\\"c"]']),
        ("ENTRYPOINT run it", ['ENTRYPOINT ["/bin/sh" "-c" "run it"]']),
        (
            "HEALTHCHECK --interval=90s --timeout=1500ms --retries=3 CMD x",
            ["HEALTHCHECK {Test:[CMD-SHELL x] Interval:1m30s Timeout:1.5s StartPeriod:0s StartInterval:0s Retries:3}"],
        ),
        (
            "HEALTHCHECK NONE",
            ["HEALTHCHECK {Test:[NONE] Interval:0s Timeout:0s StartPeriod:0s StartInterval:0s Retries:0}"],
        ),
        ("EXPOSE 5000 1234/udp 80-81", ["EXPOSE [1234/udp 5000/tcp 80/tcp 81/tcp]"]),
        ('VOLUME ["/a", "/b c"]', ["VOLUME [/a /b c]"]),
        ('SHELL ["/bin/ash", "-c"]', ["SHELL [/bin/ash -c]"]),
        ("STOPSIGNAL 9\nUSER u:g\nMAINTAINER some one", ["STOPSIGNAL 9", "USER u:g", "MAINTAINER some one"]),
        ("LABEL a=b 'c d'=\"e f\"", ["LABEL a=b c d=e f"]),
        ("WORKDIR /a/../b/\nWORKDIR c", ["WORKDIR /a/../b/", "WORKDIR /b/c"]),
        ("COPY --chown=1:2 --chmod=644 f g /d/", ["COPY --chown=1:2 --chmod=644 f g /d/ # buildkit"]),
        ("ADD --checksum=sha256:00 https://h/f /", ["ADD https://h/f / # buildkit"]),
        ("COPY --parents --link --exclude=x f <<E /d/\nE", ["COPY --parents f <<E /d/ # buildkit"]),
        ("ONBUILD RUN x", []),
    ],
)
def test_the_history_is_buildkits_word_for_word(text: str, wanted: list[str]) -> None:
    assert history_of(graph_of(f"FROM scratch\n{text}\n")) == wanted


def test_a_workdir_is_kept_as_written_and_made_clean() -> None:
    graph = graph_of("FROM scratch\nWORKDIR /a/../b/\n")
    assert config_of(graph)["WorkingDir"] == "/a/../b/"
    assert [step.op.path for step in graph.steps if isinstance(step.op, MkdirOp)] == ["/b"]


@pytest.mark.parametrize(
    ("flag", "kind"), [("", "http"), ("--keep-git-dir=true ", "git"), ("--keep-git-dir=false ", "git")]
)
def test_a_source_whose_git_directory_matters_is_a_repository(flag: str, kind: str) -> None:
    graph = graph_of(f"FROM scratch\nADD {flag}https://example.org/~a/b /\n")
    assert [item.kind for step in graph.steps if isinstance(step.op, CopyOp) for item in step.op.items] == [kind]


def test_scratch_works_in_the_root() -> None:
    assert config_of(graph_of("FROM scratch\nCOPY f /\n"))["WorkingDir"] == "/"
    assert config_of(graph_of("FROM scratch\nWORKDIR b\n"))["WorkingDir"] == "/b"


@pytest.mark.parametrize(
    ("mount", "wanted"),
    [
        ("type=secret,source=b,target=/c", "b"),
        ("type=secret,id=a,target=/c/d", "a"),
        ("type=secret,target=/c/d", "d"),
        ("type=cache,target=/c/d/", "/c/d"),
        ("type=cache,target=/c,id=a", "a"),
    ],
)
def test_what_a_mount_is_known_by(mount: str, wanted: str) -> None:
    (run,) = runs(graph_of(f"FROM scratch\nRUN --mount={mount} x\n"))
    assert [made.id for made in run.mounts] == [wanted]


@pytest.mark.parametrize(
    ("text", "target", "wanted"),
    [
        ("FROM scratch AS a\nARG TARGETSTAGE\nRUN x\n", None, "a"),
        ("FROM scratch\nARG TARGETSTAGE\nRUN x\n", None, "default"),
        ("FROM scratch AS a\nARG TARGETSTAGE\nRUN x\nFROM scratch AS b\n", "a", "a"),
        ("FROM scratch AS a\nARG TARGETSTAGE\nRUN x\nFROM a AS final\n", None, "final"),
    ],
)
def test_the_target_stage_is_told(text: str, target: str | None, wanted: str) -> None:
    (run,) = runs(graph_of(text, target=target))
    assert dict(run.env)["TARGETSTAGE"] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM scratch AS x\nCOPY --from=\\'y f /\nFROM scratch\n", "looking for matching single-quote"),
        ("FROM scratch AS x\nCOPY --from=7 f /\nFROM scratch\n", "invalid stage index 7"),
        ("FROM scratch AS x\nCOPY --from=x f /\nFROM scratch\n", "circular dependency detected on stage: x"),
        (
            "FROM scratch AS x\nCOPY --from=y f /\nFROM scratch AS y\nCOPY --from=x f /\nFROM scratch\n",
            "circular dependency detected on stage: x",
        ),
        ("FROM $nothing AS x\nFROM scratch\n", "should not be blank"),
    ],
)
def test_what_is_wrong_in_a_stage_that_nothing_needs(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        graph_of(text)


def test_a_stage_that_nothing_needs_may_look_forward() -> None:
    assert graph_of("FROM scratch AS x\nCOPY --from=y f /\nFROM scratch AS y\nCOPY a /\n").steps


def test_stages_that_after_names_are_built_first() -> None:
    text = "ARG S=one\nFROM a AS one\nRUN one\nFROM a AS two\nRUN two\nFROM --after=$S --after=1 a\nRUN own\nRUN next\n"
    graph = graph_of(text, Images(a={}))
    by_command = {step.op.args[-1]: step for step in graph.steps if isinstance(step.op, RunOp)}
    first = {by_command["one"].number, by_command["two"].number}
    assert set(by_command["own"].inputs) == first
    assert set(graph.demanded) == first
    assert by_command["next"].inputs == ()


def test_after_waits_where_the_stage_has_no_step_and_inherits_nothing() -> None:
    graph = graph_of("FROM scratch AS one\nRUN one\nENV A=1\nFROM --after=one scratch\nLABEL a=b\n")
    assert len(graph.demanded) == 1
    assert graph.images[0].top is None
    assert "A=1" not in config_of(graph)["Env"]


@pytest.mark.parametrize("name", ["later", "nosuch", "self", "2"])
def test_after_names_a_stage_before(name: str) -> None:
    with pytest.raises(PlanError, match=r"--after: no stage|invalid stage index"):
        graph_of(f"FROM scratch AS one\nFROM --after={name} scratch AS self\nFROM scratch AS later\n")


def test_a_base_built_for_a_variant_keeps_it() -> None:
    class Variants(Images):
        def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
            return super().resolve_image(name, Platform("linux", "arm64", "v9", "1.2"))

    asked = (Platform("linux", "arm64"),)
    assert graph_of("FROM a\n", Variants(a={}), platforms=asked).images[0].document["variant"] == "v9"
    foreign = graph_of("FROM a\n", Variants(a={}), platforms=(Platform("linux", "arm", "v7"),)).images[0].document
    assert (foreign["architecture"], foreign["variant"], foreign.get("os.version")) == ("arm", "v7", None)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("FROM a AS builder\nFROM a\nCOPY --from=buidler /x /y\n", "did you mean the stage builder?"),
        ("FROM a AS builder\nFROM biulder\n", "did you mean the stage builder?"),
        ("FROM a\nCOPY --from=debug /x /y\n", "no stage is called debug: it was taken for an image"),
        ("FROM debug\n", None),
        ("FROM a\nCOPY --from=host/debug:1 /x /y\n", None),
    ],
)
def test_who_meant_a_stage_is_told(text: str, hint: str | None) -> None:
    with pytest.raises(NameNotFound) as caught:
        graph_of(text, Images(a={}))
    line = text.count("\n")
    assert caught.value.hint == hint
    assert caught.value.__notes__[0] == f"Containerfile:{line}:1"
    assert text.splitlines()[-1] in caught.value.__notes__[1]


def test_a_platform_alone_must_be_known() -> None:
    with pytest.raises(ParseError, match="unknown operating system or architecture"):
        graph_of("FROM --platform=foo a\n", Images(a={}))
    for known in ("arm64", "x86_64", "windows", "linux/foo", "macos/arm64"):
        assert graph_of(f"FROM --platform={known} a\n", Images(a={})).images


def test_windows_has_its_own_shell_and_no_path() -> None:
    config = config_of(graph_of("FROM scratch\nENTRYPOINT foo bar\n", platforms=(Platform("windows", "amd64"),)))
    assert config["Entrypoint"] == ["cmd", "/S", "/C", "foo bar"]
    assert "Env" not in config


def test_variables_of_a_base_without_a_value_stay_so() -> None:
    images = Images(a={"Env": ["PATH=/p", "BARE", "SET"]})
    assert config_of(graph_of("FROM a\nENV SET=1\n", images))["Env"] == ["PATH=/p", "BARE", "SET=1"]


def test_a_link_with_a_mode_is_an_ordinary_copy() -> None:
    graph = graph_of("FROM scratch\nCOPY --link a /\nCOPY --link --chmod=644 a /\n")
    assert [step.op.link for step in graph.steps if isinstance(step.op, CopyOp)] == [True, False]


def test_a_cache_mount_without_id_is_known_by_its_target_as_written() -> None:
    text = "FROM scratch\nRUN --mount=type=cache,target=c/ x\nWORKDIR /w\nRUN --mount=type=cache,target=c y\n"
    mounts = [run.mounts[0] for run in runs(graph_of(text))]
    assert [mount.id for mount in mounts] == ["c", "c"]
    assert [mount.target for mount in mounts] == ["/c", "/w/c"]


def test_an_indented_shebang_of_a_chomped_heredoc_is_one() -> None:
    (run,) = runs(graph_of("FROM scratch\nRUN <<-EOF\n\t#!/bin/awk -f\n\tx\nEOF\n"))
    assert run.files == (("/dev/pipes/EOF", b"#!/bin/awk -f\nx\n"),)


def test_steps_share_the_environment_of_thousands_of_arguments() -> None:
    text = "FROM scratch\n" + "".join(f"ARG A{i}=x\nRUN {i}\n" for i in range(2000))
    graph = graph_of(text)
    blocks = {id(block) for run in runs(graph) for block in run.env._blocks}
    assert len(blocks) < 3 * 2000
    assert graph.images[0].history[-1].created_by.startswith("RUN |2000 A0=x A1=x")


def test_a_run_without_words_is_the_shells_and_one_of_no_program_nobodys() -> None:
    (empty,) = runs(graph_of("FROM scratch\nRUN\n"))
    assert empty.args == ("/bin/sh", "-c", "")
    with pytest.raises(PlanError, match="RUN has no command"):
        graph_of("FROM scratch\nRUN []\n")
