"""What the trainer tells vLLM's weight-transfer endpoints."""

from __future__ import annotations

import base64
import inspect
import pickle

import pytest
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from vlmrl.weight_sync.vllm_transfer import EVENT_SYNC_REQUIRED, as_json


def test_a_receiver_waits_for_no_event() -> None:
    """An event that a killed server had opened cannot be opened by the one that replaces it."""
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[EVENT_SYNC_REQUIRED] == "event_sync_required"
    args = (*range(EVENT_SYNC_REQUIRED), True)

    update = as_json({"names": ["w", "v"], "ipc_handles": [{"GPU-1": args}, {"GPU-1": args, "GPU-2": args}]})

    sent = pickle.loads(base64.b64decode(update["ipc_handles_pickled"]))
    without = (*range(EVENT_SYNC_REQUIRED), False)
    assert sent == [{"GPU-1": without}, {"GPU-1": without, "GPU-2": without}]


def test_handles_of_another_form_are_a_slip_of_ours() -> None:
    with pytest.raises(AssertionError, match="3 arguments"):
        as_json({"ipc_handles": [{"GPU-1": (1, 2, 3)}]})
