"""The videos of a report's page: which frames of each are shown, and when they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlmrl.record.rollouts import VideoRecord
from vlmrl.rendering.filmstrip import shown_frames


def shown(videos: Mapping[str, VideoRecord]) -> dict[str, dict[str, Any]]:
    """Hash → the entry of `videos` in the document: the hashes and times of the frames that are shown, at even
    distances, the number of frames of the video, and its average frames per second.

    >>> made = shown({"v": {"frames": ["a", "b"], "times": [0.0, 0.5], "fps": 2.0, "tensors": {}}})
    >>> made["v"]
    {'frames': ['a', 'b'], 'times': [0.0, 0.5], 'count': 2, 'fps': 2.0}
    """
    found = {}
    for hash, video in videos.items():
        places = shown_frames(len(video["frames"]))
        found[hash] = {
            "frames": [video["frames"][place] for place in places],
            "times": [video["times"][place] for place in places],
            "count": len(video["frames"]),
            "fps": video["fps"],
        }
    return found


def frames_of(videos: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The hashes of all frames that are shown."""
    return (frame for video in videos.values() for frame in video["frames"])
