"""`weight_sync=nccl`: the trainer's GPU broadcasts the weights to the GPUs of each server.

Every server forms an NCCL group of its own with the trainer.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from torch import Tensor

from vlmrl.config.weight_sync import NcclSyncConfig
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.weight_sync.gpu import GpuSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender, bucket_bytes, nccl_sender


class NcclSync(GpuSync):
    """Weight sync for servers on other GPUs than the trainer's."""

    def __init__(self, engine: VllmEngine, weights: Callable[[], Mapping[str, Tensor]], config: NcclSyncConfig) -> None:
        """`weights` as for `ServerSync`."""
        super().__init__(engine, weights, verify=config.verify)

    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Sender:
        version = vllm_version()
        assert version is not None, "preflight refuses a trainer without vLLM"
        address = address_towards(client.url)
        return nccl_sender(
            remote, version, address=address, port=free_port(address), bucket_bytes=bucket_bytes(tensors)
        )


def address_towards(url: str) -> str:
    """This host's address, as seen by the server at `url`. Sends no data.

    >>> address_towards("http://127.0.0.1:8000")
    '127.0.0.1'
    """
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    family, _, _, _, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        address: str = probe.getsockname()[0]
    return address


def free_port(address: str) -> int:
    """A port of `address` that is free now. It is not reserved, because vLLM binds it itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port
