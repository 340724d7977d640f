"""Where the store listens through which a trainer's GPU and a server's find each other. NCCL itself needs GPUs."""

from __future__ import annotations

import socket

import psutil
import pytest

from vlmrl.inference.vllm.server import vllm_version
from vlmrl.weight_sync.nccl import address_towards, free_port


def own_address() -> str:
    """An address of this host that other hosts can reach."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this host has only the loopback address")


def test_a_server_on_this_host_is_met_on_the_loopback_address_whatever_its_url() -> None:
    assert address_towards(f"http://{own_address()}:8000") == "127.0.0.1"
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"


def test_a_server_on_another_host_is_met_on_the_address_that_it_reaches() -> None:
    try:
        address = address_towards("http://192.0.2.1:8000")  # an address that no host has
    except OSError:
        pytest.skip("this host has no route to other hosts")
    assert address in {each.address for every in psutil.net_if_addrs().values() for each in every}
    assert not address.startswith("127.")


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_the_store_listens_on_that_address_alone() -> None:
    from vllm.distributed.utils import StatelessProcessGroup

    port = free_port("127.0.0.1")
    group = StatelessProcessGroup.create("127.0.0.1", port, rank=0, world_size=1)
    listening = [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    assert ("127.0.0.1", port) in listening
    assert [address for address in listening if address[1] == port] == [("127.0.0.1", port)]
    del group
