"""Whether tiny models of other families learn the default task from reward, as the default's tiny Qwen3-VL does.

    python benchmarks/families_learn.py                                 every model, seeds 0, 1 and 2, and the control
    python benchmarks/families_learn.py --models gemma3,llava --seeds 0 trainer.max_steps=20
    python benchmarks/families_learn.py --models "" --curves curves.svg the table of the runs that are there

`experiment=color_codeword_tiny` as it is; only the model is another one. Its checkpoint is made here: the family's own
classes, tokenizer, chat template and processor (tests/support/families), a vocabulary that has seen the prompts, and
weights by the rule of `model.tiny`: matrices have a standard deviation of 0.08. Weights, problems and samples come from
the seed. Each evaluation also asks `blind`, a set with the squares of other problems: the policy that learned to see
then reads one letter in nine. The control trains on such problems (`task.shuffle_images=true`).

A run that has ended is not made again, so the benchmark can be interrupted; delete its folder to repeat it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curves import Curve, draw
from timed_command import REPOSITORY, processor_seconds

from vlmrl.config.task import ColorCodewordConfig
from vlmrl.record.metrics import EVAL_GREEDY, EVAL_SAMPLED, Record, read_metrics
from vlmrl.tasks.color_codeword import ColorCodeword

WEIGHT_STD = 0.08
"""`model.tiny.initializer_range`."""
MEASURED = "measured.json"
"""In the folder of a run that has ended: the processor seconds of its command, in user and system mode."""
LETTERS = "eval/task/share_correct"
VISION_GAP = "vision_gap/shuffled"
LETTERS_BLIND = "eval/blind/task/share_correct"
CONTROL = "control"
COLUMNS = (
    *("model", "run", "RL steps", "before", "sampled", "greedy", "letters before", "letters", "letters, blind"),
    *("vision gap", "mismatch_kl/max", "processor s"),
)


@dataclass(frozen=True)
class Model:
    """A row of the table."""

    kind: str
    family: str | None = None
    """Of tests/support/families; None is the default's own tiny model."""
    edits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """File of the checkpoint → what is other there; nested objects are merged."""


MODELS = {
    "default": Model("the default: tiny Qwen3-VL"),
    "gemma3": Model("windows, images whose tokens see each other", "gemma3"),
    "qwen3_5": Model(
        "recurrent: a gated delta net and a softmax layer",
        "qwen3_5",
        {
            "config.json": {
                "text_config": {
                    "num_hidden_layers": 2,
                    "layer_types": ["linear_attention", "full_attention"],
                    "linear_key_head_dim": 32,
                    "linear_value_head_dim": 32,
                }
            }
        },
    ),
    "smolvlm": Model(
        "tiles: four and the whole image, a token each, with tags",
        "smolvlm",
        {
            "config.json": {"vision_config": {"image_size": 32}},
            "preprocessor_config.json": {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
            "processor_config.json": {"image_seq_len": 1},
        },
    ),
    "llava": Model("a fixed number of tokens: 16 of CLIP's patches", "llava"),
}
"""Heads of 128 serve vLLM alone, and larger tiles only make prompts longer, so they are smaller than in the tests."""

BLIND = "orchestrator.eval.sets.blind"
SETTINGS = (
    *("experiment=color_codeword_tiny", "monitor.live=false", "monitor.wandb.mode=disabled"),
    *(f"+eval_set@{BLIND}=default", f"+task@{BLIND}.task=color_codeword", f"{BLIND}.task.shuffle_images=true"),
    *(f"{BLIND}.task.{key}=${{task.{key}}}" for key in ("max_turns", "images_per_turn", "image_size")),
    *(f"{BLIND}.problems=${{orchestrator.eval.problems}}", f"{BLIND}.greedy=false"),
)


def build_checkpoint(model: Model, folder: Path, seed: int) -> None:
    """Write the checkpoint of `model` with the weights of `seed` into `folder`."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from support.families import build
    from support.families.weights import save

    assert model.family is not None, "the default builds its own checkpoint"
    build(model.family, folder, texts=ColorCodeword(ColorCodewordConfig(), seed=0).texts())
    for name, changes in model.edits.items():
        path = folder / name
        path.write_text(json.dumps(_merged(json.loads(path.read_text()), changes), indent=2))
    torch.manual_seed(seed)
    auto: Any = AutoModelForImageTextToText
    network = auto.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for _, weight in sorted(network.named_parameters()):
            if weight.ndim > 1:  # norms, biases and decay rates keep the values that their class gives them
                noise = random.standard_normal(tuple(weight.shape), np.float32)
                weight.copy_(torch.from_numpy(noise * np.float32(WEIGHT_STD)))
    save(network, folder)


def _merged(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return content | {
        key: _merged(content.get(key) or {}, value) if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }


def run_of(folder: Path, name: str, seed: int, is_control: bool) -> Path:
    """The folder of a run."""
    return folder / f"{name}_{CONTROL if is_control else 'seed'}_{seed}"


def measure(folder: Path, name: str, seed: int, is_control: bool, overrides: list[str]) -> None:
    """Run the command, unless it has run. Raises RuntimeError where it fails."""
    run, model = run_of(folder, name, seed, is_control), MODELS[name]
    if (run / MEASURED).exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    chosen = [f"model.tiny.seed={seed}"]
    if model.family is not None:
        checkpoint = folder / "checkpoints" / f"{name}_{seed}"
        build_checkpoint(model, checkpoint, seed)
        chosen = ["model=auto", f"model.name={checkpoint.absolute()}", "trainer=scratch"]
    chosen += [f"seed={seed}", f"hydra.run.dir={run}", *overrides]
    chosen += ["task.shuffle_images=true"] if is_control else []
    (run / MEASURED).write_text(json.dumps(processor_seconds([*SETTINGS, *chosen], run.name)))


def report(folder: Path, curves: Path | None) -> None:
    """Print a row for each run in `folder` that has ended, and draw their curves."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    drawn: dict[str, list[Curve]] = {}
    for name in MODELS:
        for path in sorted(folder.glob(f"{name}_*_*/{MEASURED}")):
            _, what, seed = path.parent.name.rsplit("_", 2)
            label = f"{what} {seed}"
            lines = read_metrics(path.parent / "metrics.jsonl")
            evaluated = [line for line in lines if line.get(EVAL_SAMPLED) is not None]
            print(f"| {' | '.join([name, label, *_numbers(lines, evaluated)])} | {json.loads(path.read_text()):.0f} |")
            points = [(int(line["step"]), float(line[EVAL_SAMPLED])) for line in evaluated]
            drawn.setdefault(name, []).append(Curve(label, points, is_control=what == CONTROL))
    if curves is not None:
        curves.write_text(draw(drawn), encoding="utf-8")


def _numbers(lines: Sequence[Record], evaluated: Sequence[Record]) -> list[str]:
    """The cells between the label and the processor seconds."""
    first, last = evaluated[0], evaluated[-1]
    mismatch = max((line.get("mismatch_kl/max") or 0.0 for line in lines), default=0.0)
    gaps = [line[VISION_GAP] for line in lines if line.get(VISION_GAP) is not None]
    shares = (first[EVAL_SAMPLED], last[EVAL_SAMPLED], last[EVAL_GREEDY], first[LETTERS], last[LETTERS])
    cells = [*(f"{share:.3f}" for share in (*shares, last[LETTERS_BLIND])), f"{gaps[-1]:.1f}" if gaps else ""]
    return [str(lines[-1]["step"]), *cells, f"{mismatch:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between them")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between them")
    parser.add_argument("--controls", default="0", help="seeds of the control")
    parser.add_argument("--folder", type=Path, default=Path("outputs/families_learn"))
    parser.add_argument("--curves", type=Path, help="draw the curves into this SVG")
    options, overrides = parser.parse_known_args()
    for is_control, seeds in ((False, options.seeds), (True, options.controls)):
        for seed in filter(None, seeds.split(",")):
            for name in filter(None, options.models.split(",")):
                measure(options.folder, name, int(seed), is_control, overrides)
    report(options.folder, options.curves)


if __name__ == "__main__":
    main()
