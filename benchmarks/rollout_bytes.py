"""Bytes and seconds of a step's rollouts: Parquet against the JSON lines of earlier versions, of the same rollouts.

    python benchmarks/rollout_bytes.py --run <run> [--answer-tokens 10] [--answer-tokens 1000]

`--run` names a finished run, of which the newest step is taken: its rollouts as they are, and then with answers of
`--answer-tokens` tokens, whose tokens, logprobs and entropies are drawn from the run's own. The JSON lines have the
keys and the number format that versions before Parquet wrote (orjson, the shortest decimals of a float32). Both are
written and read five times in turn; the fastest counts. What is read from both is compared, bit by bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlmrl.record.rollout_table import encode, shared_prefix
from vlmrl.record.rollouts import PartRecord, RolloutRecord, TurnRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import (
    Completion,
    DropReason,
    Image,
    ImageItem,
    Message,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Text,
    TokenMetrics,
    Turn,
)

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--answer-tokens", type=int, action="append", default=[])
    arguments = parser.parse_args()
    run_dir = RunDir(arguments.run)
    step = run_dir.rollouts_steps("step")[-1]
    rollouts = [rollout_of(record) for record in read_rollouts(run_dir.recorded_rollouts("step", step))]
    print("| answers | rollouts | tokens sampled | JSON lines, bytes | Parquet, bytes | ratio | write, s | read, s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        measure("as in the run", step, rollouts, Path(folder))
        for tokens in arguments.answer_tokens:
            longer = [with_answers(rollout, tokens, rollouts) for rollout in rollouts]
            measure(f"of {tokens} tokens", step, longer, Path(folder))


def measure(name: str, step: int, rollouts: list[Rollout], folder: Path) -> None:
    """Print a row of the table. Seconds are those of the processor, Parquet / JSON lines."""
    lines, table = folder / "step.jsonl", folder / "step.parquet"
    writes = [
        lambda: lines.write_bytes(b"".join(json_line(rollout, step) for rollout in rollouts)),
        lambda: table.write_bytes(encode(step, {"train": rollouts})),
    ]
    reads: list[Callable[[], Any]] = [lambda: list(read_rollouts(lines)), lambda: list(read_rollouts(table))]
    write, read = fastest(writes), fastest(reads)
    assert [float32s(record) for record in reads[0]()] == [float32s(record) for record in reads[1]()]
    sizes = lines.stat().st_size, table.stat().st_size
    sampled = sum(len(turn.completion.token_ids) for rollout in rollouts for turn in rollout.turns)
    print(
        f"| {name} | {len(rollouts)} | {sampled:,} | {sizes[0]:,} | {sizes[1]:,} | 1/{sizes[0] / sizes[1]:.1f} | "
        f"{write[1]:.3f} / {write[0]:.3f} | {read[1]:.3f} / {read[0]:.3f} |"
    )


def float32s(record: RolloutRecord) -> Any:
    """The record with the bits of its logprobs and entropies: JSON holds them as the shortest decimals."""
    names = ("logprobs", "trainer_logprobs", "entropies")
    turns: list[dict[str, Any]] = [dict(turn) for turn in record["turns"]]
    for turn in turns:
        turn |= {name: turn[name] and np.array(turn[name], np.float32).tobytes() for name in names}
    return {**record, "turns": turns}


def fastest(calls: list[Callable[[], Any]]) -> list[float]:
    """Seconds of processor time of the fastest of `REPEATS` runs of each call."""
    found = [float("inf")] * len(calls)
    for _ in range(REPEATS):
        for place, call in enumerate(calls):
            start = time.process_time()
            call()
            found[place] = min(found[place], time.process_time() - start)
    return found


# ── rollouts ────────────────────────────────────────────────────────────────────────────────────────────────


def rollout_of(record: RolloutRecord) -> Rollout:
    """A recorded rollout as the run had it, without pixels."""
    return Rollout(
        rollout_id=record["rollout_id"],
        problem_id=record["problem_id"],
        index=record["index"],
        turns=[_turn(turn) for turn in record["turns"]],
        reward=record["reward"],
        metrics=record["metrics"],
        stop_reason=StopReason(record["stop_reason"]),
        error=record["error"],
        dropped=None if record["dropped"] is None else DropReason(record["dropped"]),
        seconds=record["seconds"],
    )


def _turn(turn: TurnRecord) -> Turn:
    trainer, entropies = turn["trainer_logprobs"], turn["entropies"]
    places = tuple(Placeholder(*place) for place in turn["placeholders"])
    items = tuple(ImageItem(place.hash, np.zeros((1, 1, 3), np.uint8), {}, place.num_features) for place in places)
    return Turn(
        Prompt(np.array(turn["prompt_token_ids"]), places, items),
        Completion(
            np.array(turn["completion_ids"]),
            np.array(turn["logprobs"], np.float32),
            np.array(turn["versions"]),
            turn["finish_reason"],
        ),
        turn["text"],
        [Message(message["role"], tuple(map(_part, message["content"]))) for message in turn["messages"]],  # type: ignore[arg-type]
        turn["branch"],
        turn["reward"],
        turn["advantage"],
        None if trainer is None else TokenMetrics(np.array(trainer, np.float32), np.array(entropies, np.float32)),
    )


def _part(part: PartRecord) -> Text | Image:
    return Text(part["text"]) if part["type"] == "text" else Image(None)


def with_answers(rollout: Rollout, tokens: int, pool: Sequence[Rollout]) -> Rollout:
    """The rollout with as many turns, each with an answer of so many tokens, drawn from all answers of `pool`."""
    answers = [(turn.completion, turn.learned) for other in pool for turn in other.turns if turn.learned is not None]
    ids = np.concatenate([completion.token_ids for completion, _ in answers])
    numbers = [
        np.concatenate([completion.logprobs for completion, _ in answers]),
        np.concatenate([learned.trainer_logprobs for _, learned in answers]),
        np.concatenate([learned.entropies for _, learned in answers]),
    ]
    choose = np.random.default_rng(zlib.crc32(rollout.rollout_id.encode()))
    turns: list[Turn] = []
    for turn in rollout.turns:
        at = choose.integers(0, len(ids), tokens)
        # A factor of its own for each number: no two tokens of a real run have the same logprob.
        drawn = [(each[at] * choose.uniform(0.9, 1.1, tokens)).astype(np.float32) for each in numbers]
        text = (turn.text * tokens)[:tokens]
        versions = np.full(tokens, turn.completion.versions[0])
        completion = Completion(ids[at], drawn[0], versions, turn.completion.finish_reason)
        longer = replace(turn, completion=completion, text=text, learned=TokenMetrics(drawn[1], drawn[2]))
        if turns:  # it extends the turn before
            before = turns[-1]
            start = len(before.prompt.token_ids) + len(before.completion.token_ids)
            own = turn.prompt.token_ids[shared_prefix(turn, rollout.turns[len(turns) - 1]) :]
            shift = start + len(own) - len(turn.prompt.token_ids)
            places = [replace(place, offset=place.offset + shift) for place in turn.prompt.placeholders]
            kept = before.prompt.placeholders
            token_ids = np.concatenate([before.prompt.token_ids, before.completion.token_ids, own])
            longer.prompt = Prompt(token_ids, (*kept, *places[len(kept) :]), turn.prompt.mm_items)
        turns.append(longer)
    return replace(rollout, turns=turns)


# ── what versions before Parquet wrote ──────────────────────────────────────────────────────────────────────


def json_line(rollout: Rollout, step: int) -> bytes:
    """The JSON object of a rollout."""
    record = {
        "rollout_id": rollout.rollout_id,
        "problem_id": rollout.problem_id,
        "step": step,
        "split": "train",
        "index": rollout.index,
        "reward": rollout.reward,
        "metrics": rollout.metrics,
        "stop_reason": rollout.stop_reason.value,
        "filtered": [reason.value for reason in rollout.filtered],
        "dropped": rollout.dropped and rollout.dropped.value,
        "error": rollout.error,
        "seconds": rollout.seconds,
        "turns": [_turn_of_line(turn, before) for before, turn in pairwise([None, *rollout.turns]) if turn is not None],
    }
    return orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def _turn_of_line(turn: Turn, before: Turn | None) -> dict[str, Any]:
    prompt, completion, offset = turn.prompt, turn.completion, shared_prefix(turn, before)
    hashes = iter([place.hash for place in prompt.placeholders if place.offset >= offset])
    return {
        "branch": turn.branch,
        "messages": [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, Text)
                    else {"type": "image", "hash": next(hashes)}
                    for part in message.content
                ],
            }
            for message in turn.messages
        ],
        "prompt_offset": offset,
        "prompt_token_ids": np.ascontiguousarray(prompt.token_ids[offset:]),
        "placeholders": [(p.offset, p.length, p.hash, p.gaps) for p in prompt.placeholders if p.offset >= offset],
        "completion_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "versions": completion.versions,
        "trainer_logprobs": turn.learned and turn.learned.trainer_logprobs,
        "entropies": turn.learned and turn.learned.entropies,
        "finish_reason": completion.finish_reason,
        "text": turn.text,
        "reward": turn.reward,
        "advantage": turn.advantage,
    }


if __name__ == "__main__":
    main()
