"""The second model of a run, where it is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.helpers import BANNED
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.runs.reference import make_reference


def test_more_tokens_than_there_are_cannot_be_reported(
    run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]
) -> None:
    policy = Policy(tiny_model(), position_function("mrope", 2), BANNED)
    config = run_config("reference=initial", "algorithm.distill.top_k=5000")
    left = len(policy.banned) - len(BANNED)
    with pytest.raises(ConfigError, match=rf"top_k=5000 is more than the {left} tokens .* set .*top_k={left} for all"):
        make_reference(config, config.model, Path(), policy, [])
