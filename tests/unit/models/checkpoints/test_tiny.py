"""The tiny checkpoint: a real Qwen3-VL, the same bytes in every process, safe to build from several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.task import ColorCodewordConfig
from vlmrl.models.checkpoints.built_folders import MANIFEST
from vlmrl.models.checkpoints.text_files import build_tokenizer
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
from vlmrl.models.families.qwen3_vl import ATOMIC_TOKENS, RECIPE, SPECIAL_TOKENS, mrope_section
from vlmrl.tasks.color_codeword import LETTERS, ColorCodeword

TEXTS = ColorCodeword(ColorCodewordConfig(), seed=0).texts()

PRINT_FOLDER = """
import json, sys
from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint
config = ModelConfig(name="tiny", tiny=TinyConfig(), vlm=VLMConfig(family="qwen3_vl"))
print(ensure_tiny_checkpoint(config, tuple(json.loads(sys.argv[1]))))
assert sys.argv[2] == "may build" or "torch" not in sys.modules
"""


def config(**sizes: Any) -> ModelConfig:
    return ModelConfig(name="tiny", tiny=TinyConfig(**sizes), vlm=VLMConfig(family="qwen3_vl"))


def start(cache: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRINT_FOLDER, json.dumps(TEXTS), mode],
        env={**os.environ, "VLMRL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_processes_build_the_same_bytes_and_a_cached_checkpoint_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = [start(tmp_path / "shared", "may build") for _ in range(2)]
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path / "own"))
    own = ensure_tiny_checkpoint(config(), TEXTS)
    folders = []
    for process in at_once:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        folders.append(Path(out.strip()))
    assert folders[0] == folders[1]
    assert contents(folders[0]) == contents(own)
    assert [path.name for path in folders[0].parent.iterdir()] == [own.name], "scratch folders were left behind"

    cached = start(tmp_path / "shared", "torch would be a failure")
    out, err = cached.communicate(timeout=120)
    assert cached.returncode == 0, err
    assert Path(out.strip()) == folders[0]


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest", "manifest is no JSON", "no weights at all"])
def test_a_damaged_cache_is_repaired(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    folder = ensure_tiny_checkpoint(config(), TEXTS)
    whole = contents(folder)
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "remove":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "manifest is no JSON":
        (folder / MANIFEST).write_text("[")
    else:
        for path in folder.iterdir():
            path.unlink()
    assert ensure_tiny_checkpoint(config(), TEXTS) == folder
    assert contents(folder) == whole


def test_an_intact_cache_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    folder = ensure_tiny_checkpoint(config(), TEXTS)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    ensure_tiny_checkpoint(config(), TEXTS)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_sizes_or_texts_make_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path))
    small = {"bpe_merges": 8, "num_hidden_layers": 1}
    folders = {
        ensure_tiny_checkpoint(config(**small), TEXTS),
        ensure_tiny_checkpoint(config(**small, seed=1), TEXTS),
        ensure_tiny_checkpoint(config(**small, head_dim=16), TEXTS),
        ensure_tiny_checkpoint(config(**small), (*TEXTS, "more")),
    }
    assert len(folders) == 4


def test_the_special_tokens_are_those_of_qwen() -> None:
    tokenizer = build_tokenizer(RECIPE, TEXTS, 128)
    added = tokenizer.get_added_tokens_decoder()
    assert [added[id].content for id in sorted(added)] == [*SPECIAL_TOKENS, *ATOMIC_TOKENS]
    assert [token.content for _, token in sorted(added.items()) if token.special] == list(SPECIAL_TOKENS)
    first = min(added)
    # In Qwen3-VL: <|endoftext|> 151643, <|im_end|> 151645, <|image_pad|> 151655, <tool_call> 151657, </think> 151668.
    for token, real_id in {
        "<|im_end|>": 151645,
        "<|image_pad|>": 151655,
        "<tool_call>": 151657,
        "</think>": 151668,
    }.items():
        assert tokenizer.token_to_id(token) == first + real_id - 151643


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([id], skip_special_tokens=False) for id in tokenizer.encode(text).ids]


def test_letters_are_single_tokens_and_runs_of_them_do_not_merge() -> None:
    tokenizer = build_tokenizer(RECIPE, TEXTS, TinyConfig().bpe_merges)
    for letter in LETTERS:
        assert tokens(tokenizer, letter) == [letter]
        assert tokens(tokenizer, f" {letter}") == [f" {letter}"]
    for run in ("ABCD", "IHGFEDCBA", "AAAA"):
        assert tokens(tokenizer, run) == list(run)
    assert tokens(tokenizer, "<think>A</think><|im_end|>") == ["<think>", "A", "</think>", "<|im_end|>"]


def test_a_byte_level_tokenizer_knows_every_text() -> None:
    tokenizer = build_tokenizer(RECIPE, TEXTS, 128)
    text = "naïve 漢字 \U0001f600\r\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
def test_mrope_section_fits_the_head(head_dim: int) -> None:
    section = mrope_section(head_dim)
    assert sum(section) == head_dim // 2
    assert min(section) >= 1
