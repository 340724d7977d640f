"""What the chat endpoint costs: milliseconds per request, and throughput beside the same episodes played as a Task.

    python benchmarks/endpoint.py [--sessions 64 --turns 3 --new-tokens 128 --rounds 3 --requests 100]

    task        RolloutRunner ─▶ embedded engine
    endpoint    processes with the `openai` package ─▶ HTTP ─▶ ChatSession ─▶ the same engine

An episode has some turns, each with a new image and a text. Nothing ends an answer early, so both sides sample the same
number of tokens. The sides take turns after a round that warms up; the clock runs from the first request to the last
answer. The client shares the machine's cores with the engine. It is one process, or several as `task.processes` allows.

Milliseconds per request: one session, answers of one token, one request after the other. The engine's own time is
measured around its `generate`; the rest is the endpoint, HTTP and the client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from vlmrl import Image, Message, Reply, StepInfo
from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
from vlmrl.models.families import family_of
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.server import Endpoint
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.rollout import RolloutRunner, sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.types import Completion, EngineSession, InferenceEngine, Prompt, SamplingParams

QUESTION = "Which colour is this square?"
SIDE = 64
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Problem:
    id: str
    number: int


def pixels(number: int, turn: int) -> np.ndarray:
    """A new image for each episode and turn."""
    return np.random.default_rng((number, turn)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


class Squares:
    """Episodes of a fixed number of turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split} {index}", index)

    def env(self, problem: Problem) -> SquaresEnv:
        return SquaresEnv(problem, self.turns)


class SquaresEnv:
    def __init__(self, problem: Problem, turns: int) -> None:
        self.problem, self.turns = problem, turns

    def message(self, turn: int) -> Message:
        return Message.of("user", QUESTION, Image(pixels(self.problem.number, turn)))

    def reset(self) -> tuple[Message, ...]:
        return (self.message(0),)

    def step(self, completion: str, info: StepInfo) -> Reply:
        done = info.turn == self.turns
        return Reply(done=done, messages=() if done else (self.message(info.turn),))


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────


class WholeAnswers:
    """An engine whose answers all have as many tokens as they may have. The last one is set to the end of the turn."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self.seconds: list[float] = []

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await self.engine.stop()

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> WholeSession:
        return WholeSession(self.engine.session(rollout_id, is_awaited=is_awaited), self.seconds)


class WholeSession:
    def __init__(self, session: EngineSession, seconds: list[float]) -> None:
        self.session, self.seconds = session, seconds

    async def __aenter__(self) -> WholeSession:
        await self.session.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.session.__aexit__(*exc)

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        started = time.perf_counter()
        completion = await self.session.generate(prompt, sampling)
        self.seconds.append(time.perf_counter() - started)
        completion.token_ids[-1] = sampling.stop_token_ids[0]
        return replace(completion, finish_reason="stop")


def parts() -> tuple[Renderer, WholeAnswers]:
    vlm = VLMConfig("qwen3_vl", ["qwen3-vl"], "mrope", "<|image_pad|>")
    config = ModelConfig(name="tiny", device="cpu", tiny=TinyConfig(), vlm=vlm)
    folder = ensure_tiny_checkpoint(config, (QUESTION,))
    model: Any = load_model(folder, config)
    renderer = make_renderer(
        RendererConfig(),
        config,
        load_tokenizer(folder),
        load_image_processor(folder),
        model.get_input_embeddings().num_embeddings,
        family_of(vlm).placeholder_tokens,
    )
    never = (*renderer.banned_token_ids, *renderer.stop_token_ids)
    policy = Policy(model, family_of(vlm).position_function(model.config), never)
    return renderer, WholeAnswers(EmbeddedEngine(policy, lambda: 0, MAX_MODEL_LEN))


# ── the two sides ───────────────────────────────────────────────────────────────────────────────────────────


async def as_task(renderer: Renderer, engine: WholeAnswers, args: argparse.Namespace) -> tuple[float, int]:
    """(seconds, tokens) of all episodes."""
    task: Any = Squares(args.turns)
    runner = RolloutRunner(
        envs=ThreadEnvs(task),
        renderer=renderer,
        engine=engine,
        seed=0,
        max_turns=args.turns,
        max_new_tokens=args.new_tokens,
        max_model_len=MAX_MODEL_LEN,
    )
    drawn = await ProblemStream(task, "train").draw(0, args.sessions)
    started = time.perf_counter()
    groups = await runner.run_groups(split="train", step=0, problems=drawn, group_size=1, temperature=1.0)
    seconds = time.perf_counter() - started
    return seconds, sum(len(turn.completion.token_ids) for group in groups for turn in group.rollouts[0].turns)


def chat_session(renderer: Renderer, engine: EngineSession, name: str, new_tokens: int) -> ChatSession:
    own = OwnSampling(1.0, renderer.stop_token_ids, renderer.banned_token_ids)
    sampling = SessionSampling(own, partial(sampling_seed, 0, name))
    return ChatSession(name, renderer, engine, sampling, Budgets(10**6, new_tokens, MAX_MODEL_LEN))


class Client:
    """The process of the client (`--client`): a line of JSON per job in, one per result out."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--client"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def do(self, **job: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        result: dict[str, Any] = json.loads(await asyncio.to_thread(stdout.readline))
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


async def as_program(
    renderer: Renderer, engine: WholeAnswers, args: argparse.Namespace, clients: Sequence[Client]
) -> tuple[float, int]:
    """(seconds, tokens) of all episodes, which the clients share; the seconds are those of the slowest client."""
    endpoint = Endpoint("tiny", temperature=1.0)
    await endpoint.start()
    opened, addresses = [], []
    for number in range(args.sessions):
        name = f"train/000000/{number:02d}/00"
        opened.append(engine.session(name, is_awaited=False))
        session = chat_session(renderer, opened[-1], name, args.new_tokens)
        addresses.append((endpoint.open(session), session))
    numbered = [(number, address.base_url, address.api_key) for number, (address, _) in enumerate(addresses)]
    jobs = (
        client.do(kind="play", turns=args.turns, sessions=numbered[place :: len(clients)])
        for place, client in enumerate(clients)
    )
    played = await asyncio.gather(*jobs)
    turns = [turn for _, session in addresses for turn in session.close()]
    assert not any(turn.starts_over for turn in turns), "a conversation was not recognized"
    assert len(turns) == args.sessions * args.turns
    for each in opened:
        await each.__aexit__()
    await endpoint.stop()
    return max(each["seconds"] for each in played), sum(len(turn.completion.token_ids) for turn in turns)


async def latency(renderer: Renderer, engine: WholeAnswers, args: argparse.Namespace, client: Client) -> dict[str, Any]:
    """Milliseconds per request of one token: the client's, and of them the engine's."""
    endpoint = Endpoint("tiny", temperature=1.0)
    await endpoint.start()
    async with engine.session("train/000000/00/00", is_awaited=False) as opened:
        session = chat_session(renderer, opened, "train/000000/00/00", 1)
        address = endpoint.open(session)
        found: dict[str, Any] = {}
        for kind in ("openai", "http"):
            job = {"kind": kind, "url": address.base_url, "key": address.api_key, "requests": args.requests}
            await client.do(**{**job, "first": f"{kind} warm-up", "requests": 3})
            engine.seconds.clear()
            times = (await client.do(**job, first=kind))["times"]
            own = 1000 * statistics.median(engine.seconds)
            found[kind] = (1000 * statistics.median(times), own)
        session.close()
    await endpoint.stop()
    return found


# ── the client's process ────────────────────────────────────────────────────────────────────────────────────


def image_part(number: int, turn: int) -> Mapping[str, Any]:
    file = io.BytesIO()
    PILImage.fromarray(pixels(number, turn)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def client_main() -> None:
    import http.client
    from urllib.parse import urlsplit

    import openai

    async def play(sessions: list[tuple[int, str, str]], turns: int) -> float:
        images = {number: [image_part(number, turn) for turn in range(turns)] for number, *_ in sessions}
        async with openai.AsyncOpenAI(base_url=sessions[0][1], api_key=sessions[0][2], timeout=600) as shared:

            async def episode(number: int, url: str, key: str) -> None:
                client = shared.with_options(base_url=url, api_key=key)
                messages: list[Any] = []
                for turn in range(turns):
                    content = [{"type": "text", "text": QUESTION}, images[number][turn]]
                    messages.append({"role": "user", "content": content})
                    answer = await client.chat.completions.create(model="tiny", messages=messages)
                    messages.append({"role": "assistant", "content": answer.choices[0].message.content})

            started = time.perf_counter()
            await asyncio.gather(*(episode(*session) for session in sessions))
            return time.perf_counter() - started

    def timed(job: dict[str, Any]) -> list[float]:
        """Seconds of each of some requests of their own."""
        client = openai.OpenAI(base_url=job["url"], api_key=job["key"])
        place = urlsplit(job["url"])
        connection = http.client.HTTPConnection("127.0.0.1", place.port)
        headers = {"Authorization": f"Bearer {job['key']}", "Content-Type": "application/json"}
        times = []
        for number in range(job["requests"]):
            messages: list[Any] = [{"role": "user", "content": f"{job['first']} {number}"}]
            started = time.perf_counter()
            if job["kind"] == "openai":
                client.chat.completions.create(model="tiny", messages=messages)
            else:
                body = json.dumps({"messages": messages})
                connection.request("POST", place.path + "/chat/completions", body, headers)
                json.loads(connection.getresponse().read())
            times.append(time.perf_counter() - started)
        return times

    for line in sys.stdin:
        job = json.loads(line)
        if job["kind"] == "play":
            result: dict[str, Any] = {"seconds": asyncio.run(play(job["sessions"], job["turns"]))}
        else:
            result = {"times": timed(job)}
        print(json.dumps(result), flush=True)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────


async def measure(args: argparse.Namespace) -> None:
    renderer, engine = parts()
    clients = [Client() for _ in range(max(args.processes))]
    sides = {f"endpoint, processes: {number}": clients[:number] for number in args.processes}
    try:
        rounds: dict[str, list[tuple[float, int]]] = {"task": [], **{side: [] for side in sides}}
        for _ in range(args.rounds + 1):
            rounds["task"].append(await as_task(renderer, engine, args))
            for side, chosen in sides.items():
                rounds[side].append(await as_program(renderer, engine, args, chosen))
        found = await latency(renderer, engine, args, clients[0])
    finally:
        for client in clients:
            client.close()
        await engine.stop()
    print(f"{args.sessions} episodes × {args.turns} turns × {args.new_tokens} tokens, {args.rounds} rounds")
    print("| side | new tokens/s, median | min – max | of the task |\n|---|---|---|---|")
    medians: dict[str, float] = {}
    for side, measured in rounds.items():
        rates = sorted(tokens / seconds for seconds, tokens in measured[1:])
        medians[side] = statistics.median(rates)
        share = medians[side] / medians["task"]
        print(f"| {side} | {medians[side]:,.0f} | {rates[0]:,.0f} – {rates[-1]:,.0f} | {share:.3f} |")
    print("\n| client | ms per request | of it the engine | the rest |\n|---|---|---|---|")
    for kind, (total, own) in found.items():
        print(f"| {kind} | {total:.2f} | {own:.2f} | {total - own:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--client", action="store_true", help="be the client's process")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the client")
    parser.add_argument("--requests", type=int, default=100)
    args = parser.parse_args()
    if args.client:
        client_main()
        return
    torch.set_num_threads(1)
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()
