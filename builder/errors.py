"""The errors of building: the language, the plan, the steps, the sandbox, the context, the command line.

PybuildError
└── BuildError
    ├── ParseError            a Containerfile cannot be read; knows the file, line and column
    │   └── PlanError         it can be read but not built: unknown stage, missing argument...
    ├── StepError             a step's command failed; exits with that command's status
    ├── SandboxError          the kernel refused an operation of the sandbox
    ├── SecretLeakError       a secret's value was found in what was built; nothing is named or sent
    ├── CacheLostError        a remote cache lacks a layer that it has said to have; its steps are run instead
    ├── ContextError          the build context, its ignore file or a source of COPY cannot be read
    │   └── SourceNotFound    a source of COPY, ADD or a mount is not there
    └── UsageError            the command line is wrong; exits with 2
"""

from __future__ import annotations

from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.frontend.source import SourceFile, SourceRange


class BuildError(PybuildError):
    """A build cannot be done."""


class ParseError(BuildError):
    """A Containerfile is not valid.

    `message` alone says what is wrong; `str()` puts file, line and column before it; `render()`
    adds the source line with a caret, and the hint.
    """

    def __init__(
        self,
        message: str,
        *,
        source: SourceFile | None = None,
        range: SourceRange | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.source = source
        self.range = range

    def __str__(self) -> str:
        if self.source is None:
            return self.message
        position = self.source.position(self.range) if self.range else self.source.name
        return f"{position}: {self.message}"

    def render(self) -> str:
        """The whole report, of one to four lines."""
        lines = [str(self)]
        if self.source is not None and self.range is not None:
            lines.append(self.source.excerpt(self.range))
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(filter(None, lines))


class PlanError(ParseError):
    """A well-formed Containerfile asks for what cannot be."""


def locate(error: PybuildError, source: SourceFile, place: SourceRange) -> None:
    """Let an error of another kind tell its place in the Containerfile: beside the cause, which keeps its class.

    The first note is the position, the second the line with carets. Who has said it first is right.
    """
    if not isinstance(error, (ParseError, StepError)) and not getattr(error, "__notes__", None):
        error.add_note(source.position(place))
        error.add_note(source.excerpt(place))


class StepError(BuildError):
    """The command of a step ended with a status other than zero.

    `exit_code`, and so pybuild's own exit status, is the command's. `log_tail` is the end of its output.
    """

    def __init__(
        self,
        message: str,
        *,
        step: str,
        exit_status: int,
        source: SourceFile | None = None,
        range: SourceRange | None = None,
        argv: tuple[str, ...] = (),
        log_tail: str = "",
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.step = step
        self.exit_status = exit_status
        self.source = source
        self.range = range
        self.argv = argv
        self.log_tail = log_tail
        self.exit_code = exit_status if 1 <= exit_status <= 255 else 1

    def __str__(self) -> str:
        if self.source is None or self.range is None:
            return self.message
        return f"{self.source.position(self.range)}: {self.message}"


class SandboxError(BuildError):
    """A step of setting up the sandbox failed. `operation` names it, `errno` is the kernel's answer."""

    def __init__(
        self,
        message: str,
        *,
        operation: str,
        errno: int | None = None,
        path: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.operation = operation
        self.errno = errno
        self.path = path


class SecretLeakError(BuildError):
    """The value of a `--secret` is in the image, its config or the output of a step."""


class CacheLostError(BuildError):
    """A remote cache lacks a layer that it has said to have, or has other bytes."""


class ContextError(BuildError):
    """The build context, its ignore file or a source of COPY or ADD cannot be read or is not there."""


class SourceNotFound(ContextError):
    """A source of COPY, ADD or a mount is not in its tree. `path` is the source as it was written."""

    def __init__(self, message: str, *, path: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path


class UsageError(BuildError):
    """The command line cannot be obeyed as it stands."""

    exit_code = 2
