"""Publishing a policy version to vLLM servers, whatever carries the tensors.

    publish ─▶ stage (once) ─▶ each server:  pause ─▶ transfer ─▶ drop caches ─▶ version ─▶ verify ─▶ resume

Requests in flight stay: those in the middle of a completion go on after it. Their tokens so far keep the version that
sampled them; keys and values of the old weights are dropped and computed anew, so that each later token is sampled by
the new weights exactly, as the trainer computes it. Dropped with them are the prefix cache, and what vLLM's scheduler
knows of encoded images: `reload_weights` drops only the features themselves, and the engine would die of the next
request that shows one of those images. The images' data stays.

A transport says how tensors travel: `_stage` and `_transfer`. A server that dies on the way is left to the engine,
which starts it again and has `restore` bring it the published version.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmrl.errors import EngineError
from vlmrl.inference.vllm.client import ServerLostError, VllmClient
from vlmrl.inference.vllm.engine import Replica, VllmEngine
from vlmrl.models.digests import assemble, digest
from vlmrl.types import WeightComparison

SHOWN_NAMES = 8
"""Of a list of names, in an error's message."""


class ServerSync(ABC):
    """See `vlmrl.types.WeightSync`."""

    def __init__(self, engine: VllmEngine, weights: Callable[[], Mapping[str, Tensor]], *, verify: bool) -> None:
        """`weights` gives the trainer's tensors under their names in a checkpoint; `publish` calls it, in a thread,
        while nothing trains."""
        self._engine = engine
        self._weights = weights
        self._verify = verify
        self._version: int | None = None
        self._lock = asyncio.Lock()
        engine.restore_with(self.restore)

    @abstractmethod
    def _stage(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Make the tensors of `version` ready for every server, also for one that comes later. Runs in a thread."""

    @abstractmethod
    async def _transfer(self, client: VllmClient) -> None:
        """Have a paused server take what was staged last."""

    @abstractmethod
    def _staged(self) -> Mapping[str, Tensor]:
        """The tensors that were staged last."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind. May be called twice."""

    async def publish(self, version: int) -> None:
        """Bring the trainer's weights to every server that is up. Raises `EngineError` where one does not take them."""
        async with self._lock:
            tensors = await asyncio.to_thread(self._gather_and_stage, version)
            self._version = version
            updates = [self._update(replica, version, tensors) for replica in self._engine.ready_replicas()]
            for error in await asyncio.gather(*updates, return_exceptions=True):
                if error is not None and not isinstance(error, ServerLostError):
                    raise error

    async def compare(self) -> WeightComparison:
        """See `vlmrl.types.WeightSync.compare`; names of weights are vLLM's. Raises `EngineError`."""
        async with self._lock:
            tensors = await asyncio.to_thread(self._gather)
            compared = 0
            differing: set[str] = set()
            unmatched: set[str] = set()
            for replica in self._engine.ready_replicas():
                try:
                    workers = await _ask_workers(_present(replica), tensors, digests=True)
                except ServerLostError as error:
                    raise EngineError(f"{replica.name} was lost while its weights were compared: {error}") from error
                weights = _weights_of(workers)
                compared += len(weights)
                found = await asyncio.to_thread(_differing, weights, tensors)
                differing |= {f"{name} of {replica.name}" for name in found}
                unmatched |= {f"{name} of {replica.name}" for names in _unmatched(workers) for name in names}
            return WeightComparison(compared, tuple(sorted(differing)), tuple(sorted(unmatched)))

    async def restore(self, replica: Replica) -> None:
        """Bring what was published last to a server that has come back. Raises `ServerLostError` and `EngineError`."""
        async with self._lock:
            if self._version is not None:
                await self._update(replica, self._version, self._staged())

    def _gather(self, *, copy: bool = False) -> Mapping[str, Tensor]:
        """The trainer's tensors as the servers must hold them; without `copy`, the trainer's own where they fit."""
        dtype = getattr(torch, self._engine.config.dtype.value)
        tensors, held = without_ties(self._weights()), {}
        for name in list(tensors):
            tensor = tensors.pop(name).detach()  # what a sharded trainer gathered is let go as it is copied
            held[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copy)
        return held

    def _gather_and_stage(self, version: int) -> Mapping[str, Tensor]:
        tensors = self._gather()
        self._stage(version, tensors)
        return tensors

    async def _update(self, replica: Replica, version: int, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are what the server must hold in the end."""
        client = _present(replica)
        if replica.version < 0:  # its first weights from us
            await self._check_names(client, tensors)
        await client.call("POST", "/pause", params={"mode": "keep", "clear_cache": "false"})
        await self._transfer(client)
        await client.call_workers("vlmrl_repack_head")
        dropped = await client.call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
        if not dropped["success"]:
            raise EngineError(f"{client.name} keeps keys and values of old weights: its prefix cache was not reset")
        await client.call("POST", "/reset_encoder_cache")
        # 0.26 knows no versions: there, a token's is that of the time when it was asked for.
        known = await client.call("POST", "/update_weight_version", json={"new_version": str(version)}, optional=True)
        if self._verify:
            await self._compare(client, version, tensors)
        if replica.client is client:
            replica.version = version
        await client.call("POST", "/resume")
        if known is not None:
            told = (await client.call("GET", "/weight_info"))["weight_version"]
            if told != str(version):
                raise EngineError(f"{client.name} says that its weights are of version {told}, not {version}")

    async def _check_names(self, client: VllmClient, tensors: Mapping[str, Tensor]) -> None:
        """Every tensor of ours is a weight there, and every weight there is made of tensors of ours."""
        unknown, missing = _unmatched(await _ask_workers(client, tensors, digests=False))
        if unknown or missing:
            raise EngineError(
                f"{client.name} serves another model than the one that trains: of our tensors it has no place for "
                f"{_listed(unknown)}; of its weights we have nothing for {_listed(missing)}. Its checkpoint must be of "
                "the same architecture (model.name)"
            )

    async def _compare(self, client: VllmClient, version: int, tensors: Mapping[str, Tensor]) -> None:
        weights = _weights_of(await _ask_workers(client, tensors, digests=True))
        differing = await asyncio.to_thread(_differing, weights, tensors)
        if differing:
            raise EngineError(
                f"{client.name} does not hold version {version} of the weights: the SHA-256 differs for "
                f"{_listed(differing)}"
            )


def _present(replica: Replica) -> VllmClient:
    if replica.client is None:
        raise ServerLostError(f"{replica.name} has gone")
    return replica.client


async def _ask_workers(client: VllmClient, tensors: Mapping[str, Tensor], *, digests: bool) -> list[Any]:
    """Of each worker, what its weights are made of (`vllm_worker.WorkerInspector.vlmrl_weights`)."""
    return await client.call_workers("vlmrl_weights", names=list(tensors), digests=digests)


def _unmatched(workers: list[Any]) -> tuple[set[str], set[str]]:
    """Our names that no worker has a place for; names of theirs that we have nothing for."""
    unknown = set.intersection(*(set(worker["unknown"]) for worker in workers))
    return unknown, {name for worker in workers for name in worker["missing"]}


def _weights_of(workers: list[Any]) -> dict[str, Any]:
    return {f"{name} of worker {i}": weight for i, w in enumerate(workers) for name, weight in w["weights"].items()}


def _differing(weights: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the engine's weights that are not made of our tensors."""
    digests: dict[str, str] = {}
    for weight in weights.values():
        made_of = repr(weight["slices"])  # most are the same on every rank
        if made_of not in digests:
            digests[made_of] = digest(assemble(weight["slices"], tensors))
    return {name for name, weight in weights.items() if weight["sha256"] != digests[repr(weight["slices"])]}


def without_ties(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without names for what another name before them holds: a head that is the embedding is not sent twice.

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
    """
    >>> _listed(set()), _listed({"b", "a"})
    ('none', 'a, b')
    """
    shown = sorted(names)[:SHOWN_NAMES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) + more) or "none"
