"""What every key of metrics.jsonl means: its unit, and when it is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmrl.record.metrics import EVAL_SAMPLED
from vlmrl.record.splits import set_rewards


@dataclass(frozen=True)
class StepKey:
    """What a key of metrics.jsonl means."""

    unit: str
    meaning: str
    required: bool = True
    """Whether `missing_keys` expects the key of every optimizer step. If not, `meaning` says when it is there."""


def _sometimes(unit: str, meaning: str) -> StepKey:
    return StepKey(unit, meaning, required=False)


STEP_KEYS: dict[str, StepKey] = {
    "step": StepKey("steps", "RL step of the line: one batch. 0 is the evaluation before the first step."),
    "policy_version": StepKey("steps", "RL steps that the published weights contain."),
    "reward/mean": StepKey("reward", "Mean reward of the step's rollouts; faults and no_reward do not count."),
    "reward/std": StepKey("reward", "Population standard deviation of these rewards."),
    "eval/reward": _sometimes("reward", "Mean held-out reward, sampled; faults count as 0. Steps with an evaluation."),
    "eval/reward_greedy": _sometimes("reward", "Mean held-out reward, greedy decoding. Steps with an evaluation."),
    "eval/demonstration_loss": _sometimes(
        "nats per token", "Negative log-likelihood of held-out demonstrations; nothing is learned from them. mode=sft."
    ),
    "by_task/<name>/<key>": _sometimes(
        "the key's", "Rewards, own metrics and number of rollouts of one task of a mixture."
    ),
    "eval/by_task/<name>/<key>": _sometimes("the key's", "The same of an evaluation, sampled; its reward is `reward`."),
    "eval/by_task/<name>/<key>_greedy": _sometimes("the key's", "The same, greedy decoding."),
    "reward/<term>": _sometimes(
        "the term's", "Mean value of a reward term, before its weight, over the rollouts in which it does not abstain."
    ),
    "eval/reward/<term>": _sometimes("the term's", "The same of the held-out rollouts, sampled."),
    "eval/reward/<term>_greedy": _sometimes("the term's", "The same of the held-out rollouts, greedy decoding."),
    "task/<key>": _sometimes("the task's", "Mean of a metric that the task reports, over the rollouts that report it."),
    "eval/task/<key>": _sometimes("the task's", "The same of the held-out rollouts, sampled."),
    "eval/task/<key>_greedy": _sometimes("the task's", "The same of the held-out rollouts, greedy decoding."),
    "eval/<set>/reward": _sometimes("reward", "The same of a named set: the mean over its samples (avg@k)."),
    "eval/<set>/reward_greedy": _sometimes("reward", "The same of a named set, greedy decoding."),
    "eval/<set>/pass@<k>": _sometimes("share of problems", "Probability that one of k samples passes, unbiased."),
    "eval/<set>/pass_greedy": _sometimes("share of problems", "Greedy answers that pass."),
    "eval/<set>/maj@<k>": _sometimes("share of problems", "Probability that the most frequent of k answers passes."),
    "eval/<set>/<score>_se": _sometimes("the score's", "Standard error of one of these scores, clustered by problem."),
    "eval/<set>/by/<column>/<value>": _sometimes("reward", "Mean reward of the problems with this value of a column."),
    "eval/<set>/problems": _sometimes(
        "problems", "Problems that the set asked; fewer than it wants where there are no more."
    ),
    "eval/<set>/truncated": _sometimes("share of rollouts", "Sampled rollouts that a budget cut."),
    "eval/<set>/truncated_greedy": _sometimes("share of rollouts", "Greedy rollouts that a budget cut."),
    "eval/<set>/faults": _sometimes("rollouts", "Rollouts that failed and count as 0. Evaluations with one."),
    "eval/<set>/unscored": _sometimes("rollouts", "Rollouts that no reward term scored; they do not count."),
    "eval/<set>/reward/<term>": _sometimes(
        "the term's", "Mean value of a reward term; with `_greedy`, of greedy rollouts."
    ),
    "eval/<set>/task/<key>": _sometimes("the task's", "Mean of a task metric; with `_greedy`, of greedy rollouts."),
    "eval/<set>/rollouts/replayed": _sometimes("rollouts", "As `eval/rollouts/replayed`, of the set."),
    "loss": StepKey(
        "loss",
        "The loss of the first pass over the batch, with algorithm.entropy_coef, kl.loss and distill.weight, without "
        "demonstrations.",
    ),
    "grad_norm": StepKey("loss", "L2 norm of the gradient before clipping; mean over the batch's optimizer steps."),
    "learning_rate": _sometimes("1", "Learning rate of the step. Steps that trained on something."),
    "entropy": StepKey("nats per token", "Mean entropy of the trainer's distribution at the loss tokens."),
    "dpo/pairs": _sometimes("pairs", "Pairs that the step learned from. mode=dpo, as the other dpo/… keys."),
    "dpo/accuracy": _sometimes(
        "share of pairs", "Pairs whose better answer has the higher implicit reward; equal ones count half."
    ),
    "dpo/margin": _sometimes("1", "Mean difference of the implicit rewards, better minus worse answer."),
    "dpo/chosen_reward": _sometimes(
        "1", "Mean implicit reward of the better answers: beta (log policy - log reference), before the step."
    ),
    "dpo/rejected_reward": _sometimes("1", "The same of the worse answers."),
    "dpo/chosen_logprob": _sometimes("nats per answer", "Mean logprob of the better answers, before the step."),
    "dpo/rejected_logprob": _sometimes("nats per answer", "The same of the worse answers."),
    "eval/dpo/loss": _sometimes("loss", "The loss of held-out pairs; nothing is learned from them. mode=dpo."),
    "eval/dpo/<key>": _sometimes("as above", "The dpo/… keys of held-out pairs."),
    "reference_kl/mean": _sometimes(
        "nats per token",
        "Mean of exp(d) - d - 1 over the loss tokens before the step; d = reference - trainer logprob. Runs with "
        "reference=.",
    ),
    "reference_kl/penalty": _sometimes(
        "reward", "What the distance to the reference takes off a rollout's reward, on average. algorithm.kl.reward."
    ),
    "overlong/penalty": _sometimes(
        "reward", "What the length of its answers takes off a rollout's reward, on average. algorithm.overlong.tokens."
    ),
    "overlong/share": _sometimes("share of answers", "Answers that lose something. algorithm.overlong.tokens."),
    "distill/divergence": _sometimes(
        "nats per token",
        "Mean of algorithm.distill.divergence over the loss tokens before the step. Runs with algorithm.distill.top_k.",
    ),
    "distill/tail": _sometimes(
        "probability", "What the reference leaves on average to tokens that are not among its algorithm.distill.top_k."
    ),
    "mismatch_kl/mean": StepKey(
        "nats per token",
        "Mean of r - log r - 1 over the loss tokens before the step; log r = trainer - inference logprob.",
    ),
    "mismatch_kl/max": StepKey(
        "nats", "The largest of these values, of the token on which engine and trainer differ most."
    ),
    "mismatch_kl/after_update": _sometimes(
        "nats per token",
        "Mean of these values over tokens that the newest weights sampled in answers which older weights began.",
    ),
    "demonstration_loss": _sometimes(
        "nats per token", "Negative log-likelihood of the step's demonstrations (trainer.warmup.rl_weight), else 0."
    ),
    "compile/given_up": _sometimes(
        "functions", "Functions of the trainer's model that torch no longer compiles, since the start. Only above 0."
    ),
    "loss_scale": _sometimes("1", "Factor on the loss that keeps float16 gradients in range; 1 in other formats."),
    "clip_fraction": _sometimes("share of tokens", "Loss tokens whose gradient the loss clipped. Losses with a ratio."),
    "ratio/mean": _sometimes("1", "Mean importance ratio, trainer over engine. Losses with a ratio."),
    "ratio/max": _sometimes("1", "Largest importance ratio. Losses with a ratio."),
    "value/loss": _sometimes("reward²", "Mean loss of the value head, of the first pass. algorithm.advantage=gae."),
    "value/clip_fraction": _sometimes("share of tokens", "Loss tokens whose value the clip holds. As above."),
    "value/explained_variance": _sometimes(
        "1",
        "Explained variance, 1 - Var(return - value) / Var(return): 1 is perfect, 0 as good as a constant. As above.",
    ),
    "value/mean": _sometimes("reward", "Mean value of the loss tokens before the step. As above."),
    "value/return_mean": _sometimes("reward", "Mean of what these values are to be. As above."),
    "last_epoch/<key>": _sometimes("the key's", "The loss's metrics in the last pass over the batch. Several epochs."),
    "optimizer_steps": _sometimes("steps", "Optimizer steps on the batch. With algorithm.epochs or minibatches."),
    "epochs": _sometimes("passes", "Passes over the batch, fewer where algorithm.target_kl ended them. As above."),
    "policy_kl/mean": _sometimes(
        "nats per token",
        "KL(old policy, policy): mean of r - log r - 1 at the last minibatch; log r = logprob - old logprob. As above.",
    ),
    "importance/cut_fraction": _sometimes(
        "share of tokens", "Loss tokens whose weight is not the ratio. algorithm.importance_correction is not `own`."
    ),
    "importance/weight_mean": _sometimes("1", "Mean importance weight. algorithm.importance_correction is not `own`."),
    "importance/ess": _sometimes(
        "share of tokens", "Effective sample size of the weights. algorithm.importance_correction is not `own`."
    ),
    "vision_gap/blank": _sometimes(
        "nats per token",
        "Mean logprob with real images minus that with grey ones. Every monitor.vision_gap_every steps.",
    ),
    "vision_gap/shuffled": _sometimes(
        "nats per token", "The same against images of other problems. Where the step has images of the same size."
    ),
    "vision_gap/order": _sometimes(
        "nats per token", "The same against the frames of the videos in another order. Steps with videos."
    ),
    "vision_gap/first_frame": _sometimes(
        "nats per token", "The same against the first frame of each video in place of all. Steps with videos."
    ),
    "vision_advantage/gap": _sometimes(
        "nats per token",
        "Mean gap of the weighted turns: how much less likely an answer is with the images of another problem. "
        "algorithm.vision_advantage.",
    ),
    "vision_advantage/spread": _sometimes(
        "1", "Standard deviation of the weights, whose mean is 1. algorithm.vision_advantage."
    ),
    "vision_advantage/measured": _sometimes(
        "share of turns", "Turns with an advantage whose gap was measured. algorithm.vision_advantage."
    ),
    "staleness/mean": StepKey("steps", "Mean staleness of the loss tokens: training version minus sampling version."),
    "staleness/max": StepKey("steps", "Largest staleness of a loss token."),
    "credit/same_state": _sometimes(
        "share of turns", "Turns that were compared with siblings in the same state. algorithm.compare=state."
    ),
    "refill/sampled": _sometimes("groups", "Groups that the step played, with those thrown away. algorithm.refill."),
    "refill/discarded": _sometimes("groups", "Groups without a gradient, which were thrown away. algorithm.refill."),
    "refill/missing": _sometimes("groups", "Groups that the step lacks: its budget was spent. algorithm.refill."),
    "curriculum/passed_over": _sometimes("problems", "Problems that were drawn and not played. task.curriculum."),
    "curriculum/known": _sometimes("problems", "Problems with a pass rate. task.curriculum."),
    "curriculum/solved": _sometimes("problems", "Those whose pass rate is at least task.curriculum.solved."),
    "curriculum/hopeless": _sometimes("problems", "Those whose pass rate is at most task.curriculum.hopeless."),
    "data/epoch": _sometimes("passes", "Passes over the training rows so far. Tasks with a number of rows."),
    "data/rows_seen": _sometimes("rows", "Training rows that RL steps have drawn, those passed over included."),
    "data/bad_rows": _sometimes("rows", "Distinct training rows found so far that cannot be used."),
    "groups/equal_reward": _sometimes("share of groups", "Groups whose rollouts all have the same episode reward."),
    "groups/zero_advantage": _sometimes("share of groups", "Groups without any advantage, so without a gradient."),
    "rollouts/total": StepKey("rollouts", "Rollouts of the step, dropped ones included."),
    "rollouts/dropped": StepKey("rollouts", "Rollouts that were not trained on."),
    "rollouts/dropped/<reason>": _sometimes("rollouts", "Those by reason (`DropReason`). Reasons that occurred."),
    "rollouts/stop/<reason>": _sometimes("rollouts", "Rollouts by their end (`StopReason`). Reasons that occurred."),
    "rollouts/filtered/<filter>": _sometimes("rollouts", "Rollouts that a filter matched. Filters that are enabled."),
    "rollouts/replayed": _sometimes(
        "rollouts",
        "Rollouts that were played again because a server or an env worker was lost. Steps with one; no faults.",
    ),
    "env/reset_ms": _sometimes("ms", "Mean time of a call of an env's reset. Steps that made an env."),
    "env/step_ms": _sometimes("ms", "Mean time of a call of an env's step. Steps that sampled an answer."),
    "env/queue_ms": _sometimes("ms", "Mean time that such a call waited for a free thread or worker process."),
    "bridge_break_rate": StepKey("share of turns", "Later turns whose prompt could not extend the turn before."),
    "turns/bridged": StepKey("turns", "Later turns whose prompt extends the turn before, token for token."),
    "tools/calls": _sometimes("calls per rollout", "Tool calls, also those that could not be run. Runs with tools."),
    "tools/calls/<tool>": _sometimes("calls per rollout", "The same of one tool."),
    "tools/rollouts": _sometimes("share", "Rollouts with a tool call. Runs with tools."),
    "tools/broken": _sometimes(
        "share of calls",
        "Calls that could not be run: unreadable, of no tool, or with wrong arguments.",
    ),
    "tools/errors": _sometimes("share of calls", "Calls whose tool raised or took too long. Runs with tools."),
    "tools/timeouts": _sometimes("calls", "Calls that took longer than `tool.<name>.timeout_s`. Runs with tools."),
    "tools/seconds": _sometimes("s", "Time that a call took, on average. Runs with tools."),
    "endpoint/requests": _sometimes("requests", "Chat requests of programs. Runs in which programs play."),
    "endpoint/repeated": _sometimes("requests", "Those that got the answer of an equal request before them."),
    "endpoint/refused": _sometimes("requests", "Those without an answer: malformed, too long, or after the last turn."),
    "endpoint/bridged": _sometimes("requests", "Those whose prompt extends the sampled tokens of an earlier answer."),
    "endpoint/breaks": _sometimes("requests", "Those that continue an answer whose tokens could not be extended."),
    "eval/tools/<key>": _sometimes("as above", "The tools/… keys of the held-out rollouts, sampled."),
    "eval/tools/<key>_greedy": _sometimes("as above", "The same, greedy decoding."),
    "history_cut_rate": _sometimes(
        "share of turns", "Later turns whose env replaced the conversation (`Reply.history`). Steps with one."
    ),
    "tokens/prompt": StepKey("tokens", "Sum of the prompt lengths of all turns; shared prefixes count in every turn."),
    "tokens/completion": StepKey("tokens", "Tokens that the policy sampled."),
    "tokens/client_sampled": _sometimes(
        "tokens", "Of tokens/completion, those that a client sampled in its own way. Steps with such a token."
    ),
    "tokens/unlearnable": _sometimes(
        "tokens",
        "Of tokens/client_sampled, those without loss: greedy ones, and truncated ones whose support the engine does "
        "not report.",
    ),
    "support/mean": _sometimes(
        "tokens",
        "From how many tokens a token was sampled, over those of a truncated distribution. Steps with such a token.",
    ),
    "tokens/trained": StepKey("tokens", "Loss tokens of the step."),
    "tokens/packed": StepKey("tokens", "Tokens that the trainer computed, each shared prefix once."),
    "tokens/unpacked": _sometimes("tokens", "Tokens of the samples one by one. Steps that trained on something."),
    "micro_batches": _sometimes("micro-batches", "Forward and backward passes. Steps that trained on something."),
    "images/distinct": StepKey("images", "Distinct images of the step's rollouts."),
    "videos/distinct": _sometimes("videos", "Distinct videos of the step's rollouts. Steps that show one."),
    "videos/frames": _sometimes("frames", "Frames of these videos together. Steps that show one."),
    "images/encoded": _sometimes("images", "Images that the trainer's vision tower encoded. Models with images."),
    "images/cached": _sometimes("images", "Images whose features came from the trainer's cache. Models with images."),
    "images/cache_bytes": _sometimes("bytes", "Size of the trainer's feature cache. Models with images."),
    "inference/rows_prefill": _sometimes("tokens", "Prompt tokens that the engine computed. inference=embedded."),
    "inference/rows_decode": _sometimes("tokens", "Completion tokens that the engine computed. inference=embedded."),
    "inference/requests": _sometimes("requests", "Requests to the servers. inference=vllm."),
    "inference/retries": _sometimes("requests", "Requests that were sent again after a server died. inference=vllm."),
    "inference/restarts": _sometimes("servers", "Servers that were started again. inference=vllm."),
    "inference/timeouts": _sometimes("servers", "Servers that hung: they made no progress. inference=vllm."),
    "wire/bytes_sent": StepKey("bytes", "Request bodies sent to the servers; 0 with inference=embedded."),
    "wire/bytes_saved": _sometimes("bytes", "What sending all images and videos each time would add. inference=vllm."),
    "wire/images_sent": _sometimes(
        "images", "Images and videos sent to the servers, also ahead for the next step. inference=vllm."
    ),
    "wire/images_forgotten": _sometimes(
        "requests", "Requests whose image or video a server had evicted. inference=vllm."
    ),
    "eval/inference/<key>": _sometimes("as above", "The inference/… keys, counted during the evaluation."),
    "eval/rollouts/replayed": _sometimes("rollouts", "The same, of an evaluation."),
    "eval/wire/<key>": _sometimes("as above", "The wire/… keys, counted during the evaluation."),
    "time/step": StepKey("s", "Wall-clock time of the step, without evaluation and checkpoint."),
    "time/rollout": StepKey("s", "Time that the trainer waited for the step's rollouts."),
    "time/reference": _sometimes("s", "Time in which the reference scored the batch, a part of the preparation."),
    "time/values": _sometimes("s", "Scoring by the value head. algorithm.advantage=gae."),
    "time/vision_advantage": _sometimes(
        "s", "Time in which the batch was scored with other images, a part of the preparation."
    ),
    "time/train": StepKey("s", "Time of forward, backward and optimizer."),
    "time/sync": StepKey("s", "Time to publish the new weights to the engine."),
    "time/vision_gap": _sometimes("s", "Time of the blind control. Steps with vision_gap/blank."),
    "time/rollout_span": _sometimes("s", "Time from when the step's rollouts may start to the end of the last one."),
    "time/engine_idle": _sometimes("s", "Time in which no training rollout ran."),
    "time/elapsed": _sometimes("s", "Wall-clock time of the run so far, segments before a resume included."),
    "throughput/tokens_per_s": StepKey("tokens/s", "Tokens of the rollouts, each once, over time/step."),
    "memory/peak_bytes": StepKey("bytes", "Peak memory so far: of the GPU by torch, or of the process without a GPU."),
}
"""Every key of metrics.jsonl, except metrics that a user's own loss reports. `<…>` stands for any name."""

REQUIRED_KEYS = tuple(key for key, known in STEP_KEYS.items() if known.required)
"""Keys that every optimizer step must have."""


def step_key(key: str) -> str | None:
    """The entry of `STEP_KEYS` for a key as it stands in metrics.jsonl; None where there is none.

    >>> [step_key(key) for key in ("loss", "rollouts/stop/max_turns", "eval/task/share_greedy", "my_loss/beta")]
    ['loss', 'rollouts/stop/<reason>', 'eval/task/<key>_greedy', None]
    """
    if key in STEP_KEYS:
        return key
    patterns = {known: re.sub("<[^>]+>", ".+", known) for known in STEP_KEYS if "<" in known}
    matching = [known for known, pattern in patterns.items() if re.fullmatch(pattern, key)]
    return max(matching, key=len, default=None)


def missing_keys(record: Mapping[str, Any]) -> list[str]:
    """Required keys that a line of metrics.jsonl lacks. Step 0 needs only the evaluation before the first step.

    >>> missing_keys({"step": 0})
    ['eval/reward']
    >>> missing_keys(dict.fromkeys(REQUIRED_KEYS, 1.0))
    []
    """
    is_set_only = EVAL_SAMPLED not in record and bool(set_rewards(record))  # orchestrator.eval.problems=0
    first = ("step",) if is_set_only else ("step", EVAL_SAMPLED)
    required = first if record.get("step") == 0 else REQUIRED_KEYS
    return [key for key in required if key not in record]
