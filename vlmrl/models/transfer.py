"""Arrays on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` as a tensor of its shape and dtype on `device`; on a CPU it may share the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # From pinned memory a copy waits for nothing that runs on the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
