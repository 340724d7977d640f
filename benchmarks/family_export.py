"""Loads an exported checkpoint with transformers alone and compares it with the run's own: for benchmarks/families.py.

    python benchmarks/family_export.py EXPORTED CHECKPOINT     prints one JSON object

EXPORTED is what mode=export wrote, CHECKPOINT a folder of the run's checkpoints/. vlmrl is not imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model as its user loads it, and what transformers says about its tensors."""
    has_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, found


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that the run saved, without the optimizer's state."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
    return found


def main() -> None:
    exported, checkpoint = map(Path, sys.argv[1:])
    model, info = loaded(exported)
    AutoTokenizer.from_pretrained(exported)
    weights = dict(model.named_parameters())
    own = {name: tensor for name, tensor in trained(checkpoint).items() if name in weights}
    differ = [name for name, tensor in own.items() if not torch.equal(tensor.float(), weights[name].detach())]
    print(
        json.dumps(
            {
                "parameters": len(weights),
                "compared": len(own),
                "differ": len(differ),
                "missing": len(info["missing_keys"]),
                "unexpected": len(info["unexpected_keys"]),
                "mismatched": len(info["mismatched_keys"]),
            }
        )
    )


if __name__ == "__main__":
    main()
