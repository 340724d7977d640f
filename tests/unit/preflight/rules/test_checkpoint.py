"""A machine that has, or lacks, the checkpoint and the device of a model."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.model_folders import QWEN3_VL, folder_config, without_hub
from vlmrl.config.model import Dtype, ModelConfig, TinyConfig, VLMConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.load import resolve_checkpoint
from vlmrl.preflight.rules.checkpoint import frequencies_stay, refuse_model
from vlmrl.preflight.site import this_site


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder of the user's own, which a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that nobody serves. Returns the cache."""
    return without_hub(tmp_path / "hub", monkeypatch)


def test_the_tiny_default_is_available_anywhere() -> None:
    refuse_model(ModelConfig(name="tiny", vlm=QWEN3_VL, tiny=TinyConfig()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_real_model_without_gpu_weights_and_network_is_refused_in_seconds(no_hub: Path) -> None:
    config = ModelConfig(name="Qwen/Qwen3-VL-4B-Instruct", dtype=Dtype.bfloat16, vlm=QWEN3_VL)
    begin = time.monotonic()
    with pytest.raises(ConfigError) as error:
        refuse_model(config)
    assert time.monotonic() - begin < 10
    for said in (
        "model.name=Qwen/Qwen3-VL-4B-Instruct",
        str(no_hub),
        "cannot be reached",
        "no CUDA device",
        "python -m vlmrl",
        "model.name=<folder",
    ):
        assert said in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_demanded_gpu_that_is_not_there_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.device=cuda"):
        refuse_model(folder_config(copy, device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_weights_too_big_for_a_cpu_are_refused_unless_the_cpu_is_asked_for(copy: Path) -> None:
    size = 3 * 1024**3
    header = json.dumps({"large": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (copy / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # sparse: takes no room
    with pytest.raises(ConfigError, match="needs a GPU"):
        refuse_model(folder_config(copy, device="auto"))
    refuse_model(folder_config(copy, device="cpu"))


def test_truncated_weights_are_refused_before_the_run(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is corrupt .*: copy or download the checkpoint again"):
        refuse_model(folder_config(copy, device="cpu"))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        refuse_model(folder_config(tmp_path / "nothing"))


def cache_as_hub_does(folder: Path, hub: Path) -> Path:
    snapshot = hub / "models--org--tiny-vl" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    (hub / "models--org--tiny-vl" / "refs").mkdir()
    (hub / "models--org--tiny-vl" / "refs" / "main").write_text("0123abc")
    return snapshot


def test_a_cached_hub_name_needs_no_network(tiny_folder: Path, no_hub: Path) -> None:
    snapshot = cache_as_hub_does(tiny_folder, no_hub)
    config = ModelConfig(name="org/tiny-vl", device="cpu", vlm=QWEN3_VL)
    refuse_model(config)
    assert resolve_checkpoint(config, ()) == snapshot


def test_a_half_downloaded_hub_name_counts_as_missing(tiny_folder: Path, no_hub: Path) -> None:
    (cache_as_hub_does(tiny_folder, no_hub) / "model.safetensors").unlink()
    config = ModelConfig(name="org/tiny-vl", device="cpu", vlm=QWEN3_VL)
    with pytest.raises(ConfigError, match="not in the hub's cache"):
        refuse_model(config)


def test_a_cached_hub_name_of_another_family_is_refused(tiny_folder: Path, no_hub: Path) -> None:
    cache_as_hub_does(tiny_folder, no_hub)
    other = VLMConfig(family="qwen3_5", renderers=["qwen3.5"], positions="mrope", image_token="<|image_pad|>")
    with pytest.raises(ConfigError, match=r"model\.vlm\.family=qwen3_5"):
        refuse_model(ModelConfig(name="org/tiny-vl", device="cpu", vlm=other))


def test_a_folder_and_a_text_only_model_are_taken(copy: Path) -> None:
    refuse_model(folder_config(copy, Dtype.bfloat16))
    (copy / "preprocessor_config.json").unlink()
    refuse_model(ModelConfig(name=str(copy), device="cpu", vlm=None))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing"):
        refuse_model(folder_config(copy))


def test_a_folder_of_another_family_is_refused(copy: Path) -> None:
    other = VLMConfig(family="qwen3_5", renderers=["qwen3.5"], positions="mrope", image_token="<|image_pad|>")
    with pytest.raises(ConfigError, match=r"model_type=qwen3_vl, but model\.vlm\.family=qwen3_5"):
        refuse_model(ModelConfig(name=str(copy), device="cpu", vlm=other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_export_needs_no_gpu(copy: Path) -> None:
    refuse_model(folder_config(copy, device="cuda"), needs_device=False)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_checkpoint_that_cannot_be_trained_says_why(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match="quant_method=awq: quantized weights have no gradients"):
        refuse_model(folder_config(copy))


def test_a_family_that_transformers_does_not_know_says_so(copy: Path) -> None:
    change_config(copy, model_type="qwen9_vl")
    vlm = VLMConfig(family="qwen9_vl", renderers=["template"], positions="mrope", image_token="<|image_pad|>")
    with pytest.raises(ConfigError, match="model_type=qwen9_vl is not in transformers"):
        refuse_model(ModelConfig(name=str(copy), device="cpu", vlm=vlm))


def test_sequences_beyond_which_rotary_frequencies_change(copy: Path, run_config: Callable[..., RunConfig]) -> None:
    change_config(copy, rope_scaling={"type": "longrope"}, original_max_position_embeddings=96)
    name = f"model.name={copy}"
    frequencies_stay(run_config("model=auto", name, "trainer.seq_len=96"), this_site())
    with pytest.raises(ConfigError, match=r"trainer\.seq_len=97 allows sequences of more than 96 tokens"):
        frequencies_stay(run_config("model=auto", name, "trainer.seq_len=97"), this_site())


def test_what_stands_in_place_of_the_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing \(.* PyTorch's pickle format"):
        refuse_model(folder_config(copy))
