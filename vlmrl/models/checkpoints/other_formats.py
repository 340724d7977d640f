"""What a folder holds in place of a checkpoint that can be loaded, and what to do with it."""

from __future__ import annotations

from pathlib import Path

FORMATS = (
    (
        "adapter_config.json",
        "the folder holds an adapter, not a model; merge it into its base model first (peft: merge_and_unload)",
    ),
    (
        "*.gguf",
        "the folder holds a GGUF file, whose weights are quantized for llama.cpp; use the checkpoint it was made from",
    ),
    (
        "pytorch_model*.bin",
        "the weights are in PyTorch's pickle format, which can run code; save them as safetensors (transformers: "
        "save_pretrained)",
    ),
    (
        "params.json",
        "the folder holds a checkpoint in its authors' own format; use the one in transformers' format, often named "
        "…-hf",
    ),
    (
        "*.nemo",
        "the folder holds a NeMo checkpoint; export it to Hugging Face format first",
    ),
)
"""Pattern of a file → what that means, and the remedy."""


def other_format(folder: Path) -> str | None:
    """What is in a folder that lacks the files of a checkpoint; None where nothing in it is known."""
    return next((meaning for pattern, meaning in FORMATS if any(folder.glob(pattern))), None)


def other_tokenizer(folder: Path) -> str | None:
    """What is in a folder that lacks tokenizer.json; None where nothing in it is known."""
    found = next((name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()), None)
    if found is None:
        return None
    return (
        f"there is a {found}, from which transformers can make one: AutoTokenizer.from_pretrained(folder)"
        ".save_pretrained(folder)"
    )
