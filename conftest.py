"""Lends test_wallet.py and tests/ the same fixtures. (pytest asks for a file of this name here.)"""

pytest_plugins = ["tests.support"]
