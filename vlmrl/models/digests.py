"""Compare the engine's weights with the trainer's, every tensor by its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vlmrl.types import WeightComparison

Slice: TypeAlias = tuple[str, int, int, int]
"""(name, dim, start, stop): a part of the tensor `name`; dim −1 is the whole tensor."""


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values in float32, which represents every bfloat16 and float16 value exactly; −0 counts as 0."""
    values = tensor.detach().to("cpu", torch.float32) + 0.0
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def assemble(slices: Sequence[Slice], tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate slices of the trainer's tensors into the tensor that the engine must hold.

    >>> q, k = torch.arange(4.0).view(2, 2), torch.arange(10.0, 14.0).view(2, 2)
    >>> assemble([("q", 0, 0, 1), ("k", 0, 1, 2)], {"q": q, "k": k}).tolist()
    [[0.0, 1.0], [12.0, 13.0]]
    """
    parts = [
        tensors[name] if dim < 0 else tensors[name].narrow(dim, start, stop - start)
        for name, dim, start, stop in slices
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> WeightComparison:
    """Compare two models of one architecture in one process. Tensors that share their storage are equal; their values
    are not read.

    >>> held = torch.zeros(2)
    >>> compare({"a": held, "b": held, "c": held}, {"a": held, "b": torch.ones(2), "d": held})
    WeightComparison(compared=2, differing=('b',), unmatched=('c', 'd'))
    """
    common = sorted(set(ours) & set(theirs))
    differing = [
        name
        for name in common
        if ours[name].data_ptr() != theirs[name].data_ptr() and digest(ours[name]) != digest(theirs[name])
    ]
    return WeightComparison(len(common), tuple(differing), tuple(sorted(set(ours) ^ set(theirs))))
