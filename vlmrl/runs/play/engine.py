"""The engine of mode=play: a player answers in place of the model. All else of a rollout is as in training.

prompt ─▶ PlayerSession.generate ─▶ screen: what is new in it ─▶ player: a text ─▶ its tokens ─▶ completion
reply  ◀─ WatchedEnv.step ◀─ the env ◀────────────────────── rollout.py: the text of these tokens ◀──┘
"""

from __future__ import annotations

import numpy as np

from vlmrl.errors import EngineError, safe_text
from vlmrl.inference.stop_strings import find_stop
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.runs.play.envs import WatchedEnvs
from vlmrl.runs.play.players import Player
from vlmrl.runs.play.screen import Screen
from vlmrl.types import Completion, Prompt, SamplingParams, extends


class PlayerLeftError(EngineError):
    """The player gives no more answers: the standard input has ended, or somebody pressed Ctrl-C."""


class PlayerEngine:
    """An `InferenceEngine` that asks a player."""

    def __init__(self, player: Player, envs: WatchedEnvs, renderer: FamilyRenderer, screen: Screen) -> None:
        self.player = player
        self.envs = envs
        self.renderer = renderer
        self.screen = screen
        self.is_left = False
        """Whether the player has left."""

    async def start(self) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """There is nothing to stop."""

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> PlayerSession:
        return PlayerSession(self)

    def metrics(self) -> dict[str, float]:
        return {}


class PlayerSession:
    """One episode of a player."""

    def __init__(self, engine: PlayerEngine) -> None:
        self._engine = engine
        self._turns = 0
        self._before: tuple[Prompt, Completion] | None = None

    async def __aenter__(self) -> PlayerSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """There is nothing to close."""

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        """What the player answers, cut to the budget of tokens and at a stop string. Raises `PlayerLeftError`, and
        `UserFault` for a scripted policy that fails."""
        engine = self._engine
        assert engine.envs.played is not None, "a prompt comes from an env"
        engine.screen.prompt(prompt, self._turns + 1, self._num_known(prompt))
        text = await engine.player.answer(engine.envs.played)
        if text is None:
            engine.is_left = True
            turns = f"{self._turns} turn{'' if self._turns == 1 else 's'}"
            raise PlayerLeftError(f"the player left after {turns}, so the episode has no reward")
        self._turns += 1
        ids = engine.renderer.encode(safe_text(text))
        is_cut = len(ids) > sampling.max_new_tokens
        ids, stop = ids[: sampling.max_new_tokens], None
        if found := find_stop(ids, sampling.stop, sampling.stop_token_ids, engine.renderer.decode):
            count, stop = found
            ids, is_cut = ids[:count], False
        completion = Completion(
            token_ids=ids,
            logprobs=np.full(len(ids), np.nan, np.float32),
            versions=np.full(len(ids), -1),
            finish_reason="length" if is_cut else "stop",
            stop=stop,
        )
        engine.screen.answer(completion)
        self._before = prompt, completion
        return completion

    def _num_known(self, prompt: Prompt) -> int | None:
        """How many tokens of a prompt the turn before it had; None where the prompt does not extend that turn."""
        if self._before is None:
            return 0
        before, completion = self._before
        if not extends(prompt, before, completion.token_ids):
            return None
        return len(before.token_ids) + len(completion.token_ids)
