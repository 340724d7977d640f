"""`weight_sync=cuda_ipc`: servers on the trainer's GPU read the trainer's copy of the weights in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.weight_sync.gpu import GpuSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender, ipc_sender


class CudaIpcSync(GpuSync):
    """Weight sync for servers on the trainer's GPU."""

    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Sender:
        version = vllm_version()
        assert version is not None, "preflight refuses a trainer without vLLM"
        return ipc_sender(remote, version)
