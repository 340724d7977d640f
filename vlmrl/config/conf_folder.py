"""Where the configuration groups are."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""conf/: inside the package where a wheel was installed, next to it in a checkout or an editable install."""
