"""What ranks sample together with the embedded engine. As a script, every rank of a group; as a module, one process.

    sampling_ranks.py FOLDER OUT CASE…     rank 0 writes OUT/CASE.npz for each case of learning.py

Two batches of conversations of two turns, with images, and a training step between them.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from support import learning
from support.helpers import extended, image, prompt
from vlmrl.config.trainer import Sharding
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.embedded.generator import BatchSampler, Generator
from vlmrl.inference.embedded.ranked import Answered, RankedGenerator, RankSampler, SampleShare
from vlmrl.ranks.commands import Command
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment
from vlmrl.trainer.commands import Follower
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import Completion, Prompt, SamplingParams

STOPS = (3,)


class SamplingFollower(Follower):
    """A rank that also samples."""

    sampler: RankSampler | None = None

    def make_room(self) -> None:
        if self.sampler is not None:
            self.sampler.clear()

    def sample(self, share: SampleShare) -> Answered:
        sampler = self.sampler
        assert sampler is not None
        return self.learner.sample(lambda: sampler.sample(share))


@dataclass(frozen=True)
class BuildSampler(Command[SamplingFollower, None]):
    """Build the sampler of a case on a rank other than 0."""

    weights_move: bool

    def run(self, worker: SamplingFollower) -> None:
        worker.sampler = RankSampler(Generator(worker.learner.policy), weights_move=self.weights_move)


def text_of(ids: Any) -> str:
    return "".join(f"<{token}>" for token in ids)


def trainer_and_engine(folder: str, name: str, rank_group: RankGroup | None) -> tuple[LocalTrainer, EmbeddedEngine]:
    """Of a case: on rank 0 of `rank_group`, or in a run of one process."""
    trainer = learning.learner(folder, name, rank_group)
    policy = trainer._learner.policy
    own = Generator(policy, text_of)
    sampler: BatchSampler = own
    if rank_group is not None:
        moves = learning.CASES[name].sharding is not Sharding.none
        rank_group.together([BuildSampler(moves)] * (rank_group.size - 1), lambda: None)
        sampler = RankedGenerator(own, rank_group.size, trainer.sample, weights_move=moves)
    return trainer, EmbeddedEngine(policy, lambda: trainer.version, 512, text_of, sampler)


def conversations(engine: EmbeddedEngine, seed: int) -> list[Completion]:
    """Groups of 1, 5 and 6 with an image each, over two turns. Some have stop strings in their second turn."""

    async def one(session: Any, first: Prompt, sampling: SamplingParams) -> list[Completion]:
        async with session:
            said = await session.generate(first, sampling)
            longer = extended(first, said.token_ids, [9, 8], image(2, 1, 7), 7)
            stop = ("<1",) if sampling.seed % 3 == 0 else ()
            return [said, await session.generate(longer, replace(sampling, seed=sampling.seed + 1, stop=stop))]

    async def everything() -> list[list[Completion]]:
        asked = [
            (prompt(list(range(40, 60)), image(2, 3, number), [7] * (number + 1)), seed + 100 * number + 10 * index)
            for number, size in enumerate((1, 5, 6))
            for index in range(size)
        ]
        sessions = [engine.session(str(number)) for number in range(len(asked))]
        plain = SamplingParams(12, temperature=1.0, stop_token_ids=STOPS, banned_token_ids=(), seed=0)
        pairs = zip(sessions, asked, strict=True)
        return await asyncio.gather(*(one(s, first, replace(plain, seed=own)) for s, (first, own) in pairs))

    return [said for turns in asyncio.run(everything()) for said in turns]


def found(folder: str, name: str, rank_group: RankGroup | None) -> dict[str, np.ndarray]:
    """Tokens, logprobs and lengths of both batches, and the rows that the engine computed."""
    trainer, engine = trainer_and_engine(folder, name, rank_group)
    results: dict[str, np.ndarray] = {}
    for number in range(2):
        said = conversations(engine, 5000 * number)
        results[f"{number}/tokens"] = np.concatenate([each.token_ids for each in said])
        results[f"{number}/logprobs"] = np.concatenate([each.logprobs for each in said])
        results[f"{number}/lengths"] = np.array([len(each.token_ids) for each in said])
        results[f"{number}/stops"] = np.array([each.stop or "" for each in said])
        rows = engine.metrics()
        results[f"{number}/rows"] = np.array([rows["inference/rows_prefill"], rows["inference/rows_decode"]])
        if number == 0:
            trainer.train_step(learning.prepared(trainer, learning.batch(True), name))
    asyncio.run(engine.stop())
    return results


def main(folder: str, out: str, *names: str) -> int:
    with init_from_environment() as rank_group:
        if rank_group is not None and rank_group.rank > 0:
            return follow(rank_group, SamplingFollower())
        for name in names:
            np.savez(Path(out) / f"{name}.npz", **found(folder, name, rank_group))  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
