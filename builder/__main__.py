"""`python -m builder`: the command line where the name `pybuild` belongs to another program."""

from __future__ import annotations

from builder.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
