"""The preview in a terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

from vlmrl.errors import safe_repr, safe_text
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.preview.grading import Graded
from vlmrl.runs.preview.result import Preview
from vlmrl.runs.preview.sample import Sample
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.runs.preview.spelling import broken_spelling, control_spellings, pieces_of
from vlmrl.types import Prompt

PRINTED = 2
"""Rendered problems on the screen; the page has more."""

LONGEST = 1500
"""Characters of a prompt on the screen."""

_DIM, _BOLD, _END = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def print_preview(seen: Preview, run_dir: RunDir) -> None:
    """Print what was recognized, the first problems as the model sees them, and what was found."""
    width = max((len(name) for name in seen.data), default=0)
    print("data")
    for name, text in seen.data.items():
        print(f"  {name:<{width}}  {plain(text)}")
    for sample in seen.samples.values():
        print(f"  {counted(sample)}")
    for problem in seen.shown[:PRINTED]:
        print_problem(problem, seen.graded(problem), seen)
    for answer in seen.answers:
        values = ", ".join(f"{name} {_number(value)}" for name, value in answer.rewards.items())
        print(f"\nthe model answers {plain(answer.problem_id)} now: {answer.text!r:.300}")
        print(f"  reward {answer.reward:g}" + (f" ({values})" if values else "") + f", {answer.stop_reason}")
    if seen.no_answers:
        print(f"\n(no answers of the model: {seen.no_answers})")
    print(f"\nfindings: {len(seen.findings) or 'none'}")
    for finding in seen.findings:
        where = f" [{', '.join(finding.where)}]" if finding.where else ""
        task = f"{finding.task}: " if finding.task else ""
        print(f"  {finding.code}: {task}{plain(finding.text)}{plain(where)}")
    print(f"\npage  {run_dir.preview_page}")


def print_problem(problem: SeenProblem, graded: Graded | None, seen: Preview) -> None:
    """Print one problem as the model sees it, and what its reference is worth."""
    print(f"\n{plain(problem.problem_id)} ({problem.tokens} tokens, {problem.image_tokens} of {problem.kinds_shown})")
    assert problem.prompt is not None, "only problems with a prompt are printed"
    print_prompt(problem.prompt, seen.parts.tokenizer)
    print_worth(problem, graded)


def print_prompt(prompt: Prompt, tokenizer: Any, longest: int = LONGEST, start: int = 0) -> None:
    """Print a rendered prompt, from token `start` on. Control tokens and images have colors on a terminal; without them
    they stand out, too, because a text of the data that spells one is printed with a backslash in it
    (`broken_spelling`)."""
    marked = is_colored()
    text, left, is_broken = "", longest, False
    spellings = control_spellings(tokenizer)
    for piece in pieces_of(prompt, tokenizer, start):
        shown = piece.text[: max(0, left)]
        if piece.kind == "text":
            shown = broken_spelling(shown, spellings)
            is_broken |= shown != piece.text[: max(0, left)]
        shown = plain(shown)
        left -= len(piece.text)
        mark = {"control": _DIM, "image": _BOLD, "text": ""}[piece.kind] if marked else ""
        text += f"{mark}{shown}{_END if mark else ''}"
    print("\n".join(f"  │ {line}" for line in (text + ("…" if left < 0 else "")).split("\n")))
    if is_broken:
        print(r"  (a backslash marks text of the data that spells a control token: <\|im_end|> is text)")


def is_colored() -> bool:
    """Whether the standard output shows colors."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def print_worth(problem: SeenProblem, graded: Graded | None) -> None:
    """Print what the rewards say of the reference and of an empty answer."""
    if problem.is_reference:
        print(f"  reference {safe_repr(problem.reference):.200}")
    if graded is None:
        return
    for name in graded.empty:
        print(f"  {name}: reference {_number(graded.best(name))}, empty answer {_number(graded.empty[name])}")


def counted(sample: Sample) -> str:
    """How many rows were looked at, and what they were."""
    rows = "endless" if sample.num_rows is None else f"{sample.num_rows:,} rows"
    looked = "all looked at" if sample.is_whole else f"{sample.looked_at:,} looked at"
    parts = [f"{len(sample.counts.tokens):,} problems"]
    if sample.refused:
        parts.append(f"{len(sample.refused):,} refused")
    if sample.in_other_split:
        parts.append(f"{sample.in_other_split:,} of the other split")
    return f"{sample.split}: {rows}, {looked}: {', '.join(parts)}"


def _number(value: float | None) -> str:
    return "abstains" if value is None else f"{value:g}"


def plain(text: str) -> str:
    """A text that cannot steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in safe_text(text))
