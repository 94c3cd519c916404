"""Building: the Containerfile language, the graph, the sandbox, the commands.

The public API is re-exported here, loaded when first used, so that importing one part of the
package costs that part alone. `builder.api` documents it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.api import BuildResult, build, copy, pull, push, unpack
    from builder.plan.request import BuildRequest

__all__ = ["BuildRequest", "BuildResult", "build", "copy", "pull", "push", "unpack"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("builder.plan.request" if name == "BuildRequest" else "builder.api"), name)
