"""Images defined in Python come to the graph of the Containerfile that says the same; values stay literal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.definition import Image, RunMount
from builder.errors import UsageError
from builder.frontend.instructions import parse_containerfile
from builder.frontend.source import SourceFile
from builder.plan.graph import BuildGraph, CopyOp, RunOp
from builder.plan.planner import plan
from builder.plan.request import BuildRequest


class _NoImages:
    def resolve_image(self, name: str, platform: object) -> Any:
        raise AssertionError(name)

    resolve_layout = resolve_image


def graph_of(image: Image | str) -> BuildGraph:
    source = image.source() if isinstance(image, Image) else SourceFile("Containerfile", image)
    return plan(BuildRequest(containerfile=source, context=Path(".")), parse_containerfile(source), _NoImages())


def runs(image: Image) -> list[RunOp]:
    return [step.op for step in graph_of(image).steps if isinstance(step.op, RunOp)]


def test_the_same_graph_as_the_containerfiles() -> None:
    tools = Image.start(name="tools").env(A="1").run("make tools")
    image = (
        Image.start()
        .arg("LEVEL", "3")
        .copy("src", "/src/", chown="1:2", exclude=["*.md"])
        .copy("/tool", "/bin/", source=tools, link=True)
        .workdir("/src")
        .user("app")
        .run(["cc", "-o", "x"], mounts=[RunMount.cache("/cache", id="c"), RunMount.bind("/tools", image=tools)])
        .label({"a.b": "c d"})
        .expose(80, "53/udp")
        .volume("/data")
        .stop_signal("SIGQUIT")
        .entrypoint(["/x"])
        .cmd("serve $PORT")
    )
    text = """FROM scratch AS tools
ENV A=1
RUN make tools
FROM scratch
ARG LEVEL=3
COPY --chown=1:2 --exclude=*.md src /src/
COPY --from=tools --link /tool /bin/
WORKDIR /src
USER app
RUN --mount=type=cache,target=/cache,id=c --mount=type=bind,target=/tools,from=tools ["cc", "-o", "x"]
LABEL a.b="c d"
EXPOSE 80 53/udp
VOLUME /data
STOPSIGNAL SIGQUIT
ENTRYPOINT ["/x"]
CMD serve $PORT
"""
    ours, theirs = graph_of(image), graph_of(text)
    assert [step.op for step in ours.steps] == [step.op for step in theirs.steps]
    assert ours.images[0].document == theirs.images[0].document


def test_an_image_is_the_beginning_of_several() -> None:
    base = Image.start(name="base").run("first")
    one, other = base.run("one"), base.run("other")
    image = Image.start(one).copy("/a", "/a", source=other)
    assert sorted(op.args[-1] for op in runs(image)) == ["first", "one", "other"], "what they share is one step"
    assert base.lines == Image.start(name="base").run("first").lines, "nothing changes an image"


def test_a_long_and_branching_definition_is_linear() -> None:
    image = Image.start()
    for number in range(300):
        image = Image.start(image).copy("/x", f"/{number}", source=image)
    assert image.containerfile().count("FROM scratch") == 1
    assert image.containerfile().count("\n") == 601


def test_stages_are_not_called_what_an_image_or_a_context_is() -> None:
    image = Image.start("tools", name="tools").copy("a", "/a", source="stage").copy("b", "/b", source=Image.start())
    lines = image.containerfile().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM scratch AS stage-1",
        "FROM tools AS tools-1",
    ]
    assert "COPY --from=stage-1 [" in "\n".join(lines)


@pytest.mark.parametrize(
    "command",
    [
        "echo $HOME",
        "set -e\necho '$x' \\\n  more",
        "cat <<EOF",
        'cat <<"EOF"\nEOF\nEOF1\n',
        "--mount=x",
        "[ -e /x ]",
        "# a comment",
        "ends with \\",
        "  led by spaces",
        "a \\\nb",
    ],
)
def test_commands_reach_the_shell_as_they_are(command: str) -> None:
    (op,) = runs(Image.start().run(command))
    assert op.args[:2] == ("/bin/sh", "-c")
    assert op.args[2].removesuffix("\n") == command.removesuffix("\n")


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@given(words)
def test_values_are_literal(value: str) -> None:
    image = Image.start().env(A="x").env(V=value).label({"l": value}).run([value, "$A"])
    graph = graph_of(image)
    config: dict[str, Any] = graph.images[0].document["config"]
    assert f"V={value}" in config["Env"]
    assert config["Labels"]["l"] == value
    (op,) = [step.op for step in graph.steps if isinstance(step.op, RunOp)]
    assert op.args == (value, "$A")


@given(st.text("ab $'\"\\", min_size=1, max_size=8))
def test_paths_are_literal(name: str) -> None:
    graph = graph_of(Image.start().env(a="no", b="no").copy(name, f"/to/{name}"))
    (op,) = [step.op for step in graph.steps if isinstance(step.op, CopyOp)]
    assert op.items[0].source.lstrip("/") == name
    assert op.dest == f"/to/{name}"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=60))
def test_files_have_the_content_that_is_given(content: str) -> None:
    graph = graph_of(Image.start().file("/f", content))
    (op,) = [step.op for step in graph.steps if isinstance(step.op, CopyOp)]
    wanted = content if content.endswith("\n") or not content else f"{content}\n"
    assert op.items[0].data.decode() == wanted


@pytest.mark.parametrize(
    "make",
    [
        lambda i: i.env(A="a\nb"),
        lambda i: i.env({"A B": "x"}),
        lambda i: i.run(""),
        lambda i: i.run([]),
        lambda i: i.cmd("two\nlines"),
        lambda i: i.copy([], "/x"),
        lambda i: i.copy("a\nb", "/x"),
        lambda i: i.copy("a", "/x", source="two words"),
        lambda i: i.file("/a b", "x"),
        lambda i: i.file("/a", "x\0"),
        lambda i: i.instruction("RUN a\nRUN b"),
        lambda i: i.user(""),
        lambda i: Image.start(name="Not A Name"),
        lambda i: i.run("x", mounts=[RunMount.cache("/a,b")]),
    ],
)
def test_what_a_containerfile_cannot_say_is_refused(make: Callable[[Image], Image]) -> None:
    with pytest.raises(UsageError):
        make(Image.start())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.start("--platform=linux/arm64"),
        lambda: Image.start("base").user("--x"),
        lambda: Image.start("base").workdir("--x"),
        lambda: Image.start("base").expose("--x"),
        lambda: Image.start("base").arg("--x"),
        lambda: Image.start("base").env({"--x": "y"}),
        lambda: Image.start("base").label({"--x": "y"}),
    ],
)
def test_no_value_is_a_flag(make: Callable[[], Image]) -> None:
    with pytest.raises(UsageError):
        make().containerfile()
