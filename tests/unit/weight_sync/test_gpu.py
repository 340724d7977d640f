"""Weight sync from GPU to GPU, tested without a GPU: which server gets which tensors, and when. Only the senders, which
move the data, are replaced; benchmarks/weight_sync.py runs the real ones on GPUs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import torch
from torch import Tensor

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import NcclSyncConfig, RunningRequests
from vlmrl.errors import EngineError
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.control import ServerLostError
from vlmrl.inference.vllm.engine import Replica, VllmEngine
from vlmrl.inference.vllm.item_encoder import ItemEncoder
from vlmrl.weight_sync.gpu import GpuSync
from vlmrl.weight_sync.vllm_transfer import Remote, bucket_bytes, ipc_sender

CONFIG = VllmConfig(dtype=Dtype.bfloat16, urls=["http://first", "http://second"])


class Server:
    """Answers the control calls of a publish and records them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.version = "-1"
        self.is_lost = False

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.is_lost:
            raise httpx.ReadError("connection reset", request=request)
        path = request.url.path
        body = orjson.loads(request.content) if request.content else {}
        self.calls.append(body["method"] if path == "/collective_rpc" else path.strip("/"))
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            return httpx.Response(200, json={"results": [{"unknown": [], "missing": [], "weights": {}}]})
        return httpx.Response(200, json={"weight_version": self.version, "success": True, "world_size": 3})


class Wire:
    """A sender that records a copy of the tensors of every `send`."""

    def __init__(self, remote: Remote, server: Server) -> None:
        self.remote = remote
        self.server = server
        self.sent: list[dict[str, Tensor]] = []
        self.is_closed = False

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self.remote.start_weight_update()
        self.sent.append({name: tensor.clone() for name, tensor in tensors.items()})
        self.server.calls.append("(data)")
        self.remote.update_weights({"names": list(tensors)})
        self.remote.finish_weight_update()

    def close(self) -> None:
        self.is_closed = True


class Sync(GpuSync):
    def __init__(self, world: World) -> None:
        super().__init__(world.engine, lambda: world.weights, world.config, lambda: world.tower)
        self.world = world

    def _open(self, remote: Remote, client: VllmClient, tensors: Mapping[str, Tensor]) -> Wire:
        self.world.wires.append(Wire(remote, self.world.servers[client.name]))
        return self.world.wires[-1]


class World:
    """Two servers of `inference.urls`, and the trainer's weights."""

    def __init__(self, running_requests: RunningRequests = RunningRequests.recompute) -> None:
        self.config = NcclSyncConfig(running_requests=running_requests)
        self.tower: int | None = None
        """The version of a frozen vision tower."""
        self.engine = VllmEngine(CONFIG, Path(), Path(), print, print)
        self.weights = {"w": torch.tensor([1.0, 2.0]), "tied": torch.ones(3)}
        self.weights["head"] = self.weights["tied"]
        self.wires: list[Wire] = []
        self.servers: dict[str, Server] = {}
        for replica in self.engine.replicas:
            self.begin(replica)
        self.sync = Sync(self)

    def begin(self, replica: Replica) -> None:
        """Launch the server of a replica."""
        server = self.servers[replica.name] = Server()
        replica.client = VllmClient(
            replica.name,
            replica.name,
            None,
            ItemEncoder(Dtype.bfloat16),
            Counter(),
            10.0,
            transport=httpx.MockTransport(server),
        )
        replica.is_ready = True


def in_world(scenario: Callable[[World], Coroutine[Any, Any, None]], *settings: RunningRequests) -> None:
    async def run() -> None:
        world = World(*settings)
        await scenario(world)
        world.sync.close()
        assert all(wire.is_closed for wire in world.wires)

    asyncio.run(run())


def test_every_server_gets_every_tensor_once_in_the_engines_dtype_while_it_is_paused() -> None:
    async def scenario(world: World) -> None:
        await world.sync.publish(0)
        await world.sync.publish(1)
        assert len(world.wires) == 2  # one sender per launch of a server
        for wire in world.wires:
            assert [sorted(sent) for sent in wire.sent] == [["tied", "w"]] * 2
            assert all(tensor.dtype is torch.bfloat16 for sent in wire.sent for tensor in sent.values())
        for server in world.servers.values():
            assert server.version == "1"
            calls = server.calls[server.calls.index("pause") :]
            second = calls[calls.index("pause", 1) :]
            update = ["start_weight_update", "(data)", "update_weights", "finish_weight_update"]
            assert second[: second.index("finish_weight_update") + 1][-4:] == update
            assert second.index("pause") < second.index("start_weight_update")
            assert second.index("finish_weight_update") < second.index("reset_prefix_cache") < second.index("resume")

    in_world(scenario)


def last_update(server: Server) -> list[str]:
    """The calls of a server's last update, behind the first."""
    return server.calls[len(server.calls) - server.calls[::-1].index("pause") - 1 :]


def test_features_stay_where_the_tower_has_not_changed() -> None:
    """A server that was just launched has other weights, and so has one whose tower has changed since."""

    async def scenario(world: World) -> None:
        for tower, keeps in ((7, False), (7, True), (8, False), (8, True), (None, False)):
            world.tower = tower
            await world.sync.publish(0)
            for server in world.servers.values():
                calls = last_update(server)
                assert ("reset_encoder_cache" in calls) != keeps
                if keeps:
                    aside, sent, back, resumed = map(
                        calls.index, ("vlmrl_set_features_aside", "(data)", "vlmrl_put_features_back", "resume")
                    )
                    assert aside < sent < back < resumed
        world.tower = 8
        await world.sync.publish(0)
        (first, *_) = world.engine.replicas
        world.begin(first)
        await world.sync.restore(first)
        assert "reset_encoder_cache" in last_update(world.servers[first.name])

    in_world(scenario)


@pytest.mark.parametrize("setting", RunningRequests)
def test_running_requests_are_computed_again_or_kept(setting: RunningRequests) -> None:
    async def scenario(world: World) -> None:
        for version in (0, 1):
            await world.sync.publish(version)
            for server in world.servers.values():
                is_reset = "reset_prefix_cache" in last_update(server)
                assert is_reset == (version == 0 or setting is RunningRequests.recompute)

    in_world(scenario, setting)


def test_a_restarted_server_gets_the_published_weights_not_the_trainers_current_ones() -> None:
    async def scenario(world: World) -> None:
        await world.sync.publish(7)
        world.weights["w"].add_(100.0)  # the trainer is in the middle of a step
        replica = world.engine.replicas[0]
        world.begin(replica)
        await world.sync.restore(replica)
        dead, other, new = (
            world.wires
            if world.wires[0].server is not world.servers["http://second"]
            else (
                world.wires[1],
                world.wires[0],
                world.wires[2],
            )
        )
        assert new.sent[0]["w"].tolist() == [1.0, 2.0]
        assert world.servers[replica.name].version == "7"
        assert (dead.is_closed, other.is_closed, new.is_closed) == (True, False, False)

    in_world(scenario)


def test_a_server_that_dies_in_its_update_does_not_stop_the_update_of_the_other() -> None:
    async def scenario(world: World) -> None:
        await world.sync.publish(0)
        world.servers["http://first"].is_lost = True
        await world.sync.publish(1)
        assert world.servers["http://second"].version == "1"
        with pytest.raises(ServerLostError, match="connection reset"):
            await world.sync.restore(world.engine.replicas[0])

    in_world(scenario)


def test_a_failed_update_aborts_the_broadcast() -> None:
    async def scenario(world: World) -> None:
        await world.sync.publish(0)
        wire = world.wires[0]
        aborted: list[bool] = []
        wire.remote.on_failure = lambda: aborted.append(True)
        wire.server.is_lost = True
        with pytest.raises(ServerLostError):
            await asyncio.to_thread(wire.remote.update_weights, {"names": []})
        assert aborted == [True]
        assert await asyncio.to_thread(world.wires[1].remote.world_size) == 3

    in_world(scenario)


def test_a_refused_update_is_an_error() -> None:
    async def scenario(world: World) -> None:
        server = world.servers["http://first"]

        async def refuse(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/update_weights":
                return httpx.Response(500, json={"error": {"message": "shape mismatch"}})
            return await server(request)

        client = world.engine.replicas[0].client
        assert client is not None
        client._http = httpx.AsyncClient(base_url="http://first", transport=httpx.MockTransport(refuse))
        with pytest.raises(EngineError, match="shape mismatch"):
            await world.sync.publish(0)

    in_world(scenario)


def test_vllm_0_26_gets_a_sender_of_its_own() -> None:
    async def scenario(world: World) -> None:
        client = world.engine.replicas[0].client
        assert client is not None
        remote = Remote(client, asyncio.get_running_loop())
        sender = await asyncio.to_thread(ipc_sender, remote, (0, 26))
        assert isinstance(sender, old_vllm.IpcSender)
        assert world.servers["http://first"].calls == ["init_weight_transfer_engine"]

    in_world(scenario)


def test_buckets_hold_the_largest_tensor() -> None:
    assert bucket_bytes({"small": torch.zeros(2)}) == 256 * 2**20
    large = torch.empty(2**28, dtype=torch.bfloat16, device="meta")
    assert bucket_bytes({"large": large, "small": torch.zeros(2)}) == 2**29
