"""What a model's layers decide of a run's config."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Packing
from vlmrl.errors import ConfigError
from vlmrl.runs.build import fit_to_layers

RECURRENT: Any = SimpleNamespace(is_recurrent=True)


def test_layers_of_softmax_attention_change_nothing(run_config: Callable[..., RunConfig]) -> None:
    config, said = run_config(), list[str]()
    assert fit_to_layers(config, SimpleNamespace(is_recurrent=False), said.append) is config  # type: ignore[arg-type]
    assert said == []


def test_layers_that_carry_a_state_are_trained_one_by_one_and_one_line_says_so(
    run_config: Callable[..., RunConfig],
) -> None:
    config, said = run_config("inference=vllm"), list[str]()
    fitted = fit_to_layers(config, RECURRENT, said.append)
    assert config.trainer.packing is Packing.tree
    assert fitted.trainer.packing is Packing.none
    (line,) = said
    assert "trainer.packing=tree is none for qwen3vl_tiny: layers of linear_attention" in line
    assert fit_to_layers(fitted, RECURRENT, said.append) is fitted
    assert len(said) == 1


def test_the_embedded_engine_has_no_cache_for_them(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"inference=embedded requires layers of softmax attention.*inference=vllm"):
        fit_to_layers(run_config(), RECURRENT, lambda line: None)
