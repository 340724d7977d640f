"""Compile on a CPU what a GPU compiles, by a back-end that needs no compiler: torch makes the same guards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch._dynamo.callback import CallbackArgs, callback_handler

from vlmrl.models import compiling


def compile_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> None:
    """Compile the functions of the head as well as layers, by `backend`."""
    monkeypatch.setattr(compiling, "COMPILER", {"backend": backend})
    monkeypatch.setattr(compiling, "compiles_on", lambda device: True)
    monkeypatch.setattr(compiling, "_compiled", cache(compiling.for_all_sizes))
    torch.compiler.reset()


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """The ids of all that torch compiles in the block, as it goes; `3/1` is the first variant of function 3. A function
    with too many variants raises."""
    found: list[str] = []

    def note(started: CallbackArgs) -> None:
        found.append(started.compile_id)

    callback_handler.register_start_callback(note)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield found
    finally:
        callback_handler.remove_start_callback(note)
