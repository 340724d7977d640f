"""Videos of chat requests: what is taken, what is refused, and that the policy sees the frames that were sent."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.chat import ScriptedSession, asked, assistant, user
from support.families.clips import frames, video_renderer, vlm_of
from support.packages import needs_videos
from support.row_files import png
from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.orchestrator.programs.chat import NoiseSession
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.rendering.data_urls import part_of
from vlmrl.rendering.images import decode
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.types import Message, Prompt, Text, Video

FILE = base64.b64encode(b"\0\0\0\x20ftypisom" + b"\0" * 20).decode()
TWO_FRAMES = ",".join(base64.b64encode(png(shade)).decode() for shade in (10, 20))


def video(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **more}}


def taken(part: dict[str, Any]) -> Video:
    (message,) = asked(user(part)).messages
    (found,) = message.content
    assert isinstance(found, Video)
    return found


# ── what is taken ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_taken_whatever_its_type_is_called() -> None:
    for kind in ("video/mp4", "video/webm", "application/octet-stream", "video/mp4;codecs=avc1"):
        part = taken(video(f"data:{kind};base64,{FILE}"))
        assert (part.source, part.fps, part.times) == (base64.b64decode(FILE), None, None)
    assert taken({"type": "video_url", "video_url": f"data:video/mp4;base64,{FILE}"}).source == base64.b64decode(FILE)


def test_frames_are_taken_with_their_rate_or_times() -> None:
    url = f"data:video/jpeg;base64,{TWO_FRAMES}"
    assert taken(video(url)).source == (png(10), png(20))
    assert taken(video(url, fps=4)).fps == 4.0
    assert taken(video(url, times=[0, 0.5])).times == (0.0, 0.5)


def test_equal_urls_with_equal_times_are_one_part() -> None:
    media, url = DataMedia(), f"data:video/jpeg;base64,{TWO_FRAMES}"
    parts = [
        media.video(url, "p"),
        media.video(url, "p"),
        media.video(url, "p", fps=2.0),
        media.video(url, "p", fps=4.0),
    ]
    assert parts[0] is parts[1]
    assert len(set(map(id, parts))) == 3


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (video("https://host/a.mp4"), "is no data URL, and videos are not fetched: send it as data:video/mp4;base64,"),
        (video("file:///etc/passwd"), "is no data URL"),
        (video("data:video/mp4,AAAA"), "is not encoded in base64"),
        (video("data:video/mp4;base64,?"), "encode the bytes of the video file"),
        (video("data:video/jpeg;base64," + "," * (1 << 16)), "has more than 65536 frames"),
        (video(f"data:video/mp4;base64,{FILE}", fps=2), "a video file says that itself"),
        (video(f"data:video/jpeg;base64,{TWO_FRAMES}", fps=0), "is no number from 0.001"),
        (video(f"data:video/jpeg;base64,{TWO_FRAMES}", fps=True), "is no number from 0.001"),
        (video(f"data:video/jpeg;base64,{TWO_FRAMES}", times=["0"]), "is no number from 0"),
        (video(f"data:video/jpeg;base64,{TWO_FRAMES}", times=0.5), "a list is expected"),
        (video(f"data:video/mp4;base64,{FILE}", max_pixels=64), "'max_pixels' is not known here, and a run samples"),
        ({"type": "video_url"}, "a string is expected"),
    ],
)
def test_refusals(part: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError) as error:
        asked(user(part))
    assert words in error.value.message
    assert (error.value.param or "").startswith(("messages[0].content[0].video_url", "fps", "times"))


@pytest.mark.parametrize(
    "part",
    [Video(frames(0, 3, 8, 8)), Video(list(frames(0, 3, 8, 8)), fps=4.0), Video(frames(0, 3, 8, 8), times=(0, 0.5, 2))],
)
def test_a_video_of_ours_comes_back_as_it_was(part: Video) -> None:
    """What a program is sent (tasks/programs/problems.py) and sends on."""
    found = taken(part_of(part))
    source: Any = found.source
    assert np.array_equal([decode(frame) for frame in source], np.asarray(part.source))
    assert (found.fps, found.times) == (part.fps, part.times)


# ── what the policy sees ────────────────────────────────────────────────────────────────────────────────────

CLIP = Video(frames(1, 6, 56, 56), fps=2.0)
OTHER = Video(frames(2, 6, 56, 56), fps=2.0)


@pytest.fixture(scope="module")
def renderer(family_folder: Callable[[str], Path]) -> FamilyRenderer:
    needs_videos()
    return video_renderer(family_folder("qwen3_vl"), vlm_of("qwen3_vl"))


def session_of(kind: type[ChatSession], renderer: FamilyRenderer, name: str = "train/000001/00/00") -> ChatSession:
    sampling = SessionSampling(OwnSampling(1.0, (), ()), partial(sampling_seed, 0, name), client_samples=True)
    return kind(name, renderer, ScriptedSession(lambda prompt: "a"), sampling, Budgets(10, 4, 10_000))


def prompts_of(kind: type[ChatSession], renderer: FamilyRenderer, *requests: Any, name: str = "r") -> list[Prompt]:
    session = session_of(kind, renderer, name)

    async def ask() -> None:
        for request in requests:
            await session.answer(request)

    asyncio.run(ask())
    return [turn.prompt for turn in session.close()]


def test_the_prompt_is_that_of_a_task_with_the_same_video(renderer: FamilyRenderer) -> None:
    (prompt,) = prompts_of(ChatSession, renderer, asked(user("Look: ", part_of(CLIP), " and?")))
    wanted = asyncio.run(renderer.first_turn([Message.of("user", "Look: ", CLIP, " and?")]))
    assert np.array_equal(prompt.token_ids, wanted.token_ids)
    assert [item.hash for item in prompt.videos] == [item.hash for item in wanted.videos]
    (other,) = prompts_of(ChatSession, renderer, asked(user("Look: ", part_of(OTHER), " and?")))
    assert [item.hash for item in other.videos] != [item.hash for item in wanted.videos]


def test_a_conversation_goes_on_after_a_video(renderer: FamilyRenderer) -> None:
    first = user("Look: ", part_of(CLIP))
    session = session_of(ChatSession, renderer)

    async def ask() -> None:
        answer = await session.answer(asked(first))
        said = "".join(part.text for part in answer.message.content if isinstance(part, Text))
        await session.answer(asked(first, assistant(said), user("And now? ", part_of(OTHER))))

    asyncio.run(ask())
    assert session.metrics()["endpoint/bridged"] == 1
    _, second = session.close()
    assert [len(item.frames) for item in second.prompt.videos] == [6, 6]
    assert second.branch == 0


def test_the_blind_control_shows_noise_of_the_same_size_and_times(renderer: FamilyRenderer) -> None:
    both = asked(user(part_of(CLIP), part_of(OTHER), part_of(CLIP)))
    (blind,) = prompts_of(NoiseSession, renderer, both)
    (seeing,) = prompts_of(ChatSession, renderer, both)
    assert np.array_equal(blind.token_ids, seeing.token_ids)
    assert not {item.hash for item in blind.videos} & {item.hash for item in seeing.videos}
    one, two, again = blind.videos
    assert one.hash == again.hash != two.hash
    assert np.array_equal(one.times, seeing.videos[0].times)
    (elsewhere,) = prompts_of(NoiseSession, renderer, both, name="another rollout")
    assert elsewhere.videos[0].hash != one.hash
    (hidden,) = prompts_of(NoiseSession, renderer, asked(user(part_of(OTHER), part_of(CLIP), part_of(OTHER))))
    assert [item.hash for item in hidden.videos] == [item.hash for item in blind.videos], "noise says nothing of pixels"


def test_a_broken_video_is_the_requests_fault(renderer: FamilyRenderer) -> None:
    session = session_of(ChatSession, renderer)
    with pytest.raises(RefusedError, match="video"):
        asyncio.run(session.answer(asked(user(video(f"data:video/jpeg;base64,{TWO_FRAMES.partition(',')[0]}")))))
