"""Open a Gymnasium environment, and draw its frames.

    task.env_id, task.env_kwargs ─▶ gymnasium.make(render_mode="rgb_array") ─▶ Simulator ─▶ frames uint8 [H, W, 3]

What cannot be played is refused when the task is made: an environment that is not installed, draws no frames, has other
actions than a numbered list, or starts differently with the same seed.

Many simulators are open at once, each used by one thread at a time. Drawing needs a lock: pygame's shapes go through
buffers that all surfaces share, and twelve threads that drew CartPole at once drew wrong frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.errors import ConfigError, UserFault, fenced

Observed: TypeAlias = tuple[Any, dict[str, Any]]
"""Observation and info, as `Env.reset` returns them."""

Frame: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3]; RGB."""

_DRAWING = threading.Lock()
"""Held while a frame is drawn, and while an environment opens or closes its window."""


class Simulator:
    """One Gymnasium environment. `close` may be called more than once; whatever else the environment raises passes."""

    def __init__(self, config: GymnasiumConfig) -> None:
        import gymnasium

        self._frame_size = config.frame_size
        self._frame_skip = config.frame_skip
        self._films = config.film
        self.film: tuple[Frame, ...] = ()
        """The frames of the last action, from the one before it; empty without `task.film`."""
        self._is_open = True
        with _DRAWING:
            self._env: Any = gymnasium.make(
                config.env_id,
                render_mode="rgb_array",
                disable_env_checker=True,  # it plays steps of its own, and warns about what `check` refuses
                **config.env_kwargs,
            )

    @property
    def unwrapped(self) -> Any:
        """The environment without the wrappers of `gymnasium.make`: what an expert and a shaping function see."""
        return self._env.unwrapped

    @property
    def render_modes(self) -> Sequence[str]:
        return self._env.metadata.get("render_modes", ("rgb_array",))  # type: ignore[no-any-return]

    @property
    def action_space(self) -> Any:
        return self._env.action_space

    def reset(self, seed: int) -> Observed:
        """Begin the episode of a seed."""
        observation, info = self._env.reset(seed=seed)
        return observation, dict(info)

    def step(self, action: int) -> tuple[Observed, float, bool]:
        """Take an action `frame_skip` times: what is observed then, the sum of the rewards, and whether it is over."""
        total = 0.0
        film = [self.frame()] if self._films else []
        for _ in range(self._frame_skip):
            observation, reward, terminated, truncated, info = self._env.step(action)
            total += float(reward)
            if self._films:
                film.append(self.frame())
            if is_over := bool(terminated or truncated):
                break
        self.film = tuple(film)
        return (observation, dict(info)), total, is_over

    def raw_frame(self) -> Frame:
        """uint8 [H, W, 3]; the frame as the environment draws it now. Raises ValueError where it is no such array."""
        with _DRAWING:
            frame = self._env.render()
            # A copy, because an environment may draw its next frame into the same array.
            pixels = np.array(frame) if isinstance(frame, np.ndarray) else frame
        if not (
            isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        ):
            kind = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ValueError(f"the environment draws {kind}, not a frame uint8 [height, width, 3]")
        return pixels

    def frame(self) -> Frame:
        """uint8 [H, W, 3]; the frame, scaled so that its longer side has `task.frame_size` pixels."""
        return scaled(self.raw_frame(), self._frame_size)

    def close(self) -> None:
        """Free what the environment holds."""
        if self._is_open:
            self._is_open = False
            with _DRAWING:
                self._env.close()


def scaled(frame: Frame, side: int | None) -> Frame:
    """The frame with `side` pixels on its longer side; as it is with None. Each pixel is the mean of those it covers.

    >>> scaled(np.zeros((400, 600, 3), np.uint8), 96).shape
    (64, 96, 3)
    """
    height, width = frame.shape[:2]
    if side is None or max(height, width) == side:
        return frame
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(PILImage.fromarray(frame).resize(size, PILImage.Resampling.BOX))


def check(config: GymnasiumConfig) -> Any:
    """Open the environment twice, and refuse what cannot be played; returns its action space. Raises `ConfigError`.

    It also imports what draws the frames in this one thread: threads that import pygame at once find half of it.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are drawn in memory; without a screen, SDL complains
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it greets on the run's own screen
    named = f"task.env_id={config.env_id}"
    try:
        with fenced(f"gymnasium.make({config.env_id!r}, **{config.env_kwargs})"):
            simulators = [Simulator(config), Simulator(config)]
    except UserFault as fault:
        raise ConfigError(
            f"{named}: {fault.text}, so there is nothing to play: correct task.env_id or task.env_kwargs, or install "
            "what it needs; where a package registers the environment, write the package before a colon, as in "
            "minigrid:MiniGrid-Empty-8x8-v0"
        ) from None
    try:
        space = simulators[0].action_space
        _check_actions(named, space)
        with fenced("its first frame"):
            first, again = (_first_frame(simulator) for simulator in simulators)
    except UserFault as fault:
        raise ConfigError(
            f"{named}: {fault.text}, so the policy would see nothing: choose an environment that draws its state with "
            "render_mode=rgb_array"
        ) from None
    finally:
        for simulator in simulators:
            simulator.close()
    if not np.array_equal(first, again):
        raise ConfigError(
            f"{named} starts with another frame when it is reset with the same seed again, so the rollouts of a group "
            "would play different problems: choose task.env_kwargs that fix what it draws when it is made, or draw it "
            "in reset(seed=…)"
        )
    return space


def _check_actions(named: str, space: Any) -> None:
    from gymnasium.spaces import Discrete

    if not isinstance(space, Discrete):
        raise ConfigError(
            f"{named} has the action space {space}, and an answer is one action of a list, so no answer could be "
            "taken: choose an environment with a Discrete action space, or register one of yours that wraps it"
        )


def _first_frame(simulator: Simulator) -> Frame:
    modes = simulator.render_modes
    if "rgb_array" not in modes:
        raise ValueError(f"the environment draws no frames: its render modes are {list(modes)}, without rgb_array")
    simulator.reset(seed=0)
    return simulator.raw_frame()
