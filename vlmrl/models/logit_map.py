"""What a model does to its logits after the product with the head: a factor (Cohere, Granite), then a soft cap (Gemma).

    z ──▶ s · z ──▶ c · tanh(s · z / c)

The factor and the cap are measured, not read from a config, where families name them differently (`logit_scale`,
`logits_scaling`, which one family multiplies by and another divides by): the model's own forward runs with its decoder
and its head replaced, so that known numbers take the place of the head's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlmrl.errors import ModelError

SMALL, LARGE = 1e-6, 1e12
"""Logits that show the factor (tanh x = x up to 1e-12 of x) and the cap."""

PROBES = (-40.0, -7.5, -1.0, -0.125, 0.0, 0.25, 1.0, 3.0, 20.0, 60.0)
"""Logits at which the measured map must agree with the model's own."""


@dataclass(frozen=True)
class LogitMap:
    """z → scale · z, or cap · tanh(scale · z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """
        >>> LogitMap(scale=0.5, cap=2.0)(torch.tensor([0.0, 2.0, 1000.0]))
        tensor([0.0000, 0.9242, 2.0000])
        """
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def multiply_by_slope(self, gradient: Tensor, mapped: Tensor) -> Tensor:
        """The gradient before the map, from the gradient behind it and the logits behind it: d/dz = scale · (1 −
        (mapped / cap)²)."""
        if self.scale != 1:
            gradient = gradient * self.scale
        return gradient if self.cap is None else gradient * (1 - (mapped / self.cap) ** 2)


IDENTITY = LogitMap()


class _Output(BaseModelOutputWithPast):
    """The output of a replaced decoder; fields that only some families have are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(module: Any, output: Any) -> Iterator[None]:
    """`module` returns `output` for any arguments."""
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


def logit_map(model: Any) -> LogitMap:
    """Measure the map of `model`. Raises `ModelError` for one of another form."""
    name = type(model).__name__
    known = torch.tensor([*PROBES, SMALL, LARGE], dtype=torch.float64)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    head = model.get_output_embeddings()
    hidden: Any = torch.zeros(1, 1, head.weight.shape[1])
    try:
        with torch.no_grad(), _replaced(model.base_model, _Output(hidden)), _replaced(head, known[None, None]):
            found: Tensor = model(input_ids=ids, use_cache=False).logits[0, 0]
        if found.shape != known.shape:
            raise ValueError(f"{len(known)} outputs of the head became {found.numel()} logits")
    except Exception as error:  # code of any family
        raise ModelError(
            f"{name}.forward could not be asked what it does to its logits, so its logprobs would be unknown: choose a "
            f"model whose forward is a decoder followed by a head ({type(error).__name__}: {error})"
        ) from error
    scale = float(found[-2]) / SMALL
    cap = float(found[-1]) if float(found[-1]) < 0.5 * scale * LARGE else None
    # Rounded to what a config holds: 1 / 16 · 1e-6 · 1e6 is not exactly 1 / 16.
    measured = LogitMap(float(f"{scale:.10g}"), cap)
    expected = measured(known)
    if not torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-9):
        raise ModelError(
            f"{name}.forward makes {float(found[len(PROBES) - 1]):g} of a logit of {PROBES[-1]:g}. No factor with a "
            "soft cap does the same, so its logprobs would be unknown: choose a model that only scales or caps logits"
        )
    return measured
