"""Folders that are built once and kept in a cache. A folder's content is a function of its key; it is never partial."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlmrl.errors import ModelError

MANIFEST = "manifest.json"
"""File name → SHA-256. Written last. A folder whose files differ from it is built again."""

ABANDONED_AFTER_S = 86400.0
"""Seconds since the last new file in a scratch folder after which its builder was killed. A build takes seconds."""


def cache_folder() -> Path:
    """`$VLMRL_CACHE`, else `~/.cache/vlmrl`. Raises RuntimeError where there is no home folder."""
    return Path(os.environ.get("VLMRL_CACHE") or Path.home() / ".cache" / "vlmrl").expanduser()


def built(kind: str, key: list[Any], build: Callable[[Path], None]) -> Path:
    """The folder of `key` (JSON) under `kind` in the cache. If it is missing, `build` fills an empty folder.

    Safe to call from several processes at once. An incomplete or changed folder is repaired. Raises `ModelError` where
    the cache cannot be written.
    """
    text = json.dumps(key, ensure_ascii=False, sort_keys=True)
    folder = cache_folder() / kind / hashlib.sha256(text.encode()).hexdigest()[:16]
    if _is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(scratch)
            files = sorted(path for path in scratch.iterdir() if path.name != MANIFEST)
            write_json(scratch / MANIFEST, {path.name: _sha256(path) for path in files})
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"the cache {cache_folder()} cannot be written ({error.strerror or error}), so no checkpoint can be built: "
            "make room there, or set the environment variable VLMRL_CACHE to another folder"
        ) from error
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Whether all files of the manifest are there, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of builders that were killed."""
    for scratch in parent.glob(".*-*"):
        with suppress(OSError):  # another process removes it too
            if time.time() - scratch.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    """Move a finished build into place: the whole folder if there is none yet, else file by file over the old one.

    A build is a function of the folder's name, so replacing a file that another process reads or has just written
    changes none of its bytes; only missing or broken files change. The manifest is moved last.
    """
    try:
        scratch.rename(folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(folder / path.name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
