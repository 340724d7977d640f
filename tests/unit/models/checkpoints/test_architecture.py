"""What config.json alone says against a checkpoint of any architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmrl.models.checkpoints.architecture import longest_sequence, seeing_key, unfit_class, unfit_config
from vlmrl.models.checkpoints.other_formats import other_format, other_tokenizer

GLANCES: list[tuple[dict[str, Any], str | None]] = [
    ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "quant_method=mxfp4: quantized"),
    ({"model_type": "llama", "compression_config": {"format": "x"}}, "quantized weights have no gradients"),
    ({"model_type": "t5gemma", "is_encoder_decoder": True}, "an encoder reads the prompt in both directions"),
    ({"model_type": "florence2", "is_encoder_decoder": True, "vision_config": {}}, "is_encoder_decoder"),
    ({"model_type": "mllama", "text_config": {"cross_attention_layers": [3, 8]}}, "cross attention"),
    ({"model_type": "trocr", "add_cross_attention": True}, "cross attention"),
    ({"model_type": "mpt", "attn_config": {"alibi": True}}, "alibi=true"),
    ({"model_type": "falcon", "alibi": True}, "alibi=true"),
    ({"model_type": "hrm_text", "prefix_lm": True}, "prefix_lm=true"),
    ({"model_type": "deepseek_v32", "index_topk": 2048}, "an indexer chooses"),
    ({"model_type": "falcon", "alibi": False, "is_encoder_decoder": False, "index_topk": None}, None),
    ({"model_type": "llama", "quantization_config": None}, None),
    ({"hidden_size": "many"}, "hidden_size='many', which must be a whole number of at least 1; correct it"),
    ({"text_config": {"num_hidden_layers": -2}}, "text_config.num_hidden_layers=-2, which must be"),
    ({"vision_config": {"patch_size": 0}, "text_config": {}}, "vision_config.patch_size=0, which must be"),
    ({"n_head": 2.5}, "n_head=2.5, which must be"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "no multiple of num_key_value_heads=2"),
    ({"image_token_id": -1}, "image_token_id=-1, which must be a whole number of at least 0"),
    ({"vision_config": {"hidden_size": 8}}, "a vision_config and no text_config"),
    ({"vision_config": {}, "text_config": None, "image_token_id": 3}, "a vision_config and no text_config"),
    ({"vision_config": {}, "hidden_size": 64}, None),
    ({"num_key_value_heads": [2, 4], "num_attention_heads": 3, "head_dim": None}, None),
]


@pytest.mark.parametrize(("config", "reason"), GLANCES)
def test_a_glance_at_config_json(config: dict[str, Any], reason: str | None) -> None:
    found = unfit_config(config)
    assert found is None if reason is None else reason in (found or "")


CLASSES: list[tuple[str, bool, dict[str, Any], str | None]] = [
    ("nobody_knows", True, {"transformers_version": "9.1"}, r"is not in transformers .* written by 9\.1"),
    ("internvl_chat", True, {"auto_map": {"AutoModel": "x.Y"}}, "code that comes with the checkpoint .* not run"),
    ("clip", True, {}, "is no model that takes images and writes text"),
    ("t5", False, {}, "is no model that writes text"),
    ("blip", True, {}, "has no get_image_features"),
    ("git", True, {}, "has no get_image_features"),
    ("idefics", True, {}, "has no get_image_features"),
    ("paligemma", True, {}, "shows token 1 to token 0, which no window and no image explains"),
    ("llama4_text", False, {"num_hidden_layers": 4}, "mask function failed"),
    ("llama", False, {"hidden_size": "wide"}, r"Field 'hidden_size' expected int, got str \(value: 'wide'\)"),
    ("llama", False, {"hidden_act": "nobody"}, r"transformers cannot make a llama \(KeyError: 'nobody'\); correct it"),
    ("llama", False, {}, None),
    ("gpt2", False, {}, None),
    ("janus", True, {}, None),
]


@pytest.mark.parametrize(("family", "has_images", "more", "reason"), CLASSES)
def test_what_transformers_says(
    tmp_path: Path, family: str, has_images: bool, more: dict[str, Any], reason: str | None
) -> None:
    config = {"model_type": family, "num_hidden_layers": 1, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = unfit_class(tmp_path, config, has_images=has_images)
    if reason is None:
        assert found is None
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8192}}, 8192),
        ({"text_config": {"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 2048}}, 2048),
        ({"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 2048}, None),
        ({"rope_scaling": None}, None),
    ],
)
def test_where_rotary_frequencies_change(config: dict[str, Any], limit: int | None) -> None:
    assert longest_sequence(config) == limit


def test_a_key_of_images_anywhere() -> None:
    assert seeing_key({"thinker_config": {"vision_config": {}}}) == "vision_config"
    assert seeing_key({"image_token_id": 7}) == "image_token_id"
    assert seeing_key({"image_token_id": None, "vocab_size": 7}) is None


@pytest.mark.parametrize(
    ("file", "meaning"),
    [
        ("adapter_config.json", "merge it into its base model"),
        ("model-q4.gguf", "GGUF"),
        ("pytorch_model-00001-of-00002.bin", "save them as safetensors"),
        ("params.json", "its authors' own format"),
    ],
)
def test_folders_of_other_formats(tmp_path: Path, file: str, meaning: str) -> None:
    assert other_format(tmp_path) is None
    (tmp_path / file).touch()
    assert meaning in (other_format(tmp_path) or "")


def test_tokenizers_of_other_formats(tmp_path: Path) -> None:
    assert other_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    assert "there is a tokenizer.model" in (other_tokenizer(tmp_path) or "")
