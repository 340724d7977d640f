"""Files appear complete or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest

from vlmrl.record.files import write_atomically, write_bytes_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes_atomically(path, b"old")

    def half(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    write_bytes_atomically(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"new")]
