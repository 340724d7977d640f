"""Publishing a policy version to vLLM servers: the part that all transports share.

    publish ─▶ stage (once) ─▶ each server:  pause ─▶ transfer ─▶ clear caches ─▶ set version ─▶ verify ─▶ resume

Requests in flight continue after the update. Their tokens so far keep the version that sampled them. The keys and
values of the old weights are cleared and computed again, so each later token is sampled from exactly the distribution
that the trainer computes with the new weights. The prefix cache is cleared too. The data of the images stays.

With `weight_sync.running_requests=keep`, requests that run keep their keys and values. Requests that are sent after the
update never find them: each update gives the prefix cache a new key (in_server/route.py).

The features of encoded images stay where what makes them is frozen. Otherwise they are cleared together with the
scheduler's record of them: `reload_weights` clears only the features themselves, and the engine would die of the next
request with one of those images. For the same reason they are put back after it where they stay.

A transport implements `_stage` and `_transfer`. If a server dies during an update, the engine restarts it and calls
`restore`, which publishes the newest version to it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vlmrl.config.weight_sync import RunningRequests, ServerSyncConfig
from vlmrl.errors import EngineError
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.control import ServerLostError
from vlmrl.inference.vllm.engine import Replica, VllmEngine
from vlmrl.models.digests import assemble, digest
from vlmrl.types import WeightComparison

SHOWN_NAMES = 8
"""How many names of weights an error message lists."""


class ServerSync(ABC):
    """Base class of the transports to servers; implements `vlmrl.types.WeightSync`."""

    def __init__(
        self,
        engine: VllmEngine,
        weights: Callable[[], Mapping[str, Tensor]],
        config: ServerSyncConfig,
        tower_version: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`weights` returns the trainer's tensors by their names in a checkpoint; `publish` calls it in a thread while
        no training step runs. `tower_version`: see `Policy.tower_version`."""
        self._engine = engine
        self._weights = weights
        self._tower_version = tower_version
        self._towers: WeakKeyDictionary[VllmClient, int] = WeakKeyDictionary()
        """The version of the vision tower that each launch of a server has, if it is frozen."""
        self._verify = config.verify
        self._keeps_requests = config.running_requests is RunningRequests.keep
        self._version: int | None = None
        self._lock = asyncio.Lock()
        engine.restore_with(self.restore)

    @abstractmethod
    def _stage(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Prepare the tensors of `version` for all servers, also those that restart later. Runs in a thread."""

    @abstractmethod
    async def _transfer(self, client: VllmClient) -> None:
        """Have a paused server load the tensors that were staged last."""

    @abstractmethod
    def _staged(self) -> Mapping[str, Tensor]:
        """The tensors that were staged last."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources. May be called twice."""

    async def publish(self, version: int) -> None:
        """Publish the weights to every server that is up. Raises `EngineError` where an update fails. A server
        that dies is left to the engine."""
        async with self._lock:
            tensors = await asyncio.to_thread(self._gather_and_stage, version)
            self._version = version
            updates = [self._update(replica, version, tensors) for replica in self._engine.ready_replicas()]
            for error in await asyncio.gather(*updates, return_exceptions=True):
                if error is not None and not isinstance(error, ServerLostError):
                    raise error

    async def compare(self) -> WeightComparison:
        """See `vlmrl.types.WeightSync.compare`; the names of weights are vLLM's. Raises `EngineError` where a server is
        lost."""
        async with self._lock:
            tensors = await asyncio.to_thread(self._gather)
            compared = 0
            differing: set[str] = set()
            unmatched: set[str] = set()
            for replica in self._engine.ready_replicas():
                try:
                    workers = await _worker_weights(_client_of(replica), tensors, digests=True)
                except ServerLostError as error:
                    raise EngineError(f"{replica.name} was lost while its weights were compared: {error}") from error
                weights = _weights_of(workers)
                compared += len(weights)
                found = await asyncio.to_thread(_differing, weights, tensors)
                differing |= {f"{name} of {replica.name}" for name in found}
                unmatched |= {f"{name} of {replica.name}" for names in _unmatched(workers) for name in names}
            return WeightComparison(compared, tuple(sorted(differing)), tuple(sorted(unmatched)))

    async def restore(self, replica: Replica) -> None:
        """Publish the newest version to a restarted server. Raises `ServerLostError` and `EngineError`."""
        async with self._lock:
            if self._version is not None:
                await self._update(replica, self._version, self._staged())

    def _gather(self, *, copy: bool = False) -> Mapping[str, Tensor]:
        """The trainer's tensors in the engine's dtype. Without `copy`, tensors of that dtype are the trainer's own."""
        dtype = getattr(torch, self._engine.config.dtype.value)
        tensors, held = without_ties(self._weights()), {}
        for name in list(tensors):
            tensor = tensors.pop(name).detach()  # frees each tensor that a sharded trainer has gathered after its copy
            held[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copy)
        return held

    def _gather_and_stage(self, version: int) -> Mapping[str, Tensor]:
        tensors = self._gather()
        self._stage(version, tensors)
        return tensors

    async def _update(self, replica: Replica, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Update one server. `tensors` is what it must hold afterwards."""
        client = _client_of(replica)
        if replica.version < 0:  # the first update of this launch
            _check_names(client, await _worker_weights(client, tensors, digests=False))
        tower = self._tower_version()
        keeps_features = tower is not None and self._towers.get(client) == tower
        await client.call("POST", "/pause", params={"mode": "keep", "clear_cache": "false"})
        if keeps_features:
            await client.call_workers("vlmrl_set_features_aside")
        await self._transfer(client)
        await client.call_workers("vlmrl_repack")
        keeps_requests = self._keeps_requests and replica.version >= 0
        if not keeps_requests:
            dropped = await client.call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
            if not dropped["success"]:
                raise EngineError(
                    f"{client.name} did not reset its prefix cache, so it still has keys and values of old weights"
                )
        if keeps_features:
            await client.call_workers("vlmrl_put_features_back")
        else:
            await client.call("POST", "/reset_encoder_cache")
            if tower is not None:
                self._towers[client] = tower
        keeps_version = await old_vllm.update_weight_version(client, version)
        if self._verify:
            await self._compare(client, version, tensors)
        if replica.client is client:
            replica.version = version
        await client.call("POST", "/resume")
        if keeps_version:
            reported = (await client.call("GET", "/weight_info"))["weight_version"]
            if reported != str(version):
                raise EngineError(f"{client.name} reports version {reported} of its weights instead of {version}")

    async def _compare(self, client: VllmClient, version: int, tensors: Mapping[str, Tensor]) -> None:
        workers = await _worker_weights(client, tensors, digests=True)
        _check_names(client, workers)
        differing = await asyncio.to_thread(_differing, _weights_of(workers), tensors)
        if differing:
            raise EngineError(
                f"{client.name} does not hold version {version} of the weights: the SHA-256 differs for "
                f"{_listed(differing)}"
            )


def _client_of(replica: Replica) -> VllmClient:
    if replica.client is None:
        raise ServerLostError(f"{replica.name} is down")
    return replica.client


async def _worker_weights(client: VllmClient, tensors: Mapping[str, Tensor], *, digests: bool) -> list[Any]:
    """What the weights of each worker consist of (`in_server.worker.WorkerInspector.vlmrl_weights`)."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return await client.call_workers("vlmrl_weights", shapes=shapes, digests=digests)


def _check_names(client: VllmClient, workers: list[Any]) -> None:
    """Raise `EngineError` unless each of the trainer's tensors is part of a weight of the server, and each weight of
    the server consists of the trainer's tensors. `workers`: the output of `_worker_weights`."""
    unknown, missing = _unmatched(workers)
    if unknown or missing:
        raise EngineError(
            f"{client.name} serves another model than the trainer's. Tensors that the server lacks: "
            f"{_listed(unknown)}; weights that the trainer lacks: {_listed(missing)}. Start the server with a "
            "checkpoint of the same architecture as model.name."
        )


def _unmatched(workers: list[Any]) -> tuple[set[str], set[str]]:
    """Names of the trainer's tensors that no worker has, and names of the workers' weights that the trainer lacks."""
    unknown = set.intersection(*(set(worker["unknown"]) for worker in workers))
    return unknown, {name for worker in workers for name in worker["missing"]}


def _weights_of(workers: list[Any]) -> dict[str, Any]:
    return {f"{name} of worker {i}": weight for i, w in enumerate(workers) for name, weight in w["weights"].items()}


def _differing(weights: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the engine's weights whose digest differs from that of the trainer's tensors."""
    digests: dict[str, str] = {}
    for weight in weights.values():
        slices = repr(weight["slices"])  # most are the same on every rank
        if slices not in digests:
            digests[slices] = digest(assemble(weight["slices"], tensors))
    return {name for name, weight in weights.items() if weight["sha256"] != digests[repr(weight["slices"])]}


def without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop each name whose tensor is also that of an earlier name, so that a tied head is not sent twice.

    >>> embedding = torch.zeros(4, 2)
    >>> list(without_ties({"embed_tokens": embedding, "norm": torch.ones(2), "lm_head": embedding}))
    ['embed_tokens', 'norm']
    """
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        seen.setdefault(place, name)
    return {name: tensors[name] for name in seen.values()}


def _listed(names: set[str]) -> str:
    """Names for an error message, at most `SHOWN_NAMES` of them.

    >>> _listed(set()), _listed({"b", "a"})
    ('none', 'a, b')
    """
    shown = sorted(names)[:SHOWN_NAMES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) + more) or "none"
