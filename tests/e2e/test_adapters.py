"""Adapters on every part of a model whose base is held in 4 bits, by the real command: exact, resumed, exported."""

from __future__ import annotations

import pytest

from support.command_line import SHORT, Home, assert_same_run, steady

pytestmark = pytest.mark.slow

NF4 = (
    *("model/lora=nf4", "model.lora.parts=[vision_tower,projector,language_model]"),
    *("trainer.part_rates.vision_tower=0.5", "trainer.decay=wsd", "trainer.decay_share=0.01", "trainer.ema=0.5"),
)


def test_a_base_in_4_bits_is_resumed_bit_for_bit_and_exported(home: Home) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    whole = home.made("whole", (*SHORT, *NF4))
    resumed = home.made("resumed", (*SHORT, *NF4, "trainer.max_steps=4"), ("trainer.max_steps=6",))
    assert_same_run(resumed, whole)
    lines = [line for line in steady(whole / "metrics.jsonl") if line["step"] > 0]
    assert max(line["mismatch_kl/mean"] for line in lines) < 1e-8, "the engine samples from the same rounded weights"
    assert lines[-1]["images/cached"] == 0, "the tower learns"
    exported = home.path / "exported"
    ended = home.vlmrl("mode=export", f"resume={whole}", f"export.folder={exported}", "export.weights=average")
    assert ended.code == 0, ended.err
    again = home.vlmrl("mode=eval", f"model.name={exported}", "model.tiny=null", *SHORT, "hydra.run.dir=outputs/eval")
    assert again.code == 0, again.err
