"""The test suite; `tests/brokers.py` and `tests/conftest.py` are what it stands on."""
