"""`python -m builder`: the command line where the name `pybuild` belongs to another program."""

from __future__ import annotations

from builder.cli.program import program

if __name__ == "__main__":
    program()
