"""The weights of `algorithm.vision_advantage`, against gaps and factors that are computed here in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.helpers import BANNED, MERGE, TINY
from support.loop_world import World
from support.rollout_builders import image, prompt, rollout
from support.video_rollouts import video, video_rollout
from vlmrl.config.algorithm import AlgorithmConfig, VisionAdvantageConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.trainer import Packing, TrainerConfig
from vlmrl.models.attention.prefix_tree import ImageKeys, common_prefix
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.vision_advantage import weigh_by_vision, weights
from vlmrl.orchestrator.vision_gap import group_of, swap_images
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import (
    Completion,
    DropReason,
    FloatArray,
    Group,
    Image,
    ImageItem,
    Message,
    Prompt,
    Rollout,
    StopReason,
    TrainingSample,
    Turn,
)


def nats(token: int, shown: ImageItem) -> float:
    """How likely a token is next to an image, in the world of these tests."""
    return -0.25 * ((token * 7 + int(shown.hash[:4], 16)) % 11)


@dataclass(eq=False)
class Scorer:
    """A trainer whose logprob of a token follows from the token and the last image before it."""

    asked: list[TrainingSample] = field(default_factory=list)

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        self.asked += samples
        return [np.array(list(self.of(sample)), np.float32) for sample in samples]

    def of(self, sample: TrainingSample) -> Any:
        for place in np.flatnonzero(sample.loss_mask).tolist():
            before = [i for i, at in zip(sample.images, sample.placeholders, strict=True) if at.offset < place]
            yield nats(int(sample.token_ids[place]), before[-1]) if before else -1.0


def turn(shades: list[int], tokens: list[int], advantage: float, before: Turn | None = None) -> Turn:
    made = prompt([1, 2], shades, before)
    logprobs = [nats(token, made.images[-1]) if made.images else -1.0 for token in tokens]
    completion = Completion(np.array(tokens), np.array(logprobs, np.float32), np.full(len(tokens), 0), "stop")
    return Turn(made, completion, "", [], branch=0, reward=0.0, advantage=advantage)


def played(group: int, index: int, *turns: Turn) -> Rollout:
    return Rollout(f"train/000001/{group:02d}/{index:02d}", "p", index, [*turns], 0.0, {}, StopReason.TERMINATED)


def batch() -> list[Group]:
    """Two groups. The first has two siblings that see shade 10; one of them also has a second turn with shade 20. The
    second group sees shade 30; its last rollout is dropped."""
    first = turn([10], [3, 4, 5], 1.0)
    seen = [
        played(0, 0, first, turn([20], [6, 7], -0.5, first)),
        played(0, 1, turn([10], [8, 9, 10, 11], -1.0)),
        played(1, 0, turn([30], [12, 13], 2.0)),
        played(1, 1, turn([30], [14], 0.0)),
        played(1, 2, turn([30], [15], 3.0)),
    ]
    seen[-1].dropped = DropReason.TRUNCATED
    return [Group("p", seen[:2]), Group("q", seen[2:])]


CONFIG = VisionAdvantageConfig(weight=1.5, cap=0.5)


def by_hand(config: VisionAdvantageConfig = CONFIG) -> list[tuple[float, float]]:
    """(gap, advantage) of the four turns that have an advantage and are trained on, in order: float64, token by token.
    The replacements are read off the samples that the product swaps; their form is tested below."""
    groups = batch()
    rollouts = [each for group in groups for each in group.rollouts if each.dropped is None]
    samples = [sample for each in rollouts for sample in make_samples(each)]
    swapped = dict(swap_images(samples, samples))
    gaps, advantages = [], []
    for index, each in enumerate(rollouts):
        for number, one in enumerate(each.turns):
            if one.advantage == 0.0:
                continue
            own, other = one.prompt.images[-1], swapped[index].images[number]
            tokens = one.completion.token_ids.tolist()
            gaps.append(np.mean([nats(token, own) - nats(token, other) for token in tokens], dtype=np.float64))
            advantages.append(one.advantage)
    factor = [1 + config.weight * min(max(gap, 0.0), config.cap) for gap in gaps]
    mean = sum(factor) / len(factor)
    return [(float(g), a * w / mean) for g, a, w in zip(gaps, advantages, factor, strict=True)]


def advantages_of(groups: Sequence[Group]) -> list[float]:
    turns = [one for group in groups for each in group.rollouts if each.dropped is None for one in each.turns]
    return [one.advantage for one in turns if one.advantage]


def test_advantages_are_weighted_by_the_gap_of_their_turn() -> None:
    groups, trainer = batch(), Scorer()
    found = weigh_by_vision(groups, trainer, CONFIG)  # type: ignore[arg-type]
    expected = by_hand()
    gaps = [gap for gap, _ in expected]
    assert min(gaps) < 0 < CONFIG.cap < max(gaps), "the case has gaps on both sides of both bounds"
    assert advantages_of(groups) == pytest.approx([advantage for _, advantage in expected], rel=1e-5)
    assert found.pop("time/vision_advantage") > 0
    factor = [advantage / one for (_, advantage), one in zip(expected, [1.0, -0.5, -1.0, 2.0], strict=True)]
    assert np.mean(factor) == pytest.approx(1.0)
    assert found == pytest.approx(
        {
            "vision_advantage/gap": np.mean(gaps),
            "vision_advantage/spread": np.std(factor),
            "vision_advantage/measured": 1.0,
        },
        rel=1e-5,
    )
    assert groups[1].rollouts[2].turns[0].advantage == 3.0, "a dropped rollout keeps what it had"
    assert len(trainer.asked) == 3, "a sample without any advantage is not scored"


@pytest.mark.parametrize(
    "planted",
    [
        lambda gaps, config: 1.0 - config.weight * np.clip(gaps, 0.0, config.cap),  # sign
        lambda gaps, config: 1.0 + config.weight * np.roll(np.clip(gaps, 0.0, config.cap), 1),  # off by one turn
        lambda gaps, config: config.weight * np.clip(gaps, 0.0, config.cap) * len(gaps),  # wrong normalization
    ],
)
def test_a_wrong_weight_is_found(
    planted: Callable[[FloatArray, VisionAdvantageConfig], FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmrl.orchestrator.vision_advantage.weights", planted)
    groups = batch()
    weigh_by_vision(groups, Scorer(), CONFIG)  # type: ignore[arg-type]
    assert advantages_of(groups) != pytest.approx([advantage for _, advantage in by_hand()], rel=1e-3)


def test_equal_gaps_change_nothing() -> None:
    for gap in (-1.0, 0.0, 0.7, 9.0):
        assert weights(np.full(5, gap, np.float32), CONFIG).tolist() == pytest.approx([1.0] * 5)
    assert weights(np.empty(0, np.float32), CONFIG).tolist() == []


def test_turns_that_cannot_be_measured_keep_their_advantage() -> None:
    """A turn before the first image, and images that no other problem has in the same size."""
    text = turn([], [3, 4], 1.0)
    groups = [
        Group("p", [played(0, 0, text, turn([10], [5], 1.0, text)), played(0, 1, turn([10], [6], -1.0))]),
        Group("q", [played(1, 0, turn([30], [7], 0.5))]),
    ]
    found = weigh_by_vision(groups, Scorer(), CONFIG)  # type: ignore[arg-type]
    assert text.advantage == 1.0
    assert found["vision_advantage/measured"] == 3 / 4
    alone = [groups[0]]
    before = advantages_of(alone)
    found = weigh_by_vision(alone, Scorer(), CONFIG)  # type: ignore[arg-type]
    assert (advantages_of(alone), found["vision_advantage/measured"]) == (before, 0.0)


def test_off_is_off() -> None:
    groups, trainer = batch(), Scorer()
    before = advantages_of(groups)
    assert weigh_by_vision(groups, trainer, VisionAdvantageConfig()) == {}  # type: ignore[arg-type]
    assert (advantages_of(groups), trainer.asked) == (before, [])


def test_siblings_go_on_sharing_their_prefix() -> None:
    """The same image has the same replacement in all siblings, also where they see it at other places."""
    made = [rollout(index) for index in range(3)]
    made[0].turns = made[0].turns[:1]
    other = played(1, 0, turn([40, 50], [3], 1.0))
    samples = [sample for each in [*made, other] for sample in make_samples(each)]
    swapped = [sample for _, sample in swap_images(samples, samples)]
    assert [group_of(sample) for sample in swapped] == [group_of(sample) for sample in samples]
    replaced = {
        (group_of(old), before.hash, after.hash)
        for old, new in zip(samples, swapped, strict=True)
        for before, after in zip(old.mm_items, new.mm_items, strict=True)
    }
    assert len({each[:2] for each in replaced}) == len(replaced) == 5, (
        "10, 20 and 30 in one group, 40 and 50 in the other"
    )
    assert shared_tokens(swapped) >= shared_tokens(samples) > 0
    shown = {0: {10, 20, 30}, 1: {40, 50}}
    for group, _, new_hash in replaced:
        assert new_hash in {image(shade).hash for shade in shown[1 - int(group[-2:])]}


def shared_tokens(samples: Sequence[TrainingSample]) -> int:
    """Tokens that siblings have in common with the sibling before them: what the prefix tree computes once."""
    keys = ImageKeys()
    own = [(group_of(sample), keys.keys(sample.token_ids, sample.placeholders)) for sample in samples]
    return sum(common_prefix(a, b) for (group, a), (other, b) in itertools.pairwise(own) if group == other)


def test_the_loop_learns_from_the_weighted_advantages() -> None:
    """The trainer of `World` finds the tokens of odd siblings half a nat less likely with other images."""
    learned = []
    for weight in (0.0, 2.0):
        world = World(has_images=True)
        config = VisionAdvantageConfig(weight=weight)
        assert world.run(steps=2, algorithm=AlgorithmConfig(vision_advantage=config)) == "finished"
        assert ("vision_advantage/gap" in world.metrics_of[1]) == (weight > 0)
        learned.append([sample for step in world.learned for sample in step])
    for plain, weighted in zip(*learned, strict=True):
        factor = (2.0 if int(plain.rollout_id[-1]) % 2 else 1.0) / (4 / 3)
        np.testing.assert_allclose(weighted.advantages, factor * plain.advantages, rtol=1e-5)
        assert plain.advantages.any()


# ── through the real renderer and policy ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packing", Packing)
def test_the_gaps_of_the_real_policy_are_those_one_by_one(
    packing: Packing, tiny_folder: Path, tiny_model: Callable[[], Any]
) -> None:
    """Three problems with two answers each, packed together; expected are samples that are scored alone."""
    model = tiny_model()
    renderer: Renderer = make_renderer(
        RendererConfig(),
        TINY,
        load_tokenizer(tiny_folder),
        load_image_processor(tiny_folder),
        model.get_input_embeddings().num_embeddings,
        family_of(TINY.vlm).placeholder_tokens,
    )
    policy = Policy(model, position_function("mrope", MERGE), BANNED)
    settings = TrainerConfig(packing=packing)
    trainer = LocalTrainer(policy, settings, AlgorithmConfig(), temperature=1.0, max_new_tokens=4)

    def answered(group: int, index: int, answer: str) -> Rollout:
        pixels = np.random.default_rng(group).integers(0, 256, (32, 64, 3), np.uint8)
        asked = Message.of("user", "a", Image(pixels))
        whole, is_sampled = renderer.render_conversation((asked, Message.of("assistant", answer)))
        start = int(is_sampled.argmax())
        tokens = whole.token_ids[start : int(is_sampled.sum()) + start]
        made = Prompt(whole.token_ids[:start], whole.placeholders, whole.mm_items)
        sampled = Completion(tokens, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.int64), "stop")
        one = played(group, index, Turn(made, sampled, answer, [asked], branch=0, reward=0.0, advantage=1.0))
        (found,) = trainer.logprobs(make_samples(one))
        one.turns[0].completion = replace(sampled, logprobs=found)
        return one

    groups = [Group(str(g), [answered(g, 0, "abc"), answered(g, 1, "ca")]) for g in range(3)]
    samples = [sample for group in groups for each in group.rollouts for sample in make_samples(each)]
    own = [float(trainer.logprobs([sample])[0].mean()) for sample in samples]
    other = [float(trainer.logprobs([sample])[0].mean()) for _, sample in swap_images(samples, samples)]
    gaps = np.array(own, np.float64) - np.array(other)
    assert np.abs(gaps).max() > 1e-4, "the model does react to pixels"
    config = VisionAdvantageConfig(weight=1000.0, cap=1.0)
    weigh_by_vision(groups, trainer, config)
    factors = 1 + 1000 * np.clip(gaps, 0, 1)
    assert advantages_of(groups) == pytest.approx((factors / factors.mean()).tolist(), rel=2e-3)


def test_turns_that_show_videos_only_are_weighted_too() -> None:
    """Each clip is exchanged for that of the other group, which makes the second answer a nat less likely."""
    groups = []
    for number, seed in enumerate((1, 2)):
        made = replace(video_rollout((video(seed),)), rollout_id=f"train/000001/{number:02d}/00")
        made.turns[0].advantage = 1.0
        groups.append(Group(f"p{number}", [made]))
    asked: list[TrainingSample] = []

    class Lower:
        def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
            asked.extend(samples)
            return [
                sample.inference_logprobs[sample.loss_mask] - (1.0 if i else 0.0) for i, sample in enumerate(samples)
            ]

    trainer: Any = Lower()
    found = weigh_by_vision(groups, trainer, CONFIG)
    assert [sample.mm_items[0].hash for sample in asked] == [video(2).hash, video(1).hash]
    assert found["vision_advantage/measured"] == 1.0
    assert found["vision_advantage/gap"] == pytest.approx(0.5)
    first, second = (group.rollouts[0].turns[0].advantage for group in groups)
    assert (first, second) == pytest.approx((1 / 1.375, 1.75 / 1.375))
