"""Real vLLM servers on the CPU: parity with the trainer, one transfer per image, weight updates in flight, restarts.

All tests but the last share two servers, which start once. The tests run in order, and the destructive ones come last.
The last test has a third server, of a run in a process of its own, which is killed. In float32, sampler and trainer
differ only by rounding.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import httpx
import numpy as np
import psutil
import pytest
import torch

from support import TESTS
from support.vllm_tiny import Tiny, mismatch_kl
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import EngineError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.engine import Replica, VllmEngine
from vlmrl.inference.vllm.relay import Relay
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.types import Completion, Prompt, SamplingParams
from vlmrl.weight_sync.folder import FolderSync

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed"),
]
REPORTS_VERSIONS = not old_vllm.is_old(vllm_version() or (0, 0))

Result = TypeVar("Result")
Do: TypeAlias = Callable[[Coroutine[Any, Any, Result]], Result]


@dataclass
class Engine:
    """The engine with its servers, the weight sync and the trainer's model."""

    engine: VllmEngine
    sync: FolderSync
    tiny: Tiny
    version: int = -1

    async def publish(self) -> int:
        self.version += 1
        await self.sync.publish(self.version)
        return self.version

    async def ask(self, prompt: Prompt, sampling: SamplingParams, name: str = "train/000001/00/00") -> Completion:
        async with self.engine.session(name) as session:
            return await session.generate(prompt, sampling)

    def assert_parity(self, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> None:
        expected = self.tiny.logprobs(prompt, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)
        assert mismatch_kl(completion.logprobs, expected) <= 1e-8


@pytest.fixture(scope="module")
def do() -> Iterator[Any]:
    """Run a coroutine in the event loop of this module, which the engine and its clients belong to."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def servers(do: Do[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two servers with the tiny checkpoint. No version is published yet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny = Tiny.load()
    config = VllmConfig(dtype=Dtype.float32, replicas=2, max_restarts=1)
    lines: list[str] = []
    logs = tmp_path_factory.mktemp("logs")
    engine = VllmEngine(config, tiny.folder, logs, lines.append, lines.append, text_of=tiny.renderer.decode)
    do(engine.start())
    assert any(line.startswith("vLLM server 1: ") for line in lines)
    assert (logs / "vllm_0.log").stat().st_size > 0
    sync = FolderSync(engine, tiny.weights, FolderSyncConfig(verify=True))
    yield Engine(engine, sync, tiny)
    processes = [process for replica in engine.replicas for process in processes_of(replica)]
    do(engine.stop())
    do(engine.stop())
    assert alive(processes) == []
    sync.close()
    assert not sync.folder.exists()
    torch.set_num_threads(threads)


def processes_of(replica: Replica) -> list[psutil.Process]:
    """Guard, supervisor, API server and all their descendants."""
    assert replica.server is not None
    process = replica.server._process
    if process is None or process.returncode is not None:
        return []
    supervisor = psutil.Process(process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def alive(processes: list[psutil.Process], timeout_s: float = 60.0) -> list[psutil.Process]:
    """The processes that still run after `timeout_s`."""
    return list(psutil.wait_procs(processes, timeout_s)[1])


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_that_do_not_match_are_listed_before_any_weight_is_replaced(servers: Engine, do: Do[Any]) -> None:
    def renamed() -> Mapping[str, torch.Tensor]:
        weights = servers.tiny.weights()
        weights["model.language_model.layers.1.mlp.up"] = weights.pop(
            "model.language_model.layers.1.mlp.up_proj.weight"
        )
        del weights["model.visual.pos_embed.weight"]
        return weights

    sync = FolderSync(servers.engine, renamed, FolderSyncConfig())
    with pytest.raises(EngineError, match="serves another model") as error:
        do(sync.publish(0))
    sync.close()
    assert "the server lacks: model.language_model.layers.1.mlp.up;" in str(error.value)
    lacking = "the trainer lacks: language_model.model.layers.1.mlp.gate_up_proj.weight, visual.pos_embed.weight"
    assert lacking in str(error.value)
    servers.engine.restore_with(servers.sync.restore)


def test_nothing_is_sampled_from_weights_without_a_version(servers: Engine, do: Do[Any]) -> None:
    if not REPORTS_VERSIONS:
        pytest.skip("vLLM 0.26 reports no versions")
    with pytest.raises(EngineError, match="default"):
        do(servers.ask(do(servers.tiny.prompt(1)), servers.tiny.sampling(0)))


def test_logprobs_are_the_trainers_before_and_after_a_sync(servers: Engine, do: Do[Any]) -> None:
    """The images are the same before and after, so stale vision features or prefixes would be found."""
    tiny = servers.tiny
    for seed in (1, 2):
        version = do(servers.publish())
        for images in ((), (3,), (0, 1, 2, 3, 1)):
            prompt = do(tiny.prompt(*images))
            for temperature in (1.0, 0.6, 0.0):
                completion = do(servers.ask(prompt, tiny.sampling(seed, temperature=temperature)))
                servers.assert_parity(prompt, completion, temperature)
                assert completion.versions.tolist() == [version] * len(completion.token_ids)
        tiny.learn_something(seed)
    do(servers.publish())


def test_a_frozen_towers_features_outlive_a_sync(servers: Engine, do: Do[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity where only the language model has learned. Features that are not computed again do not follow a tower that
    has changed after all; the servers are told that it has not."""
    tiny = servers.tiny
    prompt = do(tiny.prompt(0, 1, 2, 3))
    tower = {name: weight for name, weight in tiny.weights().items() if ".visual." in name}

    def mismatch() -> float:
        completion = do(servers.ask(prompt, tiny.sampling(3)))
        return mismatch_kl(completion.logprobs, tiny.logprobs(prompt, completion))

    monkeypatch.setattr(servers.sync, "_tower_version", lambda: 7)
    do(servers.publish())
    assert mismatch() <= 1e-8
    before = {name: weight.clone() for name, weight in tower.items()}
    tiny.learn_something(4)
    after = {name: weight.clone() for name, weight in tower.items()}
    set_weights(tiny, tiny.weights() | before)
    do(servers.publish())
    assert mismatch() <= 1e-8
    set_weights(tiny, tiny.weights() | after)
    do(servers.publish())
    assert mismatch() > 1e-5
    monkeypatch.setattr(servers.sync, "_tower_version", lambda: None)
    do(servers.publish())
    assert mismatch() <= 1e-8


def test_logprobs_of_later_turns_are_the_trainers(servers: Engine, do: Do[Any]) -> None:
    async def episode() -> None:
        tiny, engine = servers.tiny, servers.engine
        async with engine.session("train/000001/00/00") as session:
            prompt = await tiny.prompt(10)
            for turn in range(3):
                completion = await session.generate(prompt, tiny.sampling(turn))
                servers.assert_parity(prompt, completion)
                prompt = await tiny.next_prompt(prompt, completion, 11 + turn)

    do(episode())


def _seeded(sampling: SamplingParams, seed: int) -> SamplingParams:
    return replace(sampling, seed=seed)


def test_sampling_follows_its_params(servers: Engine, do: Do[Any]) -> None:
    tiny = servers.tiny
    prompt = do(tiny.prompt(5))

    async def many(sampling: Callable[[int], SamplingParams]) -> list[Completion]:
        return await asyncio.gather(*(servers.ask(prompt, sampling(seed)) for seed in range(32)))

    sampled = do(many(tiny.sampling))
    tokens = np.concatenate([completion.token_ids for completion in sampled])
    assert len(np.unique(tokens)) > 50
    assert not np.isin(tokens, tiny.renderer.banned_token_ids).any()
    again = do(many(tiny.sampling))
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in sampled]
    huge = do(servers.ask(prompt, tiny.sampling(2**64 - 1)))
    servers.assert_parity(prompt, huge)

    # Truncated sampling: the logprobs are those of what is left, which has the mass that the definition says.
    for top_k, top_p in ((3, 1.0), (0, 0.2), (20, 0.5)):
        shape = replace(tiny.sampling(0, max_new_tokens=1), top_k=top_k, top_p=top_p)
        cut = do(many(partial(_seeded, shape)))
        whole = {int(c.token_ids[0]): float(np.exp(tiny.logprobs(prompt, c)[0])) for c in cut}
        masses = [whole[int(c.token_ids[0])] / float(np.exp(c.logprobs[0])) for c in cut]
        np.testing.assert_allclose(masses, masses[0], rtol=1e-4)
        if top_p == 1:
            assert len(whole) == top_k
            assert masses[0] == pytest.approx(sum(whole.values()), rel=1e-4)
        elif top_k == 0:
            assert len(whole) > 1
            assert top_p <= masses[0] + 1e-6 < top_p + max(whole.values())
        else:
            assert 1 < len(whole) <= top_k

    # Where the support is asked for, the trainer's logprobs over it are the server's, and it is what top_k keeps.
    shape = replace(tiny.sampling(0), top_k=5, top_p=0.9, min_p=0.05, reports_support=True)
    for number, each in enumerate((shape, replace(shape, top_p=1.0, min_p=0.0), replace(shape, top_k=1))):
        found = do(servers.ask(prompt, each))
        assert found.supports is not None
        sizes = found.supports.sizes
        assert [sizes.max() <= 5, set(sizes.tolist()) == {5}, set(sizes.tolist()) == {1}][number]
        servers.assert_parity(prompt, found)
        assert found.logprobs.any() == (number < 2)

    # With its first token as stop token, the completion ends there, and the token is part of it.
    first = int(sampled[0].token_ids[0])
    stopped = do(servers.ask(prompt, replace(tiny.sampling(0), stop_token_ids=(first,))))
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == ([first], "stop")
    endless = do(servers.ask(prompt, tiny.endless(0, 40)))
    assert (len(endless.token_ids), endless.finish_reason) == (40, "length")


@pytest.mark.parametrize("has_route", [True, False], ids=["the run's endpoint", "vLLM's own endpoint"])
def test_a_stop_string_ends_both_engines_completions_at_the_same_token(
    servers: Engine, do: Do[Any], has_route: bool
) -> None:
    """Greedy, because the engines draw other tokens from one seed. The stop strings are parts of what is sampled: one
    over two tokens, one inside a token, one that ends at the budget, one that is never reached."""
    tiny = servers.tiny
    do(servers.publish())
    embedded = EmbeddedEngine(tiny.policy, lambda: 0, 512, tiny.renderer.decode)
    prompt = do(tiny.prompt(3))
    free = replace(tiny.endless(0, 40), temperature=0.0)
    whole = do(servers.ask(prompt, free))
    text = tiny.renderer.decode(whole.token_ids)
    texts = [tiny.renderer.decode(whole.token_ids[:count]) for count in range(41)]
    # U+FFFD stands for bytes that are no character yet, so it is no stop string.
    grown = (n for n in range(12, 40) if len(texts[n]) > len(texts[n - 1]) > len(texts[n - 2]))
    place = next(n for n in grown if "\ufffd" not in texts[n][len(texts[n - 2]) :])
    over_two = texts[place][len(texts[place - 2]) :]
    last_two = next(pair for pair in map("".join, zip(text[-2::-1], text[:0:-1], strict=True)) if "\ufffd" not in pair)
    cases = {
        (over_two,): next(n for n in range(41) if over_two in texts[n]),
        (texts[place][-1], over_two): next(n for n in range(41) if texts[place][-1] in texts[n]),
        ("never reached", last_two): next(n for n in range(41) if last_two in texts[n]),
        ("never reached",): 40,
    }

    async def ask_embedded(sampling: SamplingParams) -> Completion:
        async with embedded.session("r") as session:
            return await session.generate(prompt, sampling)

    for replica in servers.engine.replicas:
        assert replica.client is not None
        replica.client.has_route = has_route
    try:
        for stop, count in cases.items():
            theirs = do(servers.ask(prompt, replace(free, stop=stop)))
            ours = do(ask_embedded(replace(free, stop=stop)))
            assert theirs.token_ids.tolist() == ours.token_ids.tolist() == whole.token_ids[:count].tolist()
            assert (theirs.stop, theirs.finish_reason) == (ours.stop, ours.finish_reason)
            assert ours.finish_reason == ("length" if stop == ("never reached",) else "stop")
            assert len(theirs.logprobs) == len(theirs.versions) == count
            np.testing.assert_allclose(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=0)
    finally:
        for replica in servers.engine.replicas:
            assert replica.client is not None
            replica.client.has_route = True


LONG = 800
"""So many new tokens that sampling them takes longer than a publish."""


@pytest.mark.parametrize("keeps", [False, True], ids=["recompute", "keep"])
def test_requests_in_flight_survive_a_sync_and_each_token_has_its_version(
    keeps: bool, servers: Engine, do: Do[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens before the update are sampled from the old policy. Those after it are sampled from the new one where keys
    and values are computed again. Where they are kept no request is computed again, later tokens are from neither
    policy, and a request of the same prompt that comes later is the new policy's alone."""
    tiny = servers.tiny
    # More than a block of 128 tokens, which vLLM would share with a later request of the same prompt.
    prompts = [do(tiny.prompt(20 + i, text="Which colours are these? " * 28)) for i in range(4)]
    monkeypatch.setattr(servers.sync, "_keeps_requests", keeps)

    async def scenario() -> tuple[list[Completion], dict[str, torch.Tensor], float]:
        await servers.publish()
        before, again = await generated(servers), await counted(servers, "num_preemptions")
        asked = [asyncio.create_task(servers.ask(p, tiny.endless(i, LONG))) for i, p in enumerate(prompts)]
        while await generated(servers) < before + 200:
            await asyncio.sleep(0.01)
        old = {name: weight.clone() for name, weight in tiny.weights().items()}
        tiny.learn_something(9 + keeps)
        await servers.publish()
        for prompt in prompts:
            servers.assert_parity(prompt, await servers.ask(prompt, tiny.sampling(5)))
        completions = await asyncio.gather(*asked)
        return completions, old, await counted(servers, "num_preemptions") - again

    completions, old, computed_again = do(scenario())
    assert (computed_again == 0) == keeps
    new = {name: weight.clone() for name, weight in tiny.weights().items()}
    expected_new = [tiny.logprobs(p, c) for p, c in zip(prompts, completions, strict=True)]
    set_weights(tiny, old)
    expected_old = [tiny.logprobs(p, c) for p, c in zip(prompts, completions, strict=True)]
    set_weights(tiny, new)
    for completion, was, becomes in zip(completions, expected_old, expected_new, strict=True):
        assert len(completion.token_ids) == LONG
        assert np.abs(was - becomes).max() > 0.1
        if REPORTS_VERSIONS:
            assert sorted(set(completion.versions.tolist())) == [servers.version - 1, servers.version]
            assert (np.diff(completion.versions) >= 0).all()
            switch = int(np.argmax(completion.versions))
        else:
            assert set(completion.versions.tolist()) == {servers.version - 1}
            switch = int(np.argmax(np.abs(completion.logprobs - was) > 1e-3))
        assert 0 < switch < LONG
        np.testing.assert_allclose(completion.logprobs[:switch], was[:switch], atol=1e-4, rtol=0)
        if keeps:
            assert mismatch_kl(completion.logprobs[switch:], becomes[switch:]) > 1e-4
            assert mismatch_kl(completion.logprobs[switch:], was[switch:]) > 1e-4
        else:
            np.testing.assert_allclose(completion.logprobs[switch:], becomes[switch:], atol=1e-4, rtol=0)


def set_weights(tiny: Tiny, weights: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in tiny.policy.model.named_parameters():
            parameter.copy_(weights[name])


async def generated(servers: Engine) -> float:
    """Tokens that all servers together have generated so far."""
    return await counted(servers, "generation_tokens")


async def counted(servers: Engine, name: str) -> float:
    """A counter of vLLM's, summed over the servers."""
    total = 0.0
    for replica in servers.engine.replicas:
        assert replica.client is not None
        text = (await replica.client._http.get("/metrics")).text
        total += sum(float(n) for n in re.findall(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE))
    return total


def test_a_weight_that_did_not_arrive_is_found(servers: Engine, do: Do[Any]) -> None:
    class Careless(FolderSync):
        def _stage(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
            wrong = "model.language_model.layers.0.self_attn.k_proj.weight"
            super()._stage(version, {n: t + 0.5 if n == wrong else t for n, t in tensors.items()})

    careless = Careless(servers.engine, servers.tiny.weights, FolderSyncConfig(verify=True))
    with pytest.raises(EngineError, match=r"SHA-256 differs for .*layers\.0\.self_attn\.qkv_proj\.weight"):
        do(careless.publish(servers.version))
    careless.close()
    servers.engine.restore_with(servers.sync.restore)
    do(servers.publish())


# ── the wire ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_images_data_goes_to_each_server_once(servers: Engine, do: Do[Any]) -> None:
    tiny, engine = servers.tiny, servers.engine

    async def groups() -> None:
        prompts = [await tiny.prompt(100 + group, 200 + group) for group in range(4)]
        engine.metrics()
        for _ in range(2):
            await asyncio.gather(
                *(
                    servers.ask(prompt, tiny.sampling(i), f"train/000001/{g:02}/{i:02}")
                    for g, prompt in enumerate(prompts)
                    for i in range(16)
                )
            )

    do(groups())
    metrics = engine.metrics()
    assert metrics["wire/images_sent"] == 8 * len(engine.replicas)
    assert metrics["wire/images_forgotten"] == 0
    assert metrics["inference/requests"] <= 128 + 2 * 8 * len(engine.replicas)
    # The data of an image is sent 16 times, not 256 times.
    assert metrics["wire/bytes_sent"] * 10 < metrics["wire/bytes_sent"] + metrics["wire/bytes_saved"]
    assert engine.metrics()["wire/bytes_sent"] == 0


def test_images_that_were_sent_ahead_survive_an_update_and_are_not_sent_again(servers: Engine, do: Do[Any]) -> None:
    """They arrive while an update of the weights is under way, and are used after it."""
    tiny, engine = servers.tiny, servers.engine

    async def scenario() -> None:
        prompts = [await tiny.prompt(300 + group, 400 + group) for group in range(3)]
        engine.metrics()
        tiny.learn_something(11)
        await asyncio.gather(servers.publish(), *(engine.prefetch(prompt) for prompt in prompts for _ in range(4)))
        sent = engine.metrics()
        assert (sent["wire/images_sent"], sent["inference/requests"]) == (6 * len(engine.replicas), 0)
        asked = [(prompt, name) for prompt in prompts for name in "abcd"]
        completions = await asyncio.gather(
            *(servers.ask(prompt, tiny.sampling(i), f"r/{i}/{name}") for i, (prompt, name) in enumerate(asked))
        )
        for (prompt, _), completion in zip(asked, completions, strict=True):
            servers.assert_parity(prompt, completion)
        used = engine.metrics()
        assert (used["wire/images_sent"], used["wire/images_forgotten"]) == (0, 0)
        assert used["inference/requests"] == len(asked)

    do(scenario())


def test_a_server_that_has_forgotten_gets_the_data_again(servers: Engine, do: Do[Any]) -> None:
    async def scenario() -> None:
        prompt = await servers.tiny.prompt(31, 32)
        async with servers.engine.session("train/000001/00/00") as session:
            await session.generate(prompt, servers.tiny.sampling(0))
            servers.engine.metrics()
            assert session.replica is not None
            assert session.replica.client is not None
            await session.replica.client.call("POST", "/reset_mm_cache")
            completion = await session.generate(prompt, servers.tiny.sampling(1))
        servers.assert_parity(prompt, completion)
        metrics = servers.engine.metrics()
        assert (metrics["wire/images_forgotten"], metrics["wire/images_sent"]) == (1, 2)

    do(scenario())


def test_a_refused_request_names_its_rollout(servers: Engine, do: Do[Any]) -> None:
    prompt = Prompt(np.full(1024, 70), (), ())
    with pytest.raises(EngineError, match=r"rollout train/000007/01/02: .*HTTP 400.*1024"):
        do(servers.ask(prompt, servers.tiny.sampling(0), "train/000007/01/02"))


def test_requests_without_the_key_are_refused(servers: Engine) -> None:
    server = servers.engine.replicas[0].server
    assert server is not None
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(server.socket)), base_url="http://server") as http:
        for method, path in (("POST", "/collective_rpc"), ("POST", "/pause"), ("GET", "/metrics")):
            assert http.request(method, path, json={"method": "vlmrl_settings"}).status_code == 401


def test_servers_of_inference_urls(servers: Engine, do: Do[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server = servers.engine.replicas[0].server
    assert server is not None
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)

    async def use(config: VllmConfig) -> Completion:
        engine = VllmEngine(config, servers.tiny.folder, Path("unused"), lambda line: None, lambda line: None)
        await engine.start()
        try:
            async with engine.session("train/000001/00/00") as session:
                return await session.generate(prompt, servers.tiny.sampling(3))
        finally:
            await engine.stop()

    relay = Relay()
    relay.target = server.socket
    prompt = do(servers.tiny.prompt(41))
    config = VllmConfig(dtype=Dtype.float32, urls=[f"http://127.0.0.1:{do(relay.listen('127.0.0.1'))}"])
    servers.assert_parity(prompt, do(use(config)))
    with pytest.raises(
        EngineError, match=r"dtype=float32, so it does not round as inference.dtype .*: start it with dtype=bfloat16"
    ):
        do(use(replace(config, dtype=Dtype.bfloat16)))
    with pytest.raises(EngineError, match=r"max_model_len=1024, so it refuses .*inference\.max_model_len=4096"):
        do(use(replace(config, max_model_len=4096)))
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9 was not healthy within .*startup_timeout_s=0\.5"):
        do(use(replace(config, urls=["http://127.0.0.1:9"], startup_timeout_s=0.5)))
    do(relay.close())


# ── restarts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_servers_turns_are_sent_again_and_it_restarts_with_the_current_weights(
    servers: Engine, do: Do[Any]
) -> None:
    """First the API server of one replica is killed, and the other replica takes over. Then a worker of the other is
    killed while no replica is ready, so its turns wait for the first that is."""
    tiny, engine = servers.tiny, servers.engine
    first, second = engine.replicas

    async def scenario() -> None:
        await servers.publish()
        prompts = [await tiny.prompt(50 + i) for i in range(8)]
        engine.metrics()

        async def episodes(kill: psutil.Process) -> list[Completion]:
            before = await generated(servers)
            asked = [asyncio.create_task(servers.ask(p, tiny.endless(i, 900))) for i, p in enumerate(prompts)]
            while await generated(servers) < before + 100:
                await asyncio.sleep(0.01)
            kill.kill()
            return await asyncio.gather(*asked)

        doomed = processes_of(first)
        api_server = doomed[2]
        for prompt, completion in zip(prompts, await episodes(api_server), strict=True):
            servers.assert_parity(prompt, completion)
        assert engine.metrics()["inference/retries"] == 4
        assert alive(doomed) == []

        worker = processes_of(second)[-1]
        for prompt, completion in zip(prompts, await episodes_on(second, worker), strict=True):
            servers.assert_parity(prompt, completion)
        while not (first.is_ready and second.is_ready):
            await asyncio.sleep(0.1)
        assert first.restarts == second.restarts == 1
        assert first.version == second.version == servers.version

    async def episodes_on(replica: Replica, kill: psutil.Process) -> list[Completion]:
        prompts = [await tiny.prompt(50 + i) for i in range(8)]
        asked = [asyncio.create_task(servers.ask(p, tiny.endless(i, 900))) for i, p in enumerate(prompts)]
        assert replica.client is not None
        kill.kill()
        return await asyncio.gather(*asked)

    do(scenario())


def test_when_no_server_is_left_every_call_raises(servers: Engine, do: Do[Any]) -> None:
    """Both replicas have used up `max_restarts`."""

    async def scenario() -> None:
        prompt = await servers.tiny.prompt(60)
        for replica in servers.engine.replicas:
            processes_of(replica)[2].kill()
        with pytest.raises(EngineError, match=r"no vLLM server is left: given up after inference\.max_restarts=1"):
            await servers.ask(prompt, servers.tiny.endless(0, 900))
        with pytest.raises(EngineError, match="no vLLM server is left"):
            await servers.sync.publish(99)

    do(scenario())


RUN = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from vlmrl.models import broken_wheels
broken_wheels.install()
from pathlib import Path
import torch
from support.vllm_tiny import Tiny
from vlmrl.config.inference import VllmConfig
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.config.model import Dtype
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.weight_sync.folder import FolderSync

async def main():
    torch.set_num_threads(1)
    tiny = Tiny.load()
    # The image cache holds one image of 2 x 2 tokens and no second one.
    config = VllmConfig(dtype=Dtype.float32, extra_args={"mm_processor_cache_gb": 150_000 / 2**30})
    engine = VllmEngine(config, tiny.folder, Path(sys.argv[2]), lambda line: None, lambda line: None)
    await engine.start()
    sync = FolderSync(engine, tiny.weights, FolderSyncConfig())
    await sync.publish(0)

    async def episode(i):
        async with engine.session(f"train/000001/00/{i:02}") as session:
            prompt = await tiny.prompt(3, 7, 11 + 4 * (i % 4))
            return prompt, await session.generate(prompt, tiny.sampling(i))

    done = [*await asyncio.gather(*map(episode, range(16))), *[await episode(i) for i in range(16)]]
    worst = max(abs(c.logprobs - tiny.logprobs(p, c)).max() for p, c in done)
    print(json.dumps({"worst": float(worst), "folder": str(sync.folder), **engine.metrics()}), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_tiny_image_cache_and_no_process_left_of_a_killed_run(tmp_path: Path) -> None:
    here = str(TESTS)
    with subprocess.Popen([sys.executable, "-c", RUN, here, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        line = run.stdout.readline()
        assert line, "the run died; see its standard error"
        found = json.loads(line)
        assert found["worst"] <= 1e-4
        assert found["wire/images_forgotten"] > 0

        processes = psutil.Process(run.pid).children(recursive=True)
        assert len(processes) >= 4  # guard, supervisor, API server, engine
        assert os.path.isdir(found["folder"])
        run.send_signal(signal.SIGKILL)
        assert alive(processes) == []
        assert not os.path.exists(found["folder"])
