"""Rows whose images or videos are not where they say, in a preview."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmrl.runs.preview.image_roots import images_not_found
from vlmrl.runs.preview.seen import Refused
from vlmrl.types import Modality


def refused(path: Path, kind: str) -> Refused:
    said = f"the {kind} file {path} does not exist: set task.{kind}_root to the folder from which its path starts"
    return Refused("train", 3, "rows.jsonl", 3, said)


@pytest.mark.parametrize(("kind", "other"), [("image", "video"), ("video", "image")])
def test_the_folder_that_has_a_missing_file_is_found(kind: Modality, other: Modality, tmp_path: Path) -> None:
    there = tmp_path / "unpacked/media/1.bin"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"")
    rows = [refused(tmp_path / "media/1.bin", kind), refused(tmp_path / "media/2.bin", other)]
    found = images_not_found(rows, {"image": None, "video": None}, tmp_path)
    assert found is not None
    assert (found.kind, found.count, found.candidate) == (kind, 1, str(tmp_path / "unpacked"))
    starts: dict[Modality, Path | None] = {kind: tmp_path / "media", other: None}
    below = images_not_found([refused(tmp_path / "media/media/1.bin", kind)], starts, tmp_path)
    assert below is not None
    assert below.candidate == str(tmp_path / "unpacked")


def test_other_reasons_are_no_missing_files(tmp_path: Path) -> None:
    assert (
        images_not_found([Refused("train", 3, "rows.jsonl", 3, "no answer")], {"image": None, "video": None}, tmp_path)
        is None
    )
