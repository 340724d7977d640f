"""Make the pictures of README.md and of the documentation from a real run.

    pip install -e '.[docs,browser]' && python docs/make_pictures.py          three minutes on two cores, needs Chromium

The script starts the default run in a terminal of its own, keeps the last screen of its live view as
`docs/pictures/live_view.svg`, opens the run's report in Chromium and keeps what it shows as `docs/pictures/report.png`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pexpect
import pyte
from playwright.sync_api import sync_playwright
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
ROWS, COLUMNS = 40, 124
"""Size of the terminal, in characters."""
RUN_TIMEOUT_S = 900.0
PANEL_END = "╰"
"""How the last line of the live view begins."""
REPORT_SIZE = {"width": 1400, "height": 900}
"""Size of the browser's window, in pixels."""


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "color_codeword_tiny"
        screen = run_in_terminal(["monitor.wandb.mode=disabled", f"hydra.run.dir={run}"])
        (PICTURES / "live_view.svg").write_text(as_svg(screen))
        take_report(run / "report.html", PICTURES / "report.png")


def run_in_terminal(overrides: list[str]) -> pyte.Screen:
    """Run the command in a terminal; returns the last screen on which the live view stood."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    child = pexpect.spawn(
        sys.executable,
        ["-m", "vlmrl", *overrides],
        dimensions=(ROWS, COLUMNS),
        encoding="utf-8",
        timeout=RUN_TIMEOUT_S,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
    )
    while True:
        try:
            stream.feed(child.read_nonblocking(4096))
        except pexpect.EOF:
            break
    child.close()
    if child.exitstatus != 0:
        sys.exit("\n".join(screen.display) + f"\nthe run ended with exit code {child.exitstatus}")
    return screen


def as_svg(screen: pyte.Screen) -> str:
    """The screen as an SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    lines = []
    for row in range(ROWS):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            line.append(cell.data, Style(color=_color(cell.fg), bgcolor=_color(cell.bg), bold=cell.bold))
        line.rstrip()
        lines.append(line)
    while not lines[-1].plain.startswith(PANEL_END):  # below the live view stands the summary, with a path
        lines.pop()
    for line in lines:
        console.print(line, no_wrap=True)
    local_fonts = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="python -m vlmrl", code_format=local_fonts)


def _color(name: str) -> str | None:
    """A colour of pyte (a name, or six hexadecimal digits) as one of rich."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return {"brown": "yellow"}.get(name, name).replace("bright", "bright_")


def take_report(page_file: Path, picture: Path) -> None:
    """A screenshot of the first screen of a report."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is not installed, so the report cannot be pictured: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=REPORT_SIZE, device_scale_factor=1)
        page.goto(page_file.as_uri())
        page.wait_for_load_state()
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
