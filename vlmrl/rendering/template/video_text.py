"""One video through the checkpoint's whole processor: its tensors, and the text that stands for it in a prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from vlmrl.config.model import VideoConfig
from vlmrl.errors import fenced
from vlmrl.rendering.images import VideoError
from vlmrl.rendering.item_store import Processed
from vlmrl.rendering.template.image_text import OF_TEXT, as_array
from vlmrl.rendering.videos import Clip
from vlmrl.types import IntArray


class ProcessVideoWithText:
    """Runs the whole processor on one video and its placeholder, so that it is processed as transformers does it."""

    def __init__(self, processor: Any, load: Callable[[], Any], config: VideoConfig, video_token_id: int) -> None:
        """`load` makes the checkpoint's video processor, when the first video is shown."""
        self._processor = processor
        self._load = load
        self._config = config
        self._video_token_id = video_token_id
        self._lock = threading.RLock()
        """A tokenizer must not be used by two threads at once."""
        self.sampled_rate = config.fps
        self.max_frames = config.max_frames
        self.placeholder: str = processor.video_token

    def choose(self, total: int, rate: float) -> IntArray:
        """Which frames are shown, by the rule of the family's video processor."""
        from transformers.video_utils import VideoMetadata

        config = self._config
        wanted: dict[str, Any] = {"fps": config.fps} if config.num_frames is None else {"num_frames": config.num_frames}
        seconds = total / rate
        at_rate = min(total, int(min(seconds * config.fps, 2.0**62)))
        if config.num_frames is None and at_rate > config.max_frames:
            raise VideoError(
                f"a video of {seconds:.4g} s has {at_rate} frames at model.vlm.video.fps="
                f"{config.fps:g}, more than model.vlm.video.max_frames={config.max_frames}: shorten it, lower fps, set "
                "num_frames, or raise max_frames"
            )
        processor = self._video_processor()
        with fenced(f"a video of {total} frames cannot be sampled: the processor", VideoError):
            return np.asarray(processor.sample_frames(VideoMetadata(total, fps=rate), **wanted), np.int64)

    def __call__(self, clip: Clip) -> Processed:
        count, height, width = clip.frames.shape[:3]
        what = f"a video of {count} frames of {width} × {height}"
        self._video_processor()
        with fenced(f"{what} cannot be processed: the processor", VideoError), self._lock:
            output = self._processor(
                text=[self.placeholder],
                videos=[clip.frames],
                return_tensors="np",
                return_text_replacement_offsets=True,
                videos_kwargs={
                    "do_sample_frames": False,
                    "input_data_format": "channels_last",
                    "video_metadata": [_metadata(clip)],
                },
            )
            num_tokens = output["input_ids"][0].tolist().count(self._video_token_id)
            replacement = str(output["text_replacement_offsets"][0][0]["replacement"])
        if num_tokens == 0:
            raise VideoError(f"{what} becomes {replacement[:80]!r}, which has no token of id {self._video_token_id}")
        arrays = {name: _as_in_torch(as_array(value)) for name, value in output.items() if name not in OF_TEXT}
        return Processed({name: array for name, array in arrays.items() if array is not None}, num_tokens, replacement)

    def load(self) -> None:
        """Load the video processor, if it is not loaded yet. Raises `ModelError` and `ConfigError`."""
        self._video_processor()

    def _video_processor(self) -> Any:
        """The processor's own, loaded when it is first needed. Raises `ModelError` and `ConfigError`."""
        with self._lock:
            if self._processor.video_processor is None:
                self._processor.video_processor = self._load()
            return self._processor.video_processor


def _as_in_torch(array: np.ndarray | None) -> np.ndarray | None:
    """Numbers as `return_tensors="pt"` gives them to the model: Qwen2.5-VL's seconds are Python floats."""
    return array.astype(np.float32) if array is not None and array.dtype == np.float64 else array


def _metadata(clip: Clip) -> Any:
    """What transformers is told about a clip: the seconds of its frames are the indices of a video of one frame a
    second."""
    from transformers.video_utils import VideoMetadata

    class Metadata(VideoMetadata):
        """Of frames that are sampled already."""

        @property
        def sampled_fps(self) -> float:
            return clip.rate

    return Metadata(total_num_frames=len(clip.times), fps=1.0, frames_indices=clip.times.tolist())
