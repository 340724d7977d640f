"""Images of which a model would drop tiles are refused one by one, and only where the model does that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.families.learning import learning
from vlmrl.models.vision_encoder import encodes
from vlmrl.rendering.images import ImageError
from vlmrl.runs.build import build_renderer
from vlmrl.types import Image

BLACK = np.zeros((96, 96, 3), np.uint8)
HALF = np.concatenate([np.full((64, 128, 3), 200, np.uint8), np.zeros((64, 128, 3), np.uint8)])


@pytest.fixture
def black_is_zero(family_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, whose image processor turns black into zeros."""

    def folder(name: str) -> Path:
        made = Path(shutil.copytree(family_folder(name), tmp_path / name))
        path = made / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.0] * 3}))
        return made

    return folder


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_dropped_tile_costs_its_image(name: str, black_is_zero: Callable[[str], Path]) -> None:
    made = learning(black_is_zero(name))
    renderer = build_renderer(made.config, made.folder, made.model).renderer
    for picture, words in ((BLACK, "5 of its 5 tiles"), (HALF, "2 of its 5 tiles")):
        with pytest.raises(ImageError, match=words):
            renderer.items([Image(picture)])
        # The model does drop them: so says its own get_image_features.
        unchecked = build_renderer(made.config, made.folder).renderer
        assert not encodes(made.model, unchecked.items([Image(picture), Image(HALF + 1)]))
    (item,) = renderer.items([Image(BLACK + 1)])
    assert encodes(made.model, [item])


def test_other_families_see_black(black_is_zero: Callable[[str], Path]) -> None:
    made = learning(black_is_zero("llava_next"))
    items = build_renderer(made.config, made.folder, made.model).renderer.items([Image(BLACK), Image(HALF)])
    assert not any(item.mm_kwargs["pixel_values"][:, -1].all() for item in items[:1])
    assert encodes(made.model, items)
