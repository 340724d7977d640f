"""What a checkpoint says of itself, before it is loaded: its family, its image and video tokens, positions, dtype.

Reads config.json and, for the spelling of the image token, tokenizer.json. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.architecture import seeing_key, unfit_config
from vlmrl.models.checkpoints.load import cached_folder, hub_is_reachable, is_hub_name
from vlmrl.models.checkpoints.other_formats import other_format

IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index")
"""Keys of config.json under which transformers' models look up the id of their placeholder token."""


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint."""

    family: str
    """`model_type` of config.json."""
    has_images: bool
    """Whether it has a vision tower whose features take the place of tokens."""
    image_token: str | None
    """The placeholder token, as the tokenizer spells it; None where config.json names none, and for text only."""
    video_token: str | None
    """The placeholder token of a video, as the tokenizer spells it; None where config.json names none."""
    positions: str
    """`mrope` where config.json divides the rotary frequencies among time, height and width, else `sequential`."""
    dtype: str | None
    """Number format of its weights; None where config.json does not say."""


def read_facts(name: str) -> Facts:
    """What the checkpoint `name` says: a folder, or a hub name, of which its config.json and tokenizer.json are
    downloaded where they are not in the cache. Raises `ConfigError` where there is none or it is damaged."""
    config = _read(name, "config.json")
    family = config.get("model_type")
    if not isinstance(family, str) or not re.fullmatch(r"[\w.-]+", family):
        raise ConfigError(
            f"model.name={name}: its config.json names no model_type ({family!r}), so its family is not known: set "
            "model.name=<folder with a Hugging Face checkpoint>"
        )
    if reason := unfit_config(config):
        raise ConfigError(f"model.name={name} cannot be trained here: its config.json says {reason}")
    has_images = isinstance(config.get("vision_config"), Mapping)
    if not has_images and (key := seeing_key(config)) is not None:
        raise ConfigError(
            f"model.name={name}: its config.json has {key} and no vision_config, so it takes images in a way that no "
            "part here knows, and training it without them would be another model: choose a checkpoint whose "
            "config.json has a vision_config, or train its language model alone with ~model/vlm"
        )
    ids = [config[key] for key in IMAGE_TOKEN_KEYS if isinstance(config.get(key), int)]
    video_id = config.get("video_token_id")
    dtype = next((str(found) for found in _values(config, ("dtype", "torch_dtype")) if found), None)
    return Facts(
        family=family,
        has_images=has_images,
        image_token=_spelling(name, ids[0]) if has_images and ids else None,
        video_token=_spelling(name, video_id) if has_images and isinstance(video_id, int) else None,
        positions="mrope" if any(True for _ in _values(config, ("mrope_section",))) else "sequential",
        dtype=dtype.removeprefix("torch.") if dtype is not None else None,
    )


def checkpoint_file(name: str, file: str) -> Path | None:
    """A file of a checkpoint on this machine; it is downloaded for a hub name where the hub can be reached. None where
    there is none."""
    folder = cached_folder(name)
    if folder is not None and (folder / file).is_file():
        return folder / file
    if not is_hub_name(name) or not hub_is_reachable():
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError):
        return None


def _read(name: str, file: str) -> dict[str, Any]:
    path = checkpoint_file(name, file)
    if path is None:
        folder = cached_folder(name)
        other = other_format(folder) if folder is not None else None
        if other is not None:
            raise ConfigError(f"model.name={name} has no {file}: {other}")
        raise ConfigError(
            f"model.name={name} has no {file} here, and none can be fetched, so nothing is known of the checkpoint: "
            "set model.name=<folder with a Hugging Face checkpoint>, or choose the family with model/vlm=<family>"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name={name}: {path} cannot be read ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.name={name}: {path} holds no JSON object: download it again")
    return content


def _values(content: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """The values under `names` anywhere in a config.json, outermost first."""
    if isinstance(content, Mapping):
        yield from (content[name] for name in names if name in content)
        for value in content.values():
            yield from _values(value, names)


def _spelling(name: str, token_id: int) -> str | None:
    """The text of a token of its own in tokenizer.json; None where no token has this id."""
    added = _read(name, "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and token.get("id") == token_id:
            return str(token.get("content"))
    return None
