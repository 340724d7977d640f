"""`mode=export` of every family: the folder is a published checkpoint with the weights that the policy learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.families.learning import LEARNING, Folder, Learning, learning
from vlmrl.config.model import Dtype
from vlmrl.models.checkpoints.load import load_model
from vlmrl.runs.export import export_checkpoint
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.trainer import LocalTrainer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def exported(family: Learning, run: Path) -> tuple[LocalTrainer, Path]:
    """The trainer after a step, and the folder exported from its checkpoint."""
    trainer = family.trainer()
    trainer.train_step(list(family.samples))
    checkpoints = Checkpoints(run / "checkpoints", 1)
    checkpoints.save(1, trainer, LoopState())
    checkpoints.finish()
    return trainer, export_checkpoint(replace(family.config, output_dir=str(run)), pytest.fail)


def by_transformers(folder: Path, *, has_images: bool) -> Any:
    """The model as a user of transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def assert_published(folder: Path, source: Path) -> None:
    """The file has the source's names, shapes and tied weights, and the rest of the folder is the source's."""
    before, after = (load_file(each / "model.safetensors") for each in (source, folder))
    assert {name: weight.shape for name, weight in after.items()} == {n: weight.shape for n, weight in before.items()}
    changed = sum(not torch.equal(after[name], before[name]) for name in after)
    assert changed > len(after) // 4, "half of Janus makes images, which no reward reaches"
    for path in source.iterdir():
        if path.name == "config.json":
            assert json.loads((folder / path.name).read_text()) == json.loads(path.read_text())
        elif path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", LEARNING)
def test_transformers_loads_what_was_learned(name: str, family_folder: Folder, tmp_path: Path) -> None:
    """Bit for bit. The exported folder renders the same tokens and pixels, and its policy has the same logprobs."""
    family = learning(family_folder(name))
    trainer, folder = exported(family, tmp_path)
    assert_published(folder, family.folder)
    found = by_transformers(folder, has_images=family.has_images).state_dict()
    wanted = trainer._learner.policy.model.state_dict()
    assert found.keys() == wanted.keys()
    for key, weight in wanted.items():
        assert torch.equal(found[key], weight), key
    again = learning(folder)
    for one, other in zip(again.samples, family.samples, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert [image.hash for image in one.mm_items] == [image.hash for image in other.mm_items]
    ours, theirs = (np.concatenate(each.logprobs(list(family.samples))) for each in (trainer, again.trainer()))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["glm4v", "qwen3_5_moe", "smolvlm"])
def test_adapters_are_merged(name: str, family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    family = learning(family_folder(name))
    trainer, folder = exported(family.adapted(), tmp_path)
    found = dict(by_transformers(folder, has_images=family.has_images).named_parameters())
    learned = trainer.weights()
    assert found.keys() == learned.keys()
    for key, weight in learned.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", ["qwen3_vl_moe"])
def test_the_dtype_is_the_models(name: str, family_folder: Folder, tmp_path: Path) -> None:
    family = learning(family_folder(name)).changed(dtype=Dtype.bfloat16)
    family = replace(family, model=load_model(family.folder, family.config.model))
    trainer, folder = exported(family, tmp_path)
    written = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    found = dict(by_transformers(folder, has_images=True).named_parameters())
    for key, weight in trainer.weights().items():
        assert torch.equal(found[key], weight), key
