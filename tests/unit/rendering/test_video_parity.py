"""Random clips, as arrays and as files: ids, pixels, grids, seconds, token types and positions are those of
transformers' own processor, which samples the frames itself."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from support.families.clips import FPS, ByTransformers, video_renderer, vlm_of
from support.packages import needs_videos
from support.video_files import encoded, moving
from vlmrl.errors import ModelError
from vlmrl.models.families import family_of
from vlmrl.orchestrator.fences import rendering_fence
from vlmrl.rendering import item_store, video_files, video_store, videos
from vlmrl.rendering.images import VideoError
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.types import Image, Message, Prompt, Video, VideoItem, mm_token_type_ids

CLIPS = 18
"""Random clips per family."""

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
RATES = (1.0, 2.0, 2.5, 5.0, 10.0, 24.0, 30.0)
IN_FILES = ("mp4", "libx264", "yuv444p")
"""Its header states the number of frames, which transformers' reader needs, and sizes may be odd."""

ONE_FAMILY = pytest.mark.parametrize("case", ["qwen3_vl"], indirect=True)

ARRAYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


@dataclass
class Case:
    """A family's renderer, and transformers' processor and positions."""

    renderer: FamilyRenderer
    reference: ByTransformers
    model: Any
    positions: Any

    def prompt(self, video: Video) -> Prompt:
        return asyncio.run(self.renderer.first_turn([Message.of("user", "What ", video, " moves?")]))

    def wrong(self, prompt: Prompt, inputs: Any, late: int = 0) -> set[str]:
        """What differs between a prompt and what transformers made; `late` is added to our positions."""
        (item,) = prompt.videos
        ids = prompt.token_ids
        given = {
            name: torch.as_tensor(inputs[name]) for name in ("video_grid_thw", "second_per_grid_ts") if name in inputs
        }
        wanted, _ = self.model.base_model.get_rope_index(
            input_ids=inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **given
        )
        positions = self.positions(len(ids), prompt.placeholders, prompt.mm_items)[1:] + late
        compared: dict[str, tuple[Any, Any]] = {
            "ids": (ids, inputs["input_ids"][0]),
            "types": (mm_token_type_ids(len(ids), prompt.placeholders), inputs["mm_token_type_ids"][0]),
            "positions": (positions, wanted[:, 0]),
        }
        compared |= {name: (item.mm_kwargs[name], inputs[name]) for name in ARRAYS if name in inputs}
        return {name for name, (ours, theirs) in compared.items() if not np.array_equal(ours, np.asarray(theirs))}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Case:
    needs_videos()
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder, vlm, auto = family_folder(request.param), vlm_of(request.param), AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = auto.from_config(config)  # type: ignore[no-untyped-call]
    renderer = video_renderer(folder, vlm)
    return Case(renderer, ByTransformers.of(folder), model, family_of(vlm).position_function(config))


def clips() -> Iterator[tuple[NDArray[np.uint8], float]]:
    """(frames, frames per second): 2 to 60 frames, also odd numbers of them, with edges of 20 to 120 pixels."""
    rng = np.random.default_rng(0)
    for number in range(CLIPS):
        rate = float(rng.choice(RATES))
        count = int(rng.integers(2, 60)) if number else 3
        height, width = rng.integers(20, 120, 2).tolist()
        yield moving(count, height, width, number), rate


def by_transformers(case: Case, frames: NDArray[np.uint8], rate: float) -> Any:
    """The processor's own sampling, as for a video with metadata."""
    return case.reference.inputs([Message.of("user", "What ", Video(frames, fps=rate), " moves?")])


def test_random_arrays_are_those_of_transformers(case: Case) -> None:
    for frames, rate in clips():
        prompt, inputs = case.prompt(Video(frames, fps=rate)), by_transformers(case, frames, rate)
        assert not case.wrong(prompt, inputs), (frames.shape, rate)
        (item,) = prompt.videos
        assert item.processed_size is not None
        edge = 2 * case.model.config.vision_config.patch_size
        width, height = item.processed_size
        assert item.num_tokens == -(-len(item.frames) // 2) * (height // edge) * (width // edge)  # docs/video.md


def test_a_fixed_number_of_frames_is_chosen_as_by_transformers(
    case: Case, family_folder: Callable[[str], Path]
) -> None:
    from transformers.video_utils import VideoMetadata

    frames = moving(31, 28, 28)
    name = case.model.config.model_type
    for count in (6, 9, 30):  # Qwen2-VL and Qwen2.5-VL take an even number
        vlm = vlm_of(name)
        assert vlm.video is not None
        renderer = video_renderer(family_folder(name), replace(vlm, video=replace(vlm.video, num_frames=count)))
        (item,) = renderer.items([Video(frames, fps=10.0)])
        chosen = case.reference.processor.video_processor.sample_frames(VideoMetadata(31, fps=10.0), num_frames=count)
        assert isinstance(item, VideoItem)
        np.testing.assert_array_equal(item.frames, frames[np.asarray(chosen)])
        np.testing.assert_array_equal(item.times, np.asarray(chosen) / 10)


def test_a_long_video_is_refused_and_a_slow_one_is_not(case: Case) -> None:
    """64 frames are allowed: 40 s have 80 of them at 2 a second, if the video has so many."""
    with pytest.raises(VideoError, match=r"a video of 40 s has 80 frames at model\.vlm\.video\.fps=2, more than model"):
        case.renderer.items([Video(moving(400, 4, 4), fps=10.0)])
    with pytest.raises(VideoError, match=r"shows 65 frames, more than model\.vlm\.video\.max_frames=64"):
        case.renderer.items([Video(moving(65, 28, 28))])
    (item,) = case.renderer.items([Video(moving(10, 28, 28), fps=0.25)])
    assert isinstance(item, VideoItem)
    assert item.times.tolist() == list(range(0, 40, 4))


def test_random_files_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    """Decoded by transformers' reader, with the frames that its processor chooses."""
    video_utils = pytest.importorskip("transformers.video_utils")
    processor = case.reference.processor
    for number, (frames, rate) in enumerate(list(clips())[::3]):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(encoded(frames[:20], int(max(rate, 3)), IN_FILES))
        choose = partial(processor.video_processor.sample_frames, fps=FPS)
        read, metadata = video_utils.read_video_pyav(
            str(path), lambda metadata, choose=choose: np.asarray(choose(metadata))
        )
        chat = [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "video"}]}]
        chat[0]["content"] += [{"type": "text", "text": " moves?"}]  # type: ignore[operator]
        inputs = processor(
            text=[processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)],
            videos=[read],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert not case.wrong(case.prompt(Video(path)), inputs), (frames.shape, rate)


def test_a_mistake_shows(case: Case) -> None:
    """Frames swapped, one frame lost, times late, positions late by one, and a pixel shifted."""
    frames, rate = moving(12, 60, 90), FPS
    inputs = by_transformers(case, frames, rate)
    times = np.arange(12) / rate
    assert not case.wrong(case.prompt(Video(frames, times=times.tolist(), fps=rate)), inputs)
    swapped, shifted = frames.copy(), frames.copy()
    swapped[[4, 5]] = frames[[5, 4]]
    shifted[3, :, 1:] = frames[3, :, :-1]
    for wrong in (swapped, shifted):
        assert case.wrong(case.prompt(Video(wrong, fps=rate)), inputs) == {"pixel_values_videos"}
    assert {"ids", "video_grid_thw"} <= case.wrong(case.prompt(Video(frames[:-2], fps=rate)), inputs)
    assert case.wrong(case.prompt(Video(frames, fps=rate)), inputs, late=1) == {"positions"}
    late = case.prompt(Video(frames, times=(times + 1 / rate).tolist(), fps=rate))
    slow = case.prompt(Video(frames, times=(2 * times).tolist()))
    if "qwen3" in case.model.config.model_type:
        assert "ids" in case.wrong(late, inputs)
    elif "second_per_grid_ts" in inputs:
        assert {"second_per_grid_ts", "positions"} <= case.wrong(slow, inputs)


@pytest.mark.parametrize("case", ["qwen2_5_vl"], indirect=True)
def test_positions_are_rounded_down_as_in_transformers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 25 positions a second, products of float64 would be rounded down to others."""
    monkeypatch.setattr(case.model.config.vision_config, "tokens_per_second", 25)
    positions = partial(case.positions, tokens_per_second=25)
    for count in (15, 21, 23, 31):
        frames = moving(count, 28, 28)
        prompt = case.prompt(Video(frames, fps=1.0))
        assert not replace(case, positions=positions).wrong(prompt, by_transformers(case, frames, 1.0))


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────


@ONE_FAMILY
def test_a_file_is_decoded_once_for_all_siblings(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under another name, and as bytes; another file of that name is another video."""
    decoded: list[Any] = []
    real = videos.decode_file

    def counted(*args: Any) -> Any:
        decoded.append(args)
        return real(*args)

    monkeypatch.setattr(video_store, "decode_file", counted)
    data = encoded(moving(8, seed=3))
    for name in ("a.mkv", "b.mkv"):
        (tmp_path / name).write_bytes(data)
    parts = [Video(tmp_path / "a.mkv") for _ in range(6)] + [Video(str(tmp_path / "b.mkv")), Video(data)]
    items = case.renderer.items(parts)
    assert len({id(item) for item in items}) == 1
    assert len(decoded) == 1
    (tmp_path / "a.mkv").write_bytes(encoded(moving(8, seed=4)))
    (other,) = case.renderer.items([Video(tmp_path / "a.mkv")])
    assert other.hash != items[0].hash
    assert len(decoded) == 2


@ONE_FAMILY
def test_a_file_that_changes_while_it_is_read_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(encoded(moving(8, seed=5)))
    real = videos.decode_file

    def changed(*args: Any) -> Any:
        path.write_bytes(path.read_bytes() + b"more")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(video_store, "decode_file", changed)
        with pytest.raises(VideoError, match=r"the video file .*a\.mkv: it changed while it was read"):
            case.renderer.items([Video(path)])
    assert len(case.renderer.items([Video(path)])[0].mm_kwargs) == 2


@ONE_FAMILY
def test_without_pyav_no_rollout_is_charged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that ends the run, also out of the fence around the messages."""
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'vlmrl\[video\]'"), rendering_fence():
        case.prompt(Video(b"a file"))


@ONE_FAMILY
def test_memory_is_flat_over_a_thousand_clips(
    case: Case, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of arrays and of files, nothing is kept but the most recent ones."""
    monkeypatch.setattr(item_store, "RECENT_BYTES", 4 << 20)
    renderer = video_renderer(family_folder("qwen3_vl"), vlm_of("qwen3_vl"))
    frames = moving(4, 56, 56)
    alive: list[weakref.ref[VideoItem]] = []
    sizes = []
    for number in range(1000):
        frames[:, 0, 0] = (number % 256, number // 256, 0)
        source = encoded(frames, int(FPS)) if number % 10 == 0 else frames
        (item,) = renderer.items([Video(source, fps=None if isinstance(source, bytes) else FPS)])
        assert isinstance(item, VideoItem)
        one = item.frames.nbytes + sum(array.nbytes for array in item.mm_kwargs.values())
        alive.append(weakref.ref(item))
        if number in (299, 999):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert sum(ref() is not None for ref in alive) <= (4 << 20) // one + 1
    assert sizes[1] - sizes[0] < 700 * one / 4  # all of them would be 130 MiB


ONLY_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_for_images_alone_refuses_no_more_than_videos(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = family_folder("qwen3_vl")
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").write_text(ONLY_IMAGES, "utf-8")
    renderer = video_renderer(folder, vlm_of("qwen3_vl"))
    picture = Image(np.zeros((56, 56, 3), np.uint8))
    prompt = asyncio.run(renderer.first_turn([Message.of("user", picture, "What?")]))
    assert len(prompt.mm_items) == 1
    with pytest.raises(VideoError, match=r"writes no <\|video_pad\|> for a video of a question"):
        asyncio.run(renderer.first_turn([Message.of("user", Video(np.zeros((4, 56, 56, 3), np.uint8), fps=2.0), "?")]))
