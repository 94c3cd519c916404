"""The instructions of the Containerfile language, as values.

Each knows where it stands (`range`), its text (`original`), and how to expand itself: `expand(env,
escape)` gives a copy in which exactly the fields that BuildKit expands are expanded. `instructions`
makes these from text; the planner reads them.

They are frozen records rather than dataclasses: a dataclass costs 0.6 ms of every start, twenty of
them a sixth of a whole cached build; these cost 0.02 ms each.
"""

from __future__ import annotations

from collections.abc import Mapping

from builder.errors import ParseError
from builder.frontend.heredoc import Heredoc
from builder.frontend.source import SourceFile, SourceRange
from builder.frontend.words import WordError, expand, expand_text, expand_word, expand_words, text_variables
from layers.values import NamedTuple, dataclass_transform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """A value with named fields: keyword-only, immutable, compared by class and content."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _required: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        own = [name for name, kind in cls.__annotations__.items() if not kind.startswith("ClassVar")]
        cls._fields = (*cls._fields, *own)
        cls._required = cls._required | {name for name in own if name not in cls.__dict__}

    def __init__(self, **values: Any) -> None:
        names = values.keys()
        if not self._required <= names or not names <= set(self._fields):
            missing, unknown = sorted(self._required - names), sorted(names - set(self._fields))
            raise TypeError(f"{type(self).__name__}: missing {missing}, unknown {unknown}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields if name != "source")
        return f"{type(self).__name__}({shown})"

    def _values(self) -> tuple[object, ...]:
        """What makes two equal: everything but the file they were read from."""
        return tuple([getattr(self, name) for name in self._fields if name != "source"])

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})


class Statement(Record):
    """What all instructions have in common."""

    keyword: ClassVar[str]
    """The instruction's name in capitals."""

    range: SourceRange
    original: str
    """The text with its continuations joined and heredoc bodies left out; for history and progress."""
    source: SourceFile
    comments: tuple[str, ...] = ()
    """The comment lines directly above."""
    written: str = ""
    """The keyword as the file spells it."""

    def expand(self, env: Mapping[str, str], escape: str) -> Self:
        """A copy with variables replaced. Raises: ParseError with this instruction's place."""
        try:
            changes = self._expansions(_Expander(env, escape))
        except ParseError as e:
            raise self._placed(e) from None
        return self.replace(**changes) if changes else self

    def undefined(self, env: Mapping[str, str], escape: str) -> frozenset[str]:
        """The variables that `expand` would find no value for; EXPOSE's are not told. Raises: as `expand`."""
        recorder = _Recorder(env, escape)
        try:
            self._expansions(recorder)
        except ParseError as e:
            raise self._placed(e) from None
        return frozenset(recorder.unmatched)

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return {}

    def _placed(self, error: ParseError) -> ParseError:
        if error.source is not None:
            return error
        return ParseError(error.message, source=self.source, range=self.range, hint=error.hint)

    def error(self, message: str, *, token: str = "", hint: str | None = None) -> ParseError:
        """An error about this instruction, or about one token of it."""
        place = self.source.locate(token, self.range) if token else self.range
        return ParseError(message, source=self.source, range=place, hint=hint)


class _Expander:
    __slots__ = ("env", "escape")

    def __init__(self, env: Mapping[str, str], escape: str) -> None:
        self.env = env
        self.escape = escape

    def word(self, word: str) -> str:
        return expand_word(word, self.env, self.escape)

    def text(self, text: str) -> str:
        return expand_text(text, self.env)

    def each(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple([self.word(word) for word in words])

    def pairs(self, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        return tuple([Pair(self.word(p.name), self.word(p.value), p.legacy) for p in pairs])


class _Recorder(_Expander):
    """An expander that remembers the variables that have no value."""

    __slots__ = ("unmatched",)

    def __init__(self, env: Mapping[str, str], escape: str) -> None:
        super().__init__(env, escape)
        self.unmatched: set[str] = set()

    def word(self, word: str) -> str:
        expansion = expand(word, self.env, self.escape)
        self.unmatched |= expansion.unmatched
        return expansion.text

    def text(self, text: str) -> str:
        self.unmatched |= text_variables(text, self.env)
        return super().text(text)


class Pair(NamedTuple):
    """A name and a value of ENV or LABEL. `legacy`: written `NAME value`, without `=`."""

    name: str
    value: str
    legacy: bool = False


class ArgPair(NamedTuple):
    """A name of ARG, and its default if it has one."""

    name: str
    value: str | None = None


class RunMount(NamedTuple):
    """`RUN --mount`. `readonly` is decided, by the type where no option says it. Sizes are bytes, 0 is no limit."""

    type: str = "bind"
    from_: str = ""
    source: str = ""
    target: str = ""
    readonly: bool = True
    id: str = ""
    sharing: str = ""
    required: bool = False
    size_bytes: int = 0
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    env: str | None = None


class RunDevice(NamedTuple):
    """`RUN --device`: a CDI name."""

    name: str
    required: bool = False


class Script(NamedTuple):
    """What a RUN really runs. `file`: the name and content of a program that `args` names by its path."""

    args: tuple[str, ...]
    shell: bool
    file: tuple[str, str] | None = None


class From(Statement):
    """`FROM [--platform=P] [--after=STAGE]... image [AS name]`. Expanded with the global ARGs alone.

    `after` is buildah's: stages that are built before this one, though it takes nothing from them.
    """

    keyword = "FROM"
    image: str
    platform: str | None = None
    name: str | None = None
    as_written: str | None = None
    """The stage's name as the file spells it, and the keyword AS likewise; `name` is lower-case."""
    as_keyword: str | None = None
    after: tuple[str, ...] = ()

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        changes: dict[str, Any] = {"image": expander.word(self.image)}
        if self.platform:
            changes["platform"] = expander.word(self.platform)
        if self.after:
            changes["after"] = expander.each(self.after)
        return changes


class Arg(Statement):
    """`ARG name[=default]...`. BuildKit expands a default only where no --build-arg replaces it."""

    keyword = "ARG"
    pairs: tuple[ArgPair, ...]

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        pairs = [ArgPair(p.name, None if p.value is None else expander.word(p.value)) for p in self.pairs]
        return {"pairs": tuple(pairs)}


class Env(Statement):
    """`ENV name=value...`."""

    keyword = "ENV"
    pairs: tuple[Pair, ...]

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return {"pairs": expander.pairs(self.pairs)}


class Label(Statement):
    """`LABEL name=value...`."""

    keyword = "LABEL"
    pairs: tuple[Pair, ...]

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return {"pairs": expander.pairs(self.pairs)}


class Run(Statement):
    """`RUN`. The command is the shell's to expand; of the options, those of --mount are expanded.

    `mounts` is filled once every option has a value: at once where none has a variable, else by `expand`.
    """

    keyword = "RUN"
    args: tuple[str, ...]
    shell: bool
    heredocs: tuple[Heredoc, ...] = ()
    mounts: tuple[RunMount, ...] = ()
    mount_options: tuple[str, ...] = ()
    network: str | None = None
    security: str | None = None
    devices: tuple[RunDevice, ...] = ()

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        if not self.mount_options:
            return {}
        from builder.frontend.runoptions import parse_mount

        return {"mounts": tuple([parse_mount(option, expander.word) for option in self.mount_options])}

    def script(self) -> Script:
        """The command with its heredocs resolved as BuildKit resolves them.

        A lone `<<EOF` is the script itself: given to the shell, or if it begins with `#!` put into a
        file and run. In any other command the heredocs are the shell's business.
        """
        from builder.frontend.heredoc import is_heredoc

        if not self.heredocs:
            return Script(self.args, self.shell)
        first = self.heredocs[0]
        if not is_heredoc(self.args[0]):
            whole = self.args[0] + "".join([f"\n{h.content}{h.name}" for h in self.heredocs])
            return Script((whole,), self.shell)
        if first.text.startswith("#!"):
            return Script((f"/dev/pipes/{first.name}",), self.shell, (first.name, first.text))
        return Script((first.text,), self.shell)


class Copy(Statement):
    """`COPY`. `heredocs` are sources, too, their content ready to be written."""

    keyword = "COPY"
    sources: tuple[str, ...]
    destination: str
    heredocs: tuple[Heredoc, ...] = ()
    from_: str | None = None
    chown: str | None = None
    chmod: str | None = None
    link: bool = False
    parents: bool = False
    exclude: tuple[str, ...] = ()

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return _expand_transfer(self, expander)


class Add(Statement):
    """`ADD`: COPY, and archives, URLs and git repositories. `unpack` is None where no flag says."""

    keyword = "ADD"
    sources: tuple[str, ...]
    destination: str
    heredocs: tuple[Heredoc, ...] = ()
    chown: str | None = None
    chmod: str | None = None
    link: bool = False
    exclude: tuple[str, ...] = ()
    checksum: str | None = None
    keep_git_dir: bool | None = None
    unpack: bool | None = None

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        changes = _expand_transfer(self, expander)
        if self.checksum:
            changes["checksum"] = expander.word(self.checksum)
        return changes


def _expand_transfer(transfer: Copy | Add, expander: _Expander) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "sources": expander.each(transfer.sources),
        "destination": expander.word(transfer.destination),
    }
    if transfer.chown:
        changes["chown"] = expander.word(transfer.chown)
    if transfer.chmod:
        changes["chmod"] = expander.word(transfer.chmod)
    if transfer.heredocs:
        changes["heredocs"] = tuple(
            [h._replace(content=expander.text(h.content)) if h.expand else h for h in transfer.heredocs]
        )
    return changes


class Workdir(Statement):
    """`WORKDIR path`."""

    keyword = "WORKDIR"
    path: str

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return {"path": expander.word(self.path)}


class User(Statement):
    """`USER user[:group]`."""

    keyword = "USER"
    user: str

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        return {"user": expander.word(self.user)}


class Expose(Statement):
    """`EXPOSE port[-port][/protocol]...`. Expansion also splits, and normalises to single `port/protocol`."""

    keyword = "EXPOSE"
    ports: tuple[str, ...]

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        from builder.frontend.ports import parse_ports

        fields: list[str] = []
        for port in self.ports:
            fields += expand_words(port, expander.env, expander.escape)
        return {"ports": parse_ports(fields)}


class Volume(Statement):
    """`VOLUME path...`, in either form."""

    keyword = "VOLUME"
    paths: tuple[str, ...]

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        paths = expander.each(self.paths)
        if "" in paths:
            raise WordError("VOLUME specified can not be an empty string")
        return {"paths": paths}


class Cmd(Statement):
    """`CMD`, as an argument list or for the shell."""

    keyword = "CMD"
    args: tuple[str, ...]
    shell: bool


class Entrypoint(Statement):
    """`ENTRYPOINT`, as an argument list or for the shell."""

    keyword = "ENTRYPOINT"
    args: tuple[str, ...]
    shell: bool


class Shell(Statement):
    """`SHELL ["program", "argument"...]`."""

    keyword = "SHELL"
    args: tuple[str, ...]


class StopSignal(Statement):
    """`STOPSIGNAL name-or-number`."""

    keyword = "STOPSIGNAL"
    signal: str

    def _expansions(self, expander: _Expander) -> dict[str, Any]:
        from builder.frontend.signals import check_signal

        signal = expander.word(self.signal)
        check_signal(signal)
        return {"signal": signal}


class Healthcheck(Statement):
    """`HEALTHCHECK`. `test` is as in the image config: NONE, or CMD or CMD-SHELL and a command. Zero: unset."""

    keyword = "HEALTHCHECK"
    test: tuple[str, ...]
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


class Onbuild(Statement):
    """`ONBUILD instruction`. `expression` is what the image config keeps, unexpanded."""

    keyword = "ONBUILD"
    expression: str
    instruction: Instruction


class Maintainer(Statement):
    """`MAINTAINER name`, unexpanded."""

    keyword = "MAINTAINER"
    name: str


Instruction = (
    Arg
    | Env
    | Label
    | Run
    | Copy
    | Add
    | Workdir
    | User
    | Expose
    | Volume
    | Cmd
    | Entrypoint
    | Shell
    | StopSignal
    | Healthcheck
    | Onbuild
    | Maintainer
    | From
)
"""The closed union; match it with `assert_never`. From stands in `Stage.from_` only, never among a stage's own."""
