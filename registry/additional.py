"""Additional stores: layouts, such as other pybuilds' stores, that images are taken from before a registry is asked.

They are read and never written, by names as the local store has them: full references. What a build or a
container needs of them is copied into the local store, checked on the way. Callers: `builder.solve.sources`,
`builder.cli.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layers.oci import Index
from registry.reference import Reference
from registry.transports.oci import REF_NAME, LayoutDir, OciLocation


def find_additional(roots: Sequence[Path], name: Reference) -> OciLocation | None:
    """Where the first of these stores that has the image keeps it.

    Raises: StoreError for what is no layout; ImageError for one whose index cannot be read.
    """
    if not roots:
        return None
    wanted = name.with_default_tag().canonical()
    for root in roots:
        layout = LayoutDir(root)
        try:
            index: Index = layout.read_index()
        finally:
            layout.close()
        for entry in index.manifests:
            known = entry.annotations.get(REF_NAME)
            if known == wanted or (known and name.digest is not None and entry.digest == name.digest):
                return OciLocation(root, known)
    return None
