"""The videos of a report's page: which frames of each are shown, and when they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlmrl.record.rollouts import VideoRecord
from vlmrl.rendering.filmstrip import shown_frames


def shown(videos: Mapping[str, VideoRecord]) -> dict[str, dict[str, Any]]:
    """Hash → the entry of `videos` in the document: the recorded video, and the numbers of the frames that are shown.

    >>> made = shown({"v": {"frames": ["a", "b"], "times": [0.0, 0.5], "fps": 2.0, "tensors": {}}})
    >>> made["v"]
    {'frames': ['a', 'b'], 'times': [0.0, 0.5], 'fps': 2.0, 'tensors': {}, 'shown': [0, 1]}
    """
    return {hash: {**video, "shown": shown_frames(len(video["frames"]))} for hash, video in videos.items()}


def frames_of(videos: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The hashes of all frames that are shown."""
    return (video["frames"][place] for video in videos.values() for place in video["shown"])
