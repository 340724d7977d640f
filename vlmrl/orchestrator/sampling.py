"""How a completion is sampled: as the run does, or as a client asks for it.

    OwnSampling (one per run) ─▶ params(budget, seed, temperature=…) ─▶ SamplingParams ─▶ engine
                              └▶ differs(params, seed) ─▶ Turn.sampling ─▶ record, samples, trainer

What is learned is what was sampled: the trainer computes each token's logprob at the temperature that it was sampled
at, and over the tokens that it was sampled from (`Completion.supports`). A completion that was decoded greedily, or
from a truncated distribution whose supports the engine does not report, is not learned (`Turn.is_learnable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.inference.stop_strings import INCOMPLETE
from vlmrl.types import MAX_SUPPORT, SamplingParams, TurnSampling

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-9, 1e6
"""The range of a temperature above 0, as that of `orchestrator.temperature`."""


@dataclass(frozen=True)
class Truncation:
    """Which tokens a run samples from. The fields are those of `SamplingParams`."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    reported: int | None = 0
    """The largest `top_k` of which the engine reports from which tokens it sampled; 0: it reports nothing. None: it
    does so for every truncated distribution."""

    @staticmethod
    def of(config: RunConfig) -> Truncation:
        """As the run samples, without a report."""
        own = config.orchestrator
        return Truncation(own.top_p, own.top_k, own.min_p)

    @staticmethod
    def learned(config: RunConfig) -> Truncation:
        """As the run samples what it learns from."""
        engine, whole = config.inference, Truncation.of(config)
        if not isinstance(engine, VllmConfig):
            return replace(whole, reported=None)
        # Of a server that the run did not start, only what the run needs is known (`check_settings`).
        return replace(whole, reported=whole.top_k if engine.urls else MAX_SUPPORT)

    def reports(self, params: SamplingParams) -> bool:
        """Whether the engine reports from which tokens it samples with `params`."""
        return params.truncates and (self.reported is None or 0 < params.top_k <= self.reported)


WHOLE = Truncation()
"""Every token can be sampled."""


@dataclass(frozen=True)
class OwnSampling:
    """How the run samples."""

    temperature: float
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    truncation: Truncation = WHOLE
    stop: tuple[str, ...] = ()

    def params(
        self,
        max_new_tokens: int,
        seed: int,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: Sequence[str] = (),
    ) -> SamplingParams:
        """How to sample one completion: as the run does, with what a client gives in its place. A client's stop strings
        are looked for besides the run's. Raises `ValueError` for a value that cannot be sampled with.

        >>> own = OwnSampling(1.0, (9,), (3, 4))
        >>> params = own.params(8, seed=5, temperature=0.5, stop=["END"])
        >>> params.temperature, params.top_p, params.seed, params.stop
        (0.5, 1.0, 5, ('END',))
        """
        chosen = self.temperature if temperature is None else temperature
        if chosen != 0 and not LOWEST_TEMPERATURE <= chosen <= HIGHEST_TEMPERATURE:
            raise ValueError(
                f"temperature={chosen} is neither 0, which is greedy decoding, nor from {LOWEST_TEMPERATURE:g} to "
                f"{HIGHEST_TEMPERATURE:g}"
            )
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} is not above 0 and at most 1")
        if top_k is not None and not 0 <= top_k < 2**31:
            raise ValueError(f"top_k={top_k} is not from 0 to {2**31 - 1}")
        if not all(stop) or any(INCOMPLETE in each for each in stop):
            raise ValueError("a stop string is empty or has the character U+FFFD of broken text, so it ends no answer")
        is_greedy = chosen == 0  # a greedy answer has the most probable token of the whole distribution
        own = self.truncation
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=chosen,
            stop_token_ids=self.stop_token_ids,
            banned_token_ids=self.banned_token_ids,
            seed=seed,
            top_p=1.0 if is_greedy else own.top_p if top_p is None else top_p,
            top_k=0 if is_greedy else own.top_k if top_k is None else top_k,
            stop=tuple(dict.fromkeys((*self.stop, *stop))),
            min_p=0.0 if is_greedy else own.min_p,
        )
        return replace(params, reports_support=own.reports(params))

    def differs(self, params: SamplingParams, seed: int) -> TurnSampling | None:
        """What `params` do otherwise than the run; None where they do not. `seed` is the one that the run gives the
        turn (`sampling_seed`).

        >>> own = OwnSampling(1.0, (9,), (3, 4))
        >>> own.differs(own.params(8, 5, temperature=0.5), 5)
        TurnSampling(temperature=0.5, top_p=1.0, top_k=0, seed=None)
        >>> own.differs(own.params(8, 5, temperature=1.0), 5)
        """
        own = self.params(params.max_new_tokens, seed)
        if params == replace(own, stop=params.stop):
            return None
        return TurnSampling(
            None if params.temperature == own.temperature else params.temperature,
            params.top_p,
            params.top_k,
            None if params.seed == seed else params.seed,
        )
