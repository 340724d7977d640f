"""What `resume=` does with a changed value, for every key of the schema.

The policies are written down here by hand: a key that makes another experiment of the run is refused, a choice of the
researcher is noted, and what concerns the machine or the logs is free.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from support.composing import compose_as_hydra
from vlmrl.cli.arguments import quoted, rewrite
from vlmrl.cli.explain import every_key, text_of
from vlmrl.cli.past_runs import replayed, resumed
from vlmrl.cli.resume_changes import changes, leaves_of
from vlmrl.config.field_docs import FieldDoc
from vlmrl.config.fields import Resume
from vlmrl.config.keys import all_settings, resume_policy
from vlmrl.config.parse import parse
from vlmrl.config.reward import TERMS
from vlmrl.config.run import RunConfig
from vlmrl.config.task import ImportedTaskConfig
from vlmrl.errors import ConfigError
from vlmrl.record.run_dir import RunDir

POLICIES = {
    # The run's identity, and what other modes read.
    "refused": """
        row full preview.problems preview.answers play.policy play.split play.problem play.episodes task.env
        bench.warmup_steps bench.steps
        seed run step rollout runs against output_dir
        model.init model.name
        model.vlm.family model.vlm.positions model.vlm.image_token model.vlm.video.token
        model.vlm.freeze_vision model.vlm.freeze_language
        model.size.name model.size.tie_word_embeddings model.size.text model.size.vision
        model.lora.rank model.lora.alpha model.lora.targets model.lora.parts model.lora.base_dtype
        model.tiny.hidden_size model.tiny.intermediate_size model.tiny.num_hidden_layers
        model.tiny.num_attention_heads model.tiny.num_key_value_heads model.tiny.head_dim model.tiny.vision_depth
        model.tiny.vision_hidden_size model.tiny.vision_intermediate_size model.tiny.vision_num_heads
        model.tiny.deepstack_visual_indexes model.tiny.bpe_merges model.tiny.max_position_embeddings
        model.tiny.initializer_range model.tiny.seed
        task.kind task.target task.images_per_turn task.image_size task.shuffle_images task.holdout_one_in
        task.eval_fraction task.env_id task.env_kwargs task.noise task.frames task.colors task.clip_size
        reward.terms.*.kind reward.terms.*.target
        tool.*.kind tool.*.target tool.*.description tool.*.coordinates task.places
        dpo.from_run dpo.eval_fraction
        inference.kind weight_sync.kind reference.kind reference.dtype reference.folder
        trainer.optimizer
    """,
    # A researcher's choice, from this step on.
    "noted": """
        model.dtype model.vlm.renderers model.vlm.min_pixels model.vlm.max_pixels model.vlm.image_settings
        model.vlm.video.fps model.vlm.video.num_frames model.vlm.video.max_frames model.vlm.video.max_episode_frames
        model.vlm.video.min_pixels model.vlm.video.max_pixels
        task.args task.max_turns task.num_examples task.credit task.timeout_s
        task.curriculum.pass_at task.curriculum.solved task.curriculum.hopeless task.curriculum.rest
        task.curriculum.low task.curriculum.high task.curriculum.outside task.curriculum.start_from
        task.weights
        task.path task.name task.split task.revision task.rows task.eval_path task.eval_split
        task.columns.prompt task.columns.messages task.columns.images task.columns.videos task.columns.answer
        task.columns.choices task.columns.system task.columns.boxes task.columns.demonstration
        task.columns.chosen task.columns.rejected
        task.image_root task.video_root task.ignore_video_settings task.system_prompt task.template
        task.actions task.prompt task.reply task.history task.frame_size task.frame_skip task.film task.shaping
        task.expert
        task.invalid task.invalid_reward task.success_at
        task.command task.reuse task.result task.sampling task.texts
        reward.task_weight reward.extract.kind reward.extract.tag reward.extract.pattern
        reward.terms.*.weight reward.terms.*.ignore_case reward.terms.*.ignore_spaces
        reward.terms.*.ignore_punctuation reward.terms.*.options reward.terms.*.first_index
        reward.terms.*.presets reward.terms.*.pattern reward.terms.*.args
        reward.terms.*.absolute reward.terms.*.relative reward.terms.*.percent reward.terms.*.units
        reward.terms.*.shape reward.terms.*.answer_space reward.terms.*.reference_space reward.terms.*.answer_format
        reward.terms.*.reference_format reward.terms.*.threshold reward.terms.*.radius
        reward.terms.*.timeout_s reward.terms.*.model reward.terms.*.prompt reward.terms.*.images reward.terms.*.low
        reward.terms.*.high reward.terms.*.max_tokens reward.terms.*.temperature reward.terms.*.on_failure
        reward.terms.*.extra_body
        tool.*.timeout_s tool.*.size tool.*.args task.demonstrated_zooms
        algorithm.loss algorithm.advantage algorithm.args algorithm.credit algorithm.compare algorithm.discount
        algorithm.truncated algorithm.entropy_coef
        algorithm.overlong.tokens algorithm.overlong.longest algorithm.overlong.penalty
        algorithm.vision_advantage.weight algorithm.vision_advantage.cap
        algorithm.gae.level algorithm.gae.lam algorithm.gae.gamma algorithm.gae.whiten
        algorithm.value.coef algorithm.value.clip
        algorithm.epochs algorithm.minibatches algorithm.target_kl algorithm.clip_dual
        algorithm.kl.loss algorithm.kl.estimator algorithm.kl.reward algorithm.kl.advantage
        algorithm.distill.top_k algorithm.distill.weight algorithm.distill.divergence algorithm.distill.beta
        reference.refresh_every reference.decay
        dpo.batch_size dpo.loss dpo.beta dpo.label_smoothing dpo.length_normalized dpo.sft_weight
        algorithm.clip_low algorithm.clip_high algorithm.importance_correction algorithm.importance_cap
        algorithm.filters.gibberish algorithm.filters.rare_from algorithm.filters.rare_logprob_offset
        algorithm.filters.repetition algorithm.filters.repetition_window algorithm.filters.repetition_probability
        algorithm.filters.zero_advantage algorithm.refill.budget
        orchestrator.renderer.name orchestrator.renderer.options orchestrator.renderer.parse_control_tokens
        orchestrator.groups_per_step orchestrator.stop
        orchestrator.group_size orchestrator.max_new_tokens
        orchestrator.temperature orchestrator.top_k orchestrator.top_p orchestrator.min_p orchestrator.max_staleness
        orchestrator.eval.every orchestrator.eval.problems orchestrator.eval.target orchestrator.eval.consecutive
        orchestrator.eval.sets.*.split orchestrator.eval.sets.*.problems orchestrator.eval.sets.*.samples
        orchestrator.eval.sets.*.greedy orchestrator.eval.sets.*.temperature orchestrator.eval.sets.*.top_p
        orchestrator.eval.sets.*.top_k orchestrator.eval.sets.*.max_new_tokens orchestrator.eval.sets.*.by
        orchestrator.eval.sets.*.pass_at orchestrator.eval.sets.*.every
        inference.max_model_len inference.batching inference.dtype inference.extra_args
        trainer.max_steps trainer.max_epochs trainer.seq_len trainer.learning_rate trainer.lr_warmup_steps trainer.decay
        trainer.min_lr_ratio trainer.decay_share trainer.part_rates.vision_tower trainer.part_rates.projector
        trainer.part_rates.language_model trainer.part_rates.head trainer.ema
        trainer.betas trainer.eps trainer.weight_decay trainer.max_grad_norm
        trainer.warmup.steps trainer.warmup.batch_size trainer.warmup.learning_rate trainer.warmup.demonstrations
        trainer.warmup.rl_weight trainer.warmup.rl_batch_size
        trainer.keep_best trainer.patience
    """,
    # The machine, the logs, and when a run is saved or given up.
    "free": """
        mode dry_run resume
        model.device
        task.workers task.num_workers task.processes task.python task.episodes
        task.max_fault_rate task.fetch task.bad_rows task.max_bad_row_rate
        reward.terms.*.workers reward.terms.*.url reward.terms.*.api_key_env reward.terms.*.concurrency
        reward.terms.*.retries reward.terms.*.cache
        inference.replicas inference.tensor_parallel_size inference.data_parallel_size
        inference.gpu_memory_utilization inference.kv_cache_gib inference.enforce_eager inference.urls
        inference.slurm_tasks inference.startup_timeout_s inference.request_timeout_s inference.max_restarts
        inference.max_retries
        trainer.packing trainer.micro_batch_tokens trainer.sharding trainer.cpu_offload trainer.compile
        trainer.activation_checkpointing trainer.feature_cache_mib trainer.threads trainer.checkpoint_every
        trainer.keep_checkpoints
        weight_sync.root weight_sync.verify weight_sync.running_requests reference.offload
        monitor.live monitor.record_rollouts monitor.max_rollouts_mib monitor.vision_gap_every monitor.report
        monitor.blind_guard monitor.blind_rise monitor.blind_gap monitor.blind_controls
        monitor.wandb.mode monitor.wandb.project monitor.wandb.name monitor.wandb.group monitor.wandb.rollouts
        monitor.wandb.checkpoints monitor.tensorboard.enabled monitor.tensorboard.rollouts
        export.folder export.weights sweep.retry_failed serve.port serve.api_key_env serve.idle_s
    """,
}
EXPECTED = {key: Resume[policy] for policy, keys in POLICIES.items() for key in keys.split()}

MIXTURE = ("task.tasks.b.target=a.b:C", "+reward@task.tasks.b.reward.terms.exact=exact")

RUNS = {
    "default": (),
    "own": (
        *("model=qwen3vl", "model/size=4b", "model/lora=all_linear", "task=imported", "task.target=a.b:C"),
        *("inference=vllm", "weight_sync=folder"),
    ),
    "dataset": (
        *("task=dataset", "task.path=rows.jsonl", f"reward=[{','.join(TERMS)}]"),
        *("reward.terms.imported.target=a.b:fn", "reward.terms.format.presets=[boxed]"),
        *("reward.terms.judge.url=http://127.0.0.1:8000/v1", "reward.terms.judge.model=judge"),
    ),
    "tools": (
        *("task=dataset", "task.path=rows.jsonl", "task.max_turns=3", "reward=exact", "tool=[zoom,imported]"),
        "tool.imported.target=a.b:fn",
    ),
    "small_print": ("task=small_print",),
    "clip_direction": ("experiment=clip_tiny",),
    "program": ("task=program", "task.command=python agent.py"),
    "verifiers": ("task=verifiers", "task.env=a_taskset"),
    "initial": ("reference=initial",),
    "teacher": ("reference=folder", "reference.folder=teacher"),
    "average": ("reference=ema",),
    "environment": ("task=gymnasium", "task.env_id=FrozenLake-v1"),
    "sets": (
        *("+eval_set@orchestrator.eval.sets.ood=default", "+task@orchestrator.eval.sets.ood.task=dataset"),
        "orchestrator.eval.sets.ood.task.path=rows.jsonl",
    ),
    "mixture": ("task=mixture", "+task@task.tasks.a=color_codeword", "+task@task.tasks.b=imported", *MIXTURE),
}
"""Runs that have every key between them."""

Having = Callable[[str], tuple[Path, str, FieldDoc, object]]

WORDS = ("mode", "resume", "run", "runs", "step", "rollout", "output_dir")
"""Keys that a resumed run reads in its own way; the tests below have them."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of `RUNS`, with config.yaml and nothing else."""
    found = {}
    for name, overrides in RUNS.items():
        run_dir = RunDir(tmp_path_factory.mktemp(name) / "run")
        run_dir.create()
        run_dir.write_config(parse(compose_as_hydra(f"output_dir={run_dir.path}", *overrides)))
        found[name] = run_dir.path
    return found


@pytest.fixture(scope="module")
def having(folders: dict[str, Path]) -> Having:
    """`having(key)`: a run that has the key, a key there that `*` stands for, its documentation, and its value."""
    configs = {folder: resumed([f"resume={folder}"])[0] for folder in folders.values()}
    documented = {folder: dict(every_key(config)) for folder, config in configs.items()}

    def find(pattern: str) -> tuple[Path, str, FieldDoc, object]:
        any_name = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        for folder, config in configs.items():
            for key in documented[folder]:
                if any_name.fullmatch(key) is None:
                    continue
                parent = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
                if isinstance(parent, DictConfig):
                    value = parent[key.rpartition(".")[2]]
                    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
                    return folder, key, documented[folder][key], value
        raise AssertionError(f"no run of RUNS has {pattern}")

    return find


def other(value: Any, doc: FieldDoc) -> Any:
    """Another value of the same type."""
    if doc.choices:
        return next(name for name in doc.choices if name != getattr(value, "name", value))
    match value:
        case None:
            return {"int": 3, "float": 0.5, "str": "other"}[doc.type_text.partition(" ")[0]]
        case bool():
            return not value
        case str():
            return f"{value}_other"
        case list() if value and all(isinstance(item, Enum) for item in value):
            return [name for name in type(value[0]).__members__ if name != value[0].name]
        case list() if all(isinstance(item, str) for item in value):
            return [*value, "other"]
        case list():
            return [item / 2 if isinstance(item, float) else item + 1 for item in value]
        case float():
            return value / 2 or 0.5
    return value + 1


def judged(folder: Path, *overrides: str) -> Resume:
    """What `resume=` does with the overrides."""
    try:
        notes = resumed([f"resume={folder}", *rewrite([*overrides])])[1]()
    except ConfigError as error:
        if "cannot continue resume=" in str(error) and "Remove what sets" in str(error):
            return Resume.refused
        raise
    return Resume.noted if notes else Resume.free


def test_the_table_has_every_key_of_every_schema() -> None:
    assert EXPECTED.keys() == {key for key, _ in all_settings()}


def spelled(value: Any) -> str:
    """A value as it is written on the command line."""
    return quoted(value) if isinstance(value, str) else text_of(value)


@pytest.mark.parametrize("pattern", EXPECTED)
def test_a_changed_value(pattern: str, having: Having) -> None:
    if pattern in WORDS:
        assert resume_policy(pattern) is EXPECTED[pattern]
        return
    folder, key, doc, value = having(pattern)
    policy = EXPECTED[pattern]
    if doc.type_text == "dict":
        assert judged(folder, f"++{key}.changed=1") is policy
    else:
        assert judged(folder, f"{key}={spelled(other(value, doc))}") is policy


@pytest.mark.parametrize("plus", ["", "++"])
def test_the_same_values_are_no_change(plus: str, having: Having) -> None:
    same: dict[Path, list[str]] = {}
    for pattern in EXPECTED.keys() - {*WORDS}:
        folder, key, doc, value = having(pattern)
        if doc.type_text != "dict":
            same.setdefault(folder, []).append(f"{plus}{key}={spelled(value)}")
    assert sum(map(len, same.values())) > 90
    assert {judged(folder, *overrides) for folder, overrides in same.items()} == {Resume.free}


@pytest.mark.parametrize("key", ["seed", "trainer.learning_rate", "task.image_size", "trainer.threads"])
def test_the_spelling_decides_nothing(key: str, having: Having) -> None:
    folder, _, doc, value = having(key)
    changed = f"{key}={spelled(other(value, doc))}"
    assert judged(folder, f"++{changed}") is judged(folder, f"+{changed}") is EXPECTED[key]


@pytest.mark.parametrize("override", ["run=/tmp", "step=3", "runs=[a]", "rollout=sft/000001/000"])
@pytest.mark.parametrize("mode", [(), ("mode=eval",), ("mode=export",)])
def test_words_of_other_modes_are_refused(override: str, mode: tuple[str, ...], folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"has no effect next to resume=.*: remove it$"):
        resumed([f"resume={folders['default']}", *mode, override])


@pytest.mark.parametrize(
    ("run", "override", "policy"),
    [
        ("default", "task=color_codeword", Resume.free),
        ("default", "task=imported", Resume.refused),
        ("default", "algorithm=grpo", Resume.free),
        ("default", "algorithm=gspo", Resume.noted),
        ("default", "inference=embedded", Resume.free),
        ("default", "inference=vllm", Resume.refused),
        ("default", "model=qwen3vl", Resume.refused),
        ("default", "model/lora=null", Resume.free),
        ("default", "~model/lora", Resume.free),
        ("default", "~model/vlm", Resume.refused),
        ("default", "monitor=default", Resume.free),
        ("default", "monitor/logger=tensorboard", Resume.free),
        ("default", "~monitor/logger", Resume.free),
        ("default", "trainer=finetune", Resume.noted),
        ("default", "trainer={learning_rate: 1}", Resume.noted),
        ("own", "model/lora=all_linear", Resume.free),
        ("own", "~model/lora", Resume.refused),
        ("own", "weight_sync=nccl", Resume.refused),
        ("own", "+task.args.level=1", Resume.noted),
        ("dataset", "reward.terms.exact.weight=0.5", Resume.noted),
        ("dataset", "reward.terms.exact.kind=format", Resume.refused),
        ("dataset", "reward.terms.imported.args.level=2", Resume.noted),
        ("mixture", "task.tasks.b.args.level=2", Resume.noted),
        ("mixture", "task.weights.a=2", Resume.noted),
        ("mixture", "task.tasks.b.reward.terms.exact.weight=2", Resume.noted),
        ("mixture", "task.tasks.a.images_per_turn=1", Resume.refused),
        ("mixture", "task.tasks.a.max_turns=1", Resume.noted),
        ("own", "inference.dtype=${model.dtype}", Resume.free),
        ("default", "trainer.learning_rate=1.5e-3", Resume.free),
        ("default", "trainer.learning_rate=0.00150", Resume.free),
        ("default", "trainer.betas=[0.9,9.5e-1]", Resume.free),
        ("default", "orchestrator.eval.target=null", Resume.free),
    ],
)
def test_groups_and_spellings_are_judged_by_their_effect(
    run: str, override: str, policy: Resume, folders: dict[str, Path]
) -> None:
    assert judged(folders[run], override) is policy


@pytest.mark.parametrize(
    ("choice", "wandb", "tensorboard"),
    [("tensorboard", "disabled", True), ("[wandb,tensorboard]", "offline", True), ("[]", "disabled", False)],
)
def test_loggers_are_chosen_by_their_group(
    choice: str, wandb: str, tensorboard: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Only which loggers there are changes; their other settings stay."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    run_dir.write_config(parse(resumed([f"resume={folders['default']}", "monitor.wandb.project=mine"])[0]))
    monitor = parse(resumed([f"resume={run_dir.path}", f"monitor/logger={choice}"])[0]).monitor
    assert (monitor.wandb.mode.name, monitor.tensorboard.enabled) == (wandb, tensorboard)
    assert monitor.wandb.project == "mine"


def test_a_group_without_a_place_in_a_run_is_refused_in_words(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"eval_set=default chooses nothing.*mode=eval \+eval_set@orchestrator"):
        resumed([f"resume={folders['default']}", "eval_set=default"])


@pytest.mark.parametrize("choice", ["[exact,format]", "format"])
def test_other_reward_terms_say_why_and_what_to_do(choice: str, folders: dict[str, Path]) -> None:
    remedy = r"two meanings: keep its terms and change their weights \(reward\.terms\.exact\.weight=0 .*mode=export"
    with pytest.raises(ConfigError, match=remedy):
        resumed([f"resume={folders['dataset']}", f"reward={choice}"])[1]()


def test_settings_of_a_task_are_removed_and_compared_with_their_types(folders: dict[str, Path], tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config, _ = resumed([f"resume={folders['own']}", "++task.args={level: 3, of: {list: [1, 2]}, nothing: null}"])
    run_dir.write_config(parse(config))
    resume = f"resume={run_dir.path}"

    def noted(*overrides: str) -> list[str]:
        return [note.partition(", so")[0] for note in resumed([resume, *overrides])[1]()]

    assert noted("++task.args.level=3", "++task.args.of.list=[1,2]", "++task.args.nothing=null") == []
    assert noted("~task.args.level") == ["task.args.level changes from 3 to null"]
    assert noted("~task.args.nothing") == ["task.args.nothing changes from None to absent"]
    assert noted("++task.args.level='3'") == ["task.args.level changes from 3 to '3'"]
    assert noted("++task.args.level=3.0") == ["task.args.level changes from 3 to 3.0"]
    assert noted("++task.args.of.list=[1,2,3]") == ["task.args.of.list changes from [1,2] to [1,2,3]"]
    for override in ("~seed", "~task.args", "~task.args.absent", "~trainer", "~trainer.eps"):
        with pytest.raises(ConfigError, match=override):
            parse(resumed([resume, override])[0])


@pytest.mark.parametrize(
    "override",
    ["hydra.run.dir=x", "hydra/launcher=slurm", "experiment=color_codeword_4b", "+sweep=seeds", "output_dir=x", "-m"],
)
def test_what_has_no_value_in_a_resumed_run_is_refused(override: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"is not a value that a resumed run can change"):
        resumed([f"resume={folders['default']}", override])


def test_a_config_has_no_change_to_itself(run_config: Callable[..., RunConfig], composed: Any) -> None:
    tree = leaves_of(composed())
    assert len(tree) > 80
    assert changes(tree, dict(tree)) == {}


# ── a config.yaml of someone else ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["resume", "eval", "export", "replay"])
@pytest.mark.parametrize("text", ["${oc.env:VLMRL_TEST_SECRET}", "${.level}", "a ${model.name} b", r"\${x} is"])
def test_references_in_a_config_are_text(
    command: str, text: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's config.yaml must not read this machine's environment, let alone write it to disk."""
    monkeypatch.setenv("VLMRL_TEST_SECRET", "f4ce")
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    tree = OmegaConf.to_container(OmegaConf.load(folders["own"] / "config.yaml"))
    assert isinstance(tree, dict)
    tree["task"]["args"] = {"of": {"list": [text]}, "level": 3}
    tree["model"]["name"] = text
    run_dir.config.write_text(yaml.safe_dump(tree))
    if command == "replay":
        config = replayed([f"run={run_dir.path}", "mode=replay", "step=1"])
    else:
        mode = [] if command == "resume" else [f"mode={command}"]
        config, judge = resumed([f"resume={run_dir.path}", *mode, "++task.args.level=4"])
        assert len(judge()) == (command == "resume")
    made = parse(config)
    wanted = "${x} is" if text == r"\${x} is" else text
    assert made.model.name == wanted
    assert isinstance(made.task, ImportedTaskConfig)
    assert made.task.args["of"] == {"list": [wanted]}
    run_dir.write_config(made)
    assert "f4ce" not in run_dir.config.read_text()
    assert parse(resumed([f"resume={run_dir.path}"])[0]).model.name == wanted


@pytest.mark.parametrize("override", ["++task.args.x=${foo}", "trainer.eps=${oc.env:VLMRL_NONE}", "seed=${task.kind}"])
def test_a_reference_of_ones_own_that_leads_nowhere_is_refused_in_words(
    override: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError):
        resumed([f"resume={folders['own']}", override])[1]()
