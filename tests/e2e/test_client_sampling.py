"""`task.sampling=client`: what is learned is what was sampled, turn by turn, and a replay gives the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.agents import CLIENT
from support.command_line import SHORT, Home
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.metrics import read_metrics
from vlmrl.record.rollouts import TurnRecord, read_rollouts

pytestmark = pytest.mark.slow

AGENTS = (
    CLIENT
    + """
for line in sys.stdin:
    problem = json.loads(line)
    first = user("Which letter?")
    said = ask(problem, first, temperature=0.7)
    ask(problem, user("And you?"), temperature=1.4, top_k=5)
    more = ask(problem, first, said, user("Sure?"), temperature=1.4, stop=["C"])
    ask(problem, first, said, user("No?"), temperature=0)
    print(json.dumps({"reward": len(more["content"]) % 3}), flush=True)
"""
)
"""Two agents. The first one goes on after the second has asked, so places of turns are not numbers of requests; then it
forks from its first answer and decodes greedily. The second one samples from five tokens."""


def temperature(turn: TurnRecord) -> float | None:
    return turn["sampling"]["temperature"] if turn["sampling"] is not None else None


def length(turn: TurnRecord) -> int:
    return len(turn["completion_ids"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "agents.py").write_text(AGENTS)
    return Home(folder)


TASK = (
    *("task=program", "task.command='python agents.py'", "task.texts=['Which letter?','A B C']"),
    *("task.sampling=client", "task.reuse=true", "task.max_turns=4"),
    *(*SHORT, "trainer.warmup.steps=0", "trainer.warmup.rl_weight=0", "trainer.max_steps=2"),
)


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
@pytest.mark.timeout(900)
def test_vllm_samples_each_turn_at_its_own_temperature(home: Home) -> None:
    run = home.made("vllm", (*TASK, "inference=vllm"))
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "mismatch_kl/mean" in line]
    assert len(steps) == 2
    for step, line in enumerate(steps, 1):
        turns = [
            turn for record in read_rollouts(run / f"rollouts/step_{step:06d}.parquet") for turn in record["turns"]
        ]
        assert {temperature(turn) for turn in turns} == {0.0, 0.7, 1.4}
        assert {turn["stop"] for turn in turns} <= {None, "C"}
        assert line["support/mean"] == 5
        assert line["mismatch_kl/mean"] < 1e-8


def test_turns_at_several_temperatures_are_learned_and_replayed(home: Home) -> None:
    run = home.made("agents", TASK)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "mismatch_kl/mean" in line]
    assert len(steps) == 2
    for step, line in enumerate(steps, 1):
        records = list(read_rollouts(Path(run, f"rollouts/step_{step:06d}.parquet")))
        turns = [turn for record in records for turn in record["turns"]]
        whole = [turn for record in records if len(record["turns"]) == 4 for turn in record["turns"]]
        assert len(whole) >= 16, "most rollouts have all four answers"
        noted = [(temperature(turn), turn["sampling"] is None or turn["sampling"]["seed"] is None) for turn in whole]
        # In the order of the branches: the first agent's two turns, the second agent, the fork.
        assert noted == [(0.7, True), (1.4, False), (1.4, False), (0.0, True)] * (len(whole) // 4)
        assert line["tokens/client_sampled"] == line["tokens/completion"] == sum(map(length, turns))
        greedy = sum(length(turn) for turn in turns if temperature(turn) == 0)
        assert line["tokens/unlearnable"] == greedy > 0
        assert line["tokens/trained"] == line["tokens/completion"] - greedy
        assert line["mismatch_kl/mean"] < 1e-10, "the trainer computes each token at its own temperature"
        assert {turn["trainer_logprobs"] is None for turn in whole[3::4]} == {True}
        assert line["support/mean"] == 5
        assert [turn["support_sizes"] is not None for turn in whole] == [False, False, True, False] * (len(whole) // 4)
    ended = home.vlmrl("mode=replay", f"run={run}", "step=1")
    assert (ended.code, ended.err) == (0, ""), ended.out
