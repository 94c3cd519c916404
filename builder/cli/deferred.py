"""Imports put off until something of them is used.

`import requests` takes 60 ms of a command that asks a registry one question, a fifth of it for
modules that only `Response.text`, HTTP/2, uploaded forms and zipped certificates need; and the stdlib's
own take 4 ms of every command, such as translations for argparse, of which there are none. A finder in front of the
others gives those an empty module, which is filled when an attribute is missed. That is for a
process of our own: `builder.cli.program` installs it, and nothing else may.
"""

from __future__ import annotations

import sys
from _thread import RLock  # threading's own, without threading
from contextlib import suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader

_NAMES = frozenset(
    {
        *("charset_normalizer", "idna"),
        *("datetime", "gettext", "importlib.metadata", "mimetypes", "tempfile", "urllib.parse", "urllib.request"),
        *("fnmatch", "ntpath"),  # pathlib: for `match`, and for the paths of other systems
        "zipfile",
    }
)
_EARLY = {
    "importlib.metadata": ("version",),  # of h2, if HTTP/2 is switched on
    "urllib.parse": ("quote_from_bytes",),  # pathlib, for URIs
    "urllib.request": (
        *("getproxies", "getproxies_environment", "parse_http_list", "proxy_bypass", "proxy_bypass_environment"),
    ),
}
"""Functions that importers take by name: what they get calls the real one."""


def install() -> None:
    """Put off the imports of this process, from now on. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds what is to be put off, as Python would have, with a loader that does not load."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _NAMES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)  # type: ignore[assignment]
        return spec


class _Later:
    """Makes a module without running its code."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # the usual one

    def exec_module(self, module: ModuleType) -> None:
        for name in _EARLY.get(module.__name__, ()):
            module.__dict__[name] = _forward(module, name)
        if module.__name__ == "gettext":
            module.__dict__.update(gettext=_untranslated, ngettext=_untranslated_number)
        elif module.__name__ == "datetime":
            # What the module comes to in the end, after it has said all of it in Python; 3.12 has left that away.
            with suppress(ImportError):
                types = vars(import_module("_datetime"))
                module.__dict__.update((name, types[name]) for name in types if not name.startswith("_"))
        module.__class__ = _Deferred

    def fill(self, module: ModuleType) -> None:
        """Run the module's code after all. Raises: what that raises."""
        spec = module.__spec__
        assert spec is not None
        module.__class__ = _Filling
        module.__loader__ = spec.loader = self._loader
        try:
            self._loader.exec_module(module)
        finally:
            module.__class__ = ModuleType


class _Deferred(ModuleType):
    """A module that fills itself when something is missed in it."""

    def __getattr__(self, name: str) -> object:
        if name == "__version__" and self.__name__ == "charset_normalizer":
            # requests looks at it, and it has a file of its own.
            return import_module("charset_normalizer.version").__version__
        if name == "__path__":
            # `from … import` asks every module whether it is a package; those are told apart when they are found.
            raise AttributeError(name)
        _fill(self)
        return getattr(self, name)


class _Filling(ModuleType):
    """A module whose code is running: another thread waits for its end, the one that runs it does not."""

    def __getattr__(self, name: str) -> object:
        with _lock:
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _fill(module: ModuleType) -> None:
    with _lock:
        if isinstance(module, _Deferred):
            spec = module.__spec__
            later: object = spec.loader if spec is not None else None
            assert isinstance(later, _Later)
            later.fill(module)


def _untranslated(message: str) -> str:
    return message


def _untranslated_number(singular: str, plural: str, number: int) -> str:
    return singular if number == 1 else plural


def _forward(module: ModuleType, name: str) -> Callable[..., object]:
    def call(*arguments: object, **more: object) -> object:
        _fill(module)
        return module.__dict__[name](*arguments, **more)

    return call


_lock = RLock()
