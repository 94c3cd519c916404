"""Commands of the form `pybuild VERB ACTION NAME…`, whose actions share flags.

A flag that an action has no use for is refused, rather than read and forgotten.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

from builder.errors import UsageError
from layers.values import NamedTuple

_EVERYWHERE = frozenset({"help", "root", "debug", "action", "names"})


class Action(NamedTuple):
    """What an action is called with: its words, what it does, the flags that are its own."""

    names: str
    help: str
    flags: frozenset[str] = frozenset()
    least: int = 1
    most: int | None = 1


def add_actions(parser: ArgumentParser, actions: Mapping[str, Action]) -> None:
    """Add the positional arguments. To be called before the flags, and `end_actions` after them."""
    parser.add_argument("action", metavar="ACTION", choices=list(actions), help="one of the actions above")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what it is done to")
    # In the form that builder.cli.helptext lays out.
    told = "\n".join(f"{name} {a.names}".strip() + f"  {a.help}" for name, a in actions.items())
    parser.description = f"{parser.description or ''}\n\nactions:\n{told}"


def end_actions(parser: ArgumentParser, actions: Mapping[str, Action] | None = None) -> None:
    """Remember the flags' spellings and defaults for `check_action`; their help names the actions that take them."""
    flags = {
        a.dest: (next(o for o in a.option_strings if o.startswith("--")), a.default)
        for a in parser._actions
        if a.option_strings
    }
    parser.set_defaults(known_flags=flags)
    for flag in parser._actions:
        takers = [name for name, action in (actions or {}).items() if flag.dest in action.flags]
        if takers and actions and len(takers) < len(actions):
            flag.help = f"{', '.join(takers)}: {flag.help}"


def check_action(verb: str, options: Namespace, actions: Mapping[str, Action], common: frozenset[str]) -> None:
    """Raises: UsageError for names too few or too many, and for flags that the action does not take."""
    action = actions[options.action]
    shown = f"`pybuild {verb} {options.action} {action.names}`".replace(" `", "`")
    if len(options.names) < action.least or (action.most is not None and len(options.names) > action.most):
        raise UsageError(f"{verb} {options.action}: wrong number of names", hint=f"usage: {shown}")
    for dest, (flag, default) in options.known_flags.items():
        if dest in _EVERYWHERE or dest in common or dest in action.flags:
            continue
        if getattr(options, dest) != default:
            raise UsageError(f"{flag} is not a flag of `{verb} {options.action}`", hint=f"see `pybuild {verb} --help`")
