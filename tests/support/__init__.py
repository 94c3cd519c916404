"""Fixtures and test doubles as modules, each named for what it provides; `tests/conftest.py` loads them."""
