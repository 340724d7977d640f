"""Task and Env: what a user writes for a task of their own.

    from vlmrl.tasks import Env, Image, Message, Reply, Task

    class Counting(Task):
        def __init__(self, config, *, seed): ...                        # config.max_turns, config.args["level"]
        def problem(self, split, index): ...                            # a dataset row: any object with an `id`
        def env(self, problem): ...                                     # a single-use interaction with it
        def demonstration(self, problem, *, random_answers, seed): ...  # only for supervised steps
        def texts(self): ...                                            # only read for a tiny tokenizer

    python -m vlmrl task=my_package.my_module:Counting task.args.level=3
    python -m vlmrl.tasks.check my_package.my_module:Counting args.level=3      # does it keep the contract?

An Env is driven like this, one completion at a time:

    messages = env.reset()                         # system + first user message, with images
    while True:
        completion = <the policy answers>
        reply = env.step(completion)               # score the turn; more messages or done
        if reply.done: break

The contract, which `vlmrl.tasks.check` runs against a task:

- `problem(split, i)` is a function of the config, the seed and i: asked again, in any order, in another process, it
  is the same problem. A resumed run and the siblings of a group rely on it. No global random state, no `hash()`.
- The splits share no problem.
- Envs share no mutable state: the envs of a group run side by side, in worker threads, and may block. The pixels of an
  `Image` are read before the env is called again; a new frame is a new `Image`.
- An exception ends that one rollout as `task_error`; a reward that is no finite number ends it as `bad_reward`.
- An episode is done within `task.max_turns`, whatever the policy says. One that is not, or that spends its token
  budget or the context before, is cut without another call: the last Reply's `reward` and `metrics` are the episode's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from vlmrl.types import Message

Split: TypeAlias = Literal["train", "eval"]


class Problem(Protocol):
    """One dataset row."""

    @property
    def id(self) -> str:
        """Names the problem in records; not empty. Equal ids mean equal problems. The splits share no id."""
        ...


@dataclass(frozen=True)
class Reply:
    """The env's answer to one completion.

    >>> Reply(turn_reward=1.0, done=False, messages=(Message.of("user", "And now?"),)).reward
    0.0
    """

    turn_reward: float
    """This turn's own reward, finite, in [0, 1] by custom; used where `algorithm.credit=turn`."""
    done: bool
    """The episode is over; `reward` is final."""
    reward: float = 0.0
    """The episode's reward so far (not a sum over turns unless the task makes it one), finite, in [0, 1] by custom;
    what counts when the episode ends here, by `done` or by a budget."""
    messages: tuple[Message, ...] = ()
    """What the policy sees next; must be non-empty unless `done`. User or tool messages only. Not read when `done`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The task's own figures for the episode so far, finite, e.g. `share_correct`. Those of the last Reply are the
    rollout's; a step reports their means as `task/<key>`."""


class Env(Protocol):
    """A single-use interaction with one problem: one `reset`, then `step` until it says done."""

    def reset(self) -> tuple[Message, ...]:
        """The first prompt; its last message is of the user (or a tool). Siblings of a group get equal messages."""
        ...

    def step(self, completion: str) -> Reply:
        """Score one completion: its text without special tokens; may be empty or anything else a policy may say."""
        ...


class Task(Protocol):
    """Problems with scoring."""

    def __init__(self, config: Any, *, seed: int) -> None:
        """`config` is the run's `task` group (`vlmrl.config.task`; a user's task finds its own settings in
        `config.args`, a dict), `seed` the run's. Raise `vlmrl.errors.ConfigError` for settings that cannot work."""

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` of a split. Any index from 0 up may be asked for, 2**40 too (supervised steps begin
        there); a finite set begins again (`rows[index % len(rows)]`). Let the evaluation problems not depend on the
        seed, so that runs compare."""
        ...

    def env(self, problem: Any) -> Env:
        """A fresh env for a problem that `problem` made."""
        ...

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A whole conversation with assistant turns, for supervised steps: what `reset` gives, an assistant message
        of text, what `step` would give after it, …, ending with an assistant message. With `random_answers` the
        answers are in the right format, drawn from `seed` (0 to 2**64 − 1) alone, and say nothing about the problem.

        A task that is never warmed up leaves this out."""
        raise NotImplementedError(
            f"{type(self).__name__}.demonstration is not defined, so there is nothing for supervised steps: "
            "define it, or set trainer.warmup.steps=0"
        )

    def texts(self) -> tuple[str, ...]:
        """Text that stands in the task's prompts and answers; a tiny tokenizer is trained on it, so what stands
        together here may become one token."""
        ...
