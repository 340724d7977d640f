"""How fast the pictures of a run are recorded, and how long the loop waits for it.

    python benchmarks/recorder.py --pictures 40 --steps 8 --size 1000

Each step shows `--pictures` new pictures of `--size` pixels with the patches that Qwen3-VL's processor makes of them
(float32), and is recorded at once, as if the steps of the loop took no time: the worst case for the queue. A picture is
smooth with a little noise, about as well compressible as a photograph. Both ways in turn, after one step of each that
does not count:

    before   one thread, four files may wait
    now      `ENCODING_THREADS` threads, and what `MAX_QUEUED_BYTES` and `MAX_QUEUED_FILES` allow waits

`longest pause` is how long another thread, which does nothing but note the time, was ever kept from running: an event
loop would wait as long. It is also given for such a thread with nothing beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import PIL.Image

from vlmrl.record import rollouts
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.types import Completion, Image, ImageItem, Message, Placeholder, Prompt, Rollout, StopReason, Turn

WAYS = {"before": (1, 4), "now": (rollouts.ENCODING_THREADS, rollouts.MAX_QUEUED_FILES)}
"""Threads, and files that may wait."""

PATCH_PIXELS = 16
PATCH_VALUES = 2 * 3 * PATCH_PIXELS**2
"""Of a patch, whose picture is shown twice in time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40, help="new ones in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=1000, help="width and height in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk that is measured")
    arguments = parser.parse_args()
    steps = [shown(arguments.pictures, arguments.size, step) for step in range(arguments.steps)]
    pictures = arguments.pictures * arguments.steps
    with longest_pause() as alone:
        time.sleep(1)
    print(
        f"{pictures} pictures of {arguments.size} × {arguments.size}, Pillow {PIL.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores; longest pause with nothing beside it {alone[0] * 1e3:.0f} ms\n"
    )
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for repeat in range(-1, arguments.repeats):
        for way, (rollouts.ENCODING_THREADS, rollouts.MAX_QUEUED_FILES) in WAYS.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                measured = record(Path(folder), steps[:1] if repeat < 0 else steps)
                if repeat >= 0:
                    found[way].append(measured)
    print("| | pictures/s, median (min–max) | the loop waits, s of s | longest pause, ms |")
    print("|---|---|---|---|")
    for way, measurements in found.items():
        seconds, waits, pauses = zip(*measurements, strict=True)
        rates = [pictures / each for each in seconds]
        print(
            f"| {way} | {statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f}) | "
            f"{statistics.median(waits):.2f} of {statistics.median(seconds):.2f} | {1e3 * max(pauses):.0f} |"
        )


def record(folder: Path, steps: list[list[Rollout]]) -> tuple[float, float, float]:
    """Seconds until all is on the disk, those in which `write` kept the caller, and the longest pause."""
    run_dir = RunDir(folder / "run")
    run_dir.create()
    recorder = RolloutRecorder(run_dir)
    with longest_pause() as pause:
        begun = time.perf_counter()
        for step, made in enumerate(steps):
            recorder.write(step, {"train": made})
        waited = time.perf_counter() - begun
        recorder.flush()
        seconds = time.perf_counter() - begun
    recorder.close()
    assert len(list(run_dir.images.iterdir())) == sum(map(len, steps))
    assert len(run_dir.rollouts_steps("step")) == len(steps)
    return seconds, waited, pause[0]


@contextmanager
def longest_pause() -> Iterator[list[float]]:
    """Let a thread run beside the block → the longest time, in seconds, in which it did not, as the only item."""
    pause, ended = [0.0], threading.Event()

    def run() -> None:
        last = time.perf_counter()
        while not ended.wait(0.001):
            now = time.perf_counter()
            pause[0] = max(pause[0], now - last)
            last = now

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield pause
    finally:
        ended.set()
        thread.join()


def shown(pictures: int, size: int, step: int) -> list[Rollout]:
    """Rollouts of a step, each with a picture of its own."""
    made = []
    for number in range(pictures):
        item = picture(size, seed=step * pictures + number)
        prompt = Prompt(np.array([1, 99], np.int64), (Placeholder(1, 1, item.hash),), (item,))
        completion = Completion(np.array([2], np.int64), np.zeros(1, np.float32), np.zeros(1, np.int64), "stop")
        turn = Turn(prompt, completion, "A", [Message.of("user", Image(item.pixels))], 0, reward=0.0)
        made.append(Rollout(f"train/{step}/{number}", "problem", number, [turn], 0.0, {}, StopReason.TERMINATED))
    return made


def picture(size: int, seed: int) -> ImageItem:
    generator = np.random.default_rng(seed)
    small = PIL.Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((size, size), PIL.Image.Resampling.BICUBIC), np.int16)
    noise = generator.integers(-4, 5, smooth.shape, dtype=np.int16)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    patches = np.zeros(((size // PATCH_PIXELS) ** 2, PATCH_VALUES), np.float32)
    hash = hashlib.sha256(pixels.tobytes()).hexdigest()[:32]
    return ImageItem(hash, pixels, {"pixel_values": patches}, 1)


if __name__ == "__main__":
    main()
