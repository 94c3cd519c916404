"""The meaning of a syntax tree: typed instructions, grouped into stages.

`parse_containerfile` is what a build calls; `parse_instruction` serves ONBUILD triggers from image
configs and `commit --change`. The instruction classes live in `language` and are exported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from builder.errors import ParseError
from builder.frontend.heredoc import Heredoc, is_heredoc, parse_heredoc
from builder.frontend.language import (
    Add,
    Arg,
    ArgPair,
    Cmd,
    Copy,
    Entrypoint,
    Env,
    Expose,
    From,
    Healthcheck,
    Instruction,
    Label,
    Maintainer,
    Onbuild,
    Pair,
    Record,
    Run,
    RunDevice,
    RunMount,
    Script,
    Shell,
    StopSignal,
    User,
    Volume,
    Workdir,
)
from builder.frontend.lineforms import FORMS
from builder.frontend.parser import Directive, Node, ParserWarning, parse_syntax
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.words import GO_SPACE
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    _T = TypeVar("_T")

__all__ = [
    "Add", "Arg", "ArgPair", "Cmd", "Containerfile", "Copy", "Entrypoint", "Env", "Expose", "From",
    "Healthcheck", "Heredoc", "Instruction", "Label", "Maintainer", "Onbuild", "Pair", "Run", "RunDevice",
    "RunMount", "Script", "Shell", "Stage", "StopSignal", "User", "Volume", "Workdir", "parse_containerfile",
    "parse_instruction", "parse_onbuild",
]  # fmt: skip

KEYWORDS = (*(name.upper() for name in FORMS), "ONBUILD")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
_ONBUILD = re.compile(r"^onbuild[\t\n\f\r ]*", re.IGNORECASE)
_MIN_INTERVAL_NS = 1_000_000
"""Docker's: a shorter interval between health checks is an error."""


class Stage(Record):
    """From one FROM to the next. `name` is lower-case; `description` is the FROM's `# name text` comment."""

    index: int
    name: str | None
    from_: From
    instructions: tuple[Instruction, ...]
    range: SourceRange
    description: str = ""


class Containerfile(NamedTuple):
    """A parsed file. `global_args` are those before the first FROM."""

    source: SourceFile
    directives: tuple[Directive, ...]
    escape: str
    global_args: tuple[Arg, ...]
    stages: tuple[Stage, ...]
    warnings: tuple[ParserWarning, ...]


def parse_containerfile(source: SourceFile) -> Containerfile:
    """Parse text all the way to instructions. Raises: ParseError, with a place."""
    tree = parse_syntax(source)
    global_args: list[Arg] = []
    stages: list[Stage] = []
    body: list[Instruction] = []
    for node in tree.nodes:
        instruction = _convert(node, source)
        if isinstance(instruction, From):
            _close(stages, body)
            comment = description_of(instruction.comments, instruction.name or "")
            stages.append(
                Stage(
                    index=len(stages),
                    name=instruction.name,
                    from_=instruction,
                    instructions=(),
                    range=instruction.range,
                    description=comment,
                )
            )
            body = []
        elif stages:
            body.append(instruction)
        elif isinstance(instruction, Arg):
            global_args.append(instruction)
        else:
            raise instruction.error(
                f"no build stage in current context: {instruction.keyword} stands before the first FROM",
                token=node.keyword,
                hint="only ARG, comments and directives may come before FROM",
            )
    _close(stages, body)
    if not stages:
        raise ParseError(
            "dockerfile contains no stages to build",
            source=source,
            range=tree.nodes[0].range,
            hint="a FROM is missing; `FROM scratch` begins an empty image",
        )
    return Containerfile(source, tree.directives, tree.escape, tuple(global_args), tuple(stages), tree.warnings)


def _close(stages: list[Stage], body: list[Instruction]) -> None:
    if not stages:
        return
    stage = stages[-1]
    end = body[-1].range if body else stage.range
    place = SourceRange(stage.range.start_line, end.end_line, stage.range.start_col, end.end_col)
    stages[-1] = stage.replace(instructions=tuple(body), range=place)


def parse_instruction(text: str, source: SourceFile | None = None, range: SourceRange | None = None) -> Instruction:
    """Parse one instruction that stands alone, such as an ONBUILD trigger.

    With `source` and `range`, errors and the instruction itself point there: for a trigger, at the FROM
    of the build that inherits it. Raises: ParseError.
    """
    own = SourceFile("instruction", text)
    try:
        nodes = parse_syntax(own).nodes
        if len(nodes) != 1:
            raise ParseError("expected a single instruction", source=own, range=nodes[1].range)
        if source is not None and range is not None:
            nodes = (_moved(nodes[0], range),)
        return _convert(nodes[0], source or own)
    except ParseError as e:
        if source is None:
            raise
        raise ParseError(f"in `{_shortened(text)}`: {e.message}", source=source, range=range, hint=e.hint) from None


def parse_onbuild(expression: str, source: SourceFile | None = None, range: SourceRange | None = None) -> Instruction:
    """Parse a trigger of an image's config; FROM, MAINTAINER and ONBUILD are refused. Raises: ParseError."""
    instruction = parse_instruction(expression, source, range)
    _check_trigger(instruction.keyword, instruction.source, instruction.range)
    return instruction


def description_of(comments: Iterable[str], name: str) -> str:
    """The text of the first comment of the form `name text`; nothing if there is none."""
    if name:
        for comment in comments:
            if comment.startswith(name + " "):
                return comment[len(name) + 1 :]
    return ""


def _shortened(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 80 and line == text else line[:80] + "..."


def _moved(node: Node, place: SourceRange) -> Node:
    child = _moved(node.child, place) if node.child else None
    return node._replace(range=place, child=child)


def _check_trigger(keyword: str, source: SourceFile, place: SourceRange) -> None:
    if keyword == "ONBUILD":
        message = "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"
    elif keyword in ("MAINTAINER", "FROM"):
        message = f"{keyword} isn't allowed as an ONBUILD trigger"
    else:
        return
    raise ParseError(message, source=source, range=source.locate(keyword, place))


class _Reader:
    """One node being read: its arguments, and its flags as they are asked for."""

    def __init__(self, node: Node, source: SourceFile) -> None:
        self.node = node
        self.source = source
        self.name = node.instruction.upper()
        self.common: dict[str, Any] = {
            "range": node.range,
            "original": node.original.strip(GO_SPACE),
            "source": source,
            "comments": node.comments,
            "written": node.keyword,
        }

    def error(self, message: str, token: str = "", hint: str | None = None) -> ParseError:
        place = self.source.locate(token, self.node.range) if token else self.node.range
        return ParseError(message, source=self.source, range=place, hint=hint)

    def flags(self, *, texts: str = "", booleans: str = "", lists: str = "") -> dict[str, Any]:
        """The values of the flags that were given; each parameter names the flags of one kind."""
        kinds = {name: kind for kind, names in (("text", texts), ("bool", booleans), ("list", lists))
                 for name in names.split()}  # fmt: skip
        values: dict[str, Any] = {}
        for flag in self.node.flags:
            name, equals, value = flag.removeprefix("--").partition("=")
            spelled = f"--{name}"
            kind = kinds.get(name)
            if kind is None:
                from builder.frontend.spelling import did_you_mean

                known = ", ".join(f"--{k}" for k in kinds)
                raise self.error(
                    f"unknown flag: {spelled}{did_you_mean(spelled, [f'--{k}' for k in kinds], match_case=True)}",
                    spelled,
                    f"{self.name} knows {known}" if known else f"{self.name} has no flags",
                )
            if name in values and kind != "list":
                raise self.error(f"duplicate flag specified: {name}", spelled)
            if kind == "bool":
                if value.lower() not in ("true", "false") and (equals or value):
                    problem = f"expecting boolean value for flag {name}, not: {value}"
                    raise self.error(problem if value else f"missing a value on flag: {name}", spelled)
                values[name] = value.lower() != "false"
            elif not equals:
                raise self.error(f"missing a value on flag: {name}", spelled, f"write {spelled}=VALUE")
            elif kind == "list":
                values.setdefault(name, []).append(value)
            else:
                values[name] = value
        return values

    def single(self) -> str:
        if len(self.node.args) != 1:
            raise self.error(f"{self.name} requires exactly one argument")
        return self.node.args[0]

    def several(self) -> tuple[str, ...]:
        if not self.node.args:
            raise self.error(f"{self.name} requires at least one argument")
        return self.node.args

    def placed(self, token: str, read: Callable[..., _T], *args: Any) -> _T:
        """Call a function that knows no file, and give its errors the place of `token`."""
        try:
            return read(*args)
        except ParseError as e:
            raise self.error(e.message, token, e.hint) from None


def _convert(node: Node, source: SourceFile) -> Instruction:
    reader = _READERS.get(node.instruction)
    if reader is None:
        from builder.frontend.spelling import did_you_mean

        raise ParseError(
            f"unknown instruction: {node.keyword}{did_you_mean(node.keyword, KEYWORDS)}",
            source=source,
            range=source.locate(node.keyword, node.range),
        )
    return reader(_Reader(node, source))


def _from(r: _Reader) -> From:
    args = r.node.args
    name = as_keyword = as_written = None
    if len(args) == 3 and args[1].lower() == "as":
        _, as_keyword, as_written = args
        name = as_written.lower()
        if not _STAGE_NAME.fullmatch(name):
            problem = f'invalid name for build stage: "{as_written}"'
            raise r.error(f"{problem}, name can't start with a number or contain symbols", as_written)
    elif len(args) != 1:
        hint = "FROM [--platform=PLATFORM] [--after=STAGE] IMAGE [AS NAME]"
        raise r.error("FROM requires either one or three arguments", hint=hint)
    flags = r.flags(texts="platform", lists="after")
    return From(
        image=args[0],
        platform=flags.get("platform") or None,
        name=name,
        as_keyword=as_keyword,
        as_written=as_written,
        after=tuple(flags.get("after", ())),
        **r.common,
    )


def _arg(r: _Reader) -> Arg:
    pairs: list[ArgPair] = []
    for arg in r.several():
        name, equals, value = arg.partition("=")
        if equals and not name:
            raise r.error("ARG names can not be blank", arg)
        pairs.append(ArgPair(name, value if equals else None))
    r.flags()
    return Arg(pairs=tuple(pairs), **r.common)


def _pairs(r: _Reader) -> tuple[Pair, ...]:
    r.flags()
    args = r.several()
    pairs: list[Pair] = []
    for i in range(0, len(args), 3):
        if not args[i]:
            raise r.error(f"{r.name} names can not be blank", "=" + args[i + 1])
        pairs.append(Pair(args[i], args[i + 1], legacy=not args[i + 2]))
    return tuple(pairs)


def _env(r: _Reader) -> Env:
    return Env(pairs=_pairs(r), **r.common)


def _label(r: _Reader) -> Label:
    return Label(pairs=_pairs(r), **r.common)


def _maintainer(r: _Reader) -> Maintainer:
    name = r.single()
    r.flags()
    return Maintainer(name=name, **r.common)


def _transfer(r: _Reader) -> dict[str, Any]:
    """Sources, heredocs and destination of COPY and ADD."""
    *sources, destination = r.node.args
    if is_heredoc(destination):
        raise r.error(f"{r.name} cannot accept a heredoc as a destination", destination)
    bodies = {heredoc.name: heredoc for heredoc in r.node.heredocs}
    paths: list[str] = []
    heredocs: list[Heredoc] = []
    for source in sources:
        heredoc = parse_heredoc(source) if is_heredoc(source) else None
        if heredoc is None:
            paths.append(source)
            continue
        body = bodies.get(heredoc.name)
        heredocs.append(heredoc._replace(content=heredoc._replace(content=body.content if body else "").text))
    return {"sources": tuple(paths), "heredocs": tuple(heredocs), "destination": destination, **r.common}


def _two_or_more(r: _Reader) -> None:
    if len(r.node.args) < 2:
        raise r.error(
            f"{r.name} requires at least two arguments, but only {len(r.node.args)} was provided. "
            "Destination could not be determined",
            hint=f"{r.name} [FLAGS] SOURCE... DESTINATION",
        )


def _copy(r: _Reader) -> Copy:
    _two_or_more(r)
    flags = r.flags(texts="chown from chmod", booleans="link parents", lists="exclude")
    if "$" in flags.get("from", ""):
        hint = "name the stage or image with a FROM, and its name here"
        raise r.error("'from' doesn't support variable expansion, define alias stage instead", "--from", hint)
    return Copy(
        from_=flags.get("from") or None,
        chown=flags.get("chown") or None,
        chmod=flags.get("chmod") or None,
        link=flags.get("link", False),
        parents=flags.get("parents", False),
        exclude=tuple(flags.get("exclude", ())),
        **_transfer(r),
    )


def _add(r: _Reader) -> Add:
    _two_or_more(r)
    flags = r.flags(texts="chown chmod checksum", booleans="link keep-git-dir unpack", lists="exclude")
    return Add(
        chown=flags.get("chown") or None,
        chmod=flags.get("chmod") or None,
        link=flags.get("link", False),
        exclude=tuple(flags.get("exclude", ())),
        checksum=flags.get("checksum") or None,
        keep_git_dir=flags.get("keep-git-dir"),
        unpack=flags.get("unpack"),
        **_transfer(r),
    )


def _run(r: _Reader) -> Run:
    flags = r.flags(texts="network security", lists="mount device")
    network, security = flags.get("network"), flags.get("security")
    _one_of(r, "network", network, ("default", "none", "host"))
    _one_of(r, "security", security, ("sandbox", "insecure"))
    node = r.node
    if node.heredocs and (len(node.args) != 1 or node.json):
        raise r.error(f"parsing produced an invalid run command: {list(node.args)}")
    options = tuple(flags.get("mount", ()))
    mounts: tuple[RunMount, ...] = ()
    if options:
        mounts = _mounts(r, options)
    devices: tuple[RunDevice, ...] = ()
    if "device" in flags:
        from builder.frontend.runoptions import parse_device

        devices = tuple([r.placed("--device", parse_device, o) for o in flags["device"]])
    return Run(
        args=node.args,
        shell=not node.json,
        heredocs=node.heredocs,
        mounts=mounts,
        mount_options=options,
        network=network,
        security=security,
        devices=devices,
        **r.common,
    )


def _mounts(r: _Reader, options: tuple[str, ...]) -> tuple[RunMount, ...]:
    """Mounts whose options hold no variable, quote or escape are known already; the others after expansion."""
    from builder.frontend.runoptions import check_mount, parse_mount

    for option in options:
        r.placed("--mount", check_mount, option)
    if any(c in option for option in options for c in "$'\"\\`"):
        return ()
    return tuple([r.placed("--mount", parse_mount, o, str) for o in options])


def _one_of(r: _Reader, flag: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        from builder.frontend.spelling import did_you_mean

        token = f"--{flag}"
        hint = f"one of {', '.join(known)}"
        raise r.error(f'{flag} "{value}" is not valid{did_you_mean(value, known)}', token, hint)


def _workdir(r: _Reader) -> Workdir:
    path = r.single()
    r.flags()
    return Workdir(path=path, **r.common)


def _user(r: _Reader) -> User:
    user = r.single()
    r.flags()
    return User(user=user, **r.common)


def _expose(r: _Reader) -> Expose:
    ports = r.several()
    r.flags()
    return Expose(ports=tuple(sorted(ports)), **r.common)


def _volume(r: _Reader) -> Volume:
    paths = tuple(path.strip(GO_SPACE) for path in r.several())
    r.flags()
    if "" in paths:
        raise r.error("VOLUME specified can not be an empty string")
    return Volume(paths=paths, **r.common)


def _cmd(r: _Reader) -> Cmd:
    r.flags()
    return Cmd(args=r.node.args, shell=not r.node.json, **r.common)


def _entrypoint(r: _Reader) -> Entrypoint:
    r.flags()
    return Entrypoint(args=r.node.args, shell=not r.node.json, **r.common)


def _shell(r: _Reader) -> Shell:
    r.flags()
    args = r.several()
    if not r.node.json:
        raise r.error("SHELL requires the arguments to be in JSON form", hint='such as SHELL ["/bin/bash", "-c"]')
    return Shell(args=args, **r.common)


def _stopsignal(r: _Reader) -> StopSignal:
    signal = r.single()
    r.flags()
    return StopSignal(signal=signal, **r.common)


def _healthcheck(r: _Reader) -> Healthcheck:
    kind, *command = r.several()
    kind = kind.upper()
    flags = r.flags(texts="interval timeout start-period start-interval retries")
    if kind == "NONE":
        if command:
            raise r.error("HEALTHCHECK NONE takes no arguments")
        return Healthcheck(test=("NONE",), **r.common)
    if kind != "CMD":
        raise r.error(f'Unknown type "{kind}" in HEALTHCHECK (try CMD)', r.node.args[0])
    if not command:
        raise r.error("Missing command after HEALTHCHECK CMD")
    retries = flags.get("retries") or "0"
    digits = retries.removeprefix("+")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 10 or int(digits) >= 1 << 31:
        if retries.startswith("-") and retries[1:].isdigit():
            raise r.error(f"--retries cannot be negative ({retries})", "--retries")
        raise r.error(f"invalid number of retries: {retries}", "--retries")
    return Healthcheck(
        test=("CMD" if r.node.json else "CMD-SHELL", *command),
        interval_ns=_interval(r, flags, "interval"),
        timeout_ns=_interval(r, flags, "timeout"),
        start_period_ns=_interval(r, flags, "start-period"),
        start_interval_ns=_interval(r, flags, "start-interval"),
        retries=int(digits),
        **r.common,
    )


def _interval(r: _Reader, flags: dict[str, Any], name: str) -> int:
    if not flags.get(name):
        return 0
    from builder.frontend.durations import parse_duration

    value = r.placed(f"--{name}", parse_duration, flags[name])
    if value and value < _MIN_INTERVAL_NS:
        raise r.error(f'Interval "{name}" cannot be less than 1ms', f"--{name}")
    return value


def _onbuild(r: _Reader) -> Onbuild:
    r.flags()
    child = r.node.child
    if child is None:
        raise r.error("ONBUILD requires at least one argument")
    _check_trigger(child.instruction.upper(), r.source, r.node.range)
    expression = _ONBUILD.sub("", r.node.original.lstrip(GO_SPACE), count=1)
    for heredoc in r.node.heredocs:
        expression += "\n" + heredoc.content + heredoc.name
    inner = _convert(child._replace(heredocs=r.node.heredocs), r.source)
    return Onbuild(expression=expression, instruction=inner, **r.common)


_READERS: dict[str, Callable[[_Reader], Instruction]] = {
    "add": _add,
    "arg": _arg,
    "cmd": _cmd,
    "copy": _copy,
    "entrypoint": _entrypoint,
    "env": _env,
    "expose": _expose,
    "from": _from,
    "healthcheck": _healthcheck,
    "label": _label,
    "maintainer": _maintainer,
    "onbuild": _onbuild,
    "run": _run,
    "shell": _shell,
    "stopsignal": _stopsignal,
    "user": _user,
    "volume": _volume,
    "workdir": _workdir,
}
