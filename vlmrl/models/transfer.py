"""Arrays on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor of its shape and dtype on `device`; on a CPU it may share the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # From pinned memory a copy waits for nothing that runs on the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def side_by_side(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """`arrays`, float32, one after another along their first dimension, on `device`. They are gone through once: a
    micro-batch's pixels are tens of megabytes, and the host is to be ahead of the device."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    together = torch.empty(shape, dtype=torch.float32, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=together.numpy())
    return together.to(device, non_blocking=True)
