"""Tests of Triton kernels: by the interpreter, by the compiler alone, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import NumpyVersion

_WAYS = ["interpreted", "compiled", pytest.param("on a GPU", marks=pytest.mark.gpu)]

LARGEST_SHARED_MEMORY = 227 << 10
"""Of a block on an H100, in bytes."""


def each_way(test: Any) -> Any:
    """Mark a test that takes `how` the kernels are tried, and gives it to `run`."""
    is_missing = find_spec("triton") is None
    return pytest.mark.skipif(is_missing, reason="Triton is not installed")(pytest.mark.parametrize("how", _WAYS)(test))


def run(script: str, how: str) -> None:
    """Run `script` with `how` in a process of its own, because Triton reads `TRITON_INTERPRET` when it is imported."""
    if how == "on a GPU" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if how == "interpreted" and NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter takes arrays of one number for numbers, which NumPy 2.4 refuses")
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    environment |= {"TRITON_INTERPRET": "1"} if how == "interpreted" else {}
    done = subprocess.run([sys.executable, script, how], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def choose(how: str, *, compiled: Callable[[], None], on_device: Callable[[str], None]) -> None:
    """What a script of `run` does."""
    if how == "compiled":
        compiled()
    else:
        on_device("cuda" if how == "on a GPU" else "cpu")


def compile_for_an_h100(
    kernel: Any, constants: Mapping[str, Any], kinds: Mapping[str, str], options: Mapping[str, int]
) -> None:
    """Compile a kernel without a GPU, as Triton does at the first launch. `kinds`: the types of its other arguments;
    int32 by default."""
    import triton  # type: ignore[import-not-found]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]
    from triton.compiler import ASTSource  # type: ignore[import-not-found]

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): constants[name] for name in constants if name in kernel.arg_names}
    source = ASTSource(kernel, signature, values)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
    assert made.asm["cubin"]
    assert made.metadata.shared < LARGEST_SHARED_MEMORY
