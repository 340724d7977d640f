"""What a million rows cost next to a thousand: seconds from the command to the first step, and memory.

    python benchmarks/dataset_start.py [--rows 1000,1000000] [--rounds 3] [--folder .]

Two Parquet files with the same columns (question, a PNG of 28 × 28 as bytes with its path, answer, an id) are written
once, as Hugging Face `datasets` 5 writes them: row groups of 100 MB, pages cut by content, no compression of images.
The last row of each has no image and no answer. A run of the tiny model takes its first three steps on each in turn,
after the file has left the page cache.

    seconds   from the start of the command to the first line of metrics.jsonl
    USS       largest unique set size of the command's processes (psutil), at the lines of the first three steps
    bad rows  of the first three steps: the last row must cost nothing before it is drawn
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet as pq
from PIL import Image

STEPS = 3
GROUP_BYTES = 100 << 20
PATIENCE_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,1000000", help="sizes of the files")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each file, in turn")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files and the runs are written")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    files = {count: write(folder / f"rows_{count}.parquet", count) for count in map(int, arguments.rows.split(","))}
    print(f"python {' '.join(sys.argv)}\n{platform.machine()}, {os.cpu_count()} cores, pyarrow {pyarrow.__version__}\n")
    found: dict[int, list[tuple[float, int, float]]] = {count: [] for count in files}
    for number in range(arguments.rounds):
        for count, file in files.items():
            leave_page_cache(file)
            found[count].append(measure(file, folder / f"run_{count}_{number}"))
    print("| rows | file | row groups | s to the first step, median | min – max | USS, MB, median | bad rows |")
    print("|---|---|---|---|---|---|---|")
    for count, runs in found.items():
        seconds, memory, bad_rows = zip(*runs, strict=True)
        num_groups = pq.read_metadata(files[count]).num_row_groups
        print(
            f"| {count:,} | {files[count].stat().st_size / 1e6:,.1f} MB | {num_groups} "
            f"| {statistics.median(seconds):.2f} | {min(seconds):.2f} – {max(seconds):.2f} "
            f"| {statistics.median(memory) / 1e6:,.0f} | {max(bad_rows):.0f} |"
        )
    few, many = found[min(found)], found[max(found)]
    later = statistics.median(run[0] for run in many) - statistics.median(run[0] for run in few)
    more = statistics.median(run[1] for run in many) - statistics.median(run[1] for run in few)
    print(f"\nThe larger file takes {later:+.2f} s and {more / 1e6:+,.0f} MB.")


def write(path: Path, count: int) -> Path:
    """The file, written unless it is there."""
    if path.exists():
        return path
    schema = pyarrow.schema(
        [
            ("id", pyarrow.int64()),
            ("question", pyarrow.string()),
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("answer", pyarrow.string()),
        ]
    )
    half = path.with_suffix(".half")
    options = {"use_content_defined_chunking": True, "write_page_index": True}
    with pq.ParquetWriter(half, schema, compression={"image.bytes": "none"}, **options) as writer:
        for rows in groups(count):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
    half.rename(path)
    return path


def groups(count: int) -> Iterator[list[dict[str, object]]]:
    """The rows, in groups of about 100 MB."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    num_bytes = 0
    for number in range(count):
        answer = int(rng.integers(10))
        picture = io.BytesIO()
        pixels = rng.integers(0, 16, (28, 28), np.uint8) * 16
        Image.fromarray(pixels).save(picture, "PNG", compress_level=1)
        is_last = number == count - 1
        rows.append(
            {
                "id": number,
                "question": f"Which digit is it? (row {number})",
                "image": None if is_last else {"bytes": picture.getvalue(), "path": f"{number}.png"},
                "answer": None if is_last else str(answer),
            }
        )
        num_bytes += len(picture.getvalue()) + 100
        if num_bytes >= GROUP_BYTES or is_last:
            yield rows
            rows, num_bytes = [], 0


def leave_page_cache(file: Path) -> None:
    """Forget what the machine has cached of the file."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(file: Path, output: Path) -> tuple[float, int, float]:
    """Seconds to the first step, the largest USS in bytes at the first steps, and the bad rows of the steps."""
    command = [
        *(
            sys.executable,
            "-m",
            "vlmrl",
            "task=dataset",
            f'task.path="{file}"',
            "reward=exact",
            f"hydra.run.dir={output}",
        ),
        *("task.eval_fraction=0", "orchestrator.eval.every=0", "trainer.warmup.steps=0", f"trainer.max_steps={STEPS}"),
        *("orchestrator.group_size=2", "orchestrator.groups_per_step=4", "orchestrator.max_new_tokens=8"),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = output / "metrics.jsonl"
    first, largest, seen = 0.0, 0, 0
    while process.poll() is None and time.perf_counter() - began < PATIENCE_S:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        if lines > seen:
            first = first or time.perf_counter() - began
            largest = max(largest, unique_bytes(process.pid))
            seen = lines
        time.sleep(0.01)
    output_text = process.communicate(timeout=PATIENCE_S)[0]
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(command)}\n{output_text}")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return first, largest, sum(step.get("data/bad_rows", 0.0) for step in steps)


def unique_bytes(pid: int) -> int:
    """USS of a process and of those that it has started."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().uss
        except psutil.Error:
            continue
    return total


if __name__ == "__main__":
    main()
