"""Checkpoints of families in the sizes that are published, with random weights, for benchmarks on a GPU.

Everything but the sizes is the tiny checkpoint of tests/support/families: the family's classes, chat template and
processor, and a tokenizer of its own. Tokens that stand for nothing fill its vocabulary, so that every token can be
sampled. `tiny` is that checkpoint itself, for rehearsals.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

# ruff: noqa: E402
from vlmrl.models import broken_wheels

broken_wheels.install()

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from support.families import build
from support.families.weights import save

Sizes = dict[str, Any]

QWEN2_5_VL_3B: Sizes = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}

QWEN3_5_2B: Sizes = {
    "text_config": {
        "vocab_size": 248320,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 6,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
    },
}

LARGE: dict[str, Sizes] = {"qwen2_5_vl": QWEN2_5_VL_3B, "qwen3_5": QWEN3_5_2B}
"""Family → what differs from its tiny checkpoint."""

LOGIT_SCALE = 20.0
"""Makes the answers of random weights about as certain as those of a trained model: -0.4 nats a token."""

IMAGE_AREA = {"shortest_edge": 4 * 28**2, "longest_edge": 16384 * 28**2}
"""Smallest and largest area of an image in pixels, in place of the tiny checkpoint's."""


def write_tokenizer_and_config(family: str, size: str, folder: Path) -> None:
    """The folder of a checkpoint of `family`. Only `size` tiny leaves weights that belong to it."""
    build(family, folder)
    if size == "tiny":
        return
    (folder / "model.safetensors").unlink()
    small = json.loads((folder / "config.json").read_text())
    for part, sizes in LARGE[family].items():
        small[part] |= sizes
    small["tie_word_embeddings"] = small["text_config"]["tie_word_embeddings"] = True
    small["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(small))
    _fill_vocabulary(folder / "tokenizer.json", small["text_config"]["vocab_size"])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"size": IMAGE_AREA}))


def random_model(folder: Path, device: str, *, logit_scale: float = 1.0) -> Any:
    """The model of a large checkpoint in bfloat16, seed 0. `logit_scale` multiplies the last norm, and so every logit:
    random weights alone make all tokens about equally likely."""
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    with torch.device(device):
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
    scale_logits(model, logit_scale)
    return model


def scale_logits(model: Any, scale: float) -> None:
    """Multiply the last norm by `scale`."""
    with torch.no_grad():
        norm = model.base_model.get_decoder().norm.weight
        # Qwen3.5's norms multiply by 1 + weight.
        offset = 1.0 if float(norm.abs().max()) == 0 else 0.0
        norm.add_(offset).mul_(scale).sub_(offset)


def write(family: str, size: str, folder: Path, device: str) -> Path:
    """A whole checkpoint, with weights → `folder`."""
    write_tokenizer_and_config(family, size, folder)
    if size != "tiny":
        save(random_model(folder, device, logit_scale=LOGIT_SCALE).cpu(), folder)
    return folder


def _fill_vocabulary(file: Path, size: int) -> None:
    """Give every id below `size` a token. Special tokens keep their ids: they become entries of the vocabulary too."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), size)}
    assert sorted(vocabulary.values()) == list(range(size))
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
