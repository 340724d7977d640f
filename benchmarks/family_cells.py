"""Judges each cell of a family's row from the commands of that family; for benchmarks/families.py.

tests/support/families ─▶ checkpoint
mode=doctor                                         renderer, embedded, mismatch
trainer.max_steps=2                                 packing
  the same, as a kill after its first step leaves it, resume=      resume
  mode=export, and a load with transformers                        export
trainer.max_steps=2 model/lora=all_linear           LoRA
mode=sft, by one process and by two ranks           FSDP2
mode=doctor inference=vllm                          vLLM
the processor with published settings               tokens of a 1-megapixel image
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from family_image import PUBLISHED, image_tokens
from family_runs import Commands, Ended

from support.command_line import Home
from support.families import FAMILIES, build
from support.kills import differences

HERE = Path(__file__).parent

LARGEST_KL = 1e-8
"""Largest mean mismatch_kl in float32 (`vlmrl.runs.doctor.logprobs.FLOAT32_KL`)."""
RANKS_APART = 1e-4
"""Largest relative difference of loss and gradient norm between one process and two ranks."""
STEPS = 2
IN_HALF = "inference.dtype=bfloat16"

COMMON = (
    "task=family_task:Pictures",
    "task.max_turns=2",
    "task.credit=turn",
    "trainer=scratch",
    "algorithm.truncated=keep",  # a random model seldom ends an answer, and a cut answer is paid 0
    "orchestrator.max_new_tokens=8",
    "monitor.live=false",
    "monitor.report=false",
    "monitor.wandb.mode=disabled",
)
RL = (
    "trainer.warmup.steps=1",
    "trainer.warmup.batch_size=4",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every=1",
    f"trainer.keep_checkpoints={STEPS}",
    "orchestrator.groups_per_step=2",
    "orchestrator.group_size=2",
    "orchestrator.eval.every=0",
)
SFT = (
    "mode=sft",
    f"trainer.warmup.steps={STEPS}",
    "trainer.warmup.batch_size=4",
    "orchestrator.eval.problems=0",
    "orchestrator.eval.every=0",
)


class State(StrEnum):
    """How a cell came out."""

    OK = "ok"
    FAILED = "failed"
    REFUSED = "refused"
    """The product says that it cannot do this exactly, why, and what to set."""
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    family: str
    column: str
    state: State
    text: str
    """What stands in the table."""
    says: str = ""
    """Where it failed or was refused: the command's own words."""
    figures: dict[str, float] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0


class Row:
    """The cells of one family. Everything that is run for it is in a folder of its own."""

    def __init__(self, family: str, home: Home, limit_s: float) -> None:
        self.family = family
        self.recipe = FAMILIES[family]
        self.folder = home.path / family
        self.folder.mkdir(parents=True)
        shutil.copy(HERE / "family_task.py", self.folder)
        self.commands = Commands(home, self.folder, limit_s)

    @cached_property
    def checkpoint(self) -> Path:
        return build(self.family, self.folder / "checkpoint")

    @cached_property
    def base(self) -> tuple[str, ...]:
        """The arguments that all commands share."""
        pictures = () if self.recipe.image_token else ("task.args.pictures=0",)
        return ("model=auto", f"model.name={self.checkpoint}", *COMMON, *pictures)

    def cells(self, columns: Collection[str]) -> Iterator[Cell]:
        """The cells of these columns. One whose own code fails is a failed cell, and the next one follows."""
        parts: dict[str, Callable[[], Cell]] = {
            "template": self.template,
            "renderer": self.renderer,
            "embedded": self.embedded,
            "mismatch": self.mismatch,
            "packing": self.packing,
            "resume": self.resume,
            "export": self.export,
            "lora": self.lora,
            "fsdp2": self.fsdp2,
            "vllm": self.vllm,
            "image_tokens": self.image_tokens,
        }
        for column in columns:
            try:
                yield parts[column]()
            except Exception as error:  # noqa: BLE001 — the other cells are still worth having
                says = " ".join(f"{type(error).__name__}: {error}".split())
                yield self.cell(column, State.FAILED, "failed", says=says)

    def cell(
        self, column: str, state: State, text: str, ended: Ended | None = None, says: str = "", **figures: float
    ) -> Cell:
        command, seconds = ("", 0.0) if ended is None else (ended.command, round(ended.seconds, 1))
        return Cell(self.family, column, state, text, says, figures, command, seconds)

    def unfit(self, column: str, ended: Ended) -> Cell:
        """The cell of a command that did not do its work."""
        state = State.REFUSED if ended.is_refusal else State.FAILED
        return self.cell(column, state, state.value, ended, ended.complaint)

    # ── the certificate ─────────────────────────────────────────────────────────────────────────────────────

    def template(self) -> Cell:
        """Where the checkpoint's chat template came from."""
        return self.cell("template", State.OK, ": ".join(self.recipe.template_source))

    @cached_property
    def doctor(self) -> Ended:
        return self.commands.vlmrl("mode=doctor", *self.base, "hydra.run.dir=doctor")

    def renderer(self) -> Cell:
        ended = self.doctor
        settings = self.commands.certificate("doctor").get("settings")
        if settings is None:
            return self.unfit("renderer", ended)
        return self.cell("renderer", State.OK, str(settings["renderer"]), ended)

    def embedded(self) -> Cell:
        return self.certified("embedded", "doctor", self.doctor)

    def certified(self, column: str, name: str, ended: Ended) -> Cell:
        """The verdict of a whole certificate."""
        checks = self.commands.checks(name)
        failed = [f"{line['name']}: {line['says']}" for line in checks if line["verdict"] == "FAILED"]
        if failed:
            text = f"{len(failed)} of {len(checks)} lines failed"
            return self.cell(column, State.FAILED, text, ended, "; ".join(failed))
        if ended.code != 0:
            return self.unfit(column, ended)
        seen = sum(line["verdict"] == "ok" for line in checks)
        return self.cell(column, State.OK, f"{seen} lines", ended, lines=seen)

    def mismatch(self) -> Cell:
        """Engine and transformers against the trainer: the largest of the certificate's lines about logprobs."""
        lines = [line["figures"] for line in self.commands.checks("doctor") if line["name"].startswith("logprobs")]
        lines = [figures for figures in lines if "max_delta" in figures]
        if not lines:
            return self.unfit("mismatch", self.doctor)
        kl, delta = (max(figures[key] for figures in lines) for key in ("mismatch_kl", "max_delta"))
        state = State.OK if kl <= LARGEST_KL else State.FAILED
        return self.cell("mismatch", state, f"{kl:.0e}, {delta:.0e}", self.doctor, mismatch_kl=kl, max_delta=delta)

    def vllm(self) -> Cell:
        """The certificate through a real server; in bfloat16 where the server takes nothing else, and with another
        scale of the logits where it names that as the remedy."""
        if find_spec("vllm") is None:
            return self.cell("vllm", State.NOT_TRIED, "not tried", says="vLLM is not installed")
        name, words = "vllm", ("mode=doctor", "inference=vllm", *self.base)
        ended = self.commands.vlmrl(*words, "hydra.run.dir=vllm")
        if IN_HALF in ended.complaint:
            name = "vllm_in_half"
            ended = self.commands.vlmrl(*words, IN_HALF, f"hydra.run.dir={name}")
        if scale := re.search(r"set (inference\.extra_args\.hf_overrides=\S+)", ended.complaint):
            name = "vllm_in_scale"
            ended = self.commands.vlmrl(*words, scale[1], f"hydra.run.dir={name}")
        if missing := re.search(r"Package `(\w+)` is required", ended.complaint):
            says = f"vLLM needs the package {missing[1]} for this model, which is not installed"
            return self.cell("vllm", State.NOT_TRIED, "not tried", ended, says)
        cell = self.certified("vllm", name, ended)
        lines = [line for line in self.commands.checks(name) if line["name"].startswith("logprobs, version")]
        if cell.state is not State.OK:
            return cell
        kl, delta = (max(line["figures"][key] for line in lines) for key in ("mismatch_kl", "max_delta"))
        parts = [self.form_of_images(name), "bfloat16" if name == "vllm_in_half" else "", f"{kl:.0e}, {delta:.0e}"]
        text = ", ".join(part for part in parts if part)
        return self.cell("vllm", State.OK, text, ended, mismatch_kl=kl, max_delta=delta)

    def form_of_images(self, name: str) -> str:
        """`tensors` or `pictures`: in which form images went to the server; empty for a text model."""
        found = re.search(r"images go to the servers as (\w+)", (self.folder / name / "logs/main.log").read_text())
        return found[1] if found else ""

    # ── runs ────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def run(self) -> Ended:
        return self.commands.vlmrl(*self.base, *RL, "hydra.run.dir=run")

    def packing(self) -> Cell:
        """How samples share a pass, how many tokens that saves, and the kinds of layers that were found."""
        if self.run.code != 0:
            return self.unfit("packing", self.run)
        lines = self.commands.metrics("run")
        packed, alone = (sum(line[f"tokens/{kind}"] for line in lines) for kind in ("packed", "unpacked"))
        settings = self.commands.certificate("doctor").get("settings", {})
        way = "by sequence" if packed == alone else f"{settings.get('packing', 'tree')} {alone / packed:.1f}×"
        kinds = "; ".join(settings.get("attention", ()))
        text = f"{way} ({kinds})" if kinds else way
        return self.learned("packing", text, "run", self.run, tokens_packed=packed, tokens_unpacked=alone)

    def learned(self, column: str, text: str, name: str, ended: Ended, **figures: float) -> Cell:
        """`text`, if every step of a run had a gradient and the engine's logprobs were the trainer's."""
        lines = self.commands.metrics(name)
        kl, norm = max(line["mismatch_kl/mean"] for line in lines), min(line["grad_norm"] for line in lines)
        figures |= {"mismatch_kl": kl, "grad_norm": norm}
        if not kl <= LARGEST_KL:
            return self.cell(column, State.FAILED, f"mismatch_kl {kl:.0e}", ended, "", **figures)
        if not norm > 0:
            return self.cell(column, State.FAILED, "no gradient", ended, "", **figures)
        return self.cell(column, State.OK, text, ended, "", **figures)

    def resume(self) -> Cell:
        """The run as a kill after its first step would have left it, resumed, is the run that was never stopped."""
        if self.run.code != 0:
            return self.unfit("resume", self.run)
        run, copy = self.folder / "run", self.folder / "resumed"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / f"checkpoints/step_{STEPS:06d}")
        (copy / "summary.json").unlink()
        ended = self.commands.vlmrl("resume=resumed")
        if ended.code != 0:
            return self.unfit("resume", ended)
        if differ := differences(copy, run):
            return self.cell("resume", State.FAILED, f"{', '.join(differ)} differ", ended)
        return self.cell("resume", State.OK, "bit-equal", ended)

    def export(self) -> Cell:
        """transformers loads what mode=export writes, and every weight is the checkpoint's."""
        if self.run.code != 0:
            return self.unfit("export", self.run)
        ended = self.commands.vlmrl("mode=export", "resume=run", "export.folder=exported")
        if ended.code != 0:
            return self.unfit("export", ended)
        loading = (str(HERE / "family_export.py"), "exported", f"run/checkpoints/step_{STEPS:06d}")
        loaded = self.commands.python(*loading)
        if loaded.code != 0:
            return self.unfit("export", loaded)
        found = json.loads(loaded.out.splitlines()[-1])
        wrong = [f"{found[name]} {name}" for name in ("missing", "unexpected", "mismatched", "differ") if found[name]]
        if wrong or found["compared"] < found["parameters"]:
            says = ", ".join([*wrong, f"{found['compared']} of {found['parameters']} compared"])
            return self.cell("export", State.FAILED, says, ended, **found)
        return self.cell("export", State.OK, f"{found['compared']} tensors", ended, **found)

    def lora(self) -> Cell:
        ended = self.commands.vlmrl(*self.base, *RL, "model/lora=all_linear", "hydra.run.dir=lora")
        return self.learned("lora", "yes", "lora", ended) if ended.code == 0 else self.unfit("lora", ended)

    def fsdp2(self) -> Cell:
        """Supervised steps of two ranks, with weights, gradients and averages in slices, are those of one process."""
        alone = self.commands.vlmrl(*self.base, *SFT, "hydra.run.dir=alone")
        ended = self.commands.torchrun(*self.base, *SFT, "hydra.run.dir=sharded")
        for each in (alone, ended):
            if each.code != 0:
                return self.unfit("fsdp2", each)
        steps = [self.commands.metrics(name, "supervised.jsonl") for name in ("alone", "sharded")]
        apart = max(
            abs(one[key] - two[key]) / abs(one[key])
            for one, two in zip(*steps, strict=True)
            for key in ("loss", "grad_norm")
        )
        state = State.OK if apart <= RANKS_APART else State.FAILED
        return self.cell("fsdp2", state, f"2 ranks, {apart:.0e} from 1", ended, apart=apart)

    def image_tokens(self) -> Cell:
        """How many tokens a 1-megapixel picture becomes with published settings."""
        if self.recipe.image_token is None:
            return self.cell("image_tokens", State.OK, "–")
        published = PUBLISHED.get(self.family)
        if published is None:
            return self.cell("image_tokens", State.NOT_TRIED, "not tried", says="no published settings are listed")
        count = image_tokens(self.family, self.checkpoint, self.folder / "published")
        return self.cell("image_tokens", State.OK, str(count), None, published.checkpoint, tokens=count)
