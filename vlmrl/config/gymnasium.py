"""`task=gymnasium`: any Gymnasium environment that draws its frames, without code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import PROSE, Form, Resume, setting
from vlmrl.config.task import TaskConfig

ENV_ID = Form(
    r"(?=.*\S)[^\x00-\x1f\x7f]*", "the id of an environment, such as FrozenLake-v1", "there is nothing to play"
)

ACTION = Form(
    r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?",
    "a name of one line",
    "no answer would be that action",
)


class InvalidAnswer(Enum):
    """What happens after an answer that names no action. The turn's reward is `task.invalid_reward` either way."""

    stay = "stay"
    """The environment stands still for this turn, and the policy sees the same frame again."""
    end = "end"
    """The episode ends."""


@dataclass
class GymnasiumConfig(TaskConfig):
    """Play a Gymnasium environment by its frames: `task=gymnasium task.env_id=FrozenLake-v1`."""

    kind: str = setting("gymnasium", on_resume=Resume.refused)
    """A Gymnasium environment with frames (`rgb_array`) and a Discrete action space."""
    target: str = setting("vlmrl.tasks.environments.task:GymnasiumTask", on_resume=Resume.refused)
    """The built-in class."""
    max_turns: int = setting(8, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The most turns of an episode, each of which is one action; it ends earlier where the environment ends it."""
    env_id: str = setting(MISSING, on_resume=Resume.refused, form=ENV_ID)
    """The environment's id. Where a package registers it, the package stands before a colon:
    `minigrid:MiniGrid-Empty-8x8-v0`, `my_module:MyEnv-v0`."""
    env_kwargs: dict[str, Any] = setting({}, on_resume=Resume.refused, free_form=True)
    """Arguments of the environment, `task.env_kwargs.is_slippery=false`; they are not checked."""
    actions: list[str] = setting([], on_resume=Resume.noted, form=ACTION)
    """Names of the actions, in the order of their numbers; a shorter list leaves the last actions out. `[]`: their
    numbers. An answer is the last name in it, whatever else it says."""
    system_prompt: str | None = setting(None, on_resume=Resume.noted, form=PROSE)
    """The system message of every prompt. null: none."""
    prompt: str = setting(
        "{{ frame }}{{ instruction }} "
        '{% if past %}So far: {{ past | map(attribute="action") | join(", ") }}. {% endif %}'
        'Choose one of: {{ actions | join(", ") }}',
        on_resume=Resume.noted,
        form=PROSE,
    )
    """The first message of a conversation as a Jinja template, inline or the path of a file (docs/environments.md lists
    what it sees). `{{ frame }}` marks where the frame stands."""
    reply: str = setting(
        '{{ frame }}{% if not valid %}This was none of: {{ actions | join(", ") }}{% endif %}',
        on_resume=Resume.noted,
        form=PROSE,
    )
    """The message after an action, as a template like `prompt`."""
    history: int | None = setting(None, on_resume=Resume.noted, low=1, high=10**5, outside="no frame is left to see")
    """The most frames in a prompt. With one more, the conversation starts over with the last ones: a new branch,
    counted as `history_cut_rate`. null: all frames of the episode."""
    frame_size: int | None = setting(None, on_resume=Resume.noted, low=1, high=2**13, outside="a frame has no pixel")
    """Pixels of the longer side, to which a frame is scaled. null: as the environment draws it."""
    frame_skip: int = setting(1, on_resume=Resume.noted, low=1, high=10**5, outside="an action is not taken")
    """How many times an action is repeated. Its rewards are added, and the last frame is shown."""
    film: bool = setting(False, on_resume=Resume.noted)
    """Show what an action does as a video, from the frame before it to the last one: `frame_skip` + 1 frames, in place
    of the last one alone. The first turn of an episode and one without an action show the present frame as an image."""
    shaping: str | None = setting(None, on_resume=Resume.noted, imports=True)
    """Import path of a function from the environment to a number, the potential of its state. A turn's own reward is
    increased by what the potential grows; the episode's reward is not."""
    expert: str | None = setting(None, on_resume=Resume.noted, imports=True)
    """Import path of a function from the environment to the right action, by name or number. Supervised steps with
    `trainer.warmup.demonstrations=correct` show its games."""
    invalid: InvalidAnswer = setting(InvalidAnswer.stay, on_resume=Resume.noted)
    """What happens after an answer that names no action."""
    invalid_reward: float = setting(0.0, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is no reward")
    """Reward of such a turn; it also counts in the episode's reward."""
    success_at: float | None = setting(None, on_resume=Resume.noted, low=-1e9, high=1e9, outside="it is no return")
    """Reward of an episode, without that of invalid answers, from which on it is a success, for `task/success`. null:
    there is no such metric."""
    holdout_one_in: int = setting(
        8, on_resume=Resume.refused, low=2, high=10**9, outside="no start state is left to train on"
    )
    """One of so many start states, chosen by the hash of its first frame, is kept for evaluation and never trained on.
    Where there are fewer start states, none is, and the run says so."""
    noise: bool = setting(False, on_resume=Resume.refused)
    """Blind control: show noise in place of every frame. Only what can be done without seeing can be learned then."""
