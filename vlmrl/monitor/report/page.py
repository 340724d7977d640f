"""Assemble report.html from the document and the page's own files.

    page.html + page.css + uPlot (vendor/, MIT) + *.js + the document as JSON

The page makes no requests. Its content security policy forbids every request, and every script except those in the
page, which it lists by digest. So even a text of a model or a task that escapes the escaping (text is only ever set as
text, never as HTML) cannot run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import orjson

from vlmrl.monitor.report.document import document
from vlmrl.record.files import disk_errors
from vlmrl.record.run_dir import RunDir

FILES = Path(__file__).parent
SCRIPTS = (
    *("vendor/uPlot.iife.min.js", "base.js", "chart.js", "sections.js", "curves.js", "film.js"),
    *("tokens.js", "rollouts.js", "config.js", "main.js"),
)
"""Files of the page's scripts, in the order in which they run."""
STYLES = ("vendor/uPlot.min.css", "page.css", "film.css")


def write_report(runs: Mapping[str, RunDir], target: Path, defaults: Mapping[str, Any]) -> None:
    """Write the page of one or several runs (by their display names) to `target`, complete or not at all.

    `defaults` is the default config as a tree. Raises ConfigError where a folder holds no run, VlmrlError where a file
    is damaged or the disk is full.
    """
    page = html(document(runs, defaults))
    temporary = temporary_of(target, os.getpid())
    with disk_errors(target):
        try:
            temporary.write_bytes(page)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_of(target: Path, pid: int) -> Path:
    """The temporary file that process `pid` writes and then renames.

    `write_atomically` has one fixed name, but a run and a user may write the page at the same moment.
    """
    return target.with_name(f".{target.name}.{pid}.tmp")


def html(content: Mapping[str, Any]) -> bytes:
    """The report's page."""
    title = " · ".join(run["name"] for run in content["runs"])
    scripts = [(FILES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    styles = [(FILES / name).read_text(encoding="utf-8") for name in STYLES]
    return assembled((FILES / "page.html").read_bytes(), title=title, scripts=scripts, styles=styles, content=content)


def assembled(
    template: bytes, *, title: str, scripts: Sequence[str], styles: Sequence[str], content: Any, body: str = ""
) -> bytes:
    """One self-contained HTML page from a template with the places `{{policy}}`, `{{title}}`, `{{licence}}` (uPlot's),
    `{{styles}}`, `{{scripts}}`, `{{data}}` (`content` as JSON) and, where the template has it, `{{body}}` (HTML)."""
    scripts = [f"\n{script}\n" for script in scripts]
    style = "\n".join(styles)
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(style)}'; script-src {digests}"
    parts = {
        "policy": policy.encode(),
        "title": escape(title).encode(),
        "licence": (FILES / "vendor/uPlot.LICENSE").read_bytes(),
        "styles": style.encode(),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts).encode(),
        "data": orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY).replace(b"<", rb"\u003c"),
        "body": body.encode(),
    }

    def part(place: re.Match[bytes]) -> bytes:
        return parts[place[1].decode()]

    return re.sub(rb"\{\{(\w+)\}\}", part, template)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
