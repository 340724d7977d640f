from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.prompt_builders import EMPTY, END, IMAGE, IMAGES, PAD, extended
from vlmrl.orchestrator.samples import make_samples, note_learned, note_reference
from vlmrl.types import (
    Completion,
    ContractError,
    DropReason,
    FloatArray,
    IntArray,
    Prompt,
    ReferenceScores,
    Rollout,
    StopReason,
    Supports,
    TokenMetrics,
    TopTokens,
    TrainingSample,
    Turn,
    TurnSampling,
)


def turn(prompt: Prompt, token_ids: list[int], branch: int, number: int = 0) -> Turn:
    """A turn with distinguishable tokens: logprob −(number + 1) − position / 100, version 10 · number."""
    n = len(token_ids)
    completion = Completion(
        token_ids=np.array(token_ids, np.int64),
        logprobs=(-(number + 1) - np.arange(n) / 100).astype(np.float32),
        versions=np.full(n, 10 * number, np.int64),
        finish_reason="stop" if token_ids[-1] == END else "length",
    )
    return Turn(prompt, completion, "", [], branch, reward=0.0, advantage=float(number - 1))


def rollout(turns: list[Turn], dropped: DropReason | None = None) -> Rollout:
    return Rollout("train/000001/00/00", "p", 0, turns, 0.0, {}, StopReason.TERMINATED, dropped=dropped)


tokens = st.lists(st.integers(2, 9) | st.just(IMAGE), max_size=5)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Up to five turns, with images outside completions, sampled image tokens, bridges and bridge breaks."""
    prompt = extended(EMPTY, [5, *draw(tokens)], draw(st.lists(st.sampled_from(IMAGES), max_size=2)))
    turns: list[Turn] = []
    branch = 0
    for number in range(draw(st.integers(1, 5))):
        sampled = [*draw(tokens), draw(st.sampled_from([END, 7, IMAGE]))]
        turns.append(turn(prompt, sampled, branch, number))
        # After a truncated completion, the renderer closes the turn with environment tokens.
        reply = [*([] if sampled[-1] == END else [END]), 8, *draw(tokens)]
        images = draw(st.lists(st.sampled_from(IMAGES), max_size=2))
        if draw(st.booleans()):
            prompt = extended(prompt, sampled + reply, images)
        else:
            branch += 1
            history = extended(EMPTY, [6, *draw(tokens)], list(prompt.images))
            prompt = extended(history, sampled + reply, images)
    return rollout(turns)


def turns_of(sample: TrainingSample) -> list[tuple[list[int], list[float], list[int], list[float]]]:
    """The completions read back from a sample: the runs of its loss mask, split where the version changes."""
    found: list[tuple[list[int], list[float], list[int], list[float]]] = []
    for i in np.flatnonzero(sample.loss_mask).tolist():
        if not i or not sample.loss_mask[i - 1] or sample.versions[i] != sample.versions[i - 1]:
            found.append(([], [], [], []))
        token_ids, logprobs, versions, advantages = found[-1]
        token_ids.append(sample.token_ids[i].item())
        logprobs.append(sample.inference_logprobs[i].item())
        versions.append(sample.versions[i].item())
        advantages.append(sample.advantages[i].item())
    return found


def as_played(turn: Turn) -> tuple[list[int], list[float], list[int], list[float]]:
    c = turn.completion
    return c.token_ids.tolist(), c.logprobs.tolist(), c.versions.tolist(), [turn.advantage] * len(c.token_ids)


@given(rollouts())
def test_turns_come_back_from_the_samples_each_once(played: Rollout) -> None:
    samples = make_samples(played)
    assert len(samples) == played.num_branches
    assert [t for sample in samples for t in turns_of(sample)] == [as_played(t) for t in played.turns]


@given(st.lists(rollouts(), max_size=3))
def test_the_trainers_metrics_go_back_to_the_turns(played: list[Rollout]) -> None:
    dropped = rollout([turn(Prompt(np.array([1]), (), ()), [END], 0)], DropReason.STALE)
    samples = [sample for each in played for sample in make_samples(each)]
    found = [TokenMetrics(s.token_ids[s.loss_mask] + 0.25, s.token_ids[s.loss_mask] + 0.5) for s in samples]
    note_learned([dropped, *played], found)
    for each in played:
        for made in each.turns:
            assert made.learned is not None
            assert made.learned.trainer_logprobs.tolist() == (made.completion.token_ids + 0.25).tolist()
            assert made.learned.entropies.tolist() == (made.completion.token_ids + 0.5).tolist()
    assert dropped.turns[0].learned is None


@given(rollouts())
def test_a_sample_is_its_branchs_last_prompt_and_completion(played: Rollout) -> None:
    for branch, sample in enumerate(make_samples(played)):
        last = [t for t in played.turns if t.branch == branch][-1]
        assert sample.token_ids.tolist() == last.prompt.token_ids.tolist() + last.completion.token_ids.tolist()
        assert (sample.placeholders, sample.mm_items) == (last.prompt.placeholders, last.prompt.mm_items)
        assert sample.rollout_id == played.rollout_id


@given(rollouts())
def test_no_loss_on_environment_tokens(played: Rollout) -> None:
    """Exactly the tokens that were sampled in this branch have a loss. A sampled image token counts as text."""
    for branch, sample in enumerate(make_samples(played)):
        sampled = {
            len(t.prompt.token_ids) + i
            for t in played.turns
            if t.branch == branch
            for i in range(len(t.completion.token_ids))
        }
        shown = {p.offset + i for p in sample.placeholders for i in range(p.length)}
        assert not sampled & shown
        for i in range(len(sample.token_ids)):
            assert sample.loss_mask[i] == (i in sampled)
            assert sample.mm_token_type_ids[i] == (i in shown)
            if i not in sampled:
                assert (sample.advantages[i], sample.inference_logprobs[i], sample.versions[i]) == (0.0, 0.0, -1)


def test_dtypes_and_an_example() -> None:
    first = extended(EMPTY, [5], [IMAGES[0]])
    second = extended(first, [7, END, 8], [])
    (sample,) = make_samples(rollout([turn(first, [7, END], 0, number=0), turn(second, [IMAGE], 0, number=1)]))
    assert sample.token_ids.tolist() == [5, IMAGE, PAD, 7, END, 8, IMAGE]
    assert sample.mm_token_type_ids.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert sample.loss_mask.tolist() == [False, False, False, True, True, False, True]
    assert sample.versions.tolist() == [-1, -1, -1, 0, 0, -1, 10]
    np.testing.assert_allclose(sample.inference_logprobs, [0, 0, 0, -1, -1.01, 0, -2])
    assert sample.advantages.tolist() == [0, 0, 0, -1, -1, 0, 0]
    for name in ("token_ids", "mm_token_type_ids", "versions"):
        assert getattr(sample, name).dtype == np.int64, name
    assert sample.loss_mask.dtype == np.bool_
    assert sample.advantages.dtype == sample.inference_logprobs.dtype == np.float32


def test_a_client_s_turns_keep_their_temperature_and_truncated_ones_have_no_loss() -> None:
    """Three turns of one branch: as the run samples, at temperature 0.5, and with top_k. Then two branches that make no
    sample: greedy, and at the run's temperature with top_p."""
    prompts = [extended(EMPTY, [5], [])]
    for sampled in ([7, END], [6, END], [9, END], [4, END]):
        prompts.append(extended(prompts[-1], [*sampled, 8], []))
    turns = [turn(prompt, [7, END], 0, number) for number, prompt in enumerate(prompts[:1])]
    turns.append(replace(turn(prompts[1], [6, END], 0, 1), sampling=TurnSampling(0.5)))
    turns.append(replace(turn(prompts[2], [9, END], 0, 2), sampling=TurnSampling(0.5, top_k=3)))
    turns.append(replace(turn(prompts[3], [4, END], 1, 3), sampling=TurnSampling(0.0)))
    turns.append(replace(turn(prompts[4], [3, END], 2, 4), sampling=TurnSampling(1.0, top_p=0.9)))
    played = rollout(turns)
    (sample,) = make_samples(played)
    assert sample.token_ids.tolist() == [5, 7, END, 8, 6, END, 8, 9, END]
    assert sample.loss_mask.tolist() == [False, True, True, False, True, True, False, False, False]
    assert sample.temperatures is not None
    assert sample.temperatures.dtype == np.float32
    assert np.array_equal(sample.temperatures, [np.nan] * 4 + [0.5] * 2 + [np.nan] * 3, equal_nan=True)
    for array, absent in ((sample.advantages, 0), (sample.inference_logprobs, 0), (sample.versions, -1)):
        assert (array[~sample.loss_mask] == absent).all()
    metrics = TokenMetrics(np.array([1, 2, 3, 4], np.float32), np.array([5, 6, 7, 8], np.float32))
    note_learned([played], [metrics])
    assert [made.learned and made.learned.entropies.tolist() for made in turns] == [[5, 6], [7, 8], None, None, None]


def test_truncated_turns_are_learned_where_their_supports_are_known() -> None:
    """Two turns of one branch: with top_k and its supports, then from the whole vocabulary."""
    first = extended(EMPTY, [5], [])
    truncated = turn(first, [7, END], 0)
    truncated.completion = replace(truncated.completion, supports=Supports.of([[3, 7], [END]]))
    turns = [replace(truncated, sampling=TurnSampling(top_k=2))]
    turns.append(turn(extended(first, [7, END, 8], []), [6, END], 0, 1))
    (sample,) = make_samples(rollout(turns))
    assert sample.loss_mask.tolist() == [False, True, True, False, True, True]
    assert sample.supports is not None
    assert sample.supports.sizes.tolist() == [0, 2, 1, 0, 0, 0]
    assert sample.supports.token_ids.tolist() == [3, 7, END]
    assert sample.supports.token_ids.dtype == np.int32


def test_a_seed_of_its_own_leaves_a_turn_at_the_runs_temperature() -> None:
    (sample,) = make_samples(
        rollout([replace(turn(extended(EMPTY, [5], []), [7, END], 0), sampling=TurnSampling(seed=3))])
    )
    assert sample.temperatures is None
    assert sample.loss_mask.tolist() == [False, True, True]


def test_a_branch_whose_prompt_does_not_extend_is_an_assertion_error() -> None:
    first = extended(EMPTY, [5], [])
    other = extended(EMPTY, [5, 6, END, 8], [])
    with pytest.raises(AssertionError, match="branch 0 does not start with the turn before it"):
        make_samples(rollout([turn(first, [7, END], 0), turn(other, [END], 0)]))


def test_a_dropped_rollout_makes_no_samples() -> None:
    played = rollout([turn(extended(EMPTY, [5], []), [END], 0)], dropped=DropReason.STALE)
    with pytest.raises(AssertionError, match="stale"):
        make_samples(played)


def test_a_rollout_without_turns_has_no_samples() -> None:
    assert make_samples(rollout([])) == []


def test_a_missing_image_is_a_contract_error() -> None:
    prompt = replace(extended(EMPTY, [5], [IMAGES[1]]), mm_items=())
    with pytest.raises(ContractError, match="1 placeholders but 0 images"):
        make_samples(rollout([turn(prompt, [END], 0)]))


def scores(token_ids: IntArray, logprobs: FloatArray) -> ReferenceScores:
    """What a reference says that finds the token itself and its successor most likely."""
    ids = np.stack([token_ids, token_ids + 1], axis=1).astype(np.int32)
    top = TopTokens(ids, np.full((len(ids), 3), -np.log(3), np.float32))
    return ReferenceScores((logprobs - token_ids).astype(np.float32), top)


@given(st.lists(rollouts(), max_size=3))
def test_what_the_reference_finds_goes_to_its_turns_and_into_the_samples(played: list[Rollout]) -> None:
    """With `kl_advantage`, each token's advantage is lower by that times log μ − log reference. The top tokens of a
    sample are those of its turns, one after another."""
    samples = [sample for each in played for sample in make_samples(each)]
    assert all(sample.reference_logprobs is None for sample in samples)
    assert all(sample.reference_top is None for sample in samples)
    note_reference(played, [scores(s.token_ids[s.loss_mask], s.inference_logprobs[s.loss_mask]) for s in samples])
    for each in played:
        for made in each.turns:
            assert made.reference_logprobs is not None
            wanted = (made.completion.logprobs - made.completion.token_ids).astype(np.float32)
            np.testing.assert_array_equal(made.reference_logprobs, wanted)
            assert made.reference_top is not None
            np.testing.assert_array_equal(made.reference_top.ids[:, 1], made.completion.token_ids + 1)
        for sample, before in zip(make_samples(each, 0.5), make_samples(each), strict=True):
            assert sample.reference_logprobs is not None
            assert not sample.reference_logprobs[~sample.loss_mask].any()
            assert sample.reference_top is not None
            np.testing.assert_array_equal(sample.reference_top.ids[:, 0], sample.token_ids[sample.loss_mask])
            assert sample.reference_top.logprobs.shape == (sample.loss_mask.sum(), 3)
            distance = sample.inference_logprobs - sample.reference_logprobs
            np.testing.assert_allclose(distance, np.where(sample.loss_mask, sample.token_ids, 0), atol=1e-5)
            np.testing.assert_allclose(sample.advantages, before.advantages - 0.5 * distance, atol=1e-5)
