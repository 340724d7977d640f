"""Tests that need packages of extras."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs_videos() -> None:
    """Skip the test where a package that makes videos is not installed. It imports neither: `pytest.importorskip` fails
    at torchvision next to a CPU build of torch, before vlmrl has made it importable."""
    missing = [name for name in ("av", "torchvision") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: pip install 'vlmrl[video]'")
