"""`model.init=random`: the published sizes, a folder that loads like any other, the same weights for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmrl.config.conf_folder import CONF
from vlmrl.config.model import Init, ModelConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import ModelError
from vlmrl.models.checkpoints.load import load_image_processor, load_model, load_tokenizer, resolve_checkpoint
from vlmrl.models.checkpoints.scratch import write_weights

SMALL = (
    "model.device=cpu",
    "model.size.text.vocab_size=1000",
    "model.size.text.hidden_size=32",
    "model.size.text.intermediate_size=64",
    "model.size.text.num_hidden_layers=3",
    "model.size.text.num_attention_heads=4",
    "model.size.text.num_key_value_heads=2",
    "model.size.vision.depth=2",
    "model.size.vision.hidden_size=32",
    "model.size.vision.intermediate_size=64",
    "model.size.vision.num_heads=4",
    "model.size.vision.out_hidden_size=32",
    "model.size.vision.deepstack_visual_indexes=[0]",
)
"""The numbers of a size file, made small."""
MOE = (
    "model=qwen3vl_moe",
    "model.size.text.num_experts=4",
    "model.size.text.num_experts_per_tok=2",
    "model.size.text.moe_intermediate_size=24",
)
TEXTS = ("red A, green B",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path / "cache"))


def made(config: ModelConfig) -> tuple[Path, Any]:
    folder = resolve_checkpoint(config, TEXTS)
    torch.manual_seed(7)
    return folder, load_model(folder, config)


@pytest.mark.parametrize(
    ("size", "family", "billions"),
    [("2b", "qwen3_vl", 2.13), ("4b", "qwen3_vl", 4.44), ("8b", "qwen3_vl", 8.77), ("30b_a3b", "qwen3_vl_moe", 31.07)],
)
def test_the_parameter_counts_are_the_published_ones(size: str, family: str, billions: float) -> None:
    """The counts on the hub, to the precision in which they are given there."""
    numbers: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "size" / f"{size}.yaml"))
    tied = numbers["tie_word_embeddings"]
    config = AutoConfig.for_model(
        family,
        text_config={**numbers["text"], "tie_word_embeddings": tied},
        vision_config=numbers["vision"],
        tie_word_embeddings=tied,
    )
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


@pytest.mark.parametrize("options", [("model=qwen3vl",), MOE], ids=["dense", "experts"])
def test_a_folder_that_is_written_is_the_model(
    options: tuple[str, ...], run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = run_config(*options, "model.init=random", *SMALL).model
    folder, model = made(config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not list(folder.glob("*.safetensors"))
    assert torch.equal(model.get_input_embeddings().weight, made(config)[1].get_input_embeddings().weight)
    target = write_weights(model, folder, tmp_path / "written")
    config.init, config.name = Init.pretrained, str(target)
    again = load_model(target, config)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_square_experts_are_refused(run_config: Callable[..., RunConfig]) -> None:
    """transformers transposes the experts of a file where their shape is not the parameter's."""
    square = run_config(*MOE, "model.init=random", *SMALL, "model.size.text.moe_intermediate_size=16").model
    with pytest.raises(ModelError, match=r"experts.gate_up_proj is square \(32 × 32\)"):
        made(square)


def test_its_tokenizer_and_processor_are_qwen3_vl_s(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("model=qwen3vl", "model.init=random", *SMALL).model
    folder, model = made(config)
    tokenizer: Any = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings == 1000
    processor: Any = load_image_processor(folder)
    assert processor.size == {"shortest_edge": 32 * 32, "longest_edge": 16 * 1024 * 1024}
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["mrope_section"] == [24, 20, 20]
    assert text["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
