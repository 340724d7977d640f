"""vLLM 0.26's senders with a stand-in for its weight-transfer functions. test_wire.py has its answers.

benchmarks/weight_sync.py runs the senders with the real vLLM 0.26 on GPUs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vlmrl.inference.vllm import old_vllm

TENSORS = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(3)}


class Remote:
    """A server's endpoints: records the calls. `meets` is waited for in each call that blocks in vLLM."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.announced: Mapping[str, Any] = {}
        self.meets = threading.Barrier(1)
        self.on_failure: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self.meets.wait(10)
        self.calls.append("init")

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self.meets.wait(10)
        self.announced = update_info
        self.calls.append("update")

    def finish_weight_update(self) -> None:
        self.calls.append("finish")


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    """Make `vllm.distributed.weight_transfer.<module>` importable, with `names` in it."""
    for path in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    found = ModuleType(module)
    vars(found).update(names)
    monkeypatch.setitem(sys.modules, f"vllm.distributed.weight_transfer.{module}", found)


def test_versions_before_0_27_are_old() -> None:
    assert [old_vllm.is_old(version) for version in ((0, 26), (0, 27), (0, 32), (1, 0))] == [True, False, False, False]


def test_ipc_sends_a_handle_per_tensor_in_one_call_between_start_and_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        @staticmethod
        def trainer_send_weights(tensors: Iterator[tuple[str, torch.Tensor]], args: Any) -> None:
            assert args.packed is False
            args.send_mode(SimpleNamespace(names=[name for name, _ in tensors]))

    stub(monkeypatch, "ipc_engine", IPCWeightTransferEngine=Engine, IPCTrainerSendWeightsArgs=SimpleNamespace)
    collected: list[bool] = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: collected.append(True))
    remote = Remote()
    sender = old_vllm.IpcSender(remote)
    sender.send(TENSORS)
    assert remote.calls == ["init", "start", "update", "finish"]
    assert remote.announced == {"names": ["w", "b"]}
    assert collected == [True]


def test_nccl_joins_and_broadcasts_while_the_servers_calls_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's calls return only when both sides take part, as the barrier does."""
    remote = Remote()
    remote.meets = threading.Barrier(2)
    group = SimpleNamespace(is_destroyed=False)
    group.destroy = lambda: setattr(group, "is_destroyed", True)
    sent: list[str] = []

    class Engine:
        @staticmethod
        def trainer_init(meeting: Mapping[str, Any]) -> Any:
            assert meeting == {"master_address": "host", "master_port": 5, "rank_offset": 1, "world_size": 3}
            remote.meets.wait(10)
            return group

        @staticmethod
        def trainer_send_weights(tensors: Iterator[tuple[str, torch.Tensor]], args: Any) -> None:
            assert (args.group, args.packed, args.packed_buffer_size_bytes) == (group, True, 64)
            remote.meets.wait(10)
            sent.extend(name for name, _ in tensors)

    stub(monkeypatch, "nccl_engine", NCCLWeightTransferEngine=Engine, NCCLTrainerSendWeightsArgs=SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sender = old_vllm.NcclSender(remote, address="host", port=5, world_size=3, bucket_bytes=64)
    sender.send(TENSORS)
    assert sent == ["w", "b"]
    assert remote.calls == ["init", "start", "update", "finish"]
    assert remote.announced == {
        "names": ["w", "b"],
        "dtype_names": ["bfloat16", "float32"],
        "shapes": [[2, 3], [3]],
        "packed": True,
        "packed_buffer_size_bytes": 64,
    }
    remote.on_failure()
    assert group.is_destroyed
