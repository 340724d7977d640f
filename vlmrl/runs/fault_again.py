"""`mode=faults run=<run> rollout=<id>`: play one faulty row again, through the user's code, and show what happens.

    rollout     problem ─▶ env ─▶ reset ─▶ render ─▶ step(recorded answer 1) ─▶ render ─▶ step(recorded answer 2) …
                ─▶ reward terms, which see this one rollout of its group
    sft/…       problem ─▶ demonstration ─▶ render ─▶ short enough?

No model is loaded: the policy's answers are those that the run recorded. Exit code 1: the fault happens again. 0: it
does not, because the task was repaired or depends on chance.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError, UserFault, VlmrlError, fenced
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.orchestrator.fences import rendering_fence, stop_reason_of
from vlmrl.orchestrator.scoring import Scorer, seen_images
from vlmrl.orchestrator.supervised import demonstrate, first_index
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.record.disk_bound import read_deleted
from vlmrl.record.faults import FaultRecord
from vlmrl.record.rollouts import RolloutRecord, TurnRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer
from vlmrl.rewards.base import Attempt
from vlmrl.runs.build import build_renderer
from vlmrl.runs.tools import make_toolbox, texts_of_run
from vlmrl.tasks.base import NoProblem, Problem, Reply, Split, StepInfo, Task
from vlmrl.tasks.border import get_num_rows, get_problem, get_reference
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.open_env import OpenEnv, finished
from vlmrl.tasks.programs.problems import played_outside
from vlmrl.types import Message, Prompt, Rollout, StopReason, Text, ToolUse

SHOWN_CHARACTERS = 200
"""Characters of a text that a line shows."""


def play_again(run_dir: RunDir, config: RunConfig, faults: Sequence[FaultRecord], rollout_id: str) -> int:
    """Play the row of the fault `rollout_id` again and print what happens; returns the exit code.

    Raises ConfigError where the run has no such fault, or no such task.
    """
    fault = next((fault for fault in faults if fault["rollout_id"] == rollout_id), None)
    if fault is None:
        some = ", ".join(fault["rollout_id"] for fault in faults[:3])
        raise ConfigError(
            f"rollout={rollout_id} is not a fault of run={run_dir.path}, so there is nothing to play again: "
            + (f"choose one of its {len(faults)} faults, e.g. {some}" if faults else "the run has no faults")
        )
    print(f"recorded as {fault['stop_reason']}: {fault['error']}")
    if fault["stop_reason"] == StopReason.ENGINE_ERROR:
        print("The engine failed, not the task; see logs/. The task's part is played all the same.")
    config, fault = _of_its_set(config, fault)
    try:
        task = _made_task(config)
        renderer = _renderer(config, task)
        if rollout_id.startswith("sft/"):
            played = _play_demonstration(config, task, renderer, fault)
            again = (played.stop_reason, played.error, played.traceback)
        else:
            recorded = _recorded(run_dir, fault)
            asyncio.run(_play_rollout(config, task, renderer, fault, recorded))
            again = (StopReason.TERMINATED, None, None)
    except NoProblem as absent:
        print(f"the task has no problem here any more: {absent}")
        return 0
    except UserFault as error:
        again = (stop_reason_of(error), error.text, error.traceback)
    stop_reason, text, traceback = again
    if not stop_reason.is_fault:
        print("it does not happen again: the task was repaired, or depends on chance")
        return 0
    if traceback is not None:
        print(traceback.rstrip())
    print(f"it happens again: {stop_reason}: {text}")
    return 1


def _of_its_set(config: RunConfig, fault: FaultRecord) -> tuple[RunConfig, FaultRecord]:
    """The config and the fault as an evaluation set played it: with the set's own task and split. Unchanged for a fault
    of no named set."""
    label = fault["rollout_id"].partition("/")[0].removesuffix("-greedy")
    own = config.orchestrator.eval.sets.get(label.removeprefix("eval_"))
    if own is None or not label.startswith("eval_"):
        return config, fault
    task = own.own_task or config.task
    return dataclasses.replace(config, task=task), {**fault, "split": own.split.value}


def _made_task(config: RunConfig) -> Task:
    refused: VlmrlError | None = None
    with fenced(f"{config.task.target}(config, seed={config.seed})"):
        try:
            return load_task(config.task, seed=config.seed)
        except VlmrlError as error:
            refused = error
    assert refused is not None
    raise refused


def _renderer(config: RunConfig, task: Task) -> Renderer | None:
    """The run's renderer, without its model; None, with a note, where its tokenizer cannot be had."""
    try:
        folder = resolve_checkpoint(config.model, texts_of_run(config, task))
        return build_renderer(config, folder).renderer
    except (VlmrlError, OSError) as error:
        print(f"(messages are not rendered: {error})")
        return None


def _play_demonstration(config: RunConfig, task: Task, renderer: Renderer | None, fault: FaultRecord) -> Rollout:
    if renderer is None:
        raise ConfigError(
            f"rollout={fault['rollout_id']} is a demonstration, which cannot be rendered without the run's tokenizer: "
            "play it where model.name can be loaded"
        )
    index = fault["problem_index"]
    print(f'the demonstration of problem("train", {index})')
    made = demonstrate(
        task,
        renderer,
        dataclasses.replace(config.trainer.warmup, batch_size=1),
        step=0,
        numbers=[index - first_index(get_num_rows(task, "train"))],
        seed=config.seed,
        seq_len=config.trainer.seq_len,
    )
    if made.absent:
        raise made.absent[0][1]
    for sample in made.samples:
        print(f"{len(sample.token_ids)} tokens, {int(sample.loss_mask.sum())} of them with a loss")
    return made.rollouts[0]


def _recorded(run_dir: RunDir, fault: FaultRecord) -> RolloutRecord | None:
    """What the run recorded of a rollout; None where it recorded no rollouts."""
    path = run_dir.recorded_rollouts("eval" if fault["phase"] == "eval" else "step", fault["step"])
    wanted = fault["rollout_id"]
    try:
        for record in read_rollouts(path, lambda rollout_id: rollout_id == wanted, damaged=lambda text: None):
            return record
    except OSError:
        pass
    deleted = read_deleted(run_dir)
    reason = "" if deleted is None else f"; the run {deleted.says()}"
    print(f"(no answers are recorded in {path}{reason}, so the env's steps are not played)")
    return None


async def _play_rollout(
    config: RunConfig, task: Task, renderer: Renderer | None, fault: FaultRecord, recorded: RolloutRecord | None
) -> None:
    turns = recorded["turns"] if recorded is not None else []
    index = fault["problem_index"]
    split: Split = "train" if fault["split"] == "train" else "eval"
    problem, problem_id = get_problem(task, split, index)
    print(f'problem("{split}", {index}): {problem_id}')
    if fault["problem_id"] not in (problem_id, f"{split}[{index}]"):
        print(f"(the run recorded problem {fault['problem_id']} here, so the task or its data have changed)")
    if played_outside(problem) is not None:
        raise ConfigError(
            f"rollout={fault['rollout_id']} was played by a program, which asks a policy, and no model is loaded here, "
            "so it cannot be played again: python -m vlmrl mode=report run=<run> shows what the program printed"
        )
    with OpenEnv(task, problem) as env:
        messages = finished(env.reset())
        history = list(messages)
        _show("reset()", messages)
        prompt = await _first_turn(renderer, messages)
        toolbox = make_toolbox(config)
        for number, turn in enumerate(turns, 1):
            print(f"answer {number}: {_short(turn['text'])}")
            results = await _results(toolbox, renderer, prompt, turn)
            info = StepInfo(number, len(turn["completion_ids"]), is_cut=turn["finish_reason"] == "length")
            reply = Reply(messages=results) if results else finished(env.step(turn["text"], info))
            print(f"step(): reward={reply.reward:g}, turn_reward={reply.turn_reward:g}, done={reply.done}")
            if reply.done or number == len(turns):
                break
            if reply.history is not None:
                _show("the conversation starts over:", reply.history)
                history = list(reply.history)
                prompt = await _first_turn(renderer, reply.history)
                continue
            _show("", reply.messages)
            completion = np.array(turn["completion_ids"], np.int64)
            written = turn["text"]
            if renderer is not None and turn.get("stop") is not None:
                written = renderer.decode(completion)
            history.append(Message.of("assistant", written))
            if renderer is not None and prompt is not None:
                with rendering_fence():
                    prompt, _ = await renderer.next_turn(prompt, completion, history, reply.messages)
            history.extend(reply.messages)
    if recorded is not None and turns:
        await _score(config, recorded, problem, history, prompt)


async def _score(
    config: RunConfig, recorded: RolloutRecord, problem: Problem, history: Sequence[Message], prompt: Prompt | None
) -> None:
    """Score the last recorded answer by the reward terms. Raises `UserFault` as one of them."""
    scorer = Scorer.of(config.reward, config.task, TaskThreads().run)
    reference = get_reference(problem) or (None, {})
    last = recorded["turns"][-1]
    attempt = Attempt(
        rollout_id=recorded["rollout_id"],
        problem_id=recorded["problem_id"],
        prompt=tuple(history),
        completion=last["text"],
        answer=None,
        reference=reference[0],
        columns=reference[1],
        images=() if prompt is None else seen_images(prompt),
        completion_ids=tuple(last["completion_ids"]),
    )
    (verdict,) = await scorer.judge(recorded["task"], [attempt])
    for name, value in verdict.values.items():
        print(f"reward/{name}: {'abstains' if value is None else f'{value:g}'}")
    if verdict.fault is not None:
        raise verdict.fault


async def _results(
    toolbox: Toolbox | None, renderer: Renderer | None, prompt: Prompt | None, turn: TurnRecord
) -> tuple[Message, ...]:
    """The results of the tool calls of an answer; empty where it has none. Without a prompt no call can be read."""
    if toolbox is None or renderer is None or prompt is None or turn["finish_reason"] == "length":
        return ()
    answer = renderer.parse(np.array(turn["completion_ids"], np.int64), toolbox.specs, prompt)
    if not (answer.calls or answer.broken):
        return ()
    return await toolbox.reply(answer, prompt, ToolUse())


async def _first_turn(renderer: Renderer | None, messages: tuple[Message, ...]) -> Prompt | None:
    if renderer is None:
        return None
    with rendering_fence():
        return await renderer.first_turn(messages)


def _show(source: str, messages: Sequence[Message]) -> None:
    for message in messages:
        parts = [part.text if isinstance(part, Text) else f"<{part.modality}>" for part in message.content]
        print(f"{source or '  next'} {message.role}: {_short(' '.join(parts))}")


def _short(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    return ascii(shown) if not shown.isprintable() else repr(shown)
