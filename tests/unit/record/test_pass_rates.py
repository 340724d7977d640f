from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from vlmrl.errors import ConfigError
from vlmrl.record.pass_rates import PassRate, read_pass_rates, write_pass_rates


def test_what_was_written_is_read(tmp_path: Path) -> None:
    rates = {"a.parquet:3:00ff00ff": PassRate(3, 8), "日本:0": PassRate(0, 1)}
    write_pass_rates(tmp_path / "pass_rates.json", rates)
    assert read_pass_rates(tmp_path / "pass_rates.json") == rates
    assert read_pass_rates(tmp_path) == rates
    assert orjson.loads((tmp_path / "pass_rates.json").read_bytes()) == {
        "problems": {"a.parquet:3:00ff00ff": {"passed": 3, "samples": 8}, "日本:0": {"passed": 0, "samples": 1}},
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"problems": []}',
        b'{"problems": {"a": {"passed": 2, "samples": 1}}}',
        b'{"problems": {"a": {"passed": 0, "samples": 0}}}',
        b'{"problems": {"a": {"passed": 0.5, "samples": 1}}}',
        b'{"problems": {"a": {"passed": true, "samples": 1}}}',
    ],
)
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.json .* name a file or folder that mode=eval wrote"):
        read_pass_rates(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pass_rates\.json"):
        read_pass_rates(tmp_path)
