"""Checks of position ids: the trainer's against transformers', the engine's against the trainer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vlmrl.models.families.positions import SECONDS
from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.evidence import Evidence
from vlmrl.runs.verdicts import Verdict, judged, not_visible
from vlmrl.types import TOKEN_TYPES, IntArray, Modality, TrainingSample


def trainer_positions(
    name: str, policy: Policy, feature_ids: Mapping[Modality, int], samples: Sequence[TrainingSample]
) -> Verdict:
    """The trainer's positions equal those of transformers' `get_rope_index`, which finds images and videos by the token
    ids alone; 0, 1, 2, … for a model without that function. `feature_ids`: the tokens that get the features of each
    kind."""
    get_rope_index = getattr(policy.model.base_model, "get_rope_index", None)
    worst, tokens = 0, 0
    for sample in samples:
        length = len(sample.token_ids)
        expected = np.tile(np.arange(length), (4, 1))
        if get_rope_index is not None:
            types = np.zeros(length, np.int64)
            for kind, id in feature_ids.items():
                types[sample.token_ids == id] = TOKEN_TYPES[kind]
            theirs, _ = get_rope_index(
                input_ids=torch.from_numpy(sample.token_ids)[None],
                mm_token_type_ids=torch.from_numpy(types)[None],
                **_geometry(sample),
            )
            expected[1:] = theirs[:, 0].numpy()
        ours = policy.positions(length, sample.placeholders, sample.mm_items)
        worst = max(worst, int(np.abs(ours - expected).max()))
        tokens += length
    source = "get_rope_index" if get_rope_index is not None else "0, 1, 2, …"
    finding = f"{len(samples)} samples, {tokens} tokens: max |delta| {worst} from {source}"
    return judged(name, worst == 0, finding, "0", max_delta=worst, tokens=tokens)


def _geometry(sample: TrainingSample) -> dict[str, torch.Tensor]:
    """The grids of the sample's images and videos, and the seconds between frames, by the names of `get_rope_index`."""
    found: dict[str, list[np.ndarray]] = {}
    for item in sample.mm_items:
        for name in (f"{item.modality}_grid_thw", SECONDS):
            if name in item.mm_kwargs:
                found.setdefault(name, []).append(item.mm_kwargs[name])
    return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in found.items()}


def engine_positions(name: str, policy: Policy, evidence: Evidence) -> Verdict:
    """Every token that the engine computed has the trainer's position, and the engine computed every token but the
    last of each sample."""
    if evidence.rows is None:
        return not_visible(
            name, "the engine computes in another process or model; wrong positions would show in the logprobs"
        )
    k = evidence.rows.shape[1] - 1
    whole: list[IntArray] = []
    fed: list[IntArray] = []
    for sample in evidence.samples:
        positions = policy.positions(len(sample.token_ids), sample.placeholders, sample.mm_items)[:k]
        rows = np.concatenate([sample.token_ids[None], positions]).T
        whole.append(rows)
        fed.append(rows[:-1])  # the last token was sampled and never fed
    theirs = {row.tobytes() for row in evidence.rows}
    ours = {row.tobytes() for rows in whole for row in np.ascontiguousarray(rows)}
    missing = {row.tobytes() for rows in fed for row in np.ascontiguousarray(rows)} - theirs
    stray = theirs - ours
    finding = (
        f"the engine computed {len(theirs)} distinct pairs of token and position: {len(stray)} are not the trainer's, "
        f"{len(missing)} of the trainer's are missing"
    )
    return judged(
        name,
        not stray and not missing,
        finding,
        "0 and 0",
        rows=len(theirs),
        stray=len(stray),
        missing=len(missing),
    )
