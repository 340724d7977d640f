"""Runs at the start of every process of a vLLM server, however vLLM starts it (spawn, fork, subprocess).

Two processes need it: the engine, which multiprocessing spawns, and the process in which vLLM inspects a model's class.
Imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from vlmrl.models import broken_wheels

broken_wheels.install()

# Python imports only the first sitecustomize that it finds. Run the one that it would have found without this folder.
_here = Path(__file__).parent
_spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if Path(path).resolve() != _here])
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
