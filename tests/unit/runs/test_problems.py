"""How long a run is in passes, and where a curriculum starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.record.difficulty import Attempts, Difficulty
from vlmrl.record.pass_rates import PassRate, write_pass_rates
from vlmrl.runs.problems import first_difficulty, limit_of, make_curriculum, steps_of

Config = Callable[..., RunConfig]


def test_the_steps_of_passes(run_config: Config) -> None:
    three = ("trainer.max_epochs=1.5", "orchestrator.groups_per_step=4", "trainer.warmup.batch_size=10")
    assert steps_of(run_config(*three), 10) == 4
    assert steps_of(run_config(*three, "mode=sft"), 100) == 15
    assert steps_of(run_config("trainer.max_steps=7"), 10) == 7
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs=1\.5 needs a task .* set trainer\.max_steps instead"):
        steps_of(run_config(*three), None)


def test_a_curriculum_that_lets_problems_rest_needs_passes(run_config: Config) -> None:
    assert make_curriculum(run_config(), None) is None
    assert make_curriculum(run_config("task.curriculum.solved=1"), None) is not None
    with pytest.raises(ConfigError, match=r"task\.curriculum\.hopeless=0 lets problems rest .* are endless"):
        make_curriculum(run_config("task.curriculum.hopeless=0"), None)


def test_a_curriculum_starts_from_an_evaluation_or_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    write_pass_rates(tmp_path / "eval/pass_rates.json", {"p": PassRate(3, 8)})
    assert first_difficulty(str(tmp_path)).by_id == {"p": Attempts(3, 8)}
    assert first_difficulty(str(tmp_path / "eval")).by_id == {"p": Attempts(3, 8)}
    for step in (2, 10):
        folder = tmp_path / f"run/checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        Difficulty({"q": Attempts(step, 10, 0, 4, 99)}).write(folder / "difficulty.parquet")
    assert first_difficulty(str(tmp_path / "run")).by_id == {"q": Attempts(10, 10, 0, 4, -1)}
    with pytest.raises(ConfigError, match=r"start_from=.*nowhere has no pass_rates\.json"):
        first_difficulty(str(tmp_path / "nowhere"))


def test_the_limit_is_the_smaller_setting(run_config: Config) -> None:
    assert limit_of(run_config("trainer.seq_len=500")) == "trainer.seq_len=500"
    assert limit_of(run_config("inference.max_model_len=400", "trainer.seq_len=500")) == "inference.max_model_len=400"
