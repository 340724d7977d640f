"""The tiny checkpoint: a real Qwen3-VL with random weights, built here in seconds and cached by content.

What is written is an ordinary Hugging Face folder: `Qwen3VLForConditionalGeneration` (vision tower, deepstack,
interleaved MRoPE, tied embeddings) in float32, a byte-level BPE tokenizer with Qwen3-VL's special tokens, its chat
template, and the image processor's settings. It loads by the same code as the real one (load.py).

Left out on purpose: tool specifications in the chat template (tool *messages* are in it); the video processor's own
settings, because no video is on the path.

Nothing here imports torch unless the checkpoint has to be built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmrl.errors import ConfigError
from vlmrl.models.config import ModelConfig, TinyConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUILDER_VERSION = 1
"""Raise it when this file writes other bytes for the same config and texts: old caches are then not found."""

MANIFEST = "manifest.json"
"""File name → SHA-256, written last: a folder whose files disagree with it is built again."""

# Qwen3-VL's own, in the order of their ids (151643 …). SPECIAL_TOKENS are `special` in its tokenizer (skipped by
# `skip_special_tokens`); ATOMIC_TOKENS are never split either, but count as text.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ATOMIC_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]

PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_WORDS = ("system\n", "user\n", "assistant\n")

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + parts(message.content) + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + parts(message.content) + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 16, 2, 2
VOCAB_MULTIPLE = 64
"""The model's vocabulary is rounded up to this, so that it has ids the tokenizer does not know, as the real one has."""


def cache_folder() -> Path:
    """`$VLMRL_CACHE`, else `~/.cache/vlmrl`."""
    return Path(os.environ.get("VLMRL_CACHE") or Path.home() / ".cache" / "vlmrl")


def ensure_tiny_checkpoint(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder of the tiny checkpoint of `config.tiny`, built if it is not in the cache.

    `texts` are what the BPE merges are trained on. The same sizes, seed and texts give the same bytes in every
    process. Safe to call from several processes at once; a folder that is incomplete or was changed is mended.
    Raises `ConfigError` for sizes that are no model.
    """
    check_tiny(config)
    key = json.dumps(
        [BUILDER_VERSION, _plain(_sizes(config)), list(texts), version("transformers"), version("tokenizers")],
        ensure_ascii=False,
        sort_keys=True,
    )
    folder = cache_folder() / "tiny" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not _is_intact(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _build(_sizes(config), texts, scratch)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def check_tiny(config: ModelConfig) -> None:
    """Raise `ConfigError` where the sizes of `model.tiny` do not make a Qwen3-VL. Imports no torch."""
    sizes = _sizes(config)
    head_dim_vision, rest = divmod(sizes.vision_hidden_size, sizes.vision_num_heads)
    demands = [
        (
            sizes.num_attention_heads % sizes.num_key_value_heads == 0,
            f"num_attention_heads={sizes.num_attention_heads} is no multiple of "
            f"num_key_value_heads={sizes.num_key_value_heads}",
        ),
        (
            sizes.head_dim % 2 == 0 and sizes.head_dim >= 8,
            f"head_dim={sizes.head_dim} is odd or below 8, so MRoPE has no room for time, height and width",
        ),
        (
            rest == 0 and head_dim_vision % 4 == 0,
            f"vision_hidden_size={sizes.vision_hidden_size} / vision_num_heads={sizes.vision_num_heads} "
            "is no multiple of 4, so the vision tower's rotary embedding does not fit",
        ),
        (
            all(0 <= index < sizes.vision_depth for index in sizes.deepstack_visual_indexes)
            and len(sizes.deepstack_visual_indexes) <= sizes.num_hidden_layers,
            f"deepstack_visual_indexes={list(sizes.deepstack_visual_indexes)} name layers that "
            f"vision_depth={sizes.vision_depth} or num_hidden_layers={sizes.num_hidden_layers} does not have",
        ),
    ]
    for holds, problem in demands:
        if not holds:
            raise ConfigError(f"model.tiny.{problem}: change one of them")


def mrope_section(head_dim: int) -> list[int]:
    """Rotary frequencies for time, height and width, in Qwen3-VL's proportions; they sum to head_dim / 2.

    >>> mrope_section(128), mrope_section(32)
    ([24, 20, 20], [6, 5, 5])
    """
    half = head_dim // 2
    space = half * 20 // 64
    return [half - 2 * space, space, space]


def build_tokenizer(texts: tuple[str, ...], merges: int) -> Tokenizer:
    """A byte-level BPE in Qwen's form: 256 bytes, at most `merges` merges learned from `texts`, then the specials."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=sorted(alphabet), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator([*CHAT_WORDS, *texts], trainer)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        + [AddedToken(token, special=False, normalized=False) for token in ATOMIC_TOKENS]
    )
    return tokenizer


def _sizes(config: ModelConfig) -> TinyConfig:
    assert config.tiny is not None, "model.tiny is not set"
    return config.tiny


def _plain(sizes: TinyConfig) -> dict[str, Any]:
    """The sizes as JSON; works for the dataclass and for its DictConfig."""
    return {
        name: list(value) if name == "deepstack_visual_indexes" else value
        for name in TinyConfig.__dataclass_fields__
        for value in [getattr(sizes, name)]
    }


def _build(sizes: TinyConfig, texts: tuple[str, ...], folder: Path) -> None:
    tokenizer = build_tokenizer(texts, sizes.bpe_merges)
    ids = {token: id for token, id in tokenizer.get_vocab().items() if token in SPECIAL_TOKENS}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "additional_special_tokens": SPECIAL_TOKENS[1:],
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": sizes.max_position_embeddings,
            "split_special_tokens": False,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": PATCH_SIZE,
            "merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            # Areas in pixels, despite the names: 32 × 32 stays as it is and is one token; 1024 × 1024 is 1024 tokens.
            "size": {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
        },
    )
    vocab_size = -(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    _write_weights(sizes, ids, vocab_size, folder)
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    _write_json(folder / MANIFEST, {path.name: _sha256(path) for path in files})


def _write_weights(sizes: TinyConfig, ids: dict[str, int], vocab_size: int, folder: Path) -> None:
    """config.json and model.safetensors.

    Names and shapes come from the real class on the meta device; values from numpy, because torch's normal numbers
    differ by rounding between processors and numpy's do not. The rule is transformers' own initialization.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            "head_dim": sizes.head_dim,
            "max_position_embeddings": sizes.max_position_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": mrope_section(sizes.head_dim),
            },
            "initializer_range": sizes.initializer_range,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_num_heads,
            "out_hidden_size": sizes.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(sizes.deepstack_visual_indexes),
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes.pop("lm_head.weight", None)  # tied to the embedding
    random = np.random.default_rng(sizes.seed)
    weights = {
        name: random.standard_normal(shape, np.float32) * np.float32(sizes.initializer_range)
        if len(shape) > 1
        else np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _publish(scratch: Path, folder: Path) -> None:
    """Move a finished build into place, whole if nothing is there, else file by file over what is there.

    A build is a function of the folder's name, so replacing a file that another process reads or has just written
    changes none of its bytes; only what is missing or broken changes. The manifest goes last.
    """
    try:
        scratch.rename(folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(folder / path.name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
