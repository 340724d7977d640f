"""The image store: one object and one processing per distinct image, off the event loop."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from vlmrl.rendering.image_store import ImageStore
from vlmrl.rendering.images import ImageError, Pixels, decode
from vlmrl.rendering.item_store import Processed
from vlmrl.types import Image


def picture(width: int = 7, height: int = 5, seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: PILImage.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


class Process:
    """A processor that counts its calls, and raises `error` if it is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[int] = []
        self.error = error

    def __call__(self, pixels: Pixels) -> Processed:
        self.calls.append(threading.get_ident())
        if self.error:
            raise self.error
        return Processed({"pixel_values": pixels.reshape(1, -1).astype(np.float32)}, 1)


def test_one_object_and_one_processing_per_distinct_image(tmp_path: Path) -> None:
    process = Process()
    store = ImageStore(process)
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    sources = (image, image.copy(), np.array(image), encoded(image), path)
    (first, *others) = store.items(Image(source) for source in sources)
    assert all(other is first for other in others)
    (different,) = store.items([Image(picture(seed=1))])
    assert different is not first
    assert different.hash != first.hash
    assert len(process.calls) == 2
    assert store.known(first.hash) is first


def test_shared_arrays_are_read_only() -> None:
    (item,) = ImageStore(Process()).items([Image(picture())])
    assert not item.pixels.flags.writeable
    assert not item.mm_kwargs["pixel_values"].flags.writeable


def test_a_picture_that_is_changed_and_passed_again_is_another_image() -> None:
    store = ImageStore(Process())
    canvas = PILImage.new("RGB", (8, 8))
    before = Image(canvas)
    (old,) = store.items([before])
    canvas.putpixel((0, 0), (255, 255, 255))
    new, still_old = store.items([Image(canvas), before])
    assert new.hash != old.hash
    assert still_old is old


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("make", [lambda image: image, encoded], ids=["decoded", "encoded"])
def test_images_are_processed_off_the_event_loop_and_once_for_concurrent_calls(
    size: int, make: Callable[[PILImage.Image], Any]
) -> None:
    process = Process()
    store = ImageStore(process)

    async def rollout() -> Any:
        return await store.items_async([Image(make(picture(size, size))), Image(make(picture(size, size, 1)))])

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(rollout() for _ in range(32))))

    results = asyncio.run(ask())
    assert len({id(item) for items in results for item in items}) == 2
    assert all(items[0] is results[0][0] and items[1] is results[0][1] for items in results)
    assert len(process.calls) == 2
    assert threading.get_ident() not in process.calls


def test_a_known_part_is_answered_without_a_thread() -> None:
    store = ImageStore(Process())
    part = Image(encoded(picture(300, 300)))
    (item,) = store.items([part])

    async def ask() -> Any:
        coroutine = store.items_async([part, part])
        try:
            coroutine.send(None)  # returns without suspending, or yields the future that it waits for
        except StopIteration as stop:
            return stop.value
        coroutine.close()
        raise AssertionError("it waited")

    assert asyncio.run(ask()) == (item, item)


def test_a_failure_reaches_every_caller_and_is_not_remembered() -> None:
    process = Process(ImageError("too thin"))
    store = ImageStore(process)
    part = Image(picture())

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(store.items_async([part]) for _ in range(4)), return_exceptions=True))

    assert all(isinstance(result, ImageError) for result in asyncio.run(ask()))
    process.error = None
    (item,) = store.items([part])
    assert item.num_tokens == 1


def test_unreferenced_images_are_evicted_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process()
    monkeypatch.setattr("vlmrl.rendering.item_store.RECENT_BYTES", 4 * 5 * 8 * 8 * 3)  # four of 8 × 8, uint8 + float32
    store = ImageStore(process)
    parts = [Image(picture(8, 8, seed)) for seed in range(8)]
    held = store.items(parts[:1])
    for part in parts:
        store.items([part])
    gc.collect()
    assert len(process.calls) == 8
    store.items(parts[5:])  # recent
    assert store.items(parts[:1])[0] is held[0]  # held
    assert len(process.calls) == 8
    store.items([parts[1]])  # forgotten
    assert len(process.calls) == 9


# ── what siblings share ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_siblings_share_a_pil_image_that_is_not_loaded_yet(format: str, tmp_path: Path) -> None:
    """Pillow loads a file when its pixels are first used, and is not thread-safe there: without a lock per source, most
    of these calls fail, or get the pixels of a half-loaded image."""
    for seed in range(8):
        path = tmp_path / f"{seed}.{format.lower()}"
        picture(200, 150, seed).save(path, format)
        with PILImage.open(path) as whole:
            expected = np.array(whole.convert("RGB"))
        store = ImageStore(Process())
        with PILImage.open(path) as shared:

            async def siblings(store: ImageStore = store, shared: PILImage.Image = shared) -> list[Any]:
                return list(await asyncio.gather(*(store.items_async([Image(shared)]) for _ in range(16))))

            found = asyncio.run(siblings())
        assert {id(item) for (item,) in found} == {id(found[0][0])}
        np.testing.assert_array_equal(found[0][0].pixels, expected)


def test_a_shared_pil_image_is_loaded_by_one_thread(tmp_path: Path) -> None:
    picture(200, 150).save(tmp_path / "a.png")
    loading: set[int] = set()
    at_once: list[int] = []

    class Slow(PILImage.Image):
        def load(self) -> Any:
            loading.add(threading.get_ident())
            at_once.append(len(loading))
            threading.Event().wait(0.002)
            result = super().load()
            loading.discard(threading.get_ident())
            return result

    with PILImage.open(tmp_path / "a.png") as opened:
        opened.load()
        slow = Slow()
        slow.__dict__.update(opened.__dict__)

    async def siblings() -> None:
        store = ImageStore(Process())
        await asyncio.gather(*(store.items_async([Image(slow)]) for _ in range(12)))

    asyncio.run(siblings())
    assert set(at_once) == {1}


def test_a_lazy_picture_that_is_changed_and_passed_again_is_another_image(tmp_path: Path) -> None:
    picture(300, 300).save(tmp_path / "a.png")
    store = ImageStore(Process())
    with PILImage.open(tmp_path / "a.png") as shared:
        (old,) = store.items([Image(shared)])
        shared.putpixel((0, 0), (1, 2, 3))
        (new,) = store.items([Image(shared)])
    assert new.hash != old.hash
    assert new.pixels[0, 0].tolist() == [1, 2, 3]


def test_siblings_decode_the_same_bytes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(300, 300))
    decoded: list[object] = []

    def counted(source: Any) -> Pixels:
        decoded.append(source)
        return decode(source)

    monkeypatch.setattr("vlmrl.rendering.image_store.decode", counted)

    async def siblings() -> None:
        store = ImageStore(Process())
        await asyncio.gather(*(store.items_async([Image(bytes(bytearray(data)))]) for _ in range(16)))

    asyncio.run(siblings())
    assert len(decoded) == 1


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Unhashable(Image):
    """A subclass whose hash is that of its fields: an array has none."""


def test_a_part_whose_own_code_raises_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="unhashable"):
        ImageStore(Process()).items([Unhashable(np.zeros((4, 4, 3), np.uint8))])


class Raising(Image):
    @property
    def source(self) -> Any:
        raise SystemExit(3)

    def __init__(self) -> None:
        pass


def test_a_part_that_has_no_source_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="SystemExit: 3"):
        ImageStore(Process()).items([Raising()])


def test_the_error_of_the_processor_names_the_file(tmp_path: Path) -> None:
    picture().save(tmp_path / "thin.png")
    store = ImageStore(Process(ImageError("the ratio is 300")))
    with PILImage.open(tmp_path / "thin.png") as lazy:
        for source in (tmp_path / "thin.png", lazy):
            with pytest.raises(ImageError, match=r"^the image file .*thin\.png: the ratio is 300$"):
                store.items([Image(source)])


def test_a_read_that_hangs_can_be_left(tmp_path: Path) -> None:
    """A file system that does not answer, here a processor that waits: the run ends although the thread does not."""
    hangs, goes_on = threading.Event(), threading.Event()

    def process(pixels: Pixels) -> Processed:
        hangs.set()
        goes_on.wait()
        raise AssertionError("nobody waits for this any more")

    async def run() -> None:
        waits = asyncio.create_task(store.items_async([Image(encoded(picture()))]))
        await asyncio.to_thread(hangs.wait)
        (thread,) = [each for each in threading.enumerate() if each.name == "images"]
        assert thread.daemon  # the interpreter does not wait for it
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits

    store = ImageStore(process)
    asyncio.run(run())
    goes_on.set()


def test_no_thread_is_left_when_there_is_nothing_to_do() -> None:
    store = ImageStore(Process())
    store.items([Image(encoded(picture(seed=seed))) for seed in range(8)])
    threads = [thread for thread in threading.enumerate() if thread.name == "images"]
    for thread in threads:
        thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "images"]
