"""What strangers send: lists of cases for ``tests/e2e/test_hostile.py``. A new case is a new line."""
