"""`python -m vlmrl explain`: values, and where they come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmrl.cli.explain import explanation
from vlmrl.cli.main import main
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF
from vlmrl.config.keys import known_keys
from vlmrl.errors import ConfigError


def explain(*arguments: str) -> str:
    register_schemas()
    return explanation(with_recipe(list(arguments)), CONF)


def test_one_key_from_schema_to_command_line() -> None:
    text = explain("trainer.learning_rate", "experiment=color_codeword_4b", "trainer.learning_rate=1e-5")
    assert text == (
        "trainer.learning_rate = 1e-05\n"
        "    float; step size; above 0 and at most 100\n"
        "    Highest step size of AdamW. The default suits pretrained weights; the option of `model` sets its\n"
        "    own.\n"
        "    from schema 1e-06 → trainer/finetune.yaml 1e-06 → experiment/color_codeword_4b.yaml 3e-06 →\n"
        "    override 1e-05\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["seed"], "from schema 0"),
        (["inference.max_model_len"], "= 1024 .* from schema 1024 → inference/embedded.yaml \\${trainer.seq_len}"),
        (
            ["algorithm.credit"],
            "= turn .* turn: Each turn's own reward\\. .* schema episode → config.yaml \\${task.credit}",
        ),
        (["trainer.warmup.steps"], "= 100 .* from schema 0 → experiment/color_codeword_tiny.yaml 100"),
        (["trainer.betas", "trainer.betas=[0.8,0.9]"], r"= \[0.8,0.9\] .* → override \[0.8,0.9\]"),
        (["model.tiny.seed", "model=qwen3vl"], "= not set: model.tiny is null under these choices"),
        (["task.target", "task=imported"], "= not set .* from schema not set"),
        (["task.args", "task=imported", "++task.args.level=3"], r"= {level:3} .* → override level=3"),
        (["algorithm.filters.gibberish"], "one of none, track, drop .* none: The filter is disabled."),
        (["orchestrator/renderer"], "^orchestrator/renderer=auto The renderer: .* orchestrator.renderer.name = auto"),
        (["model/vlm"], "^model/vlm=qwen3_vl .* options: .*qwen3_vl, qwen3_vl_moe, .* model.vlm.family = qwen3_vl"),
    ],
)
def test_value_and_origin(arguments: list[str], expected: str) -> None:
    assert re.search(expected, " ".join(explain(*arguments).split()))


def test_a_bare_name_is_every_key_of_that_name() -> None:
    text = explain("learning_rate")
    assert re.findall(r"^(\S+) = ", text, re.MULTILINE) == ["trainer.learning_rate", "trainer.warmup.learning_rate"]


def test_a_group_shows_all_its_keys_and_those_of_its_option() -> None:
    shown = re.findall(r"^(\S+) = ", explain("inference", "inference=vllm"), re.MULTILINE)
    assert shown == sorted(shown, key=shown.index)
    of_embedded = "inference.batching"
    assert set(shown) == {key for key in known_keys() if key.startswith("inference.")} - {of_embedded}
    assert "inference.replicas" not in explain("inference")
    assert of_embedded in explain("inference")


def test_without_a_key_the_groups_and_their_options() -> None:
    text = explain("model=qwen3vl")
    assert "model=qwen3vl\n" in text
    assert "options: cuda_ipc, folder, in_process, nccl" in text
    assert "color_codeword_schema" not in text


def test_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/task").mkdir(parents=True)
    (tmp_path / "mine/task/big.yaml").write_text("defaults: [color_codeword, _self_]\nimage_size: 64\n")
    monkeypatch.chdir(tmp_path)
    text = explain("task.image_size", "--config-dir", "mine", "task=big")
    assert "task.image_size = 64" in text
    assert f"→ {tmp_path}/mine/task/big.yaml 64" in " ".join(text.split())
    with pytest.raises(ConfigError, match=r"--config-dir absent: .* is no folder"):
        explain("--config-dir", "absent")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.lr"], "trainer.lr: there is no such key; did you mean trainer.learning_rate"),
        (["seed", "model=qwen"], "model=qwen: model has only auto, qwen3vl, qwen3vl_moe, qwen3vl_tiny"),
        (["seed", "trainer.max_steps=many"], "trainer.max_steps: Value 'many'"),
    ],
)
def test_what_cannot_be_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert not captured.out
