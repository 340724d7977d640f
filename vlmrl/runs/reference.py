"""Build the second model of a run on one rank (`reference=`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmrl.config.algorithm import AlgorithmConfig, DistillConfig, KLConfig
from vlmrl.config.model import Dtype, Init, ModelConfig
from vlmrl.config.reference import (
    CopyConfig,
    EmaReferenceConfig,
    FolderReferenceConfig,
    InitialReferenceConfig,
)
from vlmrl.config.run import BY_REWARD, Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.models.blocks import prepare_blocks
from vlmrl.models.checkpoints.load import load_model, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.models.policy import Policy
from vlmrl.trainer.preference import WEIGHTED_LOGPROBS
from vlmrl.trainer.reference import FrozenCopy, Reference, WithoutAdapters


def has_reference(config: RunConfig) -> bool:
    """Whether a run has a second model."""
    return config.mode in (*BY_REWARD, Mode.dpo) and isinstance(config.reference, CopyConfig)


def scored_algorithm(config: RunConfig) -> AlgorithmConfig:
    """The algorithm as the trainer of this run can follow it: nothing costs distance to a reference that is not there,
    as in a doctor's single step. With mode=dpo it is the part of the loss of pairs that has a gradient."""
    if config.mode is Mode.dpo:
        return AlgorithmConfig(loss=WEIGHTED_LOGPROBS)
    if has_reference(config):
        return config.algorithm
    return dataclasses.replace(config.algorithm, kl=KLConfig(), distill=DistillConfig())


def make_reference(
    config: RunConfig, model: ModelConfig, folder: Path, policy: Policy, banned_token_ids: Sequence[int]
) -> Reference | None:
    """The reference of this rank; None in a run without one. `model` is the config of the policy's model on this rank,
    `folder` its checkpoint. Raises `ConfigError` where the folder of a reference holds another vocabulary or the
    vocabulary is smaller than `algorithm.distill.top_k`, and `ModelError` where the reference does not load."""
    chosen = config.reference
    if not has_reference(config):
        return None
    _assert_enough_tokens(config, policy)
    if config.reference_is_policy:
        return WithoutAdapters(policy)
    assert isinstance(chosen, CopyConfig)
    settings = dataclasses.replace(model, lora=None, dtype=model.dtype if chosen.dtype is Dtype.auto else chosen.dtype)
    if isinstance(chosen, FolderReferenceConfig):
        settings = dataclasses.replace(settings, name=chosen.folder, tiny=None, init=Init.pretrained)
        _assert_same_vocabulary(chosen.folder, folder)
        folder = Path(chosen.folder)
    loaded: Any = load_model(folder, settings)
    prepare_blocks(loaded, compiled=config.trainer.compile is True, recomputed=False)
    positions = family_of(settings.vlm).position_function(loaded.config)
    cache = config.trainer.feature_cache_mib << 20
    second = Policy(loaded, positions, banned_token_ids, feature_cache_bytes=cache)
    if len(second.banned) != len(policy.banned):
        raise ConfigError(
            f"reference.folder={folder} has {len(second.banned)} logits per token and the policy {len(policy.banned)}, "
            "so they do not score the same tokens: name a checkpoint with the policy's vocabulary"
        )
    match chosen:
        case InitialReferenceConfig():
            return FrozenCopy(second, offload=chosen.offload, begins=True, refresh_every=chosen.refresh_every)
        case EmaReferenceConfig():
            return FrozenCopy(second, offload=chosen.offload, begins=True, decay=chosen.decay)
        case _:
            return FrozenCopy(second, offload=chosen.offload)


def _assert_enough_tokens(config: RunConfig, policy: Policy) -> None:
    """Raise `ConfigError` where the policy can sample fewer tokens than the reference is to report."""
    top_k, tokens = config.algorithm.distill.top_k, int((~policy.banned).sum())
    if top_k > tokens:
        raise ConfigError(
            f"algorithm.distill.top_k={top_k} is more than the {tokens} tokens that the policy can sample, so the "
            f"reference could not report so many: set algorithm.distill.top_k={tokens} for all of them, or less"
        )


def _assert_same_vocabulary(folder: str, own: Path) -> None:
    """Raise `ConfigError` where the tokenizer of a reference's folder gives a text other tokens than the policy's."""
    theirs, ours = (load_tokenizer(Path(place)).get_vocab() for place in (folder, own))
    if theirs != ours:
        other = min(theirs.items() ^ ours.items())[0]
        raise ConfigError(
            f"reference.folder={folder} has another vocabulary than the policy ({other!r} is not the same token), so "
            "its logprobs would be those of other tokens: name a checkpoint with the policy's tokenizer"
        )
