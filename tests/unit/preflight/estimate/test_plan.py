"""`dry_run=true` as a user meets it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.helpers import Sampled, sample
from vlmrl.config.conf_folder import PACKAGE
from vlmrl.config.run import RunConfig
from vlmrl.preflight.estimate import plan
from vlmrl.preflight.estimate.episode import EpisodeEstimate
from vlmrl.preflight.estimate.plan import largest_micro_batch, longest_episode, notes, step_tokens
from vlmrl.preflight.estimate.sizes import find_sizes
from vlmrl.preflight.machine import Gpu, Machine
from vlmrl.trainer.shares import Members, divide

HEAVY = ("torch", "transformers", "renderers", "vllm", "wandb")


def vlmrl(*arguments: str, folder: Path) -> tuple[int, str, str, list[str]]:
    """`python -m vlmrl …` → exit code, output, errors, the heavy packages that it imported."""
    code = (
        "import json, sys; from vlmrl.cli.main import main; code = main(sys.argv[1:]); sys.stdout.flush();"
        f"print('\\n' + json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    out, _, last = ended.stdout.rstrip().rpartition("\n")
    exit_code, heavy = json.loads(last)
    return exit_code, out, ended.stderr, heavy


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (
            ["dry_run=true"],
            0,
            [
                "model               qwen3vl_tiny: 428,480 parameters",
                "rollouts per step   9 groups × 32 = 288",
                "optimizer steps     100 supervised × 64 conversations, then 400 × 288 rollouts",
                "policy              on-policy, so 1 batch of 288 rollouts in flight or waiting",
                "starts              trainer and orchestrator on ",
            ],
        ),
        (
            ["dry_run=true", "experiment=color_codeword_async"],
            0,
            [
                "rollouts per step   2 groups × 8 = 16",
                "optimizer steps     20 × 16 rollouts",
                "up to 2 steps stale, so 3 batches of 16 rollouts",
                "vLLM server 0 on ",
                "weights go          by weight_sync=nccl",
            ],
        ),
        (["dry_run=true", "-m", "seed=0,1"], 0, ["job dry_run=True seed=0", "job dry_run=True seed=1"]),
        (["dry_run=true", "task=no_such_module:Task"], 2, []),
        (["dry_run=true", "orchestrator.group_size=1"], 2, []),
    ],
)
def test_dry_run(arguments: list[str], code: int, lines: list[str], tmp_path: Path) -> None:
    exit_code, out, err, heavy = vlmrl(*arguments, folder=tmp_path)
    assert (exit_code, heavy) == (code, [])
    for line in lines:
        assert line in out
    assert err.startswith("error: ") if code else not err
    assert not (tmp_path / "outputs").exists(), "nothing is made"


URLS = '{"image": "https://host.example/a.png", "question": "q", "answer": "a"}\n'
OF_SET = "orchestrator.eval.sets.ood.task"
SET = (f"+eval_set@{OF_SET.removesuffix('.task')}=default", f"+task@{OF_SET}=dataset")
MIXTURE = (
    "task=mixture",
    "+task@task.tasks.a=color_codeword",
    "+task@task.tasks.b=dataset",
    "algorithm.credit=episode",
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*SET, f"{OF_SET}.path=absent.jsonl"), rf"{OF_SET}\.path=absent\.jsonl does not exist"),
        ((*SET, f"{OF_SET}.path=urls.jsonl"), rf"{OF_SET}\.path=urls\.jsonl: none .* set {OF_SET}\.fetch=true"),
        ((*MIXTURE, "task.tasks.b.path=absent.jsonl"), r"task\.tasks\.b\.path=absent\.jsonl does not exist"),
        (
            (*MIXTURE, "task.tasks.b.path=urls.jsonl"),
            r"task\.tasks\.b\.path=urls\.jsonl: .* task\.tasks\.b\.fetch=true",
        ),
        (("task=dataset", "task.path=urls.jsonl"), r"task\.path=urls\.jsonl: none .* set task\.fetch=true"),
    ],
)
@pytest.mark.parametrize("how", ["dry_run=true", "mode=check"])
def test_every_task_is_checked_under_its_own_key(
    how: str, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "urls.jsonl").write_text(URLS * 40)
    reward = "+reward@task.tasks.b.reward.terms.exact=exact" if "task=mixture" in arguments else "reward=exact"
    of_set = f"+reward@{OF_SET}.reward.terms.exact=exact" if SET[0] in arguments else reward
    exit_code, out, err, _ = vlmrl(*arguments, of_set, how, folder=tmp_path)
    if how == "dry_run=true" or "absent" in said:
        assert exit_code == 2
        assert re.search(said, err), err
    else:
        assert exit_code == 1
        assert "FAIL  has_problems" in out


ON_GPU = ("trainer.cpu_offload=false", "trainer.optimizer=adamw_8bit")
"""Takes nothing of this host's memory."""


@pytest.mark.parametrize(
    ("gpus", "code", "said"),
    [
        (1, 2, "inference.tensor_parallel_size=1 with weight_sync=nccl need 2 GPUs"),
        (2, 0, "starts              vLLM server 0 on GPU 1"),
    ],
)
def test_the_gpus_that_are_there(gpus: int, code: int, said: str, tmp_path: Path) -> None:
    """As nvidia-smi lists them; here it is a script."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{i}, GPU-{i}, NVIDIA H100, 81559'\n" for i in range(gpus)))
    program.chmod(0o755)
    exit_code, out, err, heavy = vlmrl("dry_run=true", "experiment=color_codeword_4b", *ON_GPU, folder=tmp_path)
    assert (exit_code, heavy) == (code, [])
    assert said in out + err


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (("trainer.seq_len=96",), "an episode may grow to about 141 tokens and trainer.seq_len=96 cuts it"),
        (("trainer.micro_batch_tokens=100",), "trainer.micro_batch_tokens=100 is less than an episode"),
        (("model=qwen3vl", "inference=vllm", "inference.dtype=float32"), "round differently"),
        (("task.num_examples=4",), "task.num_examples=4 is less than orchestrator.groups_per_step=9"),
        ((), None),
        (("model=qwen3vl", "inference=vllm", "inference.dtype=float16"), None),
    ],
)
def test_notes(overrides: tuple[str, ...], fragment: str | None, run_config: Callable[..., RunConfig]) -> None:
    config = run_config(*overrides)
    found = list(notes(config, find_sizes(config.model), EPISODE))
    assert found == [] if fragment is None else fragment in found[0]


EPISODE = EpisodeEstimate(turns=2, images=((32, 32),) * 4, characters=178)
"""That of the default task."""


def test_the_parts_in_which_one_gpu_samples(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 rollouts of a 2B take more than 80 GiB beside its weights and optimizer, and 16 take less."""
    monkeypatch.setattr(plan, "find_machine", lambda: Machine((Gpu("0", "H100", 80 << 30),), 16, 128 << 30))

    def said(groups: int, size: int) -> str:
        return plan.dry_run(
            run_config(
                "model=qwen3vl",
                "model/size=2b",
                "model.init=random",
                "inference=embedded",
                f"orchestrator.groups_per_step={groups}",
                f"orchestrator.group_size={size}",
                "orchestrator.max_new_tokens=512",
            )
        )

    assert re.search(r"GPU 0 has room for less, so a step's rollouts are sampled in \d+ parts", said(64, 64))
    assert "has room for less" not in said(2, 8)


def test_a_tree_holds_a_prompt_once(run_config: Callable[..., RunConfig]) -> None:
    tree, apart = run_config(), run_config("trainer.packing=varlen")
    sizes = find_sizes(tree.model)
    shared = (141 - 20) // 2
    assert step_tokens(apart, sizes, EPISODE) == (288 * 141, 288 * 20)
    assert step_tokens(tree, sizes, EPISODE) == (9 * shared + 288 * (141 - shared), 288 * 20)


@pytest.mark.parametrize("packing", ["tree", "varlen", "none"])
@pytest.mark.parametrize("budget", [150, 1000, 4000, 10**6])
def test_the_largest_micro_batch_is_the_trainers(
    packing: str, budget: int, run_config: Callable[..., RunConfig]
) -> None:
    """Episodes of 141 tokens, of which siblings share 60."""
    config = run_config(f"trainer.packing={packing}", f"trainer.micro_batch_tokens={budget}")
    numbers = itertools.product(range(config.orchestrator.groups_per_step), range(config.orchestrator.group_size))
    samples = [sample("", [1 + group] * 60, Sampled([100 + sibling] * 81)) for group, sibling in numbers]
    share = divide(samples, config.trainer.packing, budget)[0]

    def rows(run: Members) -> int:
        held = [share.samples[members[0]].token_ids for members in run]
        prompts = {int(tokens[0]) for tokens in held} if packing == "tree" else held
        return 60 * len(prompts) + 81 * len(held)

    assert longest_episode(config, find_sizes(config.model), EPISODE) == 141
    assert largest_micro_batch(config, find_sizes(config.model), EPISODE) == max(map(rows, share.passes))


def test_a_huge_step_is_not_cut(run_config: Callable[..., RunConfig]) -> None:
    """Cutting it would take minutes and gigabytes, so its micro-batches count as full."""
    config = run_config("orchestrator.groups_per_step=10000000", "trainer.micro_batch_tokens=5000")
    assert largest_micro_batch(config, find_sizes(config.model), EPISODE) == 5000
    fits = run_config("orchestrator.groups_per_step=200", "trainer.micro_batch_tokens=10000000")
    rows, _ = step_tokens(fits, find_sizes(fits.model), EPISODE)
    assert largest_micro_batch(fits, find_sizes(fits.model), EPISODE) == rows
