"""HCL: bodies, expressions, functions, and bake files in it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.bakefile import BakeFile, parse_files
from builder.errors import UsageError
from builder.hcl import parse_hcl
from builder.hclfunctions import FUNCTIONS

SCOPE = {"N": 3, "T": "text", "L": ["b", "a"], "M": {"k": "v", "n": {"x": [1, 2]}}, "E": "", "B": True}


def value(text: str) -> Any:
    return parse_hcl(f"x = {text}\n", FUNCTIONS).attributes["x"](SCOPE)


def bake(text: str, **environ: str) -> BakeFile:
    return parse_files([("docker-bake.hcl", text)], environ)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1", 1), ("-1.5", -1.5), ("2e3", 2000.0), ("true", True), ("null", None), ('"a\\n\\"\\u00e9"', 'a\n"é'),
        ("N + 2 * 3 - 4 / 2", 7), ("(N + 2) * 3", 15), ("7 % 4", 3), ("7 / 2", 3.5), ("N >= 3 && N < 4", True),
        ('E == "" ? "empty" : E', "empty"), ("!B || false", False), ('"${T}-${N}"', "text-3"), ('"${N}"', 3),
        ('"$${T} %%{x}"', "${T} %{x}"), ("L[1]", "a"), ("M.k", "v"), ('M["n"].x[0]', 1), ("M.n.x.1", 2),
        ("[1, \n 2,\n]", [1, 2]), ('{a = 1, "b" : 2\n c = T}', {"a": 1, "b": 2, "c": "text"}), ("{}", {}), ("[]", []),
        ("[for x in L : upper(x)]", ["B", "A"]), ('[for i, x in L : "${i}${x}" if x != "a"]', ["0b"]),
        ("{for k, v in M : k => 1}", {"k": 1, "n": 1}),
        ('join("-", sort(L))', "a-b"), ("concat(L, [N])", ["b", "a", 3]),
        ("max([1, 5, 2]...)", 5), ('"${join(",", [for x in L : "${x}!"])}"', "b!,a!"),
        ("<<EOT\n  a ${T}\nEOT", "  a text\n"), ("<<-EOT\n    a\n      b\n  EOT", "a\n  b\n"),
        ('format("%s=%03d %q %.1f%%", T, N, "x", 2)', 'text=003 "x" 2.0%'), ('substr("abcdef", -3, 2)', "de"),
        ('regex_replace("v1.2", "v(\\\\d+)", "$${1}x")', "1x.2"),
        ('replace(T, "t", "")', "ex"), ('split(",", "a,b")', ["a", "b"]),
        ('lookup(M, "nothing", "d")', "d"), ('coalesce(E, null, "c")', "c"), ("length(L)", 2), ("notequal(E, T)", True),
        ('jsondecode("{\\"a\\": [1]}").a[0]', 1), ('sanitize("a.b/c")', "a_b_c"), ("keys(M)", ["k", "n"]),
    ],
)  # fmt: skip
def test_expressions(text: str, wanted: Any) -> None:
    assert value(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "x =", "x", "x = [1", 'x = "a', 'x = "${a"', "x = 1 2", "x = nothing", "x = nothing()", "x = L[9]", "x = M.q",
        'x = upper(1)', "x = 1 / 0", 'x = "a" + 1', "x = <<E\nno end", 'x = "\\q"', 'x = "%{ if B }a%{ endif }"',
        "a { b",
        "x = 1\nx = 2", "x = (((", "x = range(99999999)", 'x = format("%s")', "x = &", "x = " + "(" * 5000,
        "x = T ? 1 : 2", "x = coalesce()", "x = coalescelist([])", f"x = {'9' * 1000} / 3.5",
        'x = jsondecode("' + "[" * 100_000 + '")', 'x = ' + "1+" * 5000 + "1",
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"docker-bake\.hcl is no build file"):
        bake(f'variable "T" {{ default = "t" }}\n{text}\n')


@pytest.mark.parametrize(
    ("first", "twice"),
    [('"x"', '"${A}${A}"'), ("[1]", "concat(A, A)"), ("[1]", "length([A, A]) > 0 ? [A, A] : []"), ("3", "A * A"),
     ("3", "multiply(A, A)"), ('"xx"', 'replace(A, "x", A)'), ('"xx"', 'join(A, split("", A))'),
     ('"xx"', 'regex_replace(A, "x", A)')],
)  # fmt: skip
def test_what_doubles_itself_does_not_fill_memory(first: str, twice: str) -> None:
    rows = [f"a{n} = {twice}".replace("A", f"a{n - 1}") for n in range(1, 60)]
    with pytest.raises(UsageError, match="more than"):
        bake("\n".join([f"a0 = {first}", *rows]))


@given(st.text(alphabet='abTNLM{}[]()=,.:?"$%!&|+-*/<>\n 01', max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        body = parse_hcl(text, FUNCTIONS)
        for attribute in body.attributes.values():
            attribute(SCOPE)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass


FILE = """
variable "TAG" {
  default = "dev"   # from outside
}
variable "DEBUG" { default = false }
variable "COUNT" { default = 2 }
function "image" {
  params = [name]
  variadic_params = rest
  result = join("", concat(["reg.example/", name], [for r in rest : "-${r}"]))
}
group "default" { targets = ["app", "matrix"] }
target "_common" {
  labels = { "org.example.tag" = TAG }
  args = DEBUG ? { MODE = "debug" } : { MODE = "release", N = COUNT + 1 }
}
target "app" {
  inherits = ["_common"]
  tags = [image("app", TAG), notequal("dev", TAG) ? "${image("app")}:latest" : ""]
  dockerfile-inline = <<-EOT
    FROM scratch
    LABEL a=${TAG}
  EOT
}
target "matrix" {
  name = "m-${replace(v.number, ".", "-")}"
  matrix = { v = [{ number = "3.11" }, { number = "3.12" }] }
  args = { VERSION = v.number }
}
"""


def test_a_bake_file() -> None:
    whole = bake(FILE)
    targets = {t.name: t.attributes for t in whole.selected([])}
    assert list(targets) == ["app", "m-3-11", "m-3-12"]
    assert targets["app"] == {
        "labels": {"org.example.tag": "dev"}, "args": {"MODE": "release", "N": "3"},
        "tags": ["reg.example/app-dev"], "dockerfile-inline": "FROM scratch\nLABEL a=dev\n",
    }  # fmt: skip
    assert targets["m-3-12"] == {"args": {"VERSION": "3.12"}}
    changed = {t.name: t.attributes for t in bake(FILE, TAG="7", DEBUG="true", COUNT="5").selected(["app"])}
    assert changed["app"]["tags"] == ["reg.example/app-7", "reg.example/app:latest"]
    assert changed["app"]["args"] == {"MODE": "debug"}


def test_a_functions_world_is_its_parameters() -> None:
    with pytest.raises(UsageError, match="no variable TAG"):
        bake('variable "TAG" {}\nfunction "f" {\n params = []\n result = TAG\n}\ntarget "t" { tags = [f()] }')
    with pytest.raises(UsageError, match="takes 1 values"):
        bake('function "f" {\n params = [a]\n result = a\n}\ntarget "t" { tags = [f()] }')


@pytest.mark.parametrize(
    "text",
    [
        "[for a in range(5000): [for b in range(5000): [for c in range(5000): 1]]]",
        "length([for a in range(5000): {for b in range(5000): b => a if b == a}])",
        'regex_replace(join("", [for a in range(5000): "aaaaaaaaaaaaaaaaaaaa"]), "(a+)+$$|(a?){400}(a?){400}b", "")',
    ],
)
def test_what_would_take_years_is_refused(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"takes too long|takes more than"):
        value(text)
    assert time.process_time() - began < 60


def test_patterns_that_never_end_in_other_engines() -> None:
    assert value('regex_replace("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "^(a+)+$", "x")').endswith(
        "a!"
    )
    assert value('regex_replace("a-b", "(?P<l>a)-(b)", "$${2}$${l}$9$1$0")') == "baaa-b"
