"""Every command and every piece of Python in README.md, CONTRIBUTING.md and docs/ is run.

A command runs as it is written where this machine can run it in seconds. `EXCHANGED` is the list of the others: what
is exchanged is a model that would be downloaded, a cluster, or the length of a run. A command in neither list fails.
Commands run with `pytest -m documentation`, which .ci/run calls.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from importlib.util import find_spec

import pytest

from support.command_line import REPOSITORY, Home
from support.families import build
from support.layout_fixtures import LAYOUTS
from vlmrl.config.keys import known_keys
from vlmrl.record.step_keys import STEP_KEYS, step_key
from vlmrl.types import StopReason

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TEMPLATE = REPOSITORY / "vlmrl/cli/template/my_task.py"

LESS = (
    "trainer.warmup.steps=1 trainer.warmup.batch_size=2 trainer.max_steps=1 orchestrator.groups_per_step=2 "
    "orchestrator.group_size=2 orchestrator.max_new_tokens=8 orchestrator.eval.problems=2 orchestrator.eval.every=1 "
    "monitor.wandb.mode=disabled monitor.report=false"
)
"""In place of the length of a run."""

TINY = "model=qwen3vl_tiny trainer=default"
"""In place of a model that would be downloaded or needs a GPU."""

RUN_BY_CI = (
    "pip install scikit-learn",
    "pip install -e . && python -m vlmrl",
    "pip install -e '.[test]' && pytest",
    "pip install -e '.[test,dev]' && pytest",
    "ruff check . && ruff format --check .",
    "mypy",
    "lint-imports",
    "pytest tests/unit/trainer",
)
"""Run by .ci/run itself, in a fresh environment."""

AS_WRITTEN = (
    "python -m vlmrl mode=report run=outputs/latest",
    "python -m vlmrl mode=faults run=outputs/latest",
    "python -m vlmrl explain trainer",
    "python -m vlmrl explain algorithm.clip_high algorithm=dapo",
    "python -m vlmrl explain algorithm",
    "python -m vlmrl explain algorithm algorithm=cispo algorithm.importance_correction=masked "
    "algorithm.entropy_coef=0.01",
    "python -m vlmrl --cfg job",
    "python -m vlmrl dry_run=true experiment=color_codeword_4b",
    "python -m vlmrl dry_run=true model=qwen3vl model/size=8b inference=vllm",
    "python -m vlmrl resume=outputs/latest",
    "python -m vlmrl mode=replay run=outputs/latest step=1",
    "python -m vlmrl mode=replay run=outputs/latest step=1 trainer.packing=varlen",
    "python -m vlmrl mode=compare runs=[outputs/multirun/mine]",
    "python -m vlmrl mode=compare 'runs=[outputs/a,outputs/b]'",
    "python -m vlmrl mode=eval resume=outputs/latest",
    "python -m vlmrl mode=report 'runs=[outputs/a,outputs/b]'",
    "python -m vlmrl mode=compare 'runs=[outputs/a,outputs/b]'",
    "python -m vlmrl mode=check task=gymnasium task.env_id=CartPole-v1",
    "python -m vlmrl mode=check task=gymnasium task.env_id=my_games:ThreePushes-v0 task.actions=[left,none,right]",
    "python -m vlmrl mode=check task=gymnasium task.env_id=my_games:ThreePushes-v0 task.shaping=my_games:upright",
    "python -m vlmrl mode=play task=my_task:MyTask",
    "python -m vlmrl mode=play task=my_task:MyTask play.policy=random play.episodes=20",
    "python -m vlmrl mode=play task=gymnasium task.env_id=CartPole-v1 task.actions=[left,right]",
    "python -m vlmrl mode=play experiment=frozenlake_tiny task.shaping=my_games:distance 'play.policy=${task.expert}'",
    "python -m vlmrl mode=play task=dataset task.path=rows.jsonl reward=exact tool=[zoom] task.max_turns=4",
    "python -m vlmrl init my_task",
    "python -m vlmrl init my_task && cd my_task",
    "python -m vlmrl.tasks.check my_task:MyTask args.level=3",
    "python -m vlmrl mode=check task=my_task:MyTask task.args.level=3",
    "python -m vlmrl mode=check task=my_remote:Pages",
    "python -m pytest",
)

DIGITS = "task.path=rows.jsonl task.eval_path=null"
"""In place of the digits, which a command before it writes."""

SERVE = "python -m vlmrl mode=serve"
ZOOMING = "task=dataset task.path=rows.jsonl reward=exact tool=[zoom] task.max_turns=4"

PREVIEW = "python -m vlmrl mode=preview task=dataset task.path=rows.jsonl reward=exact"
FEWER = "preview.problems=20 preview.answers=1"

MODULES = (
    *(("my_losses", "your_loss.md"), ("my_rewards", "rewards.md"), ("my_renderers", "renderers.md")),
    *(("my_games", "environments.md"), ("my_remote", "your_task.md"), ("my_agent", "programs.md")),
    ("my_tools", "tools.md"),
)
"""A module of the user's own → the page that shows its code."""

TRIED = "model.name=smolvlm trainer=scratch monitor.wandb.mode=disabled"
"""In place of a checkpoint of one's own."""

OF_ROWS = "trainer.warmup.batch_size=4 orchestrator.eval.problems=2 monitor.wandb.mode=disabled"
OF_PAIRS = "trainer.max_steps=1 orchestrator.eval.problems=2 monitor.wandb.mode=disabled"

EXCHANGED = {
    # a checkpoint of one's own, and the rows of all families (test_benchmarks.py rehearses them)
    "python -m vlmrl model=auto model.name=path/to/checkpoint task=color_codeword": (
        f"python -m vlmrl model=auto {TRIED} task=color_codeword {LESS}"
    ),
    "python -m vlmrl mode=doctor model=auto model.name=path/to/checkpoint task=color_codeword": (
        f"python -m vlmrl mode=doctor model=auto {TRIED} task=color_codeword"
    ),
    "python -m vlmrl mode=doctor model=auto model.name=path/to/text_model task=dataset task.path=rows.jsonl "
    "reward=exact": (
        "python -m vlmrl mode=doctor model=auto "
        f"{TRIED.replace('smolvlm', 'qwen3')} task=dataset task.path=rows.jsonl reward=exact"
    ),
    "python -m vlmrl model=auto model/vlm=smolvlm model.name=path/to/checkpoint task=color_codeword": (
        f"python -m vlmrl model=auto model/vlm=smolvlm {TRIED} task=color_codeword dry_run=true"
    ),
    "python benchmarks/families.py": f"python {REPOSITORY}/benchmarks/families.py --help",
    "python benchmarks/families.py --families smolvlm": f"python {REPOSITORY}/benchmarks/families.py --help",
    # shorter
    "python -m vlmrl orchestrator.renderer.name=my_renderers:Quoting": (
        f"python -m vlmrl orchestrator.renderer.name=my_renderers:Quoting {LESS}"
    ),
    "python -m vlmrl orchestrator/renderer=template": f"python -m vlmrl orchestrator/renderer=template {LESS}",
    "python -m vlmrl +eval_set@orchestrator.eval.sets.hard=default orchestrator.eval.sets.hard.samples=8": (
        "python -m vlmrl +eval_set@orchestrator.eval.sets.hard=default orchestrator.eval.sets.hard.samples=8 "
        f"orchestrator.eval.sets.hard.problems=4 {LESS}"
    ),
    "python -m vlmrl +eval_set@orchestrator.eval.sets.ood=default +task@orchestrator.eval.sets.ood.task=dataset "
    "orchestrator.eval.sets.ood.task.path=rows.jsonl "
    "+reward@orchestrator.eval.sets.ood.task.reward.terms.exact=exact": (
        "python -m vlmrl +eval_set@orchestrator.eval.sets.ood=default +task@orchestrator.eval.sets.ood.task=dataset "
        "orchestrator.eval.sets.ood.task.path=rows.jsonl "
        "+reward@orchestrator.eval.sets.ood.task.reward.terms.exact=exact "
        f"dry_run=true {LESS}"
    ),
    "python -m vlmrl trainer.keep_best=eval/reward trainer.patience=5": (
        f"python -m vlmrl trainer.keep_best=eval/reward trainer.patience=5 {LESS}"
    ),
    "python -m vlmrl mode=eval resume=outputs/latest/checkpoints/best": (
        "python -m vlmrl mode=eval resume=outputs/latest/checkpoints/step_000006 orchestrator.eval.problems=4"
    ),
    "python -m vlmrl mode=eval model=qwen3vl model.name=path/to/hf_folder": (
        f"python -m vlmrl mode=eval dry_run=true {TINY}"
    ),
    # what does not end by itself (test_mode_serve.py serves a model)
    f"{SERVE} model=auto model.name=Qwen/Qwen3-VL-2B-Instruct inference=vllm": f"{SERVE} {TINY} dry_run=true",
    f"{SERVE} resume=outputs/latest": f"{SERVE} resume=outputs/latest dry_run=true",
    PREVIEW: f"{PREVIEW} {FEWER}",
    f"{PREVIEW} row=2": f"{PREVIEW} row=2 {FEWER}",
    f"{PREVIEW} full=true": f"{PREVIEW} full=true {FEWER}",
    "python docs/write_digits.py digits": f"python {REPOSITORY}/docs/write_digits.py digits",
    "python -m vlmrl mode=preview experiment=digits_tiny": (
        f"python -m vlmrl mode=preview experiment=digits_tiny {DIGITS} {FEWER}"
    ),
    "python -m vlmrl experiment=digits_tiny": f"python -m vlmrl experiment=digits_tiny {DIGITS} {LESS}",
    "python -m vlmrl experiment=digits_tiny task.shuffle_images=true": (
        f"python -m vlmrl experiment=digits_tiny {DIGITS} task.shuffle_images=true {LESS}"
    ),
    f"python -m vlmrl {ZOOMING}": f"python -m vlmrl {ZOOMING} {LESS}",
    f"python -m vlmrl mode=preview {ZOOMING}": f"python -m vlmrl mode=preview {ZOOMING} {FEWER}",
    f"python -m vlmrl mode=doctor {ZOOMING}": f"python -m vlmrl mode=doctor {ZOOMING} monitor.wandb.mode=disabled",
    f"python -m vlmrl {ZOOMING.replace('zoom', 'zoom,my_tools:brightness')}": (
        f"python -m vlmrl {ZOOMING.replace('zoom', 'zoom,my_tools:brightness')} {LESS}"
    ),
    "python -m vlmrl experiment=clip_tiny": f"python -m vlmrl experiment=clip_tiny {LESS}",
    "python -m vlmrl experiment=clip_tiny task.frames=shuffled": (
        f"python -m vlmrl experiment=clip_tiny task.frames=shuffled {LESS}"
    ),
    "python -m vlmrl experiment=clip_tiny task.frames=first": (
        f"python -m vlmrl experiment=clip_tiny task.frames=first {LESS}"
    ),
    "python -m vlmrl experiment=small_print_tiny": f"python -m vlmrl experiment=small_print_tiny {LESS}",
    "python -m vlmrl experiment=small_print_tiny tool=[] task.max_turns=1 task.demonstrated_zooms=0": (
        f"python -m vlmrl experiment=small_print_tiny tool=[] task.max_turns=1 task.demonstrated_zooms=0 {LESS}"
    ),
    "python -m vlmrl task=dataset task.path=rows.jsonl reward=exact": (
        f"python -m vlmrl task=dataset task.path=rows.jsonl reward=exact {LESS}"
    ),
    "python -m vlmrl task=gymnasium task.env_id=FrozenLake-v1 +task.env_kwargs.is_slippery=false "
    "task.actions=[left,down,right,up]": (
        "python -m vlmrl task=gymnasium task.env_id=FrozenLake-v1 +task.env_kwargs.is_slippery=false "
        f"task.actions=[left,down,right,up] trainer.seq_len=2048 {LESS}"
    ),
    "python -m vlmrl task=gymnasium task.env_id=CliffWalking-v1 "
    "task.prompt='{{ frame }} Walk to the cookie. One of: {{ actions }}'": (
        "python -m vlmrl task=gymnasium task.env_id=CliffWalking-v1 "
        f"task.prompt='{{{{ frame }}}} Walk to the cookie. One of: {{{{ actions }}}}' task.frame_size=64 {LESS}"
    ),
    "python -m vlmrl experiment=minigrid_tiny": f"python -m vlmrl experiment=minigrid_tiny {LESS}",
    "python -m vlmrl experiment=minigrid_tiny task.noise=true": (
        f"python -m vlmrl experiment=minigrid_tiny task.noise=true {LESS}"
    ),
    "python -m vlmrl experiment=minigrid_tiny task.env_id=minigrid:MiniGrid-Empty-Random-6x6-v0 task.frame_size=96 "
    "task.max_turns=12": (
        "python -m vlmrl experiment=minigrid_tiny task.env_id=minigrid:MiniGrid-Empty-Random-6x6-v0 task.frame_size=96 "
        f"task.max_turns=12 {LESS}"
    ),
    "python -m vlmrl experiment=minigrid_tiny trainer.warmup.demonstrations=correct "
    "trainer.warmup.learning_rate=1.5e-3": (
        "python -m vlmrl experiment=minigrid_tiny trainer.warmup.demonstrations=correct "
        f"trainer.warmup.learning_rate=1.5e-3 {LESS}"
    ),
    "python -m vlmrl experiment=frozenlake_tiny": f"python -m vlmrl experiment=frozenlake_tiny {LESS}",
    "python -m vlmrl algorithm=rloo seed=1": f"python -m vlmrl algorithm=rloo seed=1 {LESS}",
    "python -m vlmrl experiment=color_codeword_tiny task.max_turns=3 trainer.max_steps=600": (
        f"python -m vlmrl experiment=color_codeword_tiny task.max_turns=3 {LESS}"
    ),
    "python -m vlmrl experiment=color_codeword_tiny task.shuffle_images=true trainer.max_steps=100": (
        f"python -m vlmrl experiment=color_codeword_tiny task.shuffle_images=true {LESS}"
    ),
    "python -m vlmrl algorithm=my_losses:my_loss algorithm.args.scale=0.5": (
        f"python -m vlmrl algorithm=my_losses:my_loss algorithm.args.scale=0.5 {LESS}"
    ),
    "python -m vlmrl algorithm.advantage=my_losses:brief algorithm.args.fee=0.1": (
        f"python -m vlmrl algorithm.advantage=my_losses:brief algorithm.args.fee=0.1 {LESS}"
    ),
    "python -m vlmrl algorithm=ppo": "python -m vlmrl algorithm=ppo dry_run=true",
    "python -m vlmrl algorithm=ppo algorithm.credit=return algorithm.discount=0.9 algorithm.gae.level=turn": (
        "python -m vlmrl algorithm=ppo algorithm.credit=return algorithm.discount=0.9 algorithm.gae.level=turn "
        "dry_run=true"
    ),
    "python -m vlmrl algorithm.epochs=2 algorithm.minibatches=4 algorithm.target_kl=0.1": (
        "python -m vlmrl algorithm.epochs=2 algorithm.minibatches=4 algorithm.target_kl=0.1 dry_run=true"
    ),
    "python -m vlmrl reference=initial algorithm.kl.loss=0.04": (
        f"python -m vlmrl reference=initial algorithm.kl.loss=0.04 {LESS}"
    ),
    "python -m vlmrl reference=ema reference.decay=0.99 algorithm.kl.reward=0.01": (
        f"python -m vlmrl reference=ema reference.decay=0.99 algorithm.kl.reward=0.01 {LESS}"
    ),
    "python -m vlmrl hydra.run.dir=outputs/teacher": f"python -m vlmrl hydra.run.dir=outputs/teacher {LESS}",
    "python -m vlmrl mode=export resume=outputs/teacher export.folder=outputs/teacher_model": (
        "python -m vlmrl mode=export resume=outputs/a export.folder=outputs/teacher_model"
    ),
    # the command before it, by the order of the alphabet, comes later
    "python -m vlmrl experiment=distill_tiny reference.folder=outputs/teacher_model": (
        "python -m vlmrl experiment=distill_tiny reference.folder=outputs/teacher_model dry_run=true"
    ),
    "python -m vlmrl algorithm.vision_advantage.weight=1": (
        f"python -m vlmrl algorithm.vision_advantage.weight=1 {LESS}"
    ),
    "python -m vlmrl monitor.blind_guard=stop": "python -m vlmrl monitor.blind_guard=stop dry_run=true",
    "python -m vlmrl algorithm.overlong.tokens=4": f"python -m vlmrl algorithm.overlong.tokens=4 {LESS}",
    "python -m vlmrl experiment=distill_tiny reference.folder=outputs/teacher_model algorithm.kl.advantage=0 "
    "algorithm.distill.top_k=32 algorithm.distill.weight=1": (
        "python -m vlmrl experiment=distill_tiny reference.folder=outputs/teacher_model algorithm.kl.advantage=0 "
        "algorithm.distill.top_k=32 algorithm.distill.weight=1 dry_run=true"
    ),
    "python -m vlmrl trainer.decay=wsd trainer.decay_share=0.25": (
        "python -m vlmrl trainer.decay=wsd trainer.decay_share=0.25 dry_run=true"
    ),
    "python -m vlmrl trainer.part_rates.vision_tower=0.1 trainer.part_rates.projector=0.5": (
        f"python -m vlmrl trainer.part_rates.vision_tower=0.1 trainer.part_rates.projector=0.5 {LESS}"
    ),
    # packages that this step of CI does not have (tests/e2e/test_adapters.py)
    "python -m vlmrl model/lora=all_linear model.lora.parts=[vision_tower,projector,language_model]": (
        "python -m vlmrl model/lora=all_linear model.lora.parts=[vision_tower,projector,language_model] dry_run=true"
    ),
    "python -m vlmrl trainer.ema=0.99": "python -m vlmrl trainer.ema=0.99 dry_run=true",
    "python -m vlmrl mode=export resume=outputs/latest export.weights=average": (
        "python -m vlmrl mode=export resume=outputs/latest"
    ),
    "python -m vlmrl model/lora=nf4": "python -m vlmrl model/lora=nf4 dry_run=true",
    "python -m vlmrl mode=sft task=dataset task.path=rows.jsonl model=qwen3vl "
    "trainer.warmup.demonstrations=correct trainer.warmup.steps=1000 trainer.warmup.learning_rate=1e-5": (
        f"python -m vlmrl mode=sft task=dataset task.path=rows.jsonl {TINY} trainer.warmup.demonstrations=correct "
        f"trainer.warmup.steps=1 {OF_ROWS}"
    ),
    "python -m vlmrl mode=sft task=dataset task.path=rows.jsonl trainer.warmup.demonstrations=correct "
    "trainer.max_epochs=20 trainer.keep_best=eval/demonstration_loss trainer.patience=3": (
        "python -m vlmrl mode=sft task=dataset task.path=rows.jsonl trainer.warmup.demonstrations=correct "
        f"trainer.max_epochs=20 trainer.keep_best=eval/demonstration_loss trainer.patience=3 {OF_ROWS} dry_run=true"
    ),
    "python -m vlmrl mode=dpo task=dataset task.path=pairs.jsonl model=qwen3vl": (
        f"python -m vlmrl mode=dpo task=dataset task.path=pairs.jsonl {TINY} {OF_PAIRS}"
    ),
    "python -m vlmrl mode=dpo task=dataset task.path=pairs.jsonl trainer.keep_best=eval/dpo/accuracy "
    "trainer.patience=3": (
        "python -m vlmrl mode=dpo task=dataset task.path=pairs.jsonl trainer.keep_best=eval/dpo/accuracy "
        f"trainer.patience=3 {OF_PAIRS} dry_run=true"
    ),
    "python -m vlmrl hydra.run.dir=outputs/sampled": "python -m vlmrl hydra.run.dir=outputs/sampled dry_run=true",
    "python -m vlmrl mode=export resume=outputs/sampled export.folder=outputs/sampled_model": (
        "python -m vlmrl mode=export resume=outputs/a export.folder=outputs/sampled_model"
    ),
    # test_dpo.py learns from the rollouts of a run
    "python -m vlmrl mode=dpo dpo.from_run=outputs/sampled model=qwen3vl model.name=outputs/sampled_model "
    "task=color_codeword": (f"python -m vlmrl mode=dpo dpo.from_run=outputs/a {TINY} task=color_codeword dry_run=true"),
    "python -m vlmrl algorithm.entropy_coef=0.01": f"python -m vlmrl algorithm.entropy_coef=0.01 {LESS}",
    "python -m vlmrl algorithm.credit=return algorithm.discount=0.9": (
        f"python -m vlmrl algorithm.credit=return algorithm.discount=0.9 {LESS}"
    ),
    "python -m vlmrl algorithm.credit=return algorithm.discount=0.9 algorithm.compare=state "
    "algorithm.advantage=leave_one_out": (
        "python -m vlmrl algorithm.credit=return algorithm.discount=0.9 algorithm.compare=state "
        f"algorithm.advantage=leave_one_out {LESS}"
    ),
    "python -m vlmrl algorithm.advantage=my_losses:gigpo algorithm.args.omega=1 algorithm.credit=return "
    "algorithm.compare=state": (
        "python -m vlmrl algorithm.advantage=my_losses:gigpo algorithm.args.omega=1 algorithm.credit=return "
        f"algorithm.compare=state {LESS}"
    ),
    "python -m vlmrl algorithm.refill.budget=10": f"python -m vlmrl algorithm.refill.budget=10 {LESS}",
    "python -m vlmrl algorithm=dapo": f"python -m vlmrl algorithm=dapo {LESS}",
    "python -m vlmrl task.curriculum.solved=1": f"python -m vlmrl task.curriculum.solved=1 {LESS}",
    "python -m vlmrl task.curriculum.low=0.2 task.curriculum.high=0.8": (
        f"python -m vlmrl task.curriculum.low=0.2 task.curriculum.high=0.8 {LESS}"
    ),
    "python -m vlmrl --config-dir conf experiment=my_task task.workers=process task.timeout_s=30": (
        f"python -m vlmrl --config-dir conf experiment=my_task task.workers=process task.timeout_s=30 {LESS}"
    ),
    "python -m vlmrl --config-dir conf experiment=my_task": (
        f"python -m vlmrl --config-dir conf experiment=my_task {LESS}"
    ),
    "python -m vlmrl monitor/logger=[wandb,tensorboard]": f"python -m vlmrl monitor/logger=[tensorboard] {LESS}",
    "python -m vlmrl mode=sft task=dataset task.path=outputs/good.parquet task.image_root=outputs/latest/rollouts "
    "trainer.warmup.steps=100 trainer.warmup.demonstrations=correct": (
        "python -m vlmrl mode=sft task=dataset task.path=outputs/latest/rollouts trainer.warmup.steps=2 "
        f"trainer.warmup.batch_size=2 trainer.warmup.demonstrations=correct {TINY} monitor.wandb.mode=disabled"
    ),
    "python -m vlmrl model=qwen3vl task=program task.command='python my_agent.py' task.reuse=true": (
        f"python -m vlmrl {TINY} task=program task.command='python my_agent.py' task.reuse=true task.processes=2 "
        f"\"task.texts=['Which letter?','A B C']\" {LESS} trainer.warmup.steps=0"
    ),
    # verifiers has an environment of its own (tests/unit/orchestrator/programs/test_episodes.py)
    "python -m vlmrl model=qwen3vl task=verifiers task.env=my_env task.python=venv/bin/python": (
        "python -m vlmrl --cfg job model=qwen3vl task=verifiers task.env=my_env task.python=venv/bin/python"
    ),
    "python -m vlmrl mode=bench": (
        "python -m vlmrl mode=bench bench.warmup_steps=1 bench.steps=1 orchestrator.groups_per_step=2 "
        "orchestrator.group_size=4"
    ),
    "python -m vlmrl mode=bench model=qwen3vl inference=vllm": f"python -m vlmrl mode=bench {TINY} dry_run=true",
    "python -m vlmrl mode=bench model=qwen3vl model.init=random task=my_task:MyTask": (
        f"python -m vlmrl mode=bench {TINY} task=my_task:MyTask dry_run=true"
    ),
    "python -m vlmrl mode=doctor": "python -m vlmrl mode=doctor monitor.wandb.mode=disabled",
    "python -m vlmrl mode=doctor against=outputs/before/doctor.json": (
        "python -m vlmrl mode=doctor against=outputs/before/doctor.json dry_run=true"
    ),
    "python -m vlmrl --multirun seed=0,1,2": "python -m vlmrl --multirun seed=0,1,2 dry_run=true",
    "python -m vlmrl --multirun seed=0,1,2 algorithm=grpo,rloo hydra.sweep.dir=outputs/multirun/mine": (
        "python -m vlmrl --multirun seed=0,1,2 algorithm=grpo,rloo hydra.sweep.dir=outputs/multirun/mine dry_run=true"
    ),
    "python -m vlmrl +sweep=learning_rate trainer.max_steps=100": (
        "python -m vlmrl +sweep=learning_rate trainer.max_steps=100 dry_run=true"
    ),
    "python -m vlmrl +sweep=seeds hydra/launcher=joblib hydra.launcher.n_jobs=2": (
        "python -m vlmrl +sweep=seeds hydra/launcher=joblib hydra.launcher.n_jobs=2 dry_run=true"
    ),
    # a model or a data set that would be downloaded, a GPU
    "python -m vlmrl task=dataset task.path=hiyouga/geometry3k reward=[math,format] model=qwen3vl": (
        "python -m vlmrl task=dataset task.path=rows.jsonl reward=[math,format] model=qwen3vl dry_run=true"
    ),
    "python -m vlmrl model=qwen3vl task=color_codeword": (
        "python -m vlmrl model=qwen3vl task=color_codeword dry_run=true"
    ),
    "python -m vlmrl mode=doctor model=qwen3vl inference=vllm": (
        f"python -m vlmrl mode=doctor {TINY} monitor.wandb.mode=disabled"
    ),
    "torchrun --nproc-per-node=2 -m vlmrl model=qwen3vl inference=vllm": (
        "torchrun --nproc-per-node=2 -m vlmrl model=qwen3vl inference=vllm dry_run=true"
    ),
    # rows that are not here
    "python -m vlmrl model=qwen3vl task=mixture +task@task.tasks.sums=dataset task.tasks.sums.path=sums.jsonl "
    "+task@task.tasks.colors=color_codeword task.weights.sums=3 reward=exact algorithm.credit=episode": (
        f"python -m vlmrl {TINY} task=mixture +task@task.tasks.sums=dataset task.tasks.sums.path=rows.jsonl "
        f"+task@task.tasks.colors=color_codeword task.weights.sums=3 reward=exact algorithm.credit=episode {LESS}"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=train.parquet reward=math": (
        f"python -m vlmrl {TINY} task=dataset task.path=rows.jsonl reward=math {LESS}"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=train.parquet reward=[math,format] "
    "reward.terms.math.weight=0.9 reward.terms.format.weight=0.1 reward.terms.format.presets=[boxed]": (
        f"python -m vlmrl {TINY} task=dataset task.path=rows.jsonl reward=[math,format] "
        f"reward.terms.math.weight=0.9 reward.terms.format.weight=0.1 reward.terms.format.presets=[boxed] {LESS}"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=refcoco.jsonl reward=iou "
    "reward.terms.iou.answer_space=thousand reward.terms.iou.reference_format=xywh": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=rows.jsonl reward=iou "
        "reward.terms.iou.answer_space=thousand reward.terms.iou.reference_format=xywh"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=train.parquet reward=judge "
    "reward.terms.judge.url=https://api.openai.com/v1 reward.terms.judge.model=gpt-4.1-mini "
    "reward.terms.judge.api_key_env=OPENAI_API_KEY": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=rows.jsonl reward=judge "
        "reward.terms.judge.url=https://api.openai.com/v1 reward.terms.judge.model=gpt-4.1-mini "
        "reward.terms.judge.api_key_env=WANDB_API_KEY"
    ),
    "python -m vlmrl task=dataset task.path=rows.jsonl reward=my_rewards:short_and_right": (
        f"python -m vlmrl task=dataset task.path=rows.jsonl reward=my_rewards:short_and_right {LESS}"
    ),
    "python -m vlmrl task=dataset task.path=rows.jsonl reward=[format,my_rewards.py:short_and_right] "
    "reward.terms.short_and_right.args.most=20": (
        "python -m vlmrl task=dataset task.path=rows.jsonl reward=[format,my_rewards.py:short_and_right] "
        f"reward.terms.short_and_right.args.most=20 {LESS}"
    ),
    "python -m vlmrl task=dataset task.path=rows.jsonl "
    "reward=[my_rewards:length_reward,my_rewards:compute_score,my_rewards:easyr1_score] "
    "reward.terms.easyr1_score.args.format_weight=0.2": (
        "python -m vlmrl task=dataset task.path=rows.jsonl "
        "reward=[my_rewards:length_reward,my_rewards:compute_score,my_rewards:easyr1_score] "
        f"reward.terms.easyr1_score.args.format_weight=0.2 {LESS}"
    ),
    # data sets of the hub, exchanged for fixtures with their columns
    "python -m vlmrl model=qwen3vl task=dataset task.path=hiyouga/geometry3k task.eval_split=test reward=math": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/EasyR1/easyr1.parquet reward=math"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=leonardPKU/clevr_cogen_a_train reward=number": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/R1-V/r1v.parquet reward=number"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=leonardPKU/GEOQA_R1V_Train_8K reward=math": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/R1-V/r1v.parquet reward=math"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=FanqingM/MMK12 task.eval_split=test reward=math": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/MMK12/mmk12.parquet reward=math"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=ViRL39K/39Krelease.parquet reward=math": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/ViRL39K/virl39k.parquet reward=math"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=lmms-lab/DocVQA task.name=DocVQA "
    "task.split=validation reward=anls": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/DocVQA/docvqa.parquet reward=anls"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=HuggingFaceM4/A-OKVQA "
    "task.eval_split=validation reward=choice": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/A-OKVQA/aokvqa.parquet reward=choice"
    ),
    "python -m vlmrl model=qwen3vl task=dataset task.path=lmms-lab/RefCOCO task.split=val task.columns.answer=bbox "
    "'task.template=\"Where is {{ answer[0] }}? Answer with a box.\"' reward=iou "
    "reward.terms.iou.reference_format=xywh": (
        f"python -m vlmrl dry_run=true {TINY} task=dataset task.path=layouts/RefCOCO/refcoco.parquet "
        "task.columns.answer=bbox 'task.template=\"Where is {{ answer[0] }}? Answer with a box.\"' reward=iou "
        "reward.terms.iou.reference_format=xywh"
    ),
    # several nodes, Slurm, a search
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500 -m vlmrl model=qwen3vl "
    "inference=vllm": (
        "torchrun --nnodes=1 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:0 -m vlmrl model=qwen3vl "
        "inference=vllm dry_run=true"
    ),
    "python -m vlmrl model=qwen3vl hydra/launcher=slurm hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1": (
        "python -m vlmrl model=qwen3vl hydra/launcher=slurm hydra.launcher.partition=gpu "
        "hydra.launcher.gpus_per_node=1 dry_run=true"
    ),
    "python -m vlmrl +sweep=algorithms hydra/launcher=slurm": (
        "python -m vlmrl +sweep=algorithms hydra/launcher=slurm dry_run=true"
    ),
    "python -m vlmrl model=qwen3vl inference=vllm inference.slurm_tasks=8 weight_sync=nccl hydra/launcher=slurm "
    "hydra.launcher.nodes=3 hydra.launcher.tasks_per_node=8 hydra.launcher.gpus_per_node=8": (
        "python -m vlmrl model=qwen3vl inference=vllm inference.slurm_tasks=8 weight_sync=nccl hydra/launcher=slurm "
        "hydra.launcher.nodes=3 hydra.launcher.tasks_per_node=8 hydra.launcher.gpus_per_node=8 dry_run=true"
    ),
    "python -m vlmrl +sweep=optuna": "python -m vlmrl +sweep=optuna dry_run=true",
}
"""A command of the documentation → what is run in its place."""

PLUGINS = {
    "hydra/launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "+sweep=optuna": "hydra_plugins.hydra_optuna_sweeper",
    "experiment=clip_tiny": "torchvision",
}
"""Part of a command → the package of an extra that it needs; skipped where that is not installed."""


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of every fenced block of a language."""
    found = []
    for page in PAGES:
        pattern = rf"^```{language}\n(.*?)^```"
        found += [(page.name, block) for block in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)]
    return found


COMMANDS = sorted({line for _, block in blocks("bash") for line in block.strip().splitlines()})


@pytest.fixture(scope="module")
def documented(home: Home, finished: object) -> Home:
    """A folder in which the documentation's commands make sense: a finished run, a sweep, a task, a loss."""
    outputs = home.path / "outputs"
    for name in ("a", "b"):
        shutil.copytree(finished[0], outputs / name)  # type: ignore[index]
        shutil.copytree(finished[0], outputs / "multirun/mine" / name)  # type: ignore[index]
    shutil.rmtree(outputs / "latest", ignore_errors=True)
    (outputs / "latest").unlink(missing_ok=True)
    shutil.copytree(finished[0], outputs / "latest")  # type: ignore[index]
    for module, source in MODULES:
        code = "\n\n".join(block for page, block in blocks("python") if page == source)
        (home.path / f"{module}.py").write_text(code)
    rows = ({"question": f"What is {row} + 1?", "answer": str(row + 1)} for row in range(60))
    (home.path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pairs = ({"question": f"What is {row} + 1?", "chosen": str(row + 1), "rejected": str(row)} for row in range(60))
    (home.path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    for layout in LAYOUTS:
        layout.write(home.path / "layouts" / layout.name)
    for family in ("smolvlm", "qwen3"):
        build(family, home.path / family)
    made = home.vlmrl("init", "template/my_task")
    assert made.code == 0, made.err
    return home


@pytest.mark.documentation
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in RUN_BY_CI])
def test_a_command_of_the_documentation_runs(command: str, documented: Home) -> None:
    assert command in EXCHANGED or command in AS_WRITTEN, "add the command to AS_WRITTEN or EXCHANGED"
    for part, package in PLUGINS.items():
        if part in command and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    started = EXCHANGED.get(command, command).partition(" && ")[0]
    program, *arguments = shlex.split(started)
    if program == "torchrun":
        program, arguments = "python", ["-m", "torch.distributed.run", *arguments]
    assert program == "python"
    home = documented
    if "my_task:" in command or "experiment=my_task" in command or command == "python -m pytest":
        home = Home(documented.path / "template/my_task")
    shutil.rmtree(home.path / "my_task", ignore_errors=True)
    ended = home.vlmrl(*arguments, code=())
    assert ended.code == 0, f"{started}\n{ended.out}\n{ended.err}"


def test_each_listed_command_is_documented() -> None:
    assert sorted({*RUN_BY_CI, *AS_WRITTEN, *EXCHANGED} - set(COMMANDS)) == []


def test_python_of_the_documentation_is_run() -> None:
    """The template's own tests run it, the commands about losses and rewards above run theirs, test_rollouts_as_data.py
    those about a run, test_mode_serve.py that of the endpoint, and test_videos_of_a_run.py those about videos."""
    template = TEMPLATE.read_text()
    others = {page for page, block in blocks("python") if block != template}
    assert others == {*(page for _, page in MODULES), "reading_a_run.md", "endpoint.md", "video.md"}
    assert [page for page, block in blocks("python") if block == template] == ["README.md", "your_task.md"]


def test_every_metric_is_explained() -> None:
    page = (REPOSITORY / "docs/reading_a_run.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", page.partition("## Every metric")[2], re.MULTILINE))
    assert rows == {key: f"{known.unit} | {known.meaning}" for key, known in STEP_KEYS.items()}


def test_messages_of_the_troubleshooting_page_exist() -> None:
    page = (REPOSITORY / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 15
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / "vlmrl").rglob("*.py")]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_the_page_says_what_each_fault_costs() -> None:
    """Each stop reason of the user's faults, and the metrics and settings that the table names."""
    page = (REPOSITORY / "docs/troubleshooting.md").read_text()
    table = page.partition("## What a fault costs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \| ([^|]+) \|$", table, re.MULTILINE)[1:]
    recorded = " ".join(row[2] for row in rows)
    for reason in StopReason:
        if reason.is_fault and reason is not StopReason.ENGINE_ERROR:
            assert f"`{reason}`" in recorded, f"no row has the stop reason {reason}"
    for key in re.findall(r"`((?:rollouts|inference|eval)/[\w/<>]+)`", table):
        assert step_key(key) is not None, f"{key} is no metric"
    for key in re.findall(r"`((?:trainer|task|inference|algorithm|orchestrator)\.[\w.]+)`", table):
        assert key in known_keys(), f"{key} is no setting"


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[2]
    docs = REPOSITORY / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert set(re.findall(r"\S+\.md", navigation)) == pages


def test_the_constraints_pin_versions_and_name_no_place() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!+-]+", line)] == []
    pinned = dict(line.split("==") for line in lines)
    exact = re.findall(r'^    "([\w-]+)==([\w.]+)",$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(exact) >= 4
    assert {name: pinned.get(name) for name, _ in exact} == dict(exact)
