"""`--format`: what of Go's templates is understood, and how the rest is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.cli.template import print_formatted, render
from builder.errors import UsageError

VALUE = {"Name": "n", "Labels": {"a.b": "1", "c": "2"}, "List": ["x", "y"], "None": None, "Yes": True, "N": 3}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{.Name}}", "n"),
        ("{{ .name }}:{{.N}}", "n:3"),
        (r"{{.Name}}\t{{.N}}\n", "n\t3\n"),
        ("{{json .}}", '{"Name":"n","Labels":{"a.b":"1","c":"2"},"List":["x","y"],"None":null,"Yes":true,"N":3}'),
        ("{{json .Labels.c}}", '"2"'),
        ('{{index .Labels "a.b"}}', "1"),
        ('{{index .Labels "missing"}}|', "|"),
        ("{{index .List 1}}", "y"),
        ("{{.List}} {{.Labels}} {{.Yes}} {{.None}}", "[x y] map[a.b:1 c:2] true "),
        ('{{join .List ", "}} {{len .List}}', "x, y 2"),
        ("{{range .List}}<{{.}}>{{end}}", "<x><y>"),
        ("{{range .None}}no{{else}}empty{{end}}", "empty"),
        ("{{if .None}}a{{else}}b{{end}}{{if .Yes}}c{{end}}", "bc"),
        ("{{range .List}}{{if .}}{{.}}{{else}}-{{end}};{{end}}", "x;y;"),
        ("{{with .Labels}}{{.c}}{{end}}", "2"),
        ("a {{- .Name -}} b", "anb"),
        ("{{.Name | upper | json}}", '"N"'),
        ("{{range .List}}{{println .}}{{end}}", "x\ny\n"),
        ("plain", "plain"),
    ],
)
def test_render(template: str, text: str) -> None:
    assert render(template, VALUE) == text


@pytest.mark.parametrize(
    "template",
    [
        *("{{.Missing}}", "{{.Name", "{{range .List}}x", "{{end}}", "{{}}", "{{Name}}", "{{exec .Name}}"),
        *("{{.Name.Inner}}", "{{len .N}}", "{{range .N}}{{end}}", "{{join .N}}", '{{index .List "x"}}'),
    ],
)
def test_what_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match="--format"):
        render(template, VALUE)


def test_depth_is_bounded() -> None:
    with pytest.raises(UsageError, match="nested too deeply"):
        render("{{if .Yes}}" * 50 + "{{end}}" * 50, VALUE)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_formatted(r"table {{.Name}}\t{{.Labels.c}}", [VALUE])
    assert capsys.readouterr().out.split() == ["NAME", "C", "n", "2"]


@given(st.text(alphabet='{}.abN "|-rangeifendjson', max_size=40))
def test_any_text_is_filled_in_or_refused(template: str) -> None:
    try:
        render(template, VALUE)
    except UsageError:
        pass
