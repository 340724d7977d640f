"""One function per line of the doctor's table: evidence in, a verdict out.

Nothing here runs a rollout. Where a figure has a bound, the line says both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from vlmrl.models.policy import Policy
from vlmrl.rendering.images import image_hash
from vlmrl.runs.doctor.evidence import Played, images_of
from vlmrl.trainer.loss import mismatch_kl
from vlmrl.types import (
    FloatArray,
    ImageItem,
    IntArray,
    Message,
    Prompt,
    Rollout,
    StepResult,
    Text,
    TrainingSample,
    WeightComparison,
)


class Verdict(StrEnum):
    """What a line says."""

    OK = "ok"
    FAILED = "FAILED"
    HIDDEN = "not visible"
    """There is nothing to look at here; the line says why, and what depends on it."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    verdict: Verdict
    says: str
    """What was measured, or why nothing was."""
    bound: str = ""
    """What the figure had to be; empty where it is no figure."""
    figures: dict[str, float] = field(default_factory=dict)
    """The measured ones, for machines."""

    @property
    def text(self) -> str:
        """For the screen, beside the name."""
        return f"{self.verdict:<11}  {self.says}" + (f" (bound: {self.bound})" if self.bound else "")


def hidden(name: str, why: str) -> Line:
    return Line(name, Verdict.HIDDEN, why)


def failed(name: str, says: str) -> Line:
    return Line(name, Verdict.FAILED, says)


def judged(name: str, holds: bool, says: str, bound: str, **figures: float) -> Line:
    """A line with figures."""
    return Line(name, Verdict.OK if holds else Verdict.FAILED, says, bound, figures)


# ── the renderer against transformers ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reference:
    """transformers' own way from messages to tokens and pixels, freshly loaded from the checkpoint."""

    tokenizer: Any
    image_processor: Any
    """None for a text-only model."""
    image_token: str | None

    def token_ids(self, messages: Sequence[Message], images: Sequence[ImageItem]) -> list[int]:
        """What the chat template makes of a conversation that the policy is to continue, with every image token
        repeated as often as the image processor's grid says."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            _chat(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if not images:
            return ids
        image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if ids.count(image_token_id) != len(images):
            return ids  # and it will be seen that these are others
        counts = iter(self.process(images)["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2)
        return [id for token in ids for id in [token] * (int(next(counts)) if token == image_token_id else 1)]

    def process(self, images: Sequence[ImageItem]) -> dict[str, np.ndarray]:
        """What the image processor makes of the decoded pictures, all in one call."""
        pictures = [PILImage.fromarray(image.pixels) for image in images]
        return dict(self.image_processor(images=pictures, return_tensors="np"))


def _chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A chat template's messages. Text alone is one string, which every template takes."""
    return [
        {
            "role": message.role,
            "content": "".join(part.text for part in message.content if isinstance(part, Text))
            if not images_of([message])
            else [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]


def first_turns(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Line:
    """The renderer's token ids are the chat template's."""
    for rollout in rollouts:
        if not rollout.turns:
            return failed(name, f"{rollout.problem_id} gave no prompt ({rollout.stop_reason}): {rollout.error}")
    return _token_ids(name, reference, [_conversation(rollout, 1) for rollout in rollouts])


def later_turns(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Line:
    """So are those of a conversation that went on after a scripted answer; what a policy samples need not be what the
    tokenizer makes of its text."""
    later = [_conversation(r, turns) for r in rollouts for turns in range(2, len(r.turns) + 1)]
    if not later:
        return hidden(name, "no episode went on after its first turn")
    return _token_ids(name, reference, later)


def _conversation(rollout: Rollout, turns: int) -> tuple[str, list[Message], Prompt]:
    """The messages up to the prompt of a turn, 1-based, and that prompt."""
    messages = list(rollout.turns[0].messages)
    for before, turn in zip(rollout.turns[: turns - 1], rollout.turns[1:turns], strict=True):
        messages += [Message.of("assistant", before.text), *turn.messages]
    return f"problem {rollout.problem_id}, turn {turns}", messages, rollout.turns[turns - 1].prompt


def _token_ids(name: str, reference: Reference, conversations: Sequence[tuple[str, list[Message], Prompt]]) -> Line:
    if not reference.tokenizer.chat_template:
        return hidden(name, "the checkpoint has no chat template")
    for where, messages, prompt in conversations:
        theirs, ours = reference.token_ids(messages, prompt.images), prompt.token_ids.tolist()
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            shown = [reference.tokenizer.decode(ids[at : at + 8]) for ids in (ours, theirs)]
            return failed(
                name,
                f"{where}: {len(ours)} tokens of ours, {len(theirs)} of the chat template's; from token {at} on "
                f"ours say {shown[0]!r}, theirs {shown[1]!r}",
            )
    tokens = sum(len(prompt.token_ids) for _, _, prompt in conversations)
    says = f"{len(conversations)} prompts of {tokens} tokens are the chat template's"
    return judged(name, True, says, "", prompts=len(conversations), tokens=tokens)


def pixels(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Line:
    """Pixels and grids are the image processor's, byte for byte."""
    if reference.image_processor is None:
        return hidden(name, "the model is text-only")
    distinct = {image.hash: image for r in rollouts for turn in r.turns for image in turn.prompt.images}
    if not distinct:
        return hidden(name, "the problems show no image")
    images = list(distinct.values())
    theirs = reference.process(images)
    for key, array in theirs.items():
        ours = np.concatenate([image.mm_kwargs[key] for image in images])
        if ours.dtype != array.dtype or ours.tobytes() != np.ascontiguousarray(array).tobytes():
            apart = float(np.abs(ours - array).max()) if ours.shape == array.shape else float("nan")
            return failed(
                name,
                f"{key}: {ours.dtype} {list(ours.shape)} of ours, {array.dtype} {list(array.shape)} of the image "
                f"processor's, max |delta| {apart:.3g}",
            )
    says = f"{', '.join(theirs)} of {len(images)} images are the image processor's, byte for byte"
    return judged(name, True, says, "", images=len(images))


# ── one rollout, hop by hop ─────────────────────────────────────────────────────────────────────────────────


def rollouts(name: str, played: Played) -> Line:
    """All of them were played without a fault."""
    everyone = played.rollouts()
    turns = [turn for rollout in everyone for turn in rollout.turns]
    tokens = sum(len(turn.completion.token_ids) for turn in turns)
    says = f"{len(everyone)} rollouts, {len(turns)} turns, {tokens} tokens sampled"
    for rollout in everyone:
        if rollout.stop_reason.is_fault:
            return failed(name, f"{rollout.rollout_id} ended as {rollout.stop_reason}: {rollout.error}")
        if not rollout.turns:
            return failed(name, f"{rollout.rollout_id}: the first prompt leaves no room for an answer")
    return judged(name, tokens > 0, says, "", rollouts=len(everyone), turns=len(turns), tokens=tokens)


def placeholders(name: str, policy: Policy, image_token_id: int | None, samples: Sequence[TrainingSample]) -> Line:
    """Per sample: image tokens == placeholders == marked tokens == grids == features, and in the same places."""
    if image_token_id is None:
        return hidden(name, "the model is text-only")
    images = {image.hash: image for sample in samples for image in sample.images}
    if not images:
        return hidden(name, "the problems show no image")
    merge = policy.config.vision_config.spatial_merge_size
    with torch.no_grad():
        encoded = {hash: policy.encode_images([image]) for hash, image in images.items()}
    totals = np.zeros(5, np.int64)
    for sample in samples:
        is_image = sample.token_ids == image_token_id
        counts = {
            "image tokens": int(is_image.sum()),
            "in placeholders": sum(placeholder.length for placeholder in sample.placeholders),
            "marked": int((sample.mm_token_type_ids == 1).sum()),
            "by grids": sum(int(image.mm_kwargs["image_grid_thw"].prod()) // merge**2 for image in sample.images),
            "features": sum(
                level.shape[0]
                for image in sample.images
                for features in [encoded[image.hash]]
                if features is not None
                for level in features.levels[:1]
            ),
        }
        if len(set(counts.values())) > 1:
            return failed(name, f"{sample.rollout_id}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        if not np.array_equal(is_image, sample.mm_token_type_ids == 1):
            at = int(np.flatnonzero(is_image != (sample.mm_token_type_ids == 1))[0])
            return failed(
                name, f"{sample.rollout_id}: token {at} is an image's in the ids or in the placeholders alone"
            )
        totals += list(counts.values())
    says = f"{len(samples)} samples: " + " = ".join(f"{n} {what}" for n, what in zip(totals, counts, strict=True))
    return judged(name, True, says, "", samples=len(samples), image_tokens=int(totals[0]))


def image_hashes(name: str, played: Played, twice: Prompt | None) -> Line:
    """From the task's picture to the engine's request and the trainer's sample an image keeps its hash, and one that is
    shown twice is two placeholders."""
    if twice is None:
        return hidden(name, "no image is shown")
    shown = 0
    for rendered in played.rendered:
        new, prompt = rendered.hashes, rendered.prompt
        shown += len(new)
        in_prompt = [placeholder.hash for placeholder in prompt.placeholders][len(prompt.placeholders) - len(new) :]
        if tuple(in_prompt) != new:
            return failed(name, f"the task shows {list(new)}, the prompt {in_prompt}")
        if [image_hash(image.pixels) for image in prompt.images] != [p.hash for p in prompt.placeholders]:
            return failed(name, "a placeholder names another image than the pixels that go with it")
    requests = {_identity(prompt) for prompt in played.requests}
    for rollout in played.rollouts():
        if any(_identity(turn.prompt) not in requests for turn in rollout.turns):
            return failed(name, f"{rollout.rollout_id}: a prompt did not reach the engine as it was rendered")
    shown_by = {
        rollout.rollout_id: [
            tuple(list(turns)[-1].prompt.placeholders) for _, turns in groupby(rollout.turns, lambda turn: turn.branch)
        ]
        for rollout in played.rollouts()
    }
    for sample in played.samples:
        if sample.placeholders not in shown_by[sample.rollout_id]:
            return failed(name, f"{sample.rollout_id}: its sample shows other images than its prompts")
    pairs = [
        (a, b)
        for i, a in enumerate(twice.placeholders)
        for b in twice.placeholders[i + 1 :]
        if a.hash == b.hash and a.offset != b.offset
    ]
    if not pairs:
        return failed(name, f"an image shown twice is {[(p.offset, p.hash) for p in twice.placeholders]}")
    says = (
        f"{shown} images keep their hash from the task through {len(requests)} distinct requests to "
        f"{len(played.samples)} samples; one shown twice is two placeholders"
    )
    return judged(name, True, says, "", images=shown, requests=len(requests), samples=len(played.samples))


def _identity(prompt: Prompt) -> tuple[bytes, Any, tuple[str, ...]]:
    return prompt.token_ids.tobytes(), prompt.placeholders, tuple(image.hash for image in prompt.images)


# ── positions ───────────────────────────────────────────────────────────────────────────────────────────────


def trainer_positions(name: str, policy: Policy, image_token_id: int | None, samples: Sequence[TrainingSample]) -> Line:
    """Ours are transformers' own, which are told which tokens are an image's by the ids alone."""
    get_rope_index = getattr(policy.model.base_model, "get_rope_index", None)
    if get_rope_index is None:
        return hidden(name, f"{type(policy.model.base_model).__name__} has no get_rope_index to compare with")
    worst, tokens = 0, 0
    for sample in samples:
        length = len(sample.token_ids)
        grids = [image.mm_kwargs["image_grid_thw"] for image in sample.images]
        theirs, _ = get_rope_index(
            input_ids=torch.from_numpy(sample.token_ids)[None],
            mm_token_type_ids=torch.from_numpy((sample.token_ids == image_token_id).astype(np.int64))[None],
            image_grid_thw=torch.from_numpy(np.concatenate(grids)) if grids else None,
        )
        ours = policy.positions(length, sample.placeholders, sample.images)
        expected = np.concatenate([np.arange(length)[None], theirs[:, 0].numpy()])
        worst = max(worst, int(np.abs(ours - expected).max()))
        tokens += length
    says = f"{len(samples)} samples, {tokens} tokens: max |delta| {worst} from get_rope_index"
    return judged(name, worst == 0, says, "0", max_delta=worst, tokens=tokens)


def engine_positions(name: str, policy: Policy, played: Played) -> Line:
    """Every row that the engine computed stands where the trainer puts it, and none is missing."""
    if played.rows is None:
        return hidden(name, "the engine computes in another process or model; the logprobs depend on them")
    k = played.rows.shape[1] - 1
    whole: list[IntArray] = []
    fed: list[IntArray] = []
    for sample in played.samples:
        positions = policy.positions(len(sample.token_ids), sample.placeholders, sample.images)[:k]
        rows = np.concatenate([sample.token_ids[None], positions]).T
        whole.append(rows)
        fed.append(rows[:-1])  # the last token was sampled and never fed
    theirs = {row.tobytes() for row in played.rows}
    ours = {row.tobytes() for rows in whole for row in np.ascontiguousarray(rows)}
    missing = {row.tobytes() for rows in fed for row in np.ascontiguousarray(rows)} - theirs
    stray = theirs - ours
    says = f"{len(theirs)} rows of the engine: {len(stray)} stand elsewhere than in the trainer, {len(missing)} missing"
    return judged(
        name, not stray and not missing, says, "0 and 0", rows=len(theirs), stray=len(stray), missing=len(missing)
    )


# ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────────

EXACT_KL = 1e-8
"""Mean mismatch_kl in float32: logprobs apart by 1e-4, of rounding. Measured with the tiny model: 1e-13, embedded and
under vLLM."""

ROUNDING = 5.0
"""Times the trainer's own rounding that bfloat16 may put between engine and trainer, as mismatch_kl, which is half the
mean square of the difference. Two that round alike and independently are 2 apart. Measured: 1.5 with vLLM on an H200
(2 B parameters, logits 20 times those of random weights; benchmarks/mismatch.py), 0.8 with the tiny model and vLLM on a
CPU, and 2000 where the tiny model's pixels were normalized twice."""


@dataclass(frozen=True)
class Agreement:
    """Logprobs of the same tokens, twice."""

    tokens: int
    kl: float
    """Mean of `mismatch_kl`, nats."""
    mean: float
    """Of |Δ|, nats."""
    max: float
    """Of |Δ|, nats."""

    @staticmethod
    def of(trainer: FloatArray, other: FloatArray) -> Agreement:
        """Both float32 [tokens], at least one token."""
        total = float(mismatch_kl(torch.from_numpy(trainer), torch.from_numpy(other))[0])
        apart = np.abs(trainer.astype(np.float64) - other)
        return Agreement(len(trainer), total / len(trainer), float(apart.mean()), float(apart.max()))


def logprobs(name: str, found: Agreement, bound: float) -> Line:
    """Engine and trainer give the sampled tokens the same probability."""
    says = f"{found.tokens} tokens: mismatch_kl {found.kl:.1e}, |delta| mean {found.mean:.1e} max {found.max:.1e}"
    return judged(
        name,
        found.kl <= bound,
        says,
        f"mismatch_kl <= {bound:.1e}",
        mismatch_kl=found.kl,
        mean_delta=found.mean,
        max_delta=found.max,
        limit=bound,
        tokens=found.tokens,
    )


@dataclass(frozen=True)
class OtherPixels:
    """Tokens that the engine sampled behind some pixels; other pixels have the same place and size."""

    moved: Agreement
    """The trainer on the right pixels against itself on the others."""
    right: Agreement
    """The trainer on the right pixels against the engine."""
    wrong: Agreement
    """The trainer on the others against the engine."""


def images_in_trainer(name: str, found: OtherPixels | None, smallest: float) -> Line:
    """Other pixels behind the same tokens give the trainer other logprobs."""
    if found is None:
        return hidden(name, "no image is shown")
    kl = found.moved.kl
    says = f"{found.moved.tokens} tokens: inverted pixels move the trainer's logprobs by mismatch_kl {kl:.1e}"
    return judged(name, kl > smallest, says, f"> {smallest:.1e}", mismatch_kl=kl, limit=smallest)


def images_in_engine(name: str, found: OtherPixels | None, bound: float) -> Line:
    """The engine's logprobs are those of the pixels that it was shown, not of others behind the same tokens."""
    if found is None:
        return hidden(name, "no image is shown")
    if found.moved.kl <= bound:
        return hidden(
            name,
            f"inverted pixels move the trainer's own logprobs by mismatch_kl {found.moved.kl:.1e}, which is less than "
            f"rounding may ({bound:.1e})",
        )
    right, wrong = found.right.kl, found.wrong.kl
    says = f"mismatch_kl {right:.1e} from the trainer on the pixels shown, {wrong:.1e} on the inverted ones"
    return judged(
        name,
        right <= bound and right < wrong,
        says,
        f"<= {bound:.1e}, and less than the other",
        shown_kl=right,
        inverted_kl=wrong,
        limit=bound,
    )


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


def update(name: str, step: StepResult, noise: float, changed: Agreement, smallest: float) -> Line:
    """An optimizer step goes through, and what is published next can be told from what was before."""
    grad_norm = step.metrics["grad_norm"]
    says = f"an optimizer step (grad norm {grad_norm:.2e}) and {noise:.0%} of noise: mismatch_kl {changed.kl:.1e}"
    return judged(
        name,
        grad_norm > 0 and changed.kl > smallest,
        says,
        f"mismatch_kl > {smallest:.1e}",
        grad_norm=grad_norm,
        noise=noise,
        mismatch_kl=changed.kl,
        limit=smallest,
    )


SHOWN_NAMES = 4


def weights(name: str, found: WeightComparison) -> Line:
    """Every weight in the engine has the digest of the trainer's."""
    says = f"{found.compared} compared, {len(found.differing)} differ, {len(found.unmatched)} without a counterpart"
    named = [*found.differing, *found.unmatched]
    if named:
        says += ": " + ", ".join(named[:SHOWN_NAMES]) + (" …" if len(named) > SHOWN_NAMES else "")
    return judged(
        name,
        found.compared > 0 and not named,
        says,
        "0 and 0",
        compared=found.compared,
        differing=len(found.differing),
        unmatched=len(found.unmatched),
    )


def versions(name: str, played: Sequence[Played]) -> Line:
    """Each token says the version that was published when it was sampled; `played` in the order of the versions."""
    wrong, tokens = 0, 0
    for version, those in enumerate(played):
        for sample in those.samples:
            said = sample.versions[sample.loss_mask]
            wrong += int((said != version).sum())
            tokens += len(said)
    says = f"{tokens} tokens of versions 0 to {len(played) - 1}: {wrong} name another version"
    return judged(name, wrong == 0, says, "0", tokens=tokens, wrong=wrong)
