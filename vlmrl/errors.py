"""The exceptions that vlmrl raises for its users, and the exit code of the process for each.

    VlmrlError                     exit 1: the run started and failed
    ├── ConfigError (ValueError)   exit 2: the config cannot run; the message names key, consequence and remedy
    ├── ModelError                 a model that cannot be loaded, built or matched to the config
    ├── TaskError                  a task that breaks its contract (see vlmrl.tasks)
    ├── CheckpointError            a checkpoint that is corrupt or belongs to another run
    ├── EngineError                the inference engine failed
    ├── RankError                  a rank of the trainer ended; the message says which and why
    ├── ParityError                mode=doctor and mode=replay: a comparison failed; the message names its lines
    ├── NonFiniteLossError         the loss or gradient is NaN or infinite; the message names the samples
    └── Interrupted                Ctrl-C or SIGTERM; a checkpoint is saved, the message says how to continue

A fault of one rollout (a broken image, a prompt that is too long, a NaN reward) does not end the run: it becomes the
rollout's `stop_reason` and is counted (`vlmrl.types.StopReason`). Bugs of vlmrl itself are `assert`s.
"""


class VlmrlError(Exception):
    """Base class of every error that vlmrl raises for its users."""

    exit_code = 1


class ConfigError(VlmrlError, ValueError):
    """The config cannot run. The message says `key=value`, the consequence, and what to set instead."""

    exit_code = 2


class ModelError(VlmrlError):
    """A model cannot be loaded, built, or matched to the config."""


class TaskError(VlmrlError):
    """A task breaks the contract of `vlmrl.tasks.base` in every rollout, not just in one."""


class CheckpointError(VlmrlError):
    """A checkpoint is corrupt or incomplete, or belongs to a run with another config."""


class EngineError(VlmrlError):
    """The inference engine failed. Where only one request failed, the rollout records the error and the run goes on."""


class RankError(VlmrlError):
    """A rank of the trainer ended, so the others cannot continue. The message names the rank and its host, and quotes
    its last output."""


class ParityError(VlmrlError):
    """Engine and trainer differ (mode=doctor), or a recorded batch cannot be reproduced (mode=replay). The message
    names the lines of the table that failed."""


class NonFiniteLossError(VlmrlError):
    """The loss or the gradient norm is not finite. The message lists the samples of the batch."""


class Interrupted(VlmrlError):  # noqa: N818 — not an error: the run was told to stop
    """The run stopped on request. The message says where its checkpoint is and how to continue."""
