"""Loading checkpoints: the tiny one and others by the same code; errors name the missing or broken file."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.numpy import load_file, save_file

from support.model_folders import QWEN3_VL, folder_config, without_hub
from vlmrl.config.model import Dtype, ModelConfig, TinyConfig, VLMConfig
from vlmrl.errors import ModelError
from vlmrl.models.checkpoints.load import (
    load_eos_ids,
    load_image_processor,
    load_model,
    load_tokenizer,
    missing_files,
    resolve_checkpoint,
    resolve_device,
    wrong_image_token,
)
from vlmrl.models.families.qwen3_vl import ATOMIC_TOKENS, SPECIAL_TOKENS

TEXTS = ("red A, green B",)


def tiny_config() -> ModelConfig:
    return ModelConfig(name="tiny", vlm=QWEN3_VL, tiny=TinyConfig())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_checkpoint(tiny_config(), TEXTS)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint as a user's folder, for tests that damage it."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an unreachable hub. Returns the cache."""
    return without_hub(tmp_path / "hub", monkeypatch)


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tiny_checkpoint_is_a_real_qwen3_vl(tiny: Path) -> None:
    model = load_model(tiny, tiny_config())
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {str(parameter.device) for parameter in model.parameters()} == {str(resolve_device(tiny_config()))}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vision_config.deepstack_visual_indexes == [0]
    assert model.config.text_config.rope_parameters["mrope_interleaved"] is True
    assert model.config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    matrices = [w for name, w in weights.items() if w.ndim > 1]
    assert all(0.06 < float(w.std()) < 0.1 for w in matrices if w.numel() > 1000)
    assert all(bool((w == 1).all()) for name, w in weights.items() if w.ndim == 1 and name.endswith("weight"))
    assert all(bool((w == 0).all()) for name, w in weights.items() if name.endswith("bias"))


def test_logits_depend_on_the_pixels(tiny: Path) -> None:
    """The whole forward pass runs, and different pixels give different logits."""
    model, tokenizer, processor = load_model(tiny, tiny_config()), load_tokenizer(tiny), load_image_processor(tiny)
    ids = tokenizer("<|vision_start|><|image_pad|><|vision_end|>A", return_tensors="pt").input_ids
    logits = []
    for colour in ((255, 0, 0), (0, 0, 255)):
        pixels = processor(images=[PILImage.new("RGB", (32, 32), colour)], return_tensors="pt")
        types = (ids == model.config.image_token_id).long()
        with torch.no_grad():
            logits.append(model(input_ids=ids, mm_token_type_ids=types, **pixels).logits[0, -1])
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


def test_the_vocabulary_exceeds_the_tokenizer(tiny: Path) -> None:
    model, tokenizer = load_model(tiny, tiny_config()), load_tokenizer(tiny)
    assert model.config.text_config.vocab_size % 64 == 0
    assert model.config.text_config.vocab_size > len(tokenizer)


def test_a_folder_loads_by_the_same_code_in_another_dtype(copy: Path) -> None:
    config = folder_config(copy, Dtype.bfloat16)
    assert resolve_checkpoint(config, TEXTS) == copy
    model = load_model(copy, config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_text_only_model_loads(tmp_path: Path, copy: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = Qwen3Config(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Qwen3ForCausalLM(sizes).save_pretrained(tmp_path / "text")  # type: ignore[no-untyped-call]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copy / name, tmp_path / "text")
    config = ModelConfig(name=str(tmp_path / "text"), device="cpu", vlm=None)
    assert type(load_model(tmp_path / "text", config)).__name__ == "Qwen3ForCausalLM"


def test_the_tokenizer_has_qwens_special_tokens(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.unk_token is None
    assert tokenizer.bos_token is None
    text = "<|im_start|>A<think> b</think><|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A<think> b</think>"
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL_TOKENS)
    assert all(tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)] for token in ATOMIC_TOKENS)


@pytest.mark.parametrize(
    ("size", "grid"), [((32, 32), (2, 2)), ((64, 32), (2, 4)), ((100, 45), (2, 6)), ((5, 5), (2, 2))]
)
def test_the_image_processor_keeps_small_images_small(tiny: Path, size: tuple[int, int], grid: tuple[int, int]) -> None:
    processor = load_image_processor(tiny)
    assert type(processor).__name__.endswith("Pil")
    output = processor(images=[PILImage.new("RGB", size)], return_tensors="np")
    assert output["image_grid_thw"].tolist() == [[1, *grid]]
    assert output["pixel_values"].shape == (grid[0] * grid[1], 3 * 2 * 16 * 16)
    np.testing.assert_array_equal(output["pixel_values"], -1.0)  # black, mean and std 0.5


# ── what is broken ──────────────────────────────────────────────────────────────────────────────────────────


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def spoil_a_weight(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | values))


def name_a_missing_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: truncate(folder / "config.json"), "config.json is corrupt"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is corrupt"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
        (drop_a_weight, "lacks 1 weights .* model.language_model.norm.weight"),
        (another_shape, r"mlp\.down_proj\.weight has the shape \[64, 128\], and by config\.json it has \[64, 96\]"),
        (lambda folder: spoil_a_weight(folder, math.nan), "model.language_model.norm.weight has values that are not f"),
        (lambda folder: spoil_a_weight(folder, math.inf), "model.language_model.norm.weight has values that are not f"),
        (name_a_missing_shard, "model-00001-of-00002.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda folder: edit(folder / "model.safetensors.index.json", weight_map={}), "no weight_map"),
        (lambda folder: edit(folder / "model.safetensors.index.json", weight_map={"a": 5}), "names no files"),
        (
            lambda folder: edit(folder / "config.json", text_config="x"),
            "something that transformers' qwen3_vl does not",
        ),
    ],
)
def test_a_broken_folder_is_a_model_error_that_names_the_file(
    copy: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=named):
        load_model(copy, folder_config(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_corrupt_tokenizer_is_named(copy: Path, name: str) -> None:
    truncate(copy / name)
    with pytest.raises(ModelError, match=f"{name} is corrupt"):
        load_tokenizer(copy)


@pytest.mark.parametrize("id", ["x", -1, [2, None], True])
def test_the_end_of_an_answer_is_a_token(tmp_path: Path, id: Any) -> None:
    edit(tmp_path / "generation_config.json", eos_token_id=id)
    with pytest.raises(ModelError, match="no token id, so an answer would not end there"):
        load_eos_ids(tmp_path)


def test_config_and_tokenizer_name_the_same_image_token(copy: Path) -> None:
    assert wrong_image_token(copy, folder_config(copy)) == []
    edit(copy / "config.json", image_token_id=3)
    (problem,) = wrong_image_token(copy, folder_config(copy))
    assert re.search(r"image_token_id=3, but model\.vlm\.image_token=<\|image_pad\|> is token \d+ of tok", problem)


def test_an_image_processor_may_be_in_either_file(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    edit(copy / "processor_config.json", processor_class="x")
    assert missing_files(copy, folder_config(copy)) == ["preprocessor_config.json is missing"]
    edit(copy / "processor_config.json", image_processor={})
    assert missing_files(copy, folder_config(copy)) == []


def test_a_missing_tokenizer_is_not_an_empty_one(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        load_tokenizer(copy)


def test_a_corrupt_image_processor_is_named(copy: Path) -> None:
    truncate(copy / "preprocessor_config.json")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is corrupt"):
        load_image_processor(copy)


def test_a_checkpoint_of_another_family_is_not_loaded(copy: Path) -> None:
    other = VLMConfig(family="qwen3_5", renderers=["qwen3.5"], positions="mrope", image_token="<|image_pad|>")
    config = ModelConfig(name=str(copy), device="cpu", vlm=other)
    with pytest.raises(ModelError, match=r"model_type=qwen3_vl, but model\.vlm\.family=qwen3_5"):
        load_model(copy, config)


def test_a_failed_download_is_a_model_error(no_hub: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.name=org/tiny-vl could not be downloaded"):
        resolve_checkpoint(ModelConfig(name="org/tiny-vl", vlm=QWEN3_VL), TEXTS)
