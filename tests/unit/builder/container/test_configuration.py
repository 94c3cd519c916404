"""Changes of a config from the texts that `config` takes, without a container: a stage is all that they need."""

from __future__ import annotations

from typing import Any

import pytest

from builder.container.byhand import Draft, step_request
from builder.container.configuration import EXTRA, config_change, healthcheck_change, instruction_change
from builder.errors import ParseError, UsageError
from builder.frontend.source import SourceFile
from builder.plan.stage import Dispatcher, StageState
from layers.oci import ImageConfig, Platform


class NoSources:
    """A planner for stages without files: WORKDIR makes a step, and that is all."""

    def __init__(self) -> None:
        self.steps: list[object] = []

    def add_step(self, state: StageState, op: object, **_more: object) -> int:
        self.steps.append(op)
        return len(self.steps) - 1

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def draft(config: dict[str, Any] | None = None) -> Draft:
    state = StageState(name="", index=0, platform=Platform(), source=SourceFile("t", ""), escape="\\")
    state.start_from_config(ImageConfig.build({"architecture": "amd64", "os": "linux", "config": config or {}}))
    return Draft(state, Dispatcher(step_request(), NoSources(), {}), {}, {})


def after(*changes: tuple[str, str], config: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The config and the history's lines."""
    made = draft(config)
    for field, text in changes:
        config_change(field, text)(made)
    full = made.state.full_config()
    full["Env"] = [entry for entry in full["Env"] if not entry.startswith("PATH=")]
    return {k: v for k, v in full.items() if v}, [entry.created_by for entry in made.state.history]


@pytest.mark.parametrize(
    ("field", "text", "key", "value", "line"),
    [
        ("env", "A=b c", "Env", ["A=b c"], "ENV A=b c"),
        ("env", "A=\"q\" 's'", "Env", ["A=\"q\" 's'"], "ENV A=\"q\" 's'"),
        ("label", "a=$HOME \\x", "Labels", {"a": "$HOME \\x"}, "LABEL a=$HOME \\x"),
        ("cmd", "a 'b c'", "Cmd", ["a", "b c"], 'CMD ["a" "b c"]'),
        ("cmd", '["a", "$b"]', "Cmd", ["a", "$b"], 'CMD ["a" "$b"]'),
        ("entrypoint", "a b", "Entrypoint", ["/bin/sh", "-c", "a b"], 'ENTRYPOINT ["/bin/sh" "-c" "a b"]'),
        ("entrypoint", '["a"]', "Entrypoint", ["a"], 'ENTRYPOINT ["a"]'),
        ("port", "80", "ExposedPorts", {"80/tcp": {}}, "EXPOSE [80/tcp]"),
        ("port", "80-81/udp", "ExposedPorts", {"80/udp": {}, "81/udp": {}}, "EXPOSE [80/udp 81/udp]"),
        ("user", "$x", "User", "$x", "USER $x"),
        ("volume", "/a b", "Volumes", {"/a b": {}}, "VOLUME [/a b]"),
        ("workingdir", "a", "WorkingDir", "/a", "WORKDIR /a"),
        ("stop-signal", "9", "StopSignal", "9", "STOPSIGNAL 9"),
        ("shell", "/bin/bash -c", "Shell", ["/bin/bash", "-c"], "SHELL [/bin/bash -c]"),
    ],
)
def test_a_field_is_an_instruction(field: str, text: str, key: str, value: object, line: str) -> None:
    config, lines = after((field, text))
    assert config[key] == value
    assert lines == [line]


def test_variables_of_a_variable_are_those_so_far() -> None:
    config, _ = after(("env", "A=1"), ("env", "B=$A-${A}-$NONE"), ("env", "C=\\$A"))
    assert config["Env"] == ["A=1", "B=1-1-", "C=$A"]


def test_the_order_of_entrypoint_and_cmd_matters_as_in_a_file() -> None:
    old = {"Cmd": ["old"]}
    assert "Cmd" not in after(("entrypoint", '["e"]'), config=old)[0]
    assert after(("cmd", "new"), ("entrypoint", '["e"]'), config=old)[0]["Cmd"] == ["new"]


@pytest.mark.parametrize(
    ("field", "one", "key", "left"),
    [
        ("env", "A-", "Env", ["B=2"]),
        ("label", "a-", "Labels", {"b": "2"}),
        ("port", "80-", "ExposedPorts", {"81/udp": {}}),
        ("volume", "/a-", "Volumes", {"/b": {}}),
    ],
)
def test_removals_leave_no_line(field: str, one: str, key: str, left: object) -> None:
    config = {
        "Env": ["A=1", "B=2"], "Labels": {"a": "1", "b": "2"}, "ExposedPorts": {"80/tcp": {}, "81/udp": {}},
        "Volumes": {"/a": {}, "/b": {}},
    }  # fmt: skip
    changed, lines = after((field, one), config=config)
    assert changed[key] == left
    assert lines == []
    assert key not in after((field, "-"), config=config)[0]
    # What is not there can be removed, too.
    assert after((field, "zzz-" if field != "port" else "9-"), config=config)[0][key] == config[key]


@pytest.mark.parametrize("field", ["cmd", "entrypoint", "shell", "user", "workingdir", "stop-signal"])
def test_an_empty_text_removes(field: str) -> None:
    config = {"Cmd": ["x"], "Entrypoint": ["x"], "Shell": ["x"], "User": "x", "WorkingDir": "/x", "StopSignal": "9"}
    changed, lines = after((field, ""), config=config)
    assert len(changed) == len(config) - 1
    assert lines == []


def test_health_checks() -> None:
    made = draft()
    healthcheck_change("CMD a 'b c'", {"interval": "5", "retries": "2"})(made)
    assert made.state.config["Healthcheck"] == {"Test": ["CMD", "a", "b c"], "Interval": 5 * 10**9, "Retries": 2}
    healthcheck_change(None, {"timeout": "1m"})(made)
    assert made.state.config["Healthcheck"]["Timeout"] == 60 * 10**9
    assert made.state.config["Healthcheck"]["Interval"] == 5 * 10**9
    for text, test in (
        ("curl x", ["CMD-SHELL", "curl x"]),
        ("CMD-SHELL a b", ["CMD-SHELL", "a b"]),
        ("NONE", ["NONE"]),
    ):
        healthcheck_change(text, {})(made)
        assert made.state.config["Healthcheck"] == {"Test": test}
    healthcheck_change("", {})(made)
    assert "Healthcheck" not in made.state.config
    for test_, options in ((None, {"retries": "1"}), ("x", {"retries": "-1"}), ("x", {"interval": "-1s"})):
        with pytest.raises(UsageError):
            healthcheck_change(test_, options)(made)


def test_platforms_and_what_is_kept_for_the_image() -> None:
    made = draft()
    for field, text in (
        ("arch", "arm64"),
        ("os", "linux"),
        ("variant", "v8"),
        ("os-version", "1"),
        ("os-feature", "a"),
    ):
        config_change(field, text)(made)
    config_change("os-feature", "b")(made)
    config_change("os-feature", "a-")(made)
    assert made.state.platform == Platform("linux", "arm64", "v8", "1", ("b",))
    config_change("os-feature", "-")(made)
    assert made.state.platform.os_features == ()
    for field in EXTRA:
        config_change(field, "text")(made)
    assert made.extra == dict.fromkeys(EXTRA, "text")
    config_change("comment", "")(made)
    assert "comment" not in made.extra
    for text in ("a=1", "b=2", "a-"):
        config_change("annotation", text)(made)
    assert made.annotations == {"b": "2"}
    config_change("unsetannotation", "b")(made)
    assert made.annotations == {}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(("env", "A"), ("env", "=b"), ("label", "a"), ("cmd", "'x"), ("cmd", "[1]"), ("cmd", "[")),
        *(("entrypoint", "[1, 2]"), ("port", "http"), ("port", "80\nRUN x"), ("stop-signal", "SIGNONE")),
        *(("onbuild", "FROM x"), ("onbuild", "NOSUCH"), ("volume", ""), ("arch", ""), ("port", "70000")),
    ],
)
def test_what_means_nothing_is_one_clear_error(field: str, text: str) -> None:
    with pytest.raises((UsageError, ParseError)):
        config_change(field, text)(draft())


def test_unknown_fields_and_instructions_that_make_files_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="no field"):
        config_change("nosuch", "x")
    with pytest.raises(UsageError, match="not possible"):
        instruction_change("RUN x")
    made = draft()
    instruction_change("ENV A=1 B=$A")(made)
    assert made.state.image_env["B"] == ""
