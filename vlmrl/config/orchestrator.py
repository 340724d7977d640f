"""`orchestrator` and `orchestrator/renderer`: rollouts, groups and held-out evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmrl.config.eval_set import EvalSet
from vlmrl.config.fields import SMALLEST, Form, Resume, setting

TEMPLATE = "template"
"""The name of the renderer that is made of the checkpoint's chat template and processor."""

RENDERER = Form(
    r"[\w.-]+|[^\x00-\x1f\x7f]+:\w+",
    "a name of letters, digits, dots, dashes and underscores, or an import path module:Class",
    "there is no renderer of that name",
)

STOP = Form(
    r"[^\x00\x7f\ufffd]+",
    "text that is not empty, without the characters NUL, DEL and U+FFFD (of broken text)",
    "every answer would end at its first token, or none would",
)
MAX_STOP = 16
"""Most texts of `orchestrator.stop`."""


@dataclass
class RendererConfig:
    """The renderer: the only part that makes tokens and pixels."""

    name: str = setting("auto", on_resume=Resume.noted, form=RENDERER, imports=True)
    """`auto` is the first of `model.vlm.renderers`. `template` makes prompts from the checkpoint's own chat template
    and processor. Other values are names of the `renderers` package, e.g. `qwen3-vl`, or the import path of a renderer
    of your own (docs/renderers.md)."""
    options: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Options of the chat format, such as `enable_thinking`: fields of the renderer's config in the `renderers`
    package, or variables of the checkpoint's chat template with `template`."""
    parse_control_tokens: bool = setting(False, on_resume=Resume.noted)
    """Read control tokens that a message's text spells (`<|im_end|>`, `<|im_start|>`) as control tokens. By default
    they stay text, so that data cannot end a turn or forge one. Set it for messages that are formatted already. Image
    tokens are refused either way."""


@dataclass
class EvalConfig:
    """Held-out evaluation: the same problems each time, with sampled and with greedy answers."""

    every: int = setting(
        10, on_resume=Resume.noted, low=0, high=10**9, outside="it is not a number of steps (0 disables evaluation)"
    )
    """Optimizer steps between evaluations. A run also evaluates before step 1 and after the last step. 0 disables
    evaluation."""
    problems: int = setting(128, on_resume=Resume.noted, low=0, high=10**6, outside="it is not a number of problems")
    """Problems of the held-out split; each gets one sampled and one greedy rollout."""
    target: float | None = setting(
        None, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is not a reward that a policy can reach"
    )
    """End the run when the sampled and the greedy held-out reward are both at least this, `consecutive` times. None
    runs all steps."""
    consecutive: int = setting(
        2, on_resume=Resume.noted, low=1, high=10**9, outside="the target is met before the first evaluation"
    )
    """Number of evaluations in a row that must reach `target`."""
    sets: dict[str, EvalSet] = field(default_factory=dict)
    """Further held-out sets by name, each with metrics `eval/<name>/…`."""


@dataclass
class OrchestratorConfig:
    """Rollouts and the loop."""

    renderer: RendererConfig | None = None
    """The renderer. None (`orchestrator/renderer=none`) is refused, because nothing else makes tokens, not even for
    text-only models."""
    groups_per_step: int = setting(
        8, on_resume=Resume.noted, low=1, high=2**16, outside="a step has nothing to learn from"
    )
    """Problems per optimizer step; each gets a group of rollouts."""
    group_size: int = setting(8, on_resume=Resume.noted, low=1, high=2**16, outside="a group has no rollout")
    """Rollouts per problem, which are compared with each other."""
    max_new_tokens: int = setting(64, on_resume=Resume.noted, low=1, high=2**24, outside="the policy cannot answer")
    """The most tokens of a completion."""
    stop: list[str] = setting([], on_resume=Resume.noted, form=STOP)
    """Texts that end a completion, at most 16: it ends with the token that completes one of them, and the task sees the
    text before it. All tokens are learned as they were sampled. For formats that end a turn without the model's own end
    of turn, such as `stop=['Observation:']`."""
    temperature: float = setting(
        1.0,
        on_resume=Resume.noted,
        low=1e-9,  # logits of a few thousand, divided by less, leave the range of float32
        high=1e6,
        outside="training samples greedily and the rollouts of a group do not differ",
    )
    """Divisor of the logits in training and in the sampled evaluation; the trainer's logprobs use the same."""
    top_k: int = setting(
        0,
        on_resume=Resume.noted,
        low=0,
        high=1024,
        outside="the records of what each token is sampled from fill the memory",
    )
    """Sample from so many most probable tokens, and from those that are as probable as the last of them; 0 samples from
    all. As `temperature`, this and the next two keys hold in training and in the main evaluation's sampled answers.
    What is sampled from is what is learned: the engine reports the tokens that each token was sampled from, and the
    trainer, the reference and the controls compute their logprobs over these."""
    top_p: float = setting(1.0, on_resume=Resume.noted, low=SMALLEST, high=1, outside="no token can be sampled")
    """Nucleus sampling (arXiv 1904.09751), by the share of the probability that is kept: sample from the fewest most
    probable tokens that have at least this together, among those that `min_p` and `top_k` keep; 1 samples from all. In
    training from at most 1,024 tokens, if this or `min_p` is set without `top_k`."""
    min_p: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=1, outside="it is not a part of the largest probability"
    )
    """The smallest probability (arXiv 2407.01082), as a part of the largest: sample from the tokens that are at least
    so many times as probable as the most probable one; 0 samples from all. With inference=vllm this and `top_p` need
    `top_k` as well, because vLLM reports a given number of tokens."""
    max_staleness: int = setting(0, on_resume=Resume.noted, low=0, high=10**5, outside="every token is too old")
    """Optimizer steps that the weights which sampled a token may lie behind the weights that learn from it. 0 is
    on-policy."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation."""
