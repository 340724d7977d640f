"""The exceptions a user of vlmrl can meet, and the exit code each one ends the process with.

    VlmrlError                     exit 1: anything that stopped a run that had started
    ├── ConfigError (ValueError)   exit 2: the config cannot run; names the key, the consequence, the remedy
    ├── ModelError                 a checkpoint that cannot be loaded, built or matched to the config
    ├── TaskError                  a task that breaks its contract (see vlmrl.tasks)
    ├── CheckpointError            a checkpoint that is corrupt or of another run
    ├── EngineError                the inference engine cannot go on
    ├── RankError                  a rank of the trainer has ended; says which and why
    ├── ParityError                mode=doctor, mode=replay: what should be the same is not; names the lines
    ├── NonFiniteLossError         a loss or gradient that is NaN or infinite; names the samples
    └── Interrupted                Ctrl-C or SIGTERM; a checkpoint is written, the message says how to go on

Faults of one rollout (a broken image, an overlong prompt, a NaN reward) are not exceptions of the run: they
become the rollout's `stop_reason` and are counted (`vlmrl.types.StopReason`). Our own slips are `assert`s.
"""


class VlmrlError(Exception):
    """Root of every error that vlmrl raises for its user."""

    exit_code = 1


class ConfigError(VlmrlError, ValueError):
    """A config that cannot run. The message says `key=value`, what would follow, and what to set instead."""

    exit_code = 2


class ModelError(VlmrlError):
    """A model that cannot be loaded, built, or matched to the config."""


class TaskError(VlmrlError):
    """A task that breaks the contract of `vlmrl.tasks.base` for every rollout, not for one."""


class CheckpointError(VlmrlError):
    """A checkpoint that is corrupt, incomplete, or of a run with another config."""


class EngineError(VlmrlError):
    """The inference engine failed in a way that no single rollout can record."""


class RankError(VlmrlError):
    """A rank of the trainer has ended, so none can go on; the message says which, where, and what it said last."""


class ParityError(VlmrlError):
    """What the engine samples is not what the trainer learns from, or a batch is not what was recorded; the message
    names the lines of the table that failed."""


class NonFiniteLossError(VlmrlError):
    """A loss or gradient norm that is not finite; the message lists the samples of the batch."""


class Interrupted(VlmrlError):  # noqa: N818 — no error: it was asked to
    """The run was asked to stop and did; says where its checkpoint is and how to continue."""
