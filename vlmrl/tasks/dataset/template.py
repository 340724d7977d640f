"""`task.template`: the text of the user's message, made by Jinja from the columns of the row.

    task.template="{{ image }}{{ question }} Answer with one word."
    task.template=prompts/count.jinja                                  # a file

A template sees every column by its name (`columns["odd name"]` for names that are no identifiers), and `content`: the
text that the prompt would have without a template, as in EasyR1's `format_prompt` files. `{{ image }}` and
`{{ images }}` become the marker `<image>`, once per image, also where columns of these names hold bytes;
`{{ video }}` and `{{ videos }}` become `<video>` in the same way.

A name that no row has is refused before the run, with its place; what fails for one row costs that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmrl.errors import ConfigError, safe_text
from vlmrl.tasks.dataset.columns import Unusable, nearest, plain
from vlmrl.tasks.dataset.conversation import MARKERS
from vlmrl.tasks.template import Template, line_of
from vlmrl.types import Modality

CONTENT = "content"
"""The name of the text without a template."""

LONGEST_PROMPT = 1 << 22
"""Characters that a template may make."""


class Markers(list[str]):
    """The markers of a row's images, or videos: a list for templates that loop, and a text for those that print it."""

    def __str__(self) -> str:
        return "".join(self)

    def __html__(self) -> str:
        return str(self)


class PromptTemplate(Template):
    """A compiled template of a row's prompt. Thread-safe."""

    def check(self, known: Sequence[str]) -> None:
        """Raise ConfigError where the template needs a name that is no column."""
        for name in sorted(self.names):
            if name not in (*known, CONTENT, "image", "images", "video", "videos", "columns"):
                raise ConfigError(
                    f"{self.key} uses {name} ({self.place_of(name)}), which is no column, so no prompt can be made: "
                    f"{nearest(name, known)}"
                )

    def render(
        self,
        row: Mapping[str, Any],
        content: str,
        counts: Mapping[Modality, int],
        columns: Mapping[Modality, Sequence[str]],
    ) -> str:
        """The text of one row, which has `counts` images and videos, in `columns`. Raises `Unusable`."""
        names: dict[str, Any] = {CONTENT: content, **{name: plain(value) for name, value in row.items()}}
        for modality, count in counts.items():
            markers, held = Markers([MARKERS[modality]] * count), columns[modality]
            names |= {name: markers for name in (modality, f"{modality}s", *held) if name in held or name not in row}
        try:
            made = self.fill({**names, "columns": names})
        except Exception as error:  # noqa: BLE001 — the template is the user's code
            line = line_of(error)
            place = f" in line {line}" if line is not None else ""
            raise Unusable(
                f"{self.key} fails for this row{place} ({type(error).__name__}: {safe_text(error)}): correct the "
                "template, or the columns that it uses"
            ) from None
        if len(made) > LONGEST_PROMPT:
            raise Unusable(f"{self.key} makes {len(made)} characters of this row, too many for a prompt")
        return made
