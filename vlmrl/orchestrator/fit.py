"""Find rows whose prompt cannot be played, when they are drawn: too long, with too many frames, or with an image or a
video that is missing or broken.

The prompt is rendered once for this. The renderer keeps the result, so that the siblings of the group render it again
at no cost. Without this check the whole group would be played and dropped.

Left out on purpose: rows that a program plays, which makes the prompts, and problems that know no row. The latter are
made by code, whose faults are recorded per rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.errors import UserFault
from vlmrl.orchestrator.envs.base import EnvLostError, Envs, ProgramHandle
from vlmrl.orchestrator.fences import rendering_fence
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import BadRow, FromRow, Problem
from vlmrl.tasks.border import TaskCodeError
from vlmrl.types import Prompt, check_placeholders


@dataclass(eq=False)
class PromptCheck:
    """Renders the first prompt of problems that come from rows."""

    envs: Envs
    renderer: Renderer
    max_model_len: int
    limit: str
    """The setting that `max_model_len` comes from, e.g. `trainer.seq_len=1024`."""
    has_rows: bool
    """Whether every problem of the task comes from a row, because it has `num_rows`."""
    max_frames: int | None = None
    """Most frames of all videos of a prompt together; None for no limit."""

    async def __call__(self, problem: Problem) -> None:
        """Raise `BadRow` where the prompt cannot be rendered, has too many frames, or leaves no room for an answer."""
        if not self.has_rows and not isinstance(problem, FromRow):
            return
        env = self.envs.new(problem)
        if isinstance(env, ProgramHandle):
            return  # the program makes the prompt
        try:
            messages = await env.reset()
        except (TaskCodeError, EnvLostError):
            return  # the task's code failed, not the row: the rollouts record it
        finally:
            env.end()
        try:
            with rendering_fence():
                prompt = await self.renderer.first_turn(messages)
                check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.mm_items)
        except UserFault as fault:
            raise bad_row(problem, fault.text) from None
        if self.max_frames is not None and prompt.num_frames > self.max_frames:
            raise bad_row(problem, too_many_frames(prompt.num_frames, self.max_frames))
        if len(prompt.token_ids) >= self.max_model_len:
            raise bad_row(problem, too_long(prompt, "prompt", self.limit, "which leaves no room for an answer"))


def bad_row(problem: Problem, reason: str) -> BadRow:
    """The row of a problem cannot be used."""
    if isinstance(problem, FromRow):
        return BadRow(reason, source=problem.source, row=problem.row)
    return BadRow(reason, source=problem.id)


def too_long(prompt: Prompt, what: str, limit: str, consequence: str) -> str:
    """The sentence about a prompt that is too long.

    >>> import numpy as np
    >>> too_long(Prompt(np.zeros(9, np.int64), (), ()), "prompt", "trainer.seq_len=8", "which leaves no room")
    'its prompt has 9 tokens, which leaves no room in trainer.seq_len=8: raise it, or shorten the prompt'
    """
    counts = {"images": 0, "videos": 0}
    for placeholder in prompt.placeholders:
        counts[f"{placeholder.modality}s"] += placeholder.num_features
    shown = " and ".join(f"{count} of them of {kind}" for kind, count in counts.items() if count)
    remedy = f"shorten the {what}"
    if 2 * sum(counts.values()) > len(prompt.token_ids):
        remedy = "show smaller images (model.vlm.max_pixels)"
        if counts["videos"] > counts["images"]:
            remedy = "show fewer or smaller frames (model.vlm.video.fps, model.vlm.video.max_pixels)"
    of_items = f" ({shown})" if shown else ""
    return f"its {what} has {len(prompt.token_ids)} tokens{of_items}, {consequence} in {limit}: raise it, or {remedy}"


def too_many_frames(frames: int, most: int) -> str:
    """The sentence about videos with too many frames.

    >>> too_many_frames(300, 256)[:74]
    'its videos have 300 frames, more than model.vlm.video.max_episode_frames=2'
    """
    return (
        f"its videos have {frames} frames, more than model.vlm.video.max_episode_frames={most}: raise it, or lower "
        "model.vlm.video.fps"
    )
