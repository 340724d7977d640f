"""How the answers of a session are sampled: as the run samples, with what its client may choose instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.request import ChatRequest, ClientSampling
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.types import SamplingParams, TurnSampling


@dataclass(frozen=True)
class SessionSampling:
    """How one session samples."""

    own: OwnSampling
    """How the run samples."""
    seed: Callable[[int], int]
    """Number of an answer → the seed that the run gives it."""
    client_samples: bool = False
    """Whether a client's temperature, top_p, top_k and seed are taken. Greedy answers stay greedy: they measure what
    the policy finds most probable."""

    def params(self, request: ChatRequest, budget: int, number: int) -> SamplingParams:
        """How to sample answer `number` with at most `budget` tokens. Raises `RefusedError` for a value of the client's
        that cannot be sampled with."""
        client = request.sampling if self.client_samples and self.own.temperature > 0 else ClientSampling()
        try:
            return self.own.params(
                budget,
                self.seed(number) if client.seed is None else client.seed,
                temperature=client.temperature,
                top_p=client.top_p,
                top_k=client.top_k,
                stop=request.stop,
            )
        except ValueError as error:
            raise RefusedError(f"{error}: choose another value, or leave it out") from None

    def noted(self, params: SamplingParams, place: int) -> TurnSampling | None:
        """What the record says of a turn that `params` sampled, as turn `place` of its rollout. The seed of an answer
        follows from its number, which may be another than the place of its turn."""
        return self.own.differs(params, self.seed(place))
