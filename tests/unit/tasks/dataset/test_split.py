"""Membership in the held-out split is a function of a row's question and pixels, and of nothing else."""

from __future__ import annotations

import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from vlmrl.rendering.images import Pixels, decode
from vlmrl.tasks.dataset.split import belongs_to_eval, content_hash

FRACTIONS = st.floats(0, 1)
TEXTS = st.lists(st.text(max_size=30), max_size=4)


def picture(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)


@given(texts=TEXTS, fraction=FRACTIONS)
def test_equal_rows_are_on_one_side(texts: list[str], fraction: float) -> None:
    one, other = (content_hash(list(texts), [picture(1)]) for _ in range(2))
    assert belongs_to_eval(one, fraction) == belongs_to_eval(other, fraction)


@given(texts=TEXTS, fractions=st.tuples(FRACTIONS, FRACTIONS))
def test_a_larger_fraction_keeps_what_a_smaller_one_holds_out(texts: list[str], fractions: tuple[float, float]) -> None:
    content = content_hash(texts, [])
    small, large = sorted(fractions)
    assert belongs_to_eval(content, small) <= belongs_to_eval(content, large)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_share_converges_to_the_fraction(fraction: float) -> None:
    rows = 20_000
    share = sum(belongs_to_eval(content_hash([f"What is {n} + {n}?"], []), fraction) for n in range(rows)) / rows
    assert abs(share - fraction) <= 4 * math.sqrt(fraction * (1 - fraction) / rows)


def test_the_share_converges_for_rows_that_differ_in_their_pixels_alone() -> None:
    share = sum(belongs_to_eval(content_hash(["Which digit?"], [picture(n)]), 0.2) for n in range(3000)) / 3000
    assert abs(share - 0.2) <= 4 * math.sqrt(0.2 * 0.8 / 3000)


def test_packing_an_image_another_way_changes_nothing(tmp_path: Path) -> None:
    pixels = picture(3)
    hashes = set()
    for kind in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        data = io.BytesIO()
        PILImage.fromarray(pixels).save(data, kind, **({"lossless": True} if kind == "WEBP" else {}))
        hashes.add(content_hash(["?"], [decode(data.getvalue())]))
        path = tmp_path / f"moved.{kind.lower()}"
        path.write_bytes(data.getvalue())
        hashes.add(content_hash(["?"], [decode(path)]))
    hashes.add(content_hash(["?"], [decode(PILImage.fromarray(pixels))]))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        (["a", "b"], []),
        (["ab"], []),
        (["b", "a"], []),
        ([], [1, 2]),
        ([], [2, 1]),
        ([], [1]),
        (["a", "b"], [1]),
        (["image " + "0" * 32], []),
        ([""], []),
        ([], []),
    ],
)
def test_different_rows_have_different_hashes(texts: list[str], images: list[int]) -> None:
    others = [(["a", "B"], []), (["a b"], []), (["a"], [1]), ([], [3]), (["a", "b"], [2])]
    mine = content_hash(texts, [picture(n) for n in images])
    assert mine not in {content_hash(some, [picture(n) for n in shown]) for some, shown in others}


def test_one_changed_sample_of_a_pixel_is_another_image() -> None:
    pixels = picture(1)
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert content_hash([], [pixels]) != content_hash([], [changed])
    assert content_hash([], [pixels]) != content_hash([], [pixels.reshape(5, 6, 3)])


def test_line_ends_and_unicode_forms_do_not_count() -> None:
    forms = ["Caf\u00e9 is\r\nopen?", "Cafe\u0301 is\nopen?", " Caf\u00e9\tis open? "]
    assert len({content_hash([form], []) for form in forms}) == 1


def test_half_a_surrogate_pair_is_hashed() -> None:
    assert content_hash(["\ud83d"], []) != content_hash(["?"], [])


def test_contents_spread_over_the_whole_range() -> None:
    """No two of 2,000 thresholds in a row are without a content between them for long."""
    places = sorted(int(content_hash([str(n)], [])[:16], 16) / 2**64 for n in range(20_000))
    assert max(after - before for before, after in pairwise([0.0, *places, 1.0])) < 20 / 20_000
