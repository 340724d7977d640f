"""A loss and an advantage as a user writes them; a copy lies in the user's folder of tests/e2e/test_installed.py."""

from __future__ import annotations

import numpy as np

from vlmrl import (
    AlgorithmConfig,
    BatchTotals,
    Comparison,
    Estimator,
    FloatArray,
    LossFunction,
    LossOutput,
    LossTokens,
)


def scaled(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """The policy gradient, times `algorithm.args.scale`."""
    objective = tokens.advantages * tokens.logprobs
    loss = -config.args["scale"] * objective.sum() / totals.tokens
    return LossOutput(loss, {"mine/scale": config.args["scale"] * len(objective)})


def ranks(compared: Comparison, config: AlgorithmConfig) -> FloatArray:
    """The rank of each reward among its siblings, centered. Of two equal ones, the shorter answer comes first."""
    order = np.lexsort((-compared.lengths, compared.rewards))
    places: FloatArray = (np.argsort(order) - (len(order) - 1) / 2).astype(np.float32)
    return places


LOSS: LossFunction = scaled
ESTIMATOR: Estimator = ranks
