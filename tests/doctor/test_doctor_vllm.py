"""The doctor on runs with a real vLLM server, sound and with one fault each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from doctor.examined import examine, those

from vlmrl.doctor.checks import Verdict
from vlmrl.inference.vllm_client import VllmClient
from vlmrl.inference.vllm_server import vllm_version
from vlmrl.run import Run
from vlmrl.weight_sync.folder import FolderSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]


def test_half_precision(build: Callable[..., Run]) -> None:
    """Other kernels than the trainer's: the bound, which follows from the trainer's rounding alone, holds for them."""
    run = build("inference=vllm", "model.dtype=bfloat16")
    try:
        lines = examine(run)
    finally:
        run.weight_sync.close()
    assert those(lines, Verdict.HIDDEN) == {"positions, engine"}
    assert those(lines, Verdict.FAILED) == set(), lines
    found = lines["logprobs, version 0"].figures
    assert 1e-7 < found["mismatch_kl"] < found["limit"] / 3


def test_a_sync_that_transfers_nothing(build: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    async def transfer(self: FolderSync, client: VllmClient) -> None:
        """The rest of an update goes on: caches are dropped, the version is told."""

    monkeypatch.setattr(FolderSync, "_transfer", transfer)
    run = build("inference=vllm")
    try:
        lines = examine(run)
    finally:
        run.weight_sync.close()
    assert those(lines, Verdict.FAILED) == {"weights", "logprobs, version 1"}
    found = lines["weights"].figures
    assert found["differing"] == found["compared"] > 40
    assert "of vLLM server 0" in lines["weights"].says
