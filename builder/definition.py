"""Images defined in Python: what a Containerfile says, as an immutable value that grows step by step.

    tools = Image.start("debian:bookworm").run("apt-get update && apt-get install -y gcc")
    built = tools.copy("main.c", "/src/").run(["gcc", "-o", "/app", "/src/main.c"])
    app = Image.start("debian:bookworm").copy("/app", "/usr/bin/", source=built).entrypoint(["/usr/bin/app"])
    build(BuildRequest(containerfile=app.source(), context=Path(".")), root=root)

Each method gives a new image and leaves its own as it was: any image may be the beginning of several
others. A command is a string for the shell, or a sequence that is run as it is. All other values are
literal: no `$` and no backslash in them means anything. An image is written down as a Containerfile, so
that the graph, the cache, the history and the messages are those of one; what that cannot say is a
UsageError of the method that was asked for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from builder.errors import UsageError
from builder.frontend.source import SourceFile
from layers.values import NamedTuple

_SPECIAL = re.compile(r"([\\'\"$])")
_SPECIAL_IN_QUOTES = re.compile(r"([\\\"$])")
_CONTROL = re.compile(r"[\0-\x08\n-\x1f\x7f]")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9_.-]*\Z")
_ONE_LINE = re.compile(r"(?!--|\[|#|\s)[^\n\r\0]*[^\\\s]\Z")
"""A shell's command that an instruction's line takes as it is, if there is no `<<` in it."""

Command = str | Sequence[str]


class RunMount(NamedTuple):
    """A `--mount` of a RUN; made by the functions below."""

    type: str
    fields: Mapping[str, str]
    image: Image | str | None = None

    @classmethod
    def cache(cls, target: str, *, id: str = "", sharing: str = "shared") -> RunMount:
        """A directory that stays from build to build."""
        return cls("cache", {"target": target, "id": id, "sharing": sharing})

    @classmethod
    def secret(cls, id: str, *, target: str = "", env: str = "") -> RunMount:
        """A secret of the request, as a file (/run/secrets/ID, or `target`) or as a variable."""
        return cls("secret", {"id": id, "target": target, "env": env, "required": "true"})

    @classmethod
    def ssh(cls, id: str = "default") -> RunMount:
        """An ssh agent of the request."""
        return cls("ssh", {"id": id, "required": "true"})

    @classmethod
    def tmpfs(cls, target: str) -> RunMount:
        """An empty directory in memory."""
        return cls("tmpfs", {"target": target})

    @classmethod
    def bind(cls, target: str, *, source: str = "", image: Image | str | None = None) -> RunMount:
        """Files of the context, or of `image`, for the while of the command."""
        return cls("bind", {"target": target, "source": source}, image)


class Image(NamedTuple):
    """An image being defined. To be begun with `start`; `lines` are instructions in pieces."""

    base: Image | str
    platform: str = ""
    name: str = ""
    lines: tuple[tuple[str | Image, ...], ...] = ()

    def __repr__(self) -> str:
        below = self.base if isinstance(self.base, str) else self.base.name or "another"
        return f"<Image {self.name or 'without a name'}: {len(self.lines)} instructions on {below}>"

    @classmethod
    def start(cls, base: Image | str = "scratch", *, platform: str = "", name: str = "") -> Image:
        """Begin with an image of a registry or the store, with another definition, or with nothing.

        `name` is the stage's, as progress and messages show it.
        """
        if name and not _STAGE_NAME.match(name):
            raise UsageError(f"{name!r} cannot be a stage's name", hint="lower-case letters, digits, '.', '_', '-'")
        return cls(base, platform, name)

    # Instructions

    def run(self, command: Command, *, mounts: Sequence[RunMount] = (), network: str = "") -> Image:
        """Run a command; a string of several lines is a script."""
        parts: list[str | Image] = ["RUN"]
        for mount in mounts:
            fields = ",".join(f"{key}={_field(value)}" for key, value in mount.fields.items() if value)
            parts.append(f" --mount=type={mount.type},{fields}")
            parts += _origin(",from=", mount.image)
        if network:
            parts.append(f" --network={_word(network)}")
        return self._add(*parts, " ", _command(command))

    def copy(
        self,
        sources: str | Sequence[str],
        dest: str,
        *,
        source: Image | str | None = None,
        chown: str = "",
        chmod: str = "",
        link: bool = False,
        parents: bool = False,
        exclude: Sequence[str] = (),
    ) -> Image:
        """Copy files of the context, or of `source`: an image, or a named context's name. Wildcards count."""
        origin = _origin(" --from=", source)
        flags = _flags(chown=chown, chmod=chmod, link=link, parents=parents, exclude=exclude)
        return self._add("COPY", *origin, flags, " ", _paths(sources, dest))

    def add(
        self,
        sources: str | Sequence[str],
        dest: str,
        *,
        chown: str = "",
        chmod: str = "",
        checksum: str = "",
        link: bool = False,
        keep_git_dir: bool = False,
        exclude: Sequence[str] = (),
    ) -> Image:
        """Copy files, URLs and git repositories; archives are unpacked."""
        flags = _flags(
            chown=chown, chmod=chmod, checksum=checksum, link=link, keep_git_dir=keep_git_dir, exclude=exclude
        )
        return self._add("ADD", flags, " ", _paths(sources, dest))

    def file(self, dest: str, content: str, *, chown: str = "", chmod: str = "") -> Image:
        """Write a text file. It ends with a newline, which is added if it is missing."""
        flags = _flags(chown=chown, chmod=chmod)
        return self._add("COPY", flags, f" {_heredoc(content, ' ' + _word(dest))}")

    def env(self, variables: Mapping[str, str] | None = None, **more: str) -> Image:
        """Set variables of the image, which the RUNs that follow see, too."""
        return self._pairs("ENV", {**(variables or {}), **more})

    def label(self, labels: Mapping[str, str]) -> Image:
        return self._pairs("LABEL", labels)

    def arg(self, name: str, default: str | None = None) -> Image:
        """Let the request's `build_args` set a variable that the RUNs that follow see, and the image not."""
        return self._add(f"ARG {_key(name)}" if default is None else f"ARG {_key(name)}={_quoted(default)}")

    def workdir(self, path: str) -> Image:
        return self._add(f"WORKDIR {_word(path)}")

    def user(self, user: str) -> Image:
        return self._add(f"USER {_word(user)}")

    def cmd(self, command: Command) -> Image:
        return self._add("CMD ", _one_line(command))

    def entrypoint(self, command: Command) -> Image:
        return self._add("ENTRYPOINT ", _one_line(command))

    def shell(self, words: Sequence[str]) -> Image:
        """What strings are run by from here on."""
        return self._add(f"SHELL {_json(words)}")

    def expose(self, *ports: int | str) -> Image:
        return self._add("EXPOSE " + " ".join(_word(str(port)) for port in ports))

    def volume(self, *paths: str) -> Image:
        return self._add(f"VOLUME {_json([_escaped(path) for path in paths])}")

    def stop_signal(self, signal: str) -> Image:
        return self._add(f"STOPSIGNAL {_word(signal)}")

    def instruction(self, text: str) -> Image:
        """One line of a Containerfile as it is, variables and all."""
        if not text.strip() or _CONTROL.search(text):
            raise UsageError(f"{text!r} is not one line of a Containerfile")
        return self._add(text)

    def _pairs(self, keyword: str, pairs: Mapping[str, str]) -> Image:
        if not pairs:
            return self
        words = " ".join(f"{_key(key)}={_quoted(value)}" for key, value in pairs.items())
        return self._add(f"{keyword} {words}")

    def _add(self, *parts: str | Image) -> Image:
        return self._replace(lines=(*self.lines, parts))

    # As a Containerfile

    def source(self, name: str = "<definition>") -> SourceFile:
        """The Containerfile for a `BuildRequest`; `name` is what messages call it."""
        return SourceFile(name, self.containerfile())

    def containerfile(self) -> str:
        """The text: one stage for this image and for each that it is based on or takes files from."""
        stages = self._stages()
        # A stage must not be called what somebody means an image or a context by.
        taken = {part for stage in stages for line in stage.lines for part in line if isinstance(part, str)}
        taken |= {stage.base for stage in stages if isinstance(stage.base, str)}
        names: dict[int, str] = {}
        for stage in stages:
            candidates = (f"{stage.name or 'stage'}{f'-{n}' if n else ''}" for n in range(len(stages) + len(taken) + 1))
            names[id(stage)] = next(name for name in candidates if name not in taken)
            taken.add(names[id(stage)])

        def rendered(part: str | Image) -> str:
            return part if isinstance(part, str) else names[id(part)]

        lines: list[str] = []
        for stage in stages:
            platform = f"--platform={_word(stage.platform)} " if stage.platform else ""
            base = _word(stage.base) if isinstance(stage.base, str) else rendered(stage.base)
            lines.append(f"FROM {platform}{base} AS {names[id(stage)]}")
            lines += ["".join(map(rendered, parts)) for parts in stage.lines]
        return "\n".join(lines) + "\n"

    def _stages(self) -> list[Image]:
        """This image and all beneath it, each once and after those that it needs."""
        found: list[Image] = []
        seen: set[int] = set()
        waiting: list[tuple[Image, bool]] = [(self, False)]
        while waiting:
            image, below_done = waiting.pop()
            if below_done:
                found.append(image)
            elif id(image) not in seen:
                seen.add(id(image))
                waiting.append((image, True))
                parts = [image.base, *(part for line in reversed(image.lines) for part in line)]
                waiting += [(part, False) for part in parts if isinstance(part, Image)]
        return found


# Values into a Containerfile's words


def _escaped(text: str) -> str:
    """A value in a word that is expanded and whose quotes are taken away."""
    if _CONTROL.search(text):
        raise UsageError(f"{text!r} has a control character, which a Containerfile cannot say here")
    return _SPECIAL.sub(r"\\\1", text)


def _word(text: str) -> str:
    if not text or any(c.isspace() for c in text):
        raise UsageError(f"{text!r}: a Containerfile has no such value here: it is empty or has a space")
    if text.startswith("--"):
        raise UsageError(f"{text!r} would be a flag of the instruction")
    return _escaped(text)


def _quoted(text: str) -> str:
    if _CONTROL.search(text):
        raise UsageError(f"{text!r} has a control character, which a Containerfile cannot say here")
    return '"' + _SPECIAL_IN_QUOTES.sub(r"\\\1", text) + '"'


def _key(name: str) -> str:
    if not name or "=" in name or name.startswith("--") or any(c.isspace() for c in name):
        raise UsageError(f"{name!r} is no name of a variable or label")
    return _escaped(name)


def _field(text: str) -> str:
    """A value of a mount's comma-separated fields."""
    if any(c in text for c in ',"'):
        raise UsageError(f"{text!r}: a mount's field can have neither comma nor quotation mark")
    return _word(text)


def _origin(flag: str, image: Image | str | None) -> list[str | Image]:
    """A flag that names where files come from; nothing for the context."""
    if image is None:
        return []
    return [flag, _word(image) if isinstance(image, str) else image]


def _json(words: Sequence[str]) -> str:
    return json.dumps(list(words), ensure_ascii=False)


def _paths(sources: str | Sequence[str], dest: str) -> str:
    paths = [sources] if isinstance(sources, str) else list(sources)
    if not paths or not all(paths) or not dest:
        raise UsageError("copying takes one source at least, and a destination")
    return _json([_escaped(path) for path in (*paths, dest)])


def _flags(**flags: str | bool | Sequence[str]) -> str:
    text = ""
    for key, value in flags.items():
        flag = f" --{key.replace('_', '-')}"
        if isinstance(value, bool):
            text += flag if value else ""
        elif isinstance(value, str):
            text += f"{flag}={_word(value)}" if value else ""
        else:
            text += "".join(f"{flag}={_word(each)}" for each in value)
    return text


def _command(command: Command) -> str:
    if not isinstance(command, str):
        return _one_line(command)
    if "\0" in command or not command.strip():
        raise UsageError(f"{command!r} is no command")
    return command if _ONE_LINE.match(command) and "<<" not in command else _heredoc(command)


def _one_line(command: Command) -> str:
    """A command where no script can be."""
    if not isinstance(command, str):
        if not command:
            raise UsageError(f"{command!r} is no command")
        return _json(command)
    if not _ONE_LINE.match(command):
        raise UsageError(f"{command!r} is not one line for a shell", hint="give its words as a sequence")
    return command


def _heredoc(text: str, rest: str = "") -> str:
    """The text as a heredoc whose content is not expanded."""
    lines = text.split("\n")
    mark = next(m for m in (f"EOF{n or ''}" for n in range(len(lines) + 1)) if m not in lines)
    if "\0" in text or "\r" in text:
        raise UsageError("a Containerfile's heredoc has neither NUL nor carriage return")
    return f'<<"{mark}"{rest}\n{text}{"" if text.endswith(chr(10)) or not text else chr(10)}{mark}'
