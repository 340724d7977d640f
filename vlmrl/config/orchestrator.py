"""`orchestrator` and `orchestrator/renderer`: rollouts, groups and held-out evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RendererConfig:
    """The renderer: the only place that makes tokens and pixels."""

    name: str = "auto"
    """`auto`: the first of `model.vlm.renderers`. Otherwise a name of the `renderers` package, e.g. `qwen3-vl`."""


@dataclass
class EvalConfig:
    """Held-out evaluation: the same problems each time, sampled and greedy."""

    every: int = 10
    """Optimizer steps between evaluations; also before step 1 and after the last. 0: never."""
    problems: int = 128
    """Problems of the held-out split; one rollout each, once sampled and once greedy."""
    target: float | None = None
    """Stop the run when sampled and greedy held-out reward are both at least this (moot where nothing evaluates) …"""
    consecutive: int = 2
    """… at so many evaluations in a row."""


@dataclass
class OrchestratorConfig:
    """Rollouts and the loop."""

    renderer: RendererConfig | None = None
    """None (`orchestrator/renderer=none`) is refused: nobody else makes tokens, for text-only models either."""
    groups_per_step: int = 8
    """Problems per optimizer step."""
    group_size: int = 32
    """Sibling rollouts per problem."""
    max_new_tokens: int = 8
    """Tokens per completion."""
    temperature: float = 1.0
    """Divisor of the logits in training and in the sampled evaluation; the trainer's logprobs use the same."""
    max_staleness: int = 0
    """Optimizer steps that the weights which sampled a token may lie behind those that learn from it; 0: on-policy."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation."""
