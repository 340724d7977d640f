from __future__ import annotations

from pathlib import Path

import pytest

from support.rollout_builders import rollout
from vlmrl.errors import VlmrlError
from vlmrl.models.checkpoints.load import load_tokenizer
from vlmrl.record.rollouts import RolloutRecorder, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.record.tokens import TokenSpellings, read_spellings


def test_each_token_is_spelled_once_and_the_spellings_make_the_text(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer, path = load_tokenizer(tiny_folder), tmp_path / "tokens.jsonl"
    text = "<|im_start|>user\nis it red?"
    ids = tokenizer.encode(text)
    spellings = TokenSpellings(path, tokenizer)
    spellings.add(ids[:5])
    spellings.add(ids)
    spellings.add(ids)
    found = read_spellings(path)
    assert "".join(found[id] for id in ids) == text
    assert len(path.read_text().splitlines()) == len(set(ids))


def test_part_of_a_character_has_its_spelling_in_the_vocabulary(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer, path = load_tokenizer(tiny_folder), tmp_path / "tokens.jsonl"
    parts = tokenizer.encode("é")
    assert len(parts) == 2
    TokenSpellings(path, tokenizer).add(parts)
    assert [read_spellings(path)[id] for id in parts] == ["Ã", "©"]


def test_a_killed_segment_is_mended(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer, path = load_tokenizer(tiny_folder), tmp_path / "tokens.jsonl"
    one, other = tokenizer.encode("ab")
    TokenSpellings(path, tokenizer).add([one])
    path.write_bytes(path.read_bytes() + b'{"id":9')
    assert read_spellings(path) == {one: "a"}
    TokenSpellings(path, tokenizer).add([one, other])
    assert read_spellings(path) == {one: "a", other: "b"}
    assert len(path.read_text().splitlines()) == 2


def test_the_recorder_spells_every_token_of_its_rollouts(tmp_path: Path, tiny_folder: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    recorder = RolloutRecorder(run_dir)
    recorder.spell_with(load_tokenizer(tiny_folder))
    recorder.write(1, {"train": [rollout()]})
    recorder.close()
    (record,) = read_rollouts(run_dir.rollouts_file("step", 1))
    last = record["turns"][-1]
    assert set(read_spellings(run_dir.tokens)) == {*last["prompt_token_ids"], *last["completion_ids"]}


def test_what_the_disk_refuses_names_the_file(tmp_path: Path, tiny_folder: Path) -> None:
    spellings = TokenSpellings(tmp_path / "gone/tokens.jsonl", load_tokenizer(tiny_folder))
    with pytest.raises(VlmrlError, match=r"gone/tokens\.jsonl cannot be written"):
        spellings.add([1])
