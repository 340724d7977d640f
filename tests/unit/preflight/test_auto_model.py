"""What `model=auto` reads from a checkpoint, and what it leaves as the user set it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmrl.config.model import Dtype, VideoConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.auto_model import fill_model, known_families

GEMMA = {
    "model_type": "gemma3",
    "image_token_index": 262144,
    "vision_config": {},
    "text_config": {},
    "torch_dtype": "bfloat16",
}
UNKNOWN = {
    "model_type": "nobody_knows",
    "image_token_id": 7,
    "vision_config": {"patch_size": 14},
    "text_config": {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "dtype": "float16"},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., str]:
    def write(config: dict[str, Any] | str, tokens: dict[int, str] | None = None) -> str:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        added = [{"id": id, "content": content} for id, content in (tokens or {}).items()]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
        return f"model.name={tmp_path}"

    return write


def filled(run_config: Callable[..., RunConfig], *overrides: str) -> tuple[RunConfig, list[str]]:
    return fill_model(run_config("model=auto", "model.device=cpu", *overrides))


def test_a_known_family_is_its_file(run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]) -> None:
    config, notes = filled(run_config, checkpoint(GEMMA))
    vlm = config.model.vlm
    assert vlm is not None
    assert (vlm.family, vlm.positions, vlm.image_token) == ("gemma3", "sequential", "<image_soft_token>")
    assert config.model.dtype is Dtype.float32  # on a CPU
    assert notes[0].endswith("conf/model/vlm has its family: model/vlm=gemma3")
    assert "    image_token: <image_soft_token>" in notes


def test_an_unknown_family_is_read_from_its_files(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]
) -> None:
    config, notes = filled(run_config, checkpoint(UNKNOWN, {6: "no", 7: "<pic>", 8: "no"}))
    vlm = config.model.vlm
    assert vlm is not None
    assert (vlm.family, vlm.positions, vlm.image_token, vlm.renderers) == (
        "nobody_knows",
        "mrope",
        "<pic>",
        ["template"],
    )
    assert notes[1:] == [
        "    family: nobody_knows",
        "    renderers: [template]",
        "    positions: mrope",
        "    image_token: <pic>",
    ]


QWEN = {
    "model_type": "qwen3_vl",
    "image_token_id": 7,
    "video_token_id": 8,
    "vision_config": {},
    "text_config": {},
}


def test_videos_have_the_token_of_the_checkpoint(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]
) -> None:
    name = checkpoint(QWEN, {7: "<|image_pad|>", 8: "<film>"})
    config, notes = filled(run_config, name, "model.vlm.video.fps=1")
    assert config.model.vlm is not None
    assert config.model.vlm.video == VideoConfig(token="<film>", fps=1.0)
    assert "    video: {token: <film>}" in notes
    config, _ = filled(run_config, name, "model.vlm.video=null")
    assert config.model.vlm is not None
    assert config.model.vlm.video is None


@pytest.mark.parametrize("config", [QWEN | {"video_token_id": 9}, GEMMA | {"video_token_id": 8}, GEMMA])
def test_no_videos_without_a_token_or_a_family_that_has_them(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str], config: dict[str, Any]
) -> None:
    found, notes = filled(run_config, checkpoint(config, {7: "<image_soft_token>", 8: "<film>"}))
    assert found.model.vlm is not None
    assert found.model.vlm.video is None
    assert not any("video:" in note for note in notes)


def test_what_the_user_set_stays(run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]) -> None:
    name = checkpoint(UNKNOWN)  # no token of this id: not looked for
    config, _ = filled(
        run_config, name, "model.vlm.image_token='<mine>'", "model.vlm.positions=sequential", "model.dtype=float16"
    )
    assert config.model.vlm is not None
    assert (config.model.vlm.image_token, config.model.vlm.positions) == ("<mine>", "sequential")
    assert config.model.dtype is Dtype.float16


def test_an_image_token_that_nothing_spells_is_refused(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError, match=r"no image_token_id or image_token_index .* set model.vlm.image_token="):
        filled(run_config, checkpoint(UNKNOWN, {6: "no"}))


def test_no_vision_tower_is_a_text_only_model(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]
) -> None:
    config, notes = filled(run_config, checkpoint({"model_type": "qwen3", "torch_dtype": "bfloat16"}))
    assert config.model.vlm is None
    assert config.orchestrator.renderer is not None
    assert config.orchestrator.renderer.name == "template"
    assert "without a vision tower" in notes[0]


def test_without_its_eyes(run_config: Callable[..., RunConfig], checkpoint: Callable[..., str]) -> None:
    config, notes = filled(run_config, checkpoint(GEMMA), "~model/vlm")
    assert config.model.vlm is None
    assert notes == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read .*: download it again"),
        ("[1]", "holds no JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": "../x"}', "names no model_type"),
    ],
)
def test_damaged_files_are_named(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str], content: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        filled(run_config, checkpoint(content))


def test_a_folder_that_is_not_there_is_named(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"model.name=/no/such/folder has no config.json here"):
        filled(run_config, "model.name=/no/such/folder")


def test_a_checkpoint_that_is_built_has_no_files_to_read(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ConfigError, match=r"model.tiny builds a checkpoint, and model.vlm.family=auto is read from one"
    ):
        fill_model(run_config("model/vlm=auto"))


def test_presets_are_left_alone(run_config: Callable[..., RunConfig]) -> None:
    config = run_config()
    assert fill_model(config) == (config, [])


def test_every_file_of_a_family_is_found_by_its_model_type() -> None:
    assert {"qwen3_vl", "gemma3", "internvl", "mistral3"} <= set(known_families())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "fuyu", "image_token_id": 7}, "has image_token_id and no vision_config, so it takes images"),
        ({"model_type": "emu3", "vq_config": {}}, "has vq_config and no vision_config"),
        (GEMMA | {"quantization_config": {"quant_method": "fp8"}}, "cannot be trained here: .* quant_method=fp8"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    run_config: Callable[..., RunConfig], checkpoint: Callable[..., str], content: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        filled(run_config, checkpoint(content))


def test_a_folder_with_an_adapter_is_named(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no config\.json: the folder holds an adapter"):
        filled(run_config, f"model.name={tmp_path}")
