"""What mode=bench advises: each rule fires on planted numbers, keeps still just beside them, and what it says to set
composes and passes preflight next to the run's own settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from support.bench_numbers import GIB, config_of, measured, memory, times, tokens
from vlmrl.preflight.check import Stage, check
from vlmrl.runs.bench.activity import DRAWING, PROGRAMS, RENDERING, SAMPLING, SCORING, TASK
from vlmrl.runs.bench.advice import RULES, advice_for
from vlmrl.runs.bench.measured import Measured

VLLM = ("inference=vllm", "model=qwen3vl", "orchestrator.max_staleness=0")
ASYNC = ("inference=vllm", "model=qwen3vl", "orchestrator.max_staleness=1")
PROGRAM = ("task=program", "task.command='python agent.py'", "task.texts=[A]", "trainer.warmup.steps=0")
GPU = ("model=qwen3vl", "trainer.compile=true")


@dataclasses.dataclass(frozen=True)
class Case:
    """Numbers on which a rule fires, and numbers beside them on which it does not."""

    rule: str
    overrides: tuple[str, ...]
    fires: Callable[[Measured], Measured]
    still: Callable[[Measured], Measured]
    settings: tuple[str, ...]


def change(**changed: Any) -> Callable[[Measured], Measured]:
    return lambda found: dataclasses.replace(found, **changed)


CASES = (
    Case(
        "sample_and_train_at_once",
        VLLM,
        change(times=times(training=4.5)),
        change(times=times(training=0.9)),
        ("orchestrator.max_staleness=1",),
    ),
    Case(
        "sample_and_train_at_once",
        VLLM,
        change(memory=memory(server_share=0.0)),
        change(memory=memory(server_share=0.5)),  # one GPU does one thing at a time
        ("orchestrator.max_staleness=1",),
    ),
    Case(
        "roll_out_further_ahead",
        ASYNC,
        change(times=times({SAMPLING: 8.9}, waiting=3.0), tokens=tokens(rollouts=512.0)),
        change(times=times({SAMPLING: 9.1}, waiting=3.0), tokens=tokens(rollouts=512.0)),
        ("orchestrator.max_staleness=2",),
    ),
    Case(
        "roll_out_further_ahead",
        ASYNC,
        change(times=times({SAMPLING: 5.0}, waiting=1.1)),
        change(times=times({SAMPLING: 5.0}, waiting=0.9)),  # training bounds the step
        ("orchestrator.max_staleness=2",),
    ),
    Case(
        "roll_out_further_ahead",
        (*ASYNC, "inference.replicas=2"),
        change(times=times({SAMPLING: 10.0}, waiting=3.0), tokens=tokens(rollouts=1000.0)),
        change(times=times({SAMPLING: 10.0}, waiting=3.0), tokens=tokens(rollouts=1024.0)),  # 512 for each of both
        ("orchestrator.max_staleness=2",),
    ),
    Case(
        "roll_out_further_ahead",
        (*ASYNC, "+inference.extra_args={max_num_seqs:300}"),
        change(times=times({SAMPLING: 10.0}, waiting=3.0)),
        change(times=times({SAMPLING: 10.0}, waiting=3.0), tokens=tokens(rollouts=300.0)),  # it takes no more
        ("orchestrator.max_staleness=2",),
    ),
    Case(
        "sample_in_the_trainer",
        ASYNC,
        change(times=times({SAMPLING: 10.0}, waiting=1.1)),
        change(times=times({SAMPLING: 10.0}, waiting=0.9)),
        (),
    ),
    Case(
        "sample_in_the_trainer",
        VLLM,
        # with 3 GiB of keys and values
        change(memory=memory(peak=69 * GIB)),
        change(memory=memory(peak=70 * GIB)),
        (),
    ),
    Case(
        "sample_in_the_trainer",
        (*VLLM, "orchestrator.group_size=4"),
        change(),
        change(memory=memory(is_gpu=False)),
        (),
    ),
    Case(
        "use_spare_gpus",
        (*ASYNC, "inference.tensor_parallel_size=2"),
        change(spare_gpus=5),
        change(spare_gpus=1),
        ("inference.replicas=3",),
    ),
    Case(
        "train_on_spare_gpus",
        ASYNC,
        change(spare_gpus=2, times=times({SAMPLING: 5.0}, waiting=0.1)),
        change(spare_gpus=2, times=times({SAMPLING: 9.9}, waiting=5.0)),  # rollouts bound the step
        (),
    ),
    Case(
        "train_on_spare_gpus",
        GPU,
        change(spare_gpus=2),
        change(spare_gpus=0),
        (),
    ),
    Case(
        "use_decode_graphs",
        (*ASYNC, "inference.enforce_eager=true"),
        change(times=times({SAMPLING: 1.1})),
        change(times=times({SAMPLING: 0.9})),
        ("inference.enforce_eager=false",),
    ),
    Case(
        "larger_micro_batches",
        GPU,
        # 20 + 10 GiB of activations become 20 + 40; with 80 they would fill 100 of 80
        change(memory=memory(peak=30 * GIB)),
        change(memory=memory(peak=63 * GIB)),
        ("trainer.micro_batch_tokens=65536",),
    ),
    Case(
        "adamw_on_the_gpu",
        (*GPU, "trainer.cpu_offload=true"),
        change(memory=memory(peak=20 * GIB)),  # 2e9 × 16 bytes are 29.8 GiB
        change(memory=memory(peak=43 * GIB)),
        ("trainer.cpu_offload=false",),
    ),
    Case(
        "keep_activations",
        (*GPU, "trainer.activation_checkpointing=true"),
        change(memory=memory(peak=40 * GIB, kept_activations=41 * GIB)),
        change(memory=memory(peak=42 * GIB, kept_activations=41 * GIB)),
        ("trainer.activation_checkpointing=false",),
    ),
    Case(
        "compile_layers",
        ("model=qwen3vl", "trainer.compile=false"),
        change(times=times(training=3.1)),
        change(times=times(training=2.9)),
        ("trainer.compile=true",),
    ),
    Case(
        "share_prefixes",
        (*GPU, "trainer.packing=varlen"),
        change(tokens=tokens(rows=200_000.0)),
        change(tokens=tokens(rows=150_000.0)),
        ("trainer.packing=tree",),
    ),
    Case(
        "gather_once_a_step",
        (*GPU, "inference=vllm"),
        # on each of two ranks: 2e9 × (2 + 4) bytes more, 11.2 GiB
        change(ranks=2, memory=memory(peak=60 * GIB)),
        change(ranks=2, memory=memory(peak=61 * GIB)),
        ("trainer.sharding=optimizer",),
    ),
    Case(
        "task_in_processes",
        (),
        change(times=times({TASK: 1.1})),
        change(times=times({TASK: 0.9})),
        ("task.workers=process",),
    ),
    Case(
        "task_in_processes",
        ("task.workers=process", "task.num_workers=3"),
        change(times=times({TASK: 1.1}), env_queue=0.2),
        change(times=times({TASK: 1.1}), env_queue=0.05),
        ("task.num_workers=6",),
    ),
    Case(
        "more_programs",
        (*PROGRAM, "task.processes=4"),
        change(times=times({PROGRAMS: 1.1}), env_queue=0.2),
        change(times=times({PROGRAMS: 0.9}), env_queue=0.2),
        ("task.processes=8",),
    ),
    Case(
        "more_programs",
        PROGRAM,
        change(times=times({PROGRAMS: 1.1}), env_queue=0.05),
        change(times=times({PROGRAMS: 0.9}), env_queue=0.05),
        ("task.reuse=true",),
    ),
    Case(
        "faster_weight_sync",
        (*VLLM, "weight_sync=folder"),
        change(times=times(syncing=1.1)),
        change(times=times(syncing=0.9)),
        ("weight_sync=nccl",),
    ),
    Case(
        "faster_weight_sync",
        (*VLLM, "weight_sync=folder"),
        change(times=times(syncing=1.1), memory=memory(server_share=0.5)),
        change(times=times(syncing=1.1), memory=memory(is_gpu=False)),
        ("weight_sync=cuda_ipc",),
    ),
    Case(
        "faster_weight_sync",
        (*VLLM, "weight_sync=folder", "weight_sync.verify=true"),
        change(times=times(syncing=1.1)),
        change(times=times(syncing=0.9)),
        ("weight_sync.verify=false",),
    ),
    Case(
        "slow_recording",
        (),
        change(times=times(recording=1.1)),
        change(times=times(recording=0.9)),
        ("monitor.record_rollouts=false",),
    ),
    Case("slow_drawing", (), change(times=times({DRAWING: 1.1})), change(times=times({DRAWING: 0.9})), ()),
    Case("slow_rendering", (), change(times=times({RENDERING: 1.1})), change(times=times({RENDERING: 0.9})), ()),
    Case("slow_rewards", (), change(times=times({SCORING: 1.1})), change(times=times({SCORING: 0.9})), ()),
)

BY_NAME = {rule.__name__: rule for rule in RULES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule} {' '.join(case.settings)}")
def test_a_rule(
    case: Case,
) -> None:
    found, rule = measured(config_of(*case.overrides)), BY_NAME[case.rule]
    advice = rule(case.fires(found))
    assert advice is not None
    assert advice.settings == case.settings
    assert rule(case.still(found)) is None
    if case.settings:
        check(config_of(*case.overrides, *case.settings), Stage.composed)


@pytest.mark.parametrize(
    ("server_share", "replicas", "command"),
    [(0.3, 1, "; inference=embedded"), (0.0, 1, "; torchrun --nproc-per-node=2 -m vlmrl"), (0.0, 3, "node=4 -m vlmrl")],
)
def test_the_trainer_samples_on_all_gpus_of_the_run(server_share: float, replicas: int, command: str) -> None:
    config = config_of(*VLLM, f"inference.replicas={replicas}")
    advice = BY_NAME["sample_in_the_trainer"](measured(config, memory=memory(server_share=server_share)))
    assert advice is not None
    assert command in advice.finding


@pytest.mark.parametrize("most", ["'512'", "null", "[]"])
def test_a_number_of_requests_that_only_vllm_understands(most: str) -> None:
    """`extra_args` is free, so the advice goes on without it."""
    config = config_of(*ASYNC, f"+inference.extra_args={{max_num_seqs:{most}}}")
    found = measured(config, times=times({SAMPLING: 10.0}, waiting=3.0))
    assert BY_NAME["roll_out_further_ahead"](found) is not None


def test_few_siblings_stay_with_a_server() -> None:
    found = measured(config_of(*VLLM, "orchestrator.group_size=2"))
    assert BY_NAME["sample_in_the_trainer"](found) is None


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(BY_NAME)


def test_nothing_stands_out_in_an_on_policy_run_of_the_embedded_engine() -> None:
    assert advice_for(measured(config_of(*GPU), memory=memory(peak=70 * GIB))) == []


def test_the_largest_part_comes_first() -> None:
    found = measured(config_of(), times=times({TASK: 2.0, RENDERING: 3.0}), memory=memory(is_gpu=False))
    assert [advice.seconds for advice in advice_for(found)] == [3.0, 2.0]
    assert "30% of a step" in advice_for(found)[0].finding


def test_one_core_gains_nothing_from_processes() -> None:
    found = measured(config_of(), times=times({TASK: 2.0}), memory=memory(is_gpu=False), cores=1)
    assert advice_for(found) == []
