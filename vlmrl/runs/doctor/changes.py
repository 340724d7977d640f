"""`against=<doctor.json>`: what has changed since an older certificate, as after an upgrade of transformers or vLLM.

    versions     vllm                          0.31.0 → 0.32.0
    files        chat_template.jinja           changed
    settings     packing                       tree → varlen
    verdict      logprobs, version 0           ok → FAILED
    number       logprobs, version 0, mismatch_kl   1.2e-13 → 3.4e-06

Numbers of two runs differ by rounding even where nothing has changed. So a measured difference (of logprobs, gradients,
positions) is listed where it has grown beyond rounding, and a count (tokens, images, weights) where it differs at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

COUNTS = (
    "tokens",
    "images",
    "prompts",
    "samples",
    "image_tokens",
    "rows",
    "rollouts",
    "turns",
    "requests",
    "compared",
    "differing",
    "unmatched",
    "wrong",
    "stray",
    "missing",
)
"""Numbers that are the same each time, where the same tokens are sampled."""

LIMITS = {
    "mismatch_kl": "limit",
    "max_delta": "max_limit",
    "relative": "limit",
    "shown_kl": "limit",
    "shown_max": "max_limit",
}
"""Number that measures an error → the number of the same line that bounds it."""

GROWTH = 100.0
"""An error is beyond rounding where it has grown this many times. mismatch_kl is a mean of squares: with other kernels
its rounding was seen to grow 8 times."""


@dataclass(frozen=True)
class Change:
    """One thing that differs from the older certificate."""

    what: str
    """`versions`, `files`, `settings`, `verdict` or `number`."""
    name: str
    before: Any
    """None where the older certificate did not have it."""
    now: Any
    """None where it is gone."""

    @property
    def title(self) -> str:
        """The left column of the table."""
        return f"{self.what} {self.name}"

    @property
    def line(self) -> str:
        """`before → now`, as the screen shows it next to the name."""
        return f"{_text(self.before)} → {_text(self.now)}"

    def as_json(self) -> dict[str, Any]:
        """As doctor.json records it."""
        return asdict(self)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two certificates, in the order of the example above."""
    found = [*_of("versions", before["versions"], now["versions"])]
    old, new = before["checkpoint"], now["checkpoint"]
    digests = [{name: digest[:12] for name, digest in checkpoint["files"].items()} for checkpoint in (old, new)]
    found += _of("files", *digests)
    found += _of("settings", before["settings"], now["settings"])
    lines = {line["name"]: line for line in before["checks"]}
    for line in now["checks"]:
        found += _of_line(line["name"], lines.pop(line["name"], None), line)
    return found + [Change("verdict", name, line["verdict"], None) for name, line in lines.items()]


def _of(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            yield Change(what, name, before.get(name), now.get(name))


def _of_line(name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Iterator[Change]:
    if before is None or before["verdict"] != now["verdict"]:
        yield Change("verdict", name, None if before is None else before["verdict"], now["verdict"])
    old, new = (before or {}).get("figures", {}), now.get("figures", {})
    for key in (key for key in old if key in new):
        grew = key in LIMITS and _grew(old[key], new[key], old.get(LIMITS[key]))
        if grew or (key in COUNTS and old[key] != new[key]):
            yield Change("number", f"{name}, {key}", old[key], new[key])


def _grew(before: float | None, now: float | None, limit: float | None) -> bool:
    """Whether an error is larger than rounding explains: many times the one of before, and a part of its bound.

    A number above its limit in a line that passed measures no error: inverted pixels must change the logprobs.
    """
    if before is None or now is None or limit is None:  # null stands for a number that is not finite
        return before != now
    return before <= limit and now > GROWTH * before and now > limit / GROWTH


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "absent" if value is None else str(value)
