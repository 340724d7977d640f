"""Task, Env and Reply: what you write to train on problems of your own.

A **task** makes problems. An **env** is one attempt at one problem: it gives the prompt, reads the policy's answer and
scores it, for one or several turns. A complete task, whose policy has to say how bright a grey square is:

    >>> import numpy as np
    >>> from vlmrl import ConfigError, Env, Image, Message, Problem, Reply, Split, Task, check_task
    >>>
    >>> class Square:
    ...     def __init__(self, split: Split, index: int) -> None:
    ...         self.id = f"{split} {index}"
    ...         self.shade = 37 * index % 256
    >>>
    >>> class Ask:
    ...     def __init__(self, square: Square) -> None:
    ...         self.square = square
    ...
    ...     def reset(self):
    ...         picture = np.full((32, 32, 3), self.square.shade, np.uint8)
    ...         return (Message.of("user", "How bright is it, from 0 to 255?", Image(picture)),)
    ...
    ...     def step(self, completion: str) -> Reply:
    ...         guess = int(completion) if completion.isdecimal() and len(completion) <= 3 else 999
    ...         error = abs(guess - self.square.shade)
    ...         return Reply(done=True, reward=max(0.0, 1 - error / 64), metrics={"error": error})
    >>>
    >>> class Brightness(Task):
    ...     def __init__(self, config, *, seed: int) -> None:
    ...         if config.args:
    ...             raise ConfigError(f"task.args={config.args}: this task has no settings: leave them out")
    ...
    ...     def problem(self, split: Split, index: int) -> Problem:
    ...         return Square(split, index)
    ...
    ...     def env(self, problem: Square) -> Env:
    ...         return Ask(problem)
    ...
    ...     def texts(self):
    ...         return ("How bright is it, from 0 to 255?", "0 1 2 3 4 5 6 7 8 9")

This is how vlmrl plays it. The third square of the training split has shade 2 · 37 = 74:

    >>> from vlmrl import ImportedTaskConfig
    >>> task = Brightness(ImportedTaskConfig(), seed=0)
    >>> env = task.env(task.problem("train", 2))
    >>> [message.role for message in env.reset()]
    ['user']
    >>> env.step("90")
    Reply(turn_reward=0.0, done=True, reward=0.75, messages=(), metrics={'error': 16}, history=None)

and this is how you check that it keeps the contract below, in a test or on the command line:

    >>> check_task(task, max_turns=1)
    []

    python -m vlmrl.tasks.check my_package.my_module:Brightness
    python -m vlmrl task=my_package.my_module:Brightness

`python -m vlmrl init my_task` writes a task that the tiny model learns in a minute, as a folder to start from.

The contract:

- `problem(split, index)` is a function of the config, the seed, the split and the index. It gives the same problem
  whenever it is called, in any order and in any process, because a resumed run and the siblings of a group rely on it.
  So use no global random state and no `hash()` of a string.
- The training and the evaluation split share no problem.
- Envs share no mutable state. The envs of a group run at the same time, in threads or in worker processes
  (`task.workers`); an env may block. The pixels of an `Image` are read before the env is called again, so show a new
  frame as a new `Image`.
- `close` is called once, however the episode ends: it is done, a budget cuts it, its code raises, or the run is
  interrupted. A call that runs too long (`task.timeout_s`) ends the rollout as `task_timeout`; its env is closed when
  the call returns.
- `problem` raises `NotInSplit` or `BadRow` where the split has no problem at an index; the run goes on with the next
  index. A task with a finite number of rows says so in `num_rows`.
- An exception ends only the rollout in which it is raised, as `task_error`. A reward that is not a finite number ends
  the rollout as `bad_reward`. An exception in `demonstration` costs that demonstration.
- An episode is done within `task.max_turns` turns (with `tool=`, the turns that call a tool count, and `step` sees none
  of them), whatever the policy answers. An episode that is not done by then, or
  that spends its token budget or the context before, is cut off without another call of the env: `reward` and `metrics`
  of the last Reply count. An answer that is itself cut is paid by `algorithm.truncated`: 0, unless the run says else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from vlmrl.types import Answer, Message

Split: TypeAlias = Literal["train", "eval"]


class NoProblem(Exception):  # noqa: N818 — not an error: the run goes on with the next index
    """`Task.problem` raises it where the split has no problem at this index. The run takes the next index instead, so
    no rollout is lost.

    `Task.demonstration` and `Task.preference` may raise it too: the problem has no demonstration, or no pair, and the
    next one is taken instead.
    """


class NotInSplit(NoProblem):
    """The row at this index belongs to the other split. It is passed over without a record."""


class BadRow(NoProblem):
    """The row at this index cannot be used. It is counted and recorded in bad_rows.jsonl, once per row.

    >>> raise BadRow("the column 'answer' is empty", source="train.parquet", row=417)
    Traceback (most recent call last):
    vlmrl.tasks.base.BadRow: train.parquet row 417: the column 'answer' is empty
    """

    def __init__(self, reason: str, *, source: str = "", row: int | None = None) -> None:
        """`reason` says what is wrong with the row, without its number, so that equal reasons can be counted; `source`
        is the file or the data set, and `row` the row in it, counted from 0. Where they are left out, the split and
        the index stand in their place."""
        place = " ".join(filter(None, (source, None if row is None else f"row {row}")))
        super().__init__(f"{place}: {reason}" if place else reason)
        self.reason = reason
        self.source = source
        self.row = row


@runtime_checkable
class FromRow(Protocol):
    """A problem that knows its row, so that a prompt which turns out too long can be recorded as `BadRow`."""

    @property
    def source(self) -> str:
        """The file or the data set."""
        ...

    @property
    def row(self) -> int:
        """The row in it, counted from 0."""
        ...


class Problem(Protocol):
    """One dataset row: any object with an `id`."""

    @property
    def id(self) -> str:
        """Names the problem in records; not empty. Equal ids mean equal problems. The splits share no id."""
        ...


@runtime_checkable
class Reference(Problem, Protocol):
    """A problem that reward terms can score (`reward=`), because it holds the answer and its row. The problems of
    task=dataset are such. A problem that is no `Reference` can be scored by terms that need no answer, like `format`.
    """

    @property
    def answer(self) -> Any:
        """The answer of the data, of any type; None where the row has none."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """The other columns of the row, by name."""
        ...


@runtime_checkable
class HasDataTable(Protocol):
    """A task that tells what it has read, for the screen."""

    def data_table(self) -> dict[str, str]:
        """One line per fact: `{"rows": "2,100 of train.parquet", "answer": "answer (text)"}`."""
        ...


@runtime_checkable
class HasVideos(Protocol):
    """A task that knows whether its rows show videos."""

    def shows_videos(self) -> bool:
        """Whether any of a few rows shows one."""
        ...


@dataclass(frozen=True)
class Reply:
    """The env's answer to one completion.

    The last turn of an episode, and a turn that is followed by another one:

    >>> Reply(done=True, reward=1.0).messages
    ()
    >>> Reply(done=False, messages=(Message.of("user", "And now?"),)).reward
    0.0

    In order: `Reply(turn_reward, done, reward)`.
    """

    turn_reward: float = 0.0
    """Reward of this turn alone, finite, by convention in [0, 1]. Only `algorithm.credit=turn` and
    `algorithm.credit=return` use it."""
    done: bool = False
    """True ends the episode, and `reward` is final. A Reply that is not done has messages for the policy to answer, so
    a forgotten `done=True` is found at once."""
    reward: float = 0.0
    """Reward of the whole episode so far, finite, by convention in [0, 1]. It replaces the reward of the last Reply and
    is not added to it. It counts when the episode ends here, because it is done or because a budget cuts it off."""
    messages: tuple[Message, ...] = ()
    """What the policy sees next, after everything before: user and tool messages, at least one unless `done`. Ignored
    when `done`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The task's own metrics of the episode so far, finite, e.g. `{"share_correct": 0.5}`. The rollout keeps those of
    the last Reply, and each step reports their means over its rollouts as `task/<key>`."""
    history: tuple[Message, ...] | None = None
    """The conversation that the policy sees next, in place of all before it: an env that shows the last few frames only
    gives it, and leaves `messages` empty. It ends with a user or tool message. The rollout goes on in a new branch,
    which is trained on as a sample of its own and counted in `history_cut_rate`. Ignored when `done`."""


@dataclass(frozen=True)
class StepInfo:
    """What an env may know of a completion besides its text.

    >>> class Brief:
    ...     def step(self, completion: str, info: StepInfo) -> Reply:
    ...         return Reply(done=True, reward=0.0 if info.is_cut else 1 - info.num_tokens / 100)
    >>> Brief().step("red", StepInfo(turn=1, num_tokens=2, is_cut=False)).reward
    0.98
    """

    turn: int
    """The turn's number in the episode; the first is 1."""
    num_tokens: int
    """Tokens of the completion, with the one that ends it."""
    is_cut: bool
    """Whether the completion has no end, because its token budget or the context ran out."""
    answer: Answer | None = None
    """The completion in its parts: text, reasoning and tool calls. None in a run without tools."""

    @staticmethod
    def of_text(completion: str, turn: int) -> StepInfo:
        """The info of a text that no policy has sampled, for checks of a task: one token per character."""
        return StepInfo(turn, len(completion), is_cut=False)


@dataclass(frozen=True)
class Preference:
    """A pair of answers to one prompt, for mode=dpo.

    >>> from vlmrl import Message, Preference
    >>> pair = Preference((Message.of("user", "1 + 1?"),), Message.of("assistant", "2"), Message.of("assistant", "3"))
    >>> pair.chosen.role
    'assistant'
    """

    prompt: tuple[Message, ...]
    """What both answer; it ends with a user or tool message. Its assistant messages have no loss."""
    chosen: Message
    """The better answer, an assistant message."""
    rejected: Message
    """The worse answer, an assistant message."""


@runtime_checkable
class HasPreferences(Protocol):
    """A task with pairs of answers, for mode=dpo. task=dataset is one, where a column holds worse answers."""

    def preference(self, problem: Any) -> Preference:
        """A better and a worse answer to a problem that `problem` returned. Raises `BadRow` where the row has none that
        can be used."""
        ...


class Env(Protocol):
    """One attempt at one problem. It is used once: one `reset`, then `step` until it says done.

    `reset` and `step` may be `async`. Two things are optional, so an env without them is an `Env`, too: `step` may have
    a second parameter called `info`, which gets a `StepInfo`, and the env may have a method `close()`, `async` or not,
    that releases what the env holds.

    >>> def play(env: Env, policy) -> float:
    ...     messages = env.reset()
    ...     while True:
    ...         reply = env.step(policy(messages))
    ...         if reply.done:
    ...             return reply.reward
    ...         messages = reply.history or (*messages, *reply.messages)
    """

    def reset(self) -> tuple[Message, ...]:
        """The first prompt, which ends with a user or tool message. The envs of one problem give equal prompts."""
        ...

    def step(self, completion: str) -> Reply:
        """Score one completion: its text without special tokens. It may be empty or any text that a policy samples."""
        ...


class Task(Protocol):
    """Problems with scoring. The module's docstring shows a complete one.

    Derive from this class, or write a class with the same methods.
    """

    def __init__(self, config: Any, *, seed: int) -> None:
        """Make the task of a run.

        `config` is the run's `task` group: `config.max_turns` and the rest of `vlmrl.config.task.ImportedTaskConfig`.
        Settings of your own are in the dict `config.args`: `task.args.level=3` on the command line is
        `config.args["level"]` here. `seed` is the run's seed. Raise `vlmrl.ConfigError` for settings that cannot work.
        """

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` of a split.

        Every index from 0 up must work, also 2**40, where the problems of supervised steps begin. A finite data set
        starts again from the front: `rows[index % len(rows)]`. The evaluation problems should not depend on the seed,
        so that runs with different seeds compare.

        Raises `NotInSplit` where the row at this index belongs to the other split, `BadRow` where it cannot be used.
        """
        ...

    def num_rows(self, split: Split) -> int | None:
        """How many indices one pass over the split has (one epoch), those without a problem included. None where the
        problems are endless, which is also what a task without this method says.

        Training goes on with the next pass after it. An evaluation plays every problem of one pass at most once.
        """
        return None

    def env(self, problem: Any) -> Any:  # an `Env`; no type says that its methods may be `async`
        """A new `Env` for a problem that `problem` returned."""
        ...

    def demonstration(self, problem: Any, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A whole conversation with the answers, for supervised steps.

        It starts with the messages of `reset`, then an assistant message of text, then the messages that `step` would
        return after it, and so on; it ends with an assistant message. Where `step` replaces the conversation
        (`Reply.history`), it is one of the episode's conversations: it may start with a history instead. With
        `random_answers` the answers have the right format but are drawn from `seed` alone (0 to 2**64 − 1), so that
        they say nothing about the problem.

        The loss is on the answers: assistant messages that `reset` already gives (few-shot examples) have none. A
        demonstration longer than `trainer.seq_len` is left out.

        Leave this method out if the task is never used with supervised steps (`trainer.warmup.steps=0`).
        """
        raise NotImplementedError(
            f"{type(self).__name__}.demonstration is not defined, so supervised steps have no conversations: "
            "define it, or set trainer.warmup.steps=0"
        )

    def texts(self) -> tuple[str, ...]:
        """Examples of the text in prompts and answers, e.g. `(system_prompt, question)`.

        Only a tokenizer that is made here, for `model=qwen3vl_tiny` and for `model.init=random`, is trained on them.
        Characters that stand together here may become one token. Leave this method out if the task is never used with
        such a model.
        """
        problem = f"{type(self).__name__} does not define texts()"  # a body by itself, so that mypy lets a task omit it
        raise NotImplementedError(problem)
