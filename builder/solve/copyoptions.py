"""What a COPY is told, and what follows from it alone: its sources, its patterns, its modes.

Shared by the copy (`builder.solve.treecopy`), by the key that stands for it
(`builder.solve.contenthash`) and by ADD's archives (`builder.solve.unpack`).
"""

from __future__ import annotations

from collections.abc import Callable

from builder.errors import ContextError
from builder.solve import rootpath
from builder.solve.sourcetree import Matcher, Selection, SourceTree, split_wildcards
from layers.values import NamedTuple


class CopyOptions(NamedTuple):
    """How to copy; the defaults are those of a plain `COPY`.

    `mode` is octal or the text of `--chmod`. `include` selects beneath the source (`--parents`),
    `required` are paths that must exist, `mtime_ns` overrides all modification times
    (SOURCE_DATE_EPOCH), `ignore` hides paths of the build context, whose owners `reset_owner`
    turns into 0:0 where `owner` is not given. `replace_existing` lets an entry take the place of
    whatever is in its way (`--link`), `unpack` extracts local archives (ADD). `unprivileged` leaves out
    devices, set-id bits and extended attributes: the source is nobody to trust.
    """

    owner: tuple[int, int] | None = None
    mode: int | str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    copy_dir_contents: bool = True
    follow_symlinks: bool = True
    allow_wildcard: bool = True
    allow_empty_wildcard: bool = True
    create_dest: bool = True
    replace_existing: bool = False
    unpack: bool = False
    mtime_ns: int | None = None
    ignore: Matcher | None = None
    reset_owner: bool = False
    unprivileged: bool = False


class CopyStats(NamedTuple):
    """What a copy wrote: the number of entries, and the bytes of their regular files."""

    entries: int
    size_bytes: int


def selection(options: CopyOptions) -> Selection | None:
    """What `--parents` and `--exclude` select; None where they are not given. Raises: ContextError."""
    if not options.include and not options.exclude:
        return None
    from builder.frontend.ignorefile import IgnoreMatcher  # only builds with such flags pay for it

    include = IgnoreMatcher.from_patterns(options.include, "--parents") if options.include else None
    exclude = IgnoreMatcher.from_patterns(options.exclude, "--exclude") if options.exclude else None
    heads = tuple(split_wildcards(rootpath.clean(pattern.strip()))[0] for pattern in options.include)
    return Selection(include, exclude, heads)


def resolve_in(tree: SourceTree, pattern: str, options: CopyOptions) -> list[str]:
    """The paths that one source of COPY names, in the order in which they are copied.

    Raises: ContextError where it names nothing and must, or a `required` path is not there.
    """
    for path in options.required:
        if tree.lstat(rootpath.resolve(tree.root_fd, path)) is None:
            raise rootpath.not_found(path)
    found = tree.resolve(pattern, wildcards=options.allow_wildcard, follow=options.follow_symlinks)
    if not found and not options.allow_empty_wildcard:
        raise rootpath.not_found(pattern)
    return found


def chmod_function(mode: int | str | None) -> Callable[[int, bool], int] | None:
    """The function that gives an entry (mode, is a directory) its permission bits; None keeps the source's.

    Raises: ContextError.
    """
    if mode is None:
        return None
    if isinstance(mode, int):
        return lambda _mode, _is_directory: mode
    from builder.frontend.filemode import parse_mode

    try:
        parsed = parse_mode(mode)
    except ValueError as e:
        raise ContextError(str(e)) from e
    return lambda old, is_directory: parsed.apply(old, is_directory=is_directory)
