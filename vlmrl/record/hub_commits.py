"""hub_commits.json: which commit of each hub data set a run reads, so that a resumed run reads the same rows.

    {"someone/rows": "1f0c…", "someone/rows@v2": "9ab3…"}

A key is the id of the data set, with `@<task.revision>` where the config names one: a branch may move while a run is
interrupted.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from vlmrl.errors import ConfigError
from vlmrl.record.files import disk_errors, read_small, write_bytes_atomically

HUB_COMMITS = "hub_commits.json"


def read_hub_commits(path: Path) -> dict[str, str]:
    """Read the file; empty where there is none. Raises `ConfigError` where it is damaged."""
    try:
        content = orjson.loads(read_small(path))
    except FileNotFoundError:
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        content = error
    if not isinstance(content, dict) or not all(isinstance(commit, str) for commit in content.values()):
        raise ConfigError(
            f"{path} is damaged, so it is unknown which commit of its data set the run has read: remove the file, and "
            "set task.revision=<commit>, which the run's logs/main.log names"
        )
    return content


def write_hub_commits(path: Path, commits: dict[str, str]) -> None:
    """Write the file. Raises VlmrlError."""
    with disk_errors(path):
        write_bytes_atomically(path, orjson.dumps(commits, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
