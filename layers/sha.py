"""`sha256` for short data, from the interpreter's own module.

`hashlib` loads OpenSSL, which takes 3 ms of every start and pays from some hundred kilobytes on:
whoever hashes files uses that.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha256 as sha256
else:
    try:
        from _sha2 import sha256 as sha256  # 3.12 and later
    except ImportError:
        try:
            from _sha256 import sha256 as sha256
        except ImportError:  # an interpreter built without its own digests
            from hashlib import sha256 as sha256
