"""The files of one checkpoint, as they are checked before anything is loaded.

    sha256.json ─▶ every file is there and has its hash
    *.json      ─▶ an object of the expected form
    *.safetensors ─▶ whole tensors: shape, dtype, and no slice is missing

A checkpoint may come from a stranger, from a disk that lost half of it, or from an editor. Whatever is wrong with it,
the error is a `CheckpointError` that names the file, so that the checkpoint before it can be tried.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vlmrl.errors import CheckpointError

HASHES = "sha256.json"

HASHING_THREADS = 8

REQUIRED = ("state.json", "loop.json")
"""Files that every checkpoint has, next to its tensors."""

TENSORS = ".safetensors"

SLICES = "DCP_SHARDING_INFO"
"""The entry of a safetensors header in which torch.distributed.checkpoint notes where each slice begins."""


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file except `HASHES`, by name."""
    return _sha256([path for path in sorted(folder.iterdir()) if path.name != HASHES])


def hash_the_rest(folder: Path) -> None:
    """Complete `HASHES`: whoever wrote the tensors has hashed them on the way, and the other files are read. Raises
    OSError."""
    path = folder / HASHES
    known: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    rest = _sha256([other for other in sorted(folder.iterdir()) if other != path and other.name not in known])
    path.write_text(json.dumps(dict(sorted((known | rest).items())), indent=1), encoding="utf-8")


def check_hashes(folder: Path) -> None:
    """Raise `CheckpointError` unless every file of the checkpoint has the hash that was recorded for it."""
    expected = read_object(folder / HASHES)
    try:
        tensors = {path.name for path in folder.iterdir() if path.name.endswith(TENSORS)}
        for name in sorted({*expected, *REQUIRED, *tensors}):
            if name not in expected:
                raise CheckpointError(f"{folder} is not a complete checkpoint ({HASHES} has no hash of {name})")
            if Path(name).name != name or not (folder / name).exists():
                raise CheckpointError(f"{folder} is not a complete checkpoint ({folder / name} is missing)")
            _refuse_special(folder / name)
        found = _sha256([folder / name for name in expected])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({error})") from error
    if not any(name.endswith(TENSORS) for name in expected):
        raise CheckpointError(f"{folder} is not a complete checkpoint (it holds no *{TENSORS})")
    for name in expected:
        if found[name] != expected[name]:
            raise CheckpointError(f"{folder / name} is damaged (its SHA-256 differs from the one in {HASHES})")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError`."""
    try:
        _refuse_special(path)
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.parent} is not a complete checkpoint ({path.name}: {error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds no JSON object)")
    return content


def is_count(value: object) -> bool:
    """Whether a value from a JSON file can count steps or problems."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, put together from its slices."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: `F32`, `BF16`, `U8`."""
    path: Path
    """The file of its first slice."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, by name. Raises `CheckpointError` where a file is damaged or a slice is missing."""
    found: dict[str, StoredTensor] = {}
    slices: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for path in sorted(folder.glob(f"*{TENSORS}")):
        for name, (dtype, begin, shape) in _slices_in(path).items():
            known = found.setdefault(name, StoredTensor((0,) * len(shape), dtype, path))
            if known.dtype != dtype or len(known.shape) != len(shape):
                raise CheckpointError(f"{path} is damaged ({name} is of another kind than in {known.path.name})")
            ends = tuple(start + size for start, size in zip(begin, shape, strict=True))
            whole = tuple(map(max, known.shape, ends))
            found[name] = StoredTensor(whole, dtype, known.path)
            slices.setdefault(name, {})[begin] = shape
    for name, tensor in found.items():
        if sum(map(math.prod, slices[name].values())) != math.prod(tensor.shape):
            raise CheckpointError(f"{folder} is not a complete checkpoint (slices of {name} are missing)")
    return found


def _slices_in(path: Path) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The slices in one file: name → dtype, where the slice begins in the whole tensor, shape of the slice."""
    try:
        _refuse_special(path)
        with safe_open(str(path), framework="numpy") as file:
            noted = json.loads((file.metadata() or {}).get(SLICES) or "null")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: str(file.get_slice(name).get_dtype()) for name in shapes}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    return {name: (dtypes[name], _begin(path, noted, name, len(shape)), shape) for name, shape in shapes.items()}


def _begin(path: Path, noted: object, name: str, dimensions: int) -> tuple[int, ...]:
    """Where a slice begins in its tensor; at 0 in a file that holds whole tensors."""
    if noted is None:
        return (0,) * dimensions
    entry = noted.get(name) if isinstance(noted, dict) else None
    begin = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not isinstance(begin, list) or len(begin) != dimensions or not all(map(is_count, begin)):
        raise CheckpointError(f"{path} is damaged (its header does not say where the slice of {name} begins)")
    return tuple(begin)


def _refuse_special(path: Path) -> None:
    """Raise OSError where `path` is missing or no regular file: opening a FIFO would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no regular file")


def _sha256(paths: Sequence[Path]) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return {path.name: found for path, found in zip(paths, pool.map(digest, paths), strict=True)}
