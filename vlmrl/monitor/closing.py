"""The table that a run prints when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmrl.monitor.progress import duration
from vlmrl.record.bad_rows import read_bad_rows
from vlmrl.record.metrics import DEMONSTRATION_LOSS, EVAL_GREEDY, EVAL_SAMPLED, PAIR_ACCURACY
from vlmrl.record.run_dir import RunDir


def closing_table(
    run_dir: RunDir, exit_reason: str, seconds: float, last: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, str]:
    """How a run of so many seconds ended. `last` is its last line of metrics.jsonl, `evaluation` the last line with a
    main evaluation; empty without one."""
    table = {
        "ended": f"{exit_reason} after step {last.get('step', 0)} and {duration(seconds)}",
        "reward": _shown(last.get("reward/mean")),
        "held-out": _held_out(last, evaluation),
        "folder": readable(run_dir.path),
    }
    if rows := read_bad_rows(run_dir.bad_rows):
        command = f"python -m vlmrl mode=faults run={table['folder']}"
        table["bad rows"] = f"{len(rows)} were passed over: {command} lists them"
    return table


def readable(path: Path) -> str:
    """A path as a user types it: relative to the working directory where it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _held_out(last: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The held-out rewards, loss and accuracy on pairs of the newest evaluation, for people."""
    loss, pairs = last.get(DEMONSTRATION_LOSS), last.get(PAIR_ACCURACY)
    rewards = f"sampled {_shown(evaluation.get(EVAL_SAMPLED))}, greedy {_shown(evaluation.get(EVAL_GREEDY))}"
    others = ([] if loss is None else [f"loss {loss:.3f}"]) + ([] if pairs is None else [f"pairs {pairs:.3f}"])
    return ", ".join([rewards, *others] if evaluation or not others else others)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
