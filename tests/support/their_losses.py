"""A loss and an advantage as a user writes them; a copy lies in the user's folder of tests/e2e/test_installed.py."""

from __future__ import annotations

import numpy as np

from vlmrl import AlgorithmConfig, BatchTotals, Estimator, FloatArray, LossFunction, LossOutput, LossTokens


def scaled(tokens: LossTokens, totals: BatchTotals, config: AlgorithmConfig) -> LossOutput:
    """The policy gradient, times `algorithm.args.scale`."""
    objective = tokens.advantages * tokens.logprobs
    loss = -config.args["scale"] * objective.sum() / totals.tokens
    return LossOutput(loss, {"mine/scale": config.args["scale"] * len(objective)})


def ranks(rewards: FloatArray) -> FloatArray:
    """The rank of each reward among its siblings, centered."""
    places: FloatArray = (np.argsort(np.argsort(rewards)) - (len(rewards) - 1) / 2).astype(np.float32)
    return places


LOSS: LossFunction = scaled
ESTIMATOR: Estimator = ranks
