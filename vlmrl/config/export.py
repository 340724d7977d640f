"""`export`: where mode=export writes the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ExportConfig:
    """mode=export: the newest checkpoint as a Hugging Face folder."""

    folder: str | None = None
    """Where to; None is `export/step_000020` in the run's folder. One of that name is not written over."""
