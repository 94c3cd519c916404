"""Extended attributes: which of them belong into a layer, and overlayfs's own marks.

Callers are the two directions of a layer (`layers.layerdiff` and `layers.changeset`, `layers.apply`)
and the merged view. A place is a path (its last component not followed) or an open descriptor.

Kernel: Documentation/filesystems/overlayfs.rst; xattr(7).
"""

from __future__ import annotations

import errno
import os

from layers.ownership import ATTRIBUTE as _OWNER
from layers.ownership import CAPABILITY as CAPABILITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

ACL_ACCESS = "system.posix_acl_access"
ACL_DEFAULT = "system.posix_acl_default"

# Labels of the host's security modules and of network file systems mean nothing elsewhere.
_KEPT = frozenset({CAPABILITY, "security.ima", ACL_ACCESS, ACL_DEFAULT})
_KEPT_PREFIXES = ("user.", "trusted.")
_OVERLAY = ("trusted.overlay.", "user.overlay.")

NONE: dict[str, bytes] = {}
"""No attributes; shared, never changed."""
_IGNORED = frozenset({errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES})


def belongs(name: str) -> bool:
    """Whether a layer may carry the attribute: never overlayfs's marks or records of owners, which it would forge."""
    return name in _KEPT or (name.startswith(_KEPT_PREFIXES) and not name.startswith(_OVERLAY) and name != _OWNER)


def load(place: bytes | int) -> dict[str, bytes]:
    """The attributes that belong into a layer, by name. Raises: OSError."""
    names = names_of(place)
    if not names:
        return NONE
    return pick(place, names)


def names_of(place: bytes | int) -> list[str]:
    """Every attribute's name; none where the file system has no attributes. Raises: OSError."""
    try:
        if isinstance(place, int):
            return os.listxattr(place)
        return os.listxattr(place, follow_symlinks=False)
    except OSError as e:
        if e.errno == errno.ENOTSUP:
            return []
        raise


def pick(place: bytes | int, names: list[str]) -> dict[str, bytes]:
    """Those of `names` that belong into a layer, with their values, sorted."""
    found = {}
    for name in sorted(names):
        if belongs(name):
            value = get(place, name)
            if value is not None:
                found[name] = value
    return found


def get(place: bytes | int, name: str) -> bytes | None:
    """One value; None if it is absent or not for us to see. Raises: OSError for other causes."""
    try:
        if isinstance(place, int):
            return os.getxattr(place, name)
        return os.getxattr(place, name, follow_symlinks=False)
    except OSError as e:
        if e.errno in _IGNORED:
            return None
        raise


def mark(place: bytes | int, dialect: Dialect, name: str) -> bytes | None:
    """One of overlayfs's marks (`opaque`, `redirect`, …) in that dialect."""
    return get(place, f"{dialect}.overlay.{name}")
