"""Helpers that several tests share: `from support.helpers import image`."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
"""The folder tests/, for the path of a process that a test starts."""
