"""`mode=replay run=<dir> step=N`: send a recorded batch through today's code and compare hop by hop.

    images/*.png ─▶ pictures      the pixels against the hash that names the file
       processor ─▶ tensors       against the digests recorded in the PNG files
        renderer ─▶ prompts       rendered again from the messages, each turn after the recorded turn before it
          engine ─▶ completions   sampled again from the recorded prompts with the run's seeds
                    logprobs, engine   of the tokens that came out the same
         trainer ─▶ logprobs, trainer

Each hop gets what was *recorded* as its input, not what the hop before it made today, so the first line that differs is
where to look. Engine, device, dtype and packing are those of today's config: the run's own with the overrides of the
command line on top.

An engine of another kind draws other tokens from the same seed. Then there are no completions to compare, and its
logprobs of the tokens that it draws are compared with the trainer's of the same tokens.

The same code on the same device gives the same bits: the batch is what the loop handed over, in its order, so the
engine and the trainer form the same batches again. Left out on purpose: the update of the weights (a resumed run
repeats it), evaluations, and tokens that other policy versions sampled, or that no policy did (mode=play).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from vlmrl.config.parse import parse, typed
from vlmrl.config.run import Mode, RunConfig
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.samples import learned_branches, make_samples
from vlmrl.orchestrator.sampling import OwnSampling, Truncation
from vlmrl.record.run_dir import RunDir
from vlmrl.record.tokens import read_spellings
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.build import Run
from vlmrl.runs.dtypes import is_float32
from vlmrl.runs.replay import comparisons
from vlmrl.runs.replay.comparisons import RerenderedTurn, ResampledTurn, ScoredTurn, Spelling
from vlmrl.runs.replay.recorded import fits, load_items, load_records, replayed_batch, rollout_of
from vlmrl.runs.sft import take_supervised_steps
from vlmrl.runs.verdicts import State, Verdict, as_table, conclude, not_visible
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.types import (
    EngineSession,
    InferenceEngine,
    Prompt,
    Rollout,
    SamplingParams,
    Trainer,
    TrainingSample,
    Turn,
    extends,
)

COMPARISONS = ("pictures", "tensors", "prompts", "completions", "logprobs, engine", "logprobs, trainer")
"""Names of the comparisons, in the order of the table."""

CONSEQUENCE = "so today's code does not reproduce the recorded batch"

ROUNDING_FLOAT32 = 1e-4
"""Nats that one token's logprob may differ where everything computes in float32. Measured between packings and
engines: below 1e-5."""
ROUNDING_BFLOAT16 = 0.5
"""The same where anything computes in bfloat16, which changes the logprob of an unlikely token by 0.1 to 0.3."""


async def replay_batch(run: Run) -> ExitReason:
    """Compare one recorded batch with what today's code makes of it. Raises `ParityError` where they differ by more
    than rounding, after the table is shown and written."""
    recorded, step = replayed_batch(run.config)
    recorded_config = parse(typed(recorded.read_config(key="run")))
    weights: str | None = "none, because no policy sampled the batch"
    if recorded_config.mode is not Mode.play:
        weights = await _load_weights(run, recorded, step)
    if weights is None:
        return "interrupted"
    run.monitor.phase("replay")
    await run.weight_sync.publish(run.trainer.version)
    replay = Replay(
        recorded=recorded,
        step=step,
        config=run.config,
        renderer=run.renderer,
        engine=run.engine,
        trainer=run.trainer,
        exact=is_float32(run.config) and is_float32(recorded_config),
        same_engine=run.config.inference.kind == recorded_config.inference.kind,
        status=run.monitor.status,
    )
    comparing = asyncio.create_task(replay.compare())
    if await stopped_before(comparing, run.stop):
        return "interrupted"
    verdicts = comparing.result()
    run.run_dir.write_replay(content(recorded, step, verdicts))
    run.monitor.table(f"replay of step {step}", {"weights": weights, **as_table(verdicts)})
    conclude(verdicts, CONSEQUENCE)
    return "finished"


async def _load_weights(run: Run, recorded: RunDir, step: int) -> str | None:
    """Give the trainer the weights that learned from the batch of `step`.

    Returns where they come from, for the screen; None if the run was asked to stop.
    """
    checkpoints = Checkpoints(recorded.checkpoints, run.config.trainer.keep_checkpoints)
    if step - 1 in checkpoints.steps():
        checkpoints.load(step - 1, run.trainer)
        return f"the checkpoint of version {step - 1}"
    if await take_supervised_steps(run, run.config.trainer.warmup.steps):
        return f"version 0, made again: the model and {run.trainer.supervised_steps} supervised steps"
    return None


@dataclass(eq=False)
class Replay:
    """Compares one batch. The trainer holds the weights of version `step` − 1, and the engine serves them."""

    recorded: RunDir
    """The run that recorded the batch."""
    step: int
    config: RunConfig
    """Today's config."""
    renderer: Renderer
    engine: InferenceEngine
    trainer: Trainer
    exact: bool
    """Whether both the recorded run and today's code compute in float32."""
    same_engine: bool
    """Whether today's engine is of the kind that the run had."""
    status: Callable[[str], None]
    """Called with a line about what is being done."""
    _rounding: float = field(init=False)

    def __post_init__(self) -> None:
        self._rounding = ROUNDING_FLOAT32 if self.exact else ROUNDING_BFLOAT16

    async def compare(self) -> list[Verdict]:
        """One verdict for each of `COMPARISONS`. Raises VlmrlError where the record cannot be read."""
        pictures, tensors, prompts, completions, of_engine, of_trainer = COMPARISONS
        spelling: Spelling = read_spellings(self.recorded.tokens) if self.recorded.tokens.exists() else {}
        self.status("replay: pictures and prompts")
        records = await asyncio.to_thread(load_records, self.recorded, self.step)
        items = await asyncio.to_thread(load_items, self.recorded, records, self.renderer)
        rollouts = [rollout_of(record, items) for record in records]
        written = [self._as_written(rollout) for rollout in rollouts]
        verdicts = [
            comparisons.pictures(pictures, items, rollouts),
            comparisons.tensors(tensors, items, rollouts),
            comparisons.prompts(prompts, await self._rerendered(written), spelling),
        ]
        if not all(fits(rollout) for rollout in rollouts):
            why = "an image or video takes another number of tokens than was recorded"
            return [*verdicts, *(not_visible(name, why) for name in (completions, of_engine, of_trainer))]
        self.status("replay: completions")
        resampled = await self._resampled(rollouts)
        if not resampled:
            why = f"other policy versions than {self.step - 1} sampled the batch"
            verdicts += [not_visible(completions, why), not_visible(of_engine, why)]
        elif self.same_engine:
            same = [_up_to_first_difference(each) for each in resampled]
            verdicts += [
                comparisons.completions(completions, resampled, self.exact, spelling),
                comparisons.logprobs(of_engine, same, self._rounding, spelling),
            ]
        else:
            sides = "by the trainer", f"by the engine, of {len(resampled)} completions of its own"
            both = await asyncio.to_thread(self._scored_by_both, resampled)
            verdicts += [
                not_visible(completions, "another engine draws other tokens from the same seeds"),
                comparisons.logprobs(of_engine, both, self._rounding, spelling, sides=sides),
            ]
        self.status("replay: the trainer's logprobs")
        scored = await asyncio.to_thread(self._scored, rollouts)
        return [*verdicts, comparisons.logprobs(of_trainer, scored, self._rounding, spelling)]

    def _as_written(self, rollout: Rollout) -> Rollout:
        """The rollout with the whole text of its answers, as the prompts of later turns have it: what a task saw ends
        before a stop string."""
        turns = [replace(turn, text=self.renderer.decode(turn.completion.token_ids)) for turn in rollout.turns]
        return replace(rollout, turns=turns) if any(turn.completion.stop for turn in turns) else rollout

    async def _rerendered(self, rollouts: Sequence[Rollout]) -> list[RerenderedTurn]:
        """Every prompt, rendered again from its messages and, in turns that go on, the recorded tokens before it."""
        return [
            RerenderedTurn(rollout, number, await self._prompt_of(rollout, number))
            for rollout in rollouts
            for number in range(len(rollout.turns))
        ]

    async def _prompt_of(self, rollout: Rollout, number: int) -> Prompt:
        """The prompt of turn `number`, rendered again."""
        turn = rollout.turns[number]
        before, history, new = None, rollout.messages_before(number), turn.messages
        if number and not turn.starts_over:
            before = rollout.turns[number - 1]
        elif (fork := forked_from(rollout, number)) is not None:
            before, known = fork
            history, new = new[:known], new[known:]
        if before is None:
            return await self.renderer.first_turn(turn.messages, turn.tools)
        prompt, _ = await self.renderer.next_turn(before.prompt, before.completion.token_ids, history, new, turn.tools)
        return prompt

    async def _resampled(self, rollouts: Sequence[Rollout]) -> list[ResampledTurn]:
        """Every completion that this replay's weights sampled, sampled again, in the order of the batch."""
        async with AsyncExitStack() as scope:
            seats = []
            # All sessions are open before the first request: an engine may wait for every open session to ask.
            for rollout in rollouts:
                closing = await scope.enter_async_context(AsyncExitStack())
                session = await closing.enter_async_context(self.engine.session(rollout.rollout_id))
                seats.append((rollout, session, closing))
            played = await asyncio.gather(*(self._play(*seat) for seat in seats))
        return [each for turns in played for each in turns]

    async def _play(self, rollout: Rollout, session: EngineSession, closing: AsyncExitStack) -> list[ResampledTurn]:
        """The rollout's turns up to the first token of another version. Closes the session by `closing`."""
        played: list[ResampledTurn] = []
        async with closing:
            for number, turn in enumerate(rollout.turns):
                if (turn.completion.versions != self.step - 1).any():
                    break
                sampling = self._sampling(turn, sampling_seed(self.config.seed, rollout.rollout_id, number))
                played.append(ResampledTurn(rollout, number, await session.generate(turn.prompt, sampling)))
        return played

    def _sampling(self, turn: Turn, seed: int) -> SamplingParams:
        """How the turn was sampled. `seed`: the one that the run gives the turn."""
        completion, room = turn.completion, self.config.inference.max_model_len - len(turn.prompt.token_ids)
        own = OwnSampling(
            self.config.orchestrator.temperature,
            self.renderer.stop_token_ids,
            self.renderer.banned_token_ids,
            Truncation.learned(self.config),
            # Of its stop strings, only the one that ended it had an effect.
            stop=() if completion.stop is None else (completion.stop,),
        )
        budget = min(self.config.orchestrator.max_new_tokens, room)
        if completion.finish_reason == "length":  # which may be a client's own limit
            budget = len(completion.token_ids)
        client = turn.sampling
        if client is None:
            return own.params(budget, seed)
        return own.params(
            budget,
            seed if client.seed is None else client.seed,
            temperature=client.temperature,
            top_p=client.top_p,
            top_k=client.top_k,
        )

    def _scored(self, rollouts: Sequence[Rollout]) -> list[ScoredTurn]:
        """The turns that were trained on, by the trainer then and today. The samples are those of the step, so they
        pack as they did."""
        trained_on = [rollout for rollout in rollouts if rollout.dropped is None and is_sampled(rollout)]
        samples = [(rollout, sample) for rollout in trained_on for sample in make_samples(rollout)]
        branches = [
            [(rollout.turns.index(turn), turn) for turn in turns if turn.is_learnable]
            for rollout in trained_on
            for turns in learned_branches(rollout)
        ]
        scored = []
        today = self.trainer.logprobs([sample for _, sample in samples])
        for (rollout, _), turns, found in zip(samples, branches, today, strict=True):
            ends = np.cumsum([len(turn.completion.token_ids) for _, turn in turns])
            for (number, turn), part in zip(turns, np.split(found, ends[:-1]), strict=True):
                recorded = turn.learned.trainer_logprobs if turn.learned is not None else turn.completion.logprobs
                scored.append(ScoredTurn(rollout, number, turn.completion.token_ids, recorded, part))
        return scored

    def _scored_by_both(self, resampled: Sequence[ResampledTurn]) -> list[ScoredTurn]:
        """The tokens that the engine sampled today, by the trainer and by the engine."""
        resampled = [each for each in resampled if each.turn.is_learnable]
        samples = [_sample_of(each) for each in resampled]
        return [
            ScoredTurn(each.rollout, each.number, each.today.token_ids, by_trainer, each.today.logprobs)
            for each, by_trainer in zip(resampled, self.trainer.logprobs(samples), strict=True)
        ]


def forked_from(rollout: Rollout, number: int) -> tuple[Turn, int] | None:
    """The earlier turn whose tokens the prompt of turn `number` begins with although it starts over, and how many of
    its messages they are: a program may go on from an answer in two ways. None for a prompt that was rendered whole."""
    turn = rollout.turns[number]
    found = []
    for place, before in enumerate(rollout.turns[:number]):
        known = len(rollout.messages_before(place)) + len(before.messages) + 1
        if known < len(turn.messages) and extends(turn.prompt, before.prompt, before.completion.token_ids):
            found.append((known, place))
    if not found:
        return None
    known, place = max(found)
    return rollout.turns[place], known


def is_sampled(rollout: Rollout) -> bool:
    """Whether a policy sampled it, and no player of mode=play gave its answers."""
    return all((turn.completion.versions >= 0).all() for turn in rollout.turns)


def _up_to_first_difference(each: ResampledTurn) -> ScoredTurn:
    """The engine's logprobs of a completion, up to the first token that is sampled differently today."""
    recorded = each.turn.completion
    end = comparisons.first_difference(recorded.token_ids, each.today.token_ids)
    ids = recorded.token_ids[:end]
    return ScoredTurn(each.rollout, each.number, ids, recorded.logprobs[:end], each.today.logprobs[:end])


def _sample_of(each: ResampledTurn) -> TrainingSample:
    """A training sample of the recorded prompt and the completion that the engine samples today."""
    (sample,) = make_samples(
        Rollout(
            rollout_id=each.rollout.rollout_id,
            problem_id=each.rollout.problem_id,
            index=each.rollout.index,
            turns=[replace(each.turn, completion=each.today, branch=0, learned=None)],
            reward=0.0,
            metrics={},
            stop_reason=each.rollout.stop_reason,
        )
    )
    return sample


def content(recorded: RunDir, step: int, verdicts: Sequence[Verdict]) -> dict[str, object]:
    """The content of replay.json."""
    first = first_of(verdicts)
    return {
        "run": str(recorded.path),
        "step": step,
        "policy_version": step - 1,
        "identical": all(verdict.state in (State.SAME, State.NOT_VISIBLE) for verdict in verdicts),
        "first": None if first is None else first.as_json("first"),
        "lines": [verdict.as_json("first") for verdict in verdicts],
    }


def first_of(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The first line that differs, else the first that differs by rounding; None where all lines are equal."""
    for state in (State.DIFFERS, State.ROUNDING):
        for verdict in verdicts:
            if verdict.state is state:
                return verdict
    return None
