"""`weight_sync=nccl`: the trainer's GPU broadcasts the weights to the GPUs of each server.

Every server forms an NCCL group of its own with the trainer.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from torch import Tensor

from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.weight_sync.gpu import GpuSync
from vlmrl.weight_sync.vllm_transfer import Remote, Sender, bucket_bytes, nccl_sender

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_6 = "::1"


class NcclSync(GpuSync):
    """Weight sync for servers on other GPUs than the trainer's."""

    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Sender:
        version = vllm_version()
        assert version is not None, "preflight refuses a trainer without vLLM"
        address = address_towards(client.url)
        port = free_port(address)
        log.warning(
            f"weight_sync=nccl: {client.name} finds the trainer through a store at {address}:{port}, which has no "
            f"password, and unpickles what it reads there. So {whoever_reaches(address)} could run code in the server "
            "while it starts: where you do not trust them, set weight_sync=folder or weight_sync=cuda_ipc"
        )
        return nccl_sender(remote, version, address=address, port=port, bucket_bytes=bucket_bytes(tensors))


def address_towards(url: str) -> str:
    """This host's address, as seen by the server at `url`; the loopback address where the server is on this host too,
    so that no other host reaches what listens there. Sends no data.

    >>> address_towards("http://127.0.0.1:8000")
    '127.0.0.1'
    """
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    family, _, _, _, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        address: str = probe.getsockname()[0]
    if address != there[0]:
        return address
    return LOOPBACK if family == socket.AF_INET else LOOPBACK_6


def whoever_reaches(address: str) -> str:
    """Who can connect to a port of `address`, for a message.

    >>> whoever_reaches("127.0.0.1"), whoever_reaches("10.0.0.7")
    ('other users of this host', 'everybody in the network of 10.0.0.7')
    """
    return "other users of this host" if address in (LOOPBACK, LOOPBACK_6) else f"everybody in the network of {address}"


def free_port(address: str) -> int:
    """A port of `address` that is free now. It is not reserved, because vLLM binds it itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
    return port
