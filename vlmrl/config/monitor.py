"""`monitor`: what a run shows on the screen and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlmrl.config.fields import Resume, setting


class WandbMode(Enum):
    """Whether to log to Weights & Biases, and where the logs go."""

    auto = "auto"
    disabled = "disabled"
    offline = "offline"
    online = "online"


class BlindGuard(Enum):
    """What happens when the reward rises although the policy ignores its images. (Not called `off`, which YAML reads as
    a boolean.)"""

    none = "none"
    """Nothing."""
    warn = "warn"
    """A warning, once, in the log, in report.html and in summary.json."""
    stop = "stop"
    """The same, and the run ends after the step and saves it: `exit_reason` is `blind`, the exit code 0."""


@dataclass
class WandbConfig:
    """Weights & Biases logging."""

    mode: WandbMode = setting(WandbMode.auto, on_resume=Resume.free)
    """`offline` writes into the run directory and sends nothing; `wandb sync` uploads it later. `online` sends during
    the run. `auto` is `offline` where wandb is installed and `disabled` elsewhere; config.yaml says which."""
    project: str = setting("vlmrl", on_resume=Resume.free)
    """Project on wandb.ai."""
    name: str | None = setting(None, on_resume=Resume.free)
    """Name of the run. null: the name of the run directory."""
    group: str | None = setting(None, on_resume=Resume.free)
    """Group that the jobs of a sweep share. null: the name of the sweep's folder; a single run has no group."""
    rollouts: int = setting(4, on_resume=Resume.free, low=0, high=10**5, outside="it is not a number of rollouts")
    """Rollouts of each kind (trained on, sampled, greedy) in the table of an evaluation."""
    checkpoints: bool = setting(False, on_resume=Resume.free)
    """Log each checkpoint as an artifact. Offline, it is copied into the run directory, and `wandb sync` uploads it."""


@dataclass
class TensorboardConfig:
    """TensorBoard logging."""

    enabled: bool = setting(False, on_resume=Resume.free)
    """Write every metric to event files in the run directory's `tensorboard/`; `tensorboard --logdir outputs` shows
    them. `monitor/logger=[tensorboard]` sets it."""
    rollouts: int = setting(4, on_resume=Resume.free, low=0, high=10**5, outside="it is not a number of rollouts")
    """Rollouts of each kind (trained on, sampled, greedy) that an evaluation shows, with their images."""


@dataclass
class MonitorConfig:
    """What a run shows on the screen and logs."""

    live: bool = setting(True, on_resume=Resume.free)
    """Show a live view when the output is a terminal. false: plain lines, as without a terminal."""
    record_rollouts: bool = setting(True, on_resume=Resume.free)
    """Write rollouts/*.parquet and images/*.png."""
    max_rollouts_mib: int | None = setting(
        None, on_resume=Resume.free, low=1, high=10**9, outside="there is no room for a file"
    )
    """Most MiB of rollouts/ and images/ together. With more, the oldest training steps are deleted first, then the
    oldest evaluations, and the images that only they show; the newest of each stays. The report, replay and compare
    name what is missing. null: all are kept."""
    vision_gap_every: int = setting(
        10,
        on_resume=Resume.free,
        low=0,
        high=10**9,
        outside="it is not a number of steps (0 disables the blind control)",
    )
    """Optimizer steps between two blind controls, which compare the policy's answers with and without its images
    (vision_gap/… in metrics.jsonl). The first step has one. 0: never."""
    blind_guard: BlindGuard = setting(BlindGuard.warn, on_resume=Resume.free)
    """What happens when the reward rises blind: over the newest 200 steps, `reward/mean` has risen by `blind_rise` or
    more, and the last `blind_controls` blind controls all found a gap below `blind_gap`."""
    blind_rise: float = setting(
        0.05, on_resume=Resume.free, low=0, high=10**9, outside="a reward that falls would count as a rise"
    )
    """For `blind_guard`: the rise of the mean reward that counts, from the first five of these steps to the last
    five. Raise it for tasks whose answers have a format to learn first, which needs no eyes."""
    blind_gap: float = setting(
        0.01, on_resume=Resume.free, low=0, high=10**4, outside="it is not a gap that a policy can have"
    )
    """For `blind_guard`: the gap in nats per token below which a policy does not look. `vision_gap/shuffled` where the
    step has it, else `vision_gap/blank`."""
    blind_controls: int = setting(
        2, on_resume=Resume.free, low=1, high=20, outside="no row of controls is that long in 200 steps"
    )
    """For `blind_guard`: how many blind controls in a row must find no gap."""
    report: bool = setting(True, on_resume=Resume.free)
    """Write report.html after each evaluation and at the end, in a separate process."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    """TensorBoard."""
