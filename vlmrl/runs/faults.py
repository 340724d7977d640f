"""`mode=faults run=<run>`: list what the user's code and data did wrong in a run, and how to play each row again.

    bad_rows.jsonl ────────────────────────┐
    faults.jsonl ──────────────────────────┐
    rollouts/ (runs before the file)      ┴─▶ FaultRecords ─▶ kinds of equal errors ─▶ the screen, faults.json

It only reads the run, so it works while the run goes on; faults.json is written next to it, where the folder allows.
fault_again.py plays one row.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from omegaconf import DictConfig, OmegaConf

from vlmrl.errors import safe_text
from vlmrl.record.bad_rows import BadRowRecord, kinds_of_bad_rows, place_of, read_bad_rows
from vlmrl.record.faults import FaultPhase, FaultRecord, fault_kind, read_faults
from vlmrl.record.files import write_bytes_atomically
from vlmrl.record.rollouts import read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import StopReason

SHOWN_KINDS = 20
"""Kinds of faults that the screen shows, the most frequent ones first; faults.json has all."""

SHOWN_ROWS = 5
"""Bad rows that the screen names for each reason."""

PLAYED_ID = re.compile(r"(?:train|eval|eval-greedy)/(\d+)/(\d+)/\d+")
"""The id of a rollout: its step and its group."""


@dataclass
class FaultKind:
    """Faults with the same reason and, apart from numbers, the same error."""

    first: FaultRecord
    faults: list[FaultRecord] = field(default_factory=list)

    @property
    def phases(self) -> dict[str, int]:
        """Phase → number of faults."""
        return dict(Counter(fault["phase"] for fault in self.faults))


def list_faults(run_dir: RunDir) -> None:
    """Print the faults of a run, and write faults.json. Raises ConfigError where there is no such run."""
    faults = faults_in(run_dir, run_dir.read_config(key="run"))
    kinds = kinds_of(faults)
    bad_rows = read_bad_rows(run_dir.bad_rows)
    print("\n".join([*_listing(run_dir, faults, kinds), *_bad_row_lines(bad_rows)]))
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    try:
        write_bytes_atomically(
            run_dir.faults_json, orjson.dumps(_as_json(run_dir, faults, kinds, bad_rows), option=options)
        )
    except OSError as error:
        print(f"(not written: {run_dir.faults_json}: {error.strerror})")


def faults_in(run_dir: RunDir, config: DictConfig) -> list[FaultRecord]:
    """The faults of a run in the order in which they happened: those of faults.jsonl, or of the rollouts of a run that
    is older than the file."""
    if run_dir.faults.exists():
        return read_faults(run_dir.faults)
    groups_per_step = OmegaConf.select(config, "orchestrator.groups_per_step") or 1
    found = (*_of_rollouts(run_dir, "eval", groups_per_step), *_of_rollouts(run_dir, "step", groups_per_step))
    return sorted(found, key=lambda fault: (fault["step"], fault["phase"] == "eval"))


def _of_rollouts(run_dir: RunDir, kind: Any, groups_per_step: int) -> Iterator[FaultRecord]:
    phase: FaultPhase = "rl" if kind == "step" else "eval"
    for step in run_dir.rollouts_steps(kind):
        for record in read_rollouts(run_dir.recorded_rollouts(kind, step), damaged=lambda text: None):
            if not StopReason(record["stop_reason"]).is_fault:
                continue
            named = PLAYED_ID.fullmatch(record["rollout_id"])
            group = int(named[2]) if named else 0
            yield {
                "step": step,
                "phase": phase,
                "rollout_id": record["rollout_id"],
                "problem_id": record["problem_id"],
                "split": "train" if phase == "rl" else "eval",
                "problem_index": group + (groups_per_step * (step - 1) if phase == "rl" else 0),
                "stop_reason": record["stop_reason"],
                "error": record["error"] or "",
                "traceback": None,
            }


def kinds_of(faults: Sequence[FaultRecord]) -> list[FaultKind]:
    """Faults of the same kind together, the most frequent kind first."""
    kinds: dict[tuple[str, str], FaultKind] = {}
    for fault in faults:
        kinds.setdefault(fault_kind(fault["stop_reason"], fault["error"]), FaultKind(fault)).faults.append(fault)
    return sorted(kinds.values(), key=lambda kind: -len(kind.faults))


def command_of(run_dir: RunDir, fault: FaultRecord) -> str:
    """The command that plays one fault again."""
    return f"python -m vlmrl mode=faults run={shlex.quote(str(run_dir.path))} rollout={fault['rollout_id']}"


def _listing(run_dir: RunDir, faults: Sequence[FaultRecord], kinds: Sequence[FaultKind]) -> Iterator[str]:
    if not faults:
        yield f"no faults in {run_dir.path}"
        return
    yield f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} in {run_dir.path}"
    yield ""
    yield f"  {'phase':<12}{'reason':<16}faults"
    for (phase, reason), count in sorted(Counter((f["phase"], f["stop_reason"]) for f in faults).items()):
        yield f"  {phase:<12}{reason:<16}{count:>6}"
    for kind in kinds[:SHOWN_KINDS]:
        yield ""
        yield from _kind_lines(run_dir, kind)
    if len(kinds) > SHOWN_KINDS:
        yield f"\nand {len(kinds) - SHOWN_KINDS} more kinds: see {run_dir.faults_json}"


def _kind_lines(run_dir: RunDir, kind: FaultKind) -> Iterator[str]:
    first = kind.first
    where = ", ".join(f"{phase} {count}" for phase, count in kind.phases.items())
    yield f"{len(kind.faults)} × {first['stop_reason']} ({where})"
    yield f"  {first['error']}"
    yield (
        f"  first: {first['rollout_id']} at {first['phase']} step {first['step']}, problem {first['problem_id']} "
        f'(problem("{first["split"]}", {first["problem_index"]}))'
    )
    for line in (first["traceback"] or "").splitlines():
        yield f"  | {line}"
    yield f"  play it again: {command_of(run_dir, first)}"


def _bad_row_lines(rows: Sequence[BadRowRecord]) -> Iterator[str]:
    """Rows that were passed over, those with equal reasons together."""
    if not rows:
        return
    yield ""
    yield f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} of the data cannot be used and were passed over"
    for of_kind in kinds_of_bad_rows(rows)[:SHOWN_KINDS]:
        places = ", ".join(place_of(row) for row in of_kind[:SHOWN_ROWS]) + (", …" if len(of_kind) > SHOWN_ROWS else "")
        yield f"{len(of_kind)} × {of_kind[0]['reason']}"
        yield f"  {places}"


def _as_json(
    run_dir: RunDir, faults: Sequence[FaultRecord], kinds: Sequence[FaultKind], bad_rows: Sequence[BadRowRecord]
) -> dict[str, Any]:
    return {
        "run": safe_text(str(run_dir.path)),
        "faults": len(faults),
        "bad_rows": list(bad_rows),
        "phases": dict(Counter(fault["phase"] for fault in faults)),
        "reasons": dict(Counter(fault["stop_reason"] for fault in faults)),
        "kinds": [
            {
                "stop_reason": kind.first["stop_reason"],
                "error": kind.first["error"],
                "traceback": kind.first["traceback"],
                "faults": len(kind.faults),
                "phases": kind.phases,
                "play": safe_text(command_of(run_dir, kind.first)),
                "rows": [{key: value for key, value in f.items() if key != "traceback"} for f in kind.faults],
            }
            for kind in kinds
        ],
    }
