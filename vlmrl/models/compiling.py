"""Compile functions once for all sizes, so that nothing is compiled again in the middle of a run.

torch compiles a function again where a call breaks a condition (a *guard*) that held when it was compiled. On an H200
that took 9 to 26 s each time. After eight variants of a function torch runs further ones uncompiled, and here a warning
says so. Guards that come from sizes, and what removes them:

    a size of 0 or 1 is a constant of the compiled code         such calls are small and run uncompiled
    two sizes that were equal by chance must stay equal         switched off (`use_duck_shape`)
    on a GPU, the rows of a norm's backward pass compare with   switched off (`triton.mix_order_reduction`)
    thresholds: with 1,024 columns, `2 <= rows <= 5119`
    FlexAttention compares its rows with 128                    short passes run uncompiled (blocks.py, plan.py)

Two remain. A tower that takes its images as a batch (SigLIP) has one variant for a single image and one for several. On
a CPU, where compiling is no default, code for sums of more than 4,096 numbers is other code.

Callers see to two more: no tensor is passed twice, and a tensor is always a view of another one or never.

What never changes is not to be compiled for all sizes: with the width of a layer as an unknown, its code takes a third
longer to make (`of_one_width`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.experimental import _config as shapes

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

COMPILER: dict[str, Any] = {"options": {"triton.mix_order_reduction": False}}
"""Arguments of `torch.compile` next to `dynamic=True`. The option is of torch 2.11 and later: in one kernel, a norm's
backward pass would sum over the columns of each row and over the rows, where there are enough rows."""


def for_all_sizes(function: F) -> F:
    """`function`, compiled at its first call for all sizes of at least 2."""
    compiled = torch.compile(function, dynamic=True, **COMPILER)
    _warn_of_the_limit()

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if shapes.use_duck_shape:  # a setting of each thread
            shapes.use_duck_shape = False
        return compiled(*arguments, **named)

    return cast("F", call)


def of_one_width(*tensors: Tensor) -> None:
    """Have code that is compiled for `tensors` hold for their last dimension only."""
    for tensor in tensors:
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)


def compiled_on_gpu(function: F) -> F:
    """`function` itself on a CPU. On a GPU it is compiled for all sizes: a few passes over the logits instead of ten.

    Its first argument is a chunk of logits, [rows, columns]. The leading dimension of every other tensor counts rows,
    columns or targets.
    """

    @functools.wraps(function)
    def call(logits: Tensor, *others: Any) -> Any:
        leading = [len(x) for x in others if isinstance(x, Tensor)]
        if not compiles_on(logits.device) or min(*logits.shape, *leading) < 2:
            return function(logits, *others)
        return _compiled(function)(logits, *others)

    return cast("F", call)


_compiled = functools.cache(for_all_sizes)


def compiles_on(device: torch.device) -> bool:
    """Whether functions of this device are compiled: code for a CPU takes minutes to make."""
    return device.type == "cuda"


def start_compilers(device: torch.device) -> None:
    """Start torch's pool of compilers, where functions of `device` are compiled; does not wait for it. Its processes
    take seconds to import torch. What is compiled before they have is compiled by this process, piece by piece."""
    if compiles_on(device):
        # Imported here, because it takes seconds, and nothing on a CPU needs it.
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.use_process_pool()  # type: ignore[no-untyped-call]  # the first look at the pool makes it


def functions_given_up() -> int:
    """How many functions torch has compiled in as many variants as it may, and runs uncompiled from then on."""
    return len(_warn_of_the_limit().functions)


@functools.cache
def _warn_of_the_limit() -> _LimitHandler:
    """Repeat torch's own warning in this package's log; torch's loggers do not pass it on."""
    handler = _LimitHandler(logging.WARNING)
    logging.getLogger("torch._dynamo.convert_frame").addHandler(handler)
    return handler


class _LimitHandler(logging.Handler):
    """Looks for torch's warning that a function has too many variants."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.functions: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if "recompile_limit" in text or "cache_size_limit" in text:
            function = text.partition("function: ")[2].partition(" last reason")[0]
            self.functions.add(function or text)
            log.warning(
                "torch has compiled a function for as many kinds of arguments as it may, and runs further kinds "
                f"uncompiled, which is slower: {text}"
            )
