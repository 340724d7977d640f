"""preview.html: one page that needs nothing else, without JavaScript.

Everything from the data is escaped, and the page's policy lets nothing be loaded or run.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import PIL.Image

from vlmrl.errors import safe_repr, safe_text
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.rendering.filmstrip import described, filmstrip
from vlmrl.runs.build import RenderingParts
from vlmrl.runs.preview.grading import Graded
from vlmrl.runs.preview.result import Preview
from vlmrl.runs.preview.sample import Sample
from vlmrl.runs.preview.screen import counted
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.runs.preview.spelling import pieces_of
from vlmrl.runs.preview.summary import shared
from vlmrl.types import ImageItem, MMItem, VideoItem

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

BARS = 24
"""Bars of a histogram."""

LONGEST_SIDE = 512
"""Pixels per side of a picture on the page."""

LONGEST_FILM = 2048
"""Pixels of the width of a filmstrip, whose times must stay readable."""

LISTED_REASONS = 50
"""Reasons of refused rows that the page lists."""

SHOWN_CELL = 2000
"""Characters of a cell or a reference."""


def write_page(path: Path, seen: Preview) -> None:
    """Write preview.html. Raises VlmrlError where the disk does not take it."""
    samples = list(seen.samples.values())
    counts = [sample.counts for sample in samples]
    looked = ", ".join(counted(sample) for sample in samples)
    cards = [card(each, seen.graded(each), seen.parts) for each in seen.shown]
    body = [
        _findings(seen),
        section("Data", table([(name, text) for name, text in seen.data.items()])),
        f"<p>{_escaped(looked)}</p>",
        section(
            "Sizes",
            f"<p>{_of_sample(samples)}</p><div class=histograms>"
            + histogram("prompt tokens", [number for each in counts for number in each.tokens])
            + histogram("image, video tokens per prompt", [number for each in counts for number in each.image_tokens])
            + histogram("image width, pixels", [number for each in counts for number in each.widths])
            + histogram("image height, pixels", [number for each in counts for number in each.heights])
            + histogram("frames per video", [number for each in counts for number in each.frames])
            + "</div>",
        ),
        _copies(seen),
        _refused(samples),
        _answers(seen),
        section("Problems", "".join(cards)),
    ]
    write_document(path, "Preview", "".join(body))


def write_document(path: Path, title: str, body: str) -> None:
    """Write a page with the styles of the preview. `body` is HTML."""
    styles = resources.files("vlmrl.runs.preview").joinpath("page.css").read_text(encoding="utf-8")
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(title)}</title><style>{styles}</style></head>\n"
        f"<body><h1>{_escaped(title)}</h1>{body}</body></html>\n"
    )
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, text.encode())


def section(title: str, body: str) -> str:
    """A part of the page; empty without a body."""
    return f"<section><h2>{_escaped(title)}</h2>{body}</section>" if body else ""


def table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and texts."""
    lines = "".join(f"<tr><th>{_escaped(name)}</th><td>{_escaped(text)}</td></tr>" for name, text in rows)
    return f"<table>{lines}</table>" if lines else ""


def histogram(title: str, numbers: Sequence[int]) -> str:
    """A histogram as SVG with its range; empty without numbers.

    >>> "4 values, 1 to 9" in histogram("tokens", [1, 1, 2, 9])
    True
    """
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    counts, edges = np.histogram(numbers, bins=min(BARS, max(1, high - low + 1)), range=(low, high + 1))
    tallest, width = max(int(counts.max()), 1), 240 / len(counts)
    bars = "".join(
        f'<rect x="{place * width:.1f}" y="{80 - 78 * int(count) / tallest:.1f}" width="{max(width - 1, 1):.1f}" '
        f'height="{78 * int(count) / tallest:.1f}"><title>{int(edges[place])} to {int(edges[place + 1])}: {int(count)}'
        "</title></rect>"
        for place, count in enumerate(counts)
    )
    median = float(np.median(numbers))
    return (
        f"<figure><figcaption>{_escaped(title)}</figcaption>"
        f'<svg viewBox="0 0 240 80" role="img" aria-label="{_escaped(title)}">{bars}</svg>'
        f"<p>{len(numbers):,} values, {low:,} to {high:,}, median {median:g}</p></figure>"
    )


def card(problem: SeenProblem, graded: Graded | None, parts: RenderingParts) -> str:
    """One problem: pictures, the prompt as tokens, the reference and what it is worth."""
    assert problem.prompt is not None, "only problems with a prompt are shown"
    pictures = "".join(_pictures(item, parts) for item in problem.prompt.mm_items)
    tokens = "".join(
        f'<span class="{piece.kind}">{_escaped(piece.text)}</span>'
        for piece in pieces_of(problem.prompt, parts.tokenizer)
    )
    facts = [("tokens", f"{problem.tokens:,}, {problem.image_tokens:,} of them of {problem.kinds_shown}")]
    if problem.is_reference:
        facts.append(("reference", safe_repr(problem.reference)[:SHOWN_CELL]))
    if problem.demonstration:
        facts.append(("demonstration", problem.demonstration[-1][:SHOWN_CELL]))
    for name in graded.empty if graded is not None else ():
        assert graded is not None
        facts.append((name, f"reference {_number(graded.best(name))}, empty answer {_number(graded.empty[name])}"))
    return (
        f'<article><h3>{_escaped(problem.problem_id)}</h3><div class="pictures">{pictures}</div>'
        f"<pre>{tokens}</pre>{table(facts)}</article>"
    )


def _findings(seen: Preview) -> str:
    lines = "".join(
        f"<li><code>{finding.code}</code> {_escaped(finding.task and finding.task + ': ')}{_escaped(finding.text)}"
        + (f" <small>{_escaped(', '.join(finding.where))}</small>" if finding.where else "")
        + "</li>"
        for finding in seen.findings
    )
    return section("Findings", f'<ul class="findings">{lines}</ul>' if lines else "<p>Nothing was found.</p>")


def _of_sample(samples: Iterable[Sample]) -> str:
    parts = []
    for sample in samples:
        share = "all" if sample.is_whole else "a sample of"
        parts.append(f"{share} {len(sample.counts.tokens):,} problems of the {sample.split} split")
    return _escaped(f"Counted over {' and '.join(parts)}.")


def _copies(seen: Preview) -> str:
    """How many problems repeat another one, within a split and across both."""
    rows = []
    for sample in seen.samples.values():
        for name, different in (
            ("texts", sample.counts.by_text),
            ("pixels", sample.counts.by_pixels),
            ("texts and pixels", sample.counts.by_both),
        ):
            rows.append((f"{sample.split}, {name}", f"{different.total():,} problems, {len(different):,} different"))
    across = shared(seen.samples["train"].counts, seen.samples["eval"].counts)
    rows += [
        (f"eval, also in train: {name.replace('_', ' ')}", f"{count:,} problems") for name, count in across.items()
    ]
    return section("Copies", table(rows))


def _refused(samples: Iterable[Sample]) -> str:
    reasons: Counter[str] = Counter()
    where: dict[str, str] = {}
    for sample in samples:
        for each in sample.refused:
            reasons[each.reason] += 1
            where.setdefault(each.reason, each.source if each.row is None else f"{each.source}:{each.row}")
    rows = [
        (f"{count} × {where[reason]}", reason[:SHOWN_CELL]) for reason, count in reasons.most_common(LISTED_REASONS)
    ]
    return section("Refused rows", table(rows))


def _answers(seen: Preview) -> str:
    rows = []
    for answer in seen.answers:
        values = ", ".join(f"{name} {_number(value)}" for name, value in answer.rewards.items())
        text = f"{answer.text[:SHOWN_CELL]!r}\nreward {answer.reward:g}" + (f" ({values})" if values else "")
        rows.append((answer.problem_id, f"{text}, {answer.stop_reason}"))
    if not rows:
        return section("What the model answers now", f"<p>{_escaped(seen.no_answers)}</p>")
    return section("What the model answers now", table(rows))


def _pictures(item: MMItem, parts: RenderingParts) -> str:
    """The picture of the row, and the one that the image processor made of it; the filmstrip of a video."""
    return _film(item) if isinstance(item, VideoItem) else _image(item, parts)


def _film(video: VideoItem) -> str:
    height, width = video.frames.shape[1:3]
    seen_width, seen_height = video.processed_size or (width, height)
    said = f"{described(video)}, each seen as {seen_width} × {seen_height}, in {video.num_tokens} tokens"
    strip = _picture(filmstrip(video), LONGEST_FILM)
    return f"<figure>{strip}<figcaption>{said}</figcaption></figure>"


def _image(image: ImageItem, parts: RenderingParts) -> str:
    height, width = image.pixels.shape[:2]
    seen_width, seen_height = image.processed_size or (width, height)
    said = f"{width} × {height}, seen as {seen_width} × {seen_height} in {image.num_tokens} tokens"
    processed = parts.processed_pixels(image)
    shown = _picture(image.pixels) + ("" if processed is None else _picture(processed))
    return f"<figure>{shown}<figcaption>{said}</figcaption></figure>"


def _picture(pixels: np.ndarray, longest: int = LONGEST_SIDE) -> str:
    """uint8 [H, W, 3] as an `img` of at most `longest` pixels per side."""
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((longest, longest))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _number(value: float | None) -> str:
    return "abstains" if value is None else f"{value:g}"


def _escaped(text: str) -> str:
    return html.escape(safe_text(text))
