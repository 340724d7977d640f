"""The fence around files of any checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.errors import ConfigError, ModelError, UserFault
from vlmrl.runs.fence import files_of


def test_errors_of_files_are_named() -> None:
    with (
        pytest.raises(ModelError, match=r"no renderer .* /x \(TypeError: no such filter\)"),
        files_of(Path("/x")),
    ):
        raise TypeError("no such filter")


def test_faults_of_a_processor_are_named() -> None:
    with pytest.raises(ModelError, match="of /x does not serve: an image of 2 × 2"), files_of(Path("/x")):
        raise UserFault("an image of 2 × 2 becomes nothing")


def test_refusals_stay_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"^set it$"), files_of(Path("/x")):
        raise ConfigError("set it")
