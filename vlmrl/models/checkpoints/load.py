"""Finds and loads a checkpoint: the tiny one, a local folder, or a hub name, all by the same code.

    folder = resolve_checkpoint(…)      tiny → built or cached; folder → itself; hub name → cache or download;
                                        init=random → a folder without weights, which load_model initializes
    load_model, load_tokenizer, load_image_processor, load_processor (folder)

torch and transformers are imported inside the functions that need them: importing Qwen3-VL takes seconds, which a
refused configuration should not cost.

Left out on purpose: weights in PyTorch's pickle format (only safetensors), code that comes with a checkpoint
(`trust_remote_code`), revisions of a hub repository other than its main one.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlmrl.config.model import Init, ModelConfig, VLMConfig
from vlmrl.errors import ModelError, headline
from vlmrl.models.checkpoints.image_size import resized
from vlmrl.models.checkpoints.other_formats import other_format, other_tokenizer
from vlmrl.models.checkpoints.processor import make_processor
from vlmrl.models.checkpoints.published import keep_published_layout
from vlmrl.models.checkpoints.scratch import ensure_architecture, initialize
from vlmrl.models.checkpoints.settings import IDS, unreadable
from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
"""Files to download from a hub repository."""


def resolve_checkpoint(config: ModelConfig, texts: tuple[str, ...]) -> Path:
    """The folder to load from. A tokenizer that is built here is trained on `texts`.

    A hub name is taken from the local cache if it is complete there, else downloaded. Raises `ModelError` where the
    download fails.
    """
    if config.tiny is not None:
        return ensure_tiny_checkpoint(config, texts)
    if config.init is Init.random:
        return ensure_architecture(config, texts)
    if not is_hub_name(config.name):
        return Path(config.name).expanduser()
    cached = _cached_snapshot(config.name)
    if cached and not missing_files(cached, config):
        return cached
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.name, allow_patterns=HUB_FILES))
    except OSError as error:
        raise ModelError(
            f"model.name={config.name} could not be downloaded: {error}. Check the name and the network, or set "
            "model.name=<folder with the checkpoint>"
        ) from error


def cached_folder(name: str) -> Path | None:
    """The folder on this machine of a local path or a hub name, complete or not; None where there is none. Downloads
    nothing."""
    if is_hub_name(name):
        return _cached_snapshot(name)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def load_model(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """The model of `folder` in `config.dtype`, on `config.device`, in eval mode (no dropout anywhere).

    Raises `ModelError` for a missing or corrupt file, for weights that do not fill the architecture, and for a
    checkpoint of another family than `model.vlm.family`.
    """
    if config.init is Init.random and config.tiny is None:
        return initialize(folder, config, resolve_device(config))
    problems = missing_files(folder, config) or wrong_family(folder, config)
    if not problems:
        reason = unreadable(folder, str(read_json(folder / "config.json").get("model_type")))
        problems = [] if reason is None else [f"its config.json says {reason}"]
    if problems:
        raise ModelError(f"{folder} does not load: {'; '.join(problems)}")
    check_weight_headers(folder)

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    auto: Any = AutoModelForCausalLM if config.vlm is None else AutoModelForImageTextToText
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would draw over the live view
    settings = {"dtype": getattr(torch, config.dtype.value), "output_loading_info": True, "local_files_only": True}
    try:
        model, info = auto.from_pretrained(folder, **settings)
    except Exception as error:  # code of any family, over files that may hold anything
        raise ModelError(f"{folder} does not load: {_other_shape(auto, folder) or headline(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ModelError(
            f"{folder} lacks {len(names)} weights of {type(model).__name__} (the first is {names[0]}), which would "
            "start at random: use a complete checkpoint"
        )
    keep_published_layout(model)
    loaded: PreTrainedModel = model.to(resolve_device(config)).eval()
    _check_finite(folder, loaded)
    return loaded


def _other_shape(auto: Any, folder: Path) -> str | None:
    """Which weight of a folder that does not load has another shape than config.json says; None where none has."""
    try:
        wrong = auto.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
        )[1]["mismatched_keys"]
    except Exception:  # noqa: BLE001  the first error is the one to report
        return None
    if not wrong:
        return None
    name, in_file, wanted = min(wrong)
    return (
        f"its weight {name} has the shape {list(in_file)}, and by config.json it has {list(wanted)} (weights of "
        f"another shape: {len(wrong)}), so the files do not belong together: download the checkpoint again"
    )


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raise `ModelError` for a weight with NaN or infinite values, which make every probability NaN."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(
                f"{folder} does not load: its weight {name} has values that are not finite, so no token could be "
                "sampled: download the checkpoint again, or set model.name to another one"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder`. Raises `ModelError` where it is missing or corrupt."""
    read_json(folder / "tokenizer.json")  # without the file, transformers would make an empty tokenizer
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file makes the tokenizers package raise `Exception` itself
        raise ModelError(
            f"the tokenizer of {folder} does not load ({headline(error)}): download tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    return tokenizer


def load_image_processor(folder: Path, vlm: VLMConfig | None = None) -> BaseImageProcessor:
    """The image processor of `folder`, with the sizes of images that `vlm` sets. Raises `ModelError` where it is
    missing or corrupt, and `ConfigError` for sizes that it does not have.

    Always transformers' PIL backend, so that the same image gives the same pixels on every machine, with or without
    torchvision.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    try:
        processor: BaseImageProcessor = auto.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # code of any family, over files that may hold anything
        if "torchvision" in str(error) and find_spec("torchvision") is None:
            raise ModelError(
                f"transformers has the image processor of {folder} for torchvision only, which is not installed, so no "
                "image could be processed: pip install torchvision, in the version that belongs to the installed torch"
            ) from error
        raise ModelError(
            f"the image processor of {folder} does not load ({headline(error).partition('. ')[0]}): use the "
            "preprocessor_config.json that belongs to the checkpoint"
        ) from error
    return processor if vlm is None else resized(processor, vlm)


def load_processor(folder: Path, vlm: VLMConfig | None = None) -> Any:
    """The whole processor of `folder`, for images: its tokenizer, its image processor and its chat template. Raises
    `ModelError` where a part is missing or corrupt, or where transformers does not have its class.

    It has a tokenizer of its own: threads that process images must not share one with those that render text.
    """
    return make_processor(folder, load_tokenizer(folder), load_image_processor(folder, vlm))


def load_eos_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a generation, as generation_config.json says; empty where it does not say. Raises
    `ModelError` for what is no token id."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if wrong := [id for id in ids if type(id) is not int or id < 0]:
        raise ModelError(
            f"{path} says eos_token_id={wrong[0]!r}, which is no token id, so an answer would not end there: correct "
            "it, or remove the line"
        )
    return tuple(ids)


def resolve_device(config: ModelConfig) -> torch.device:
    """`model.device`; `auto` is `cuda` where there is one, else `cpu`."""
    import torch

    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────


def is_hub_name(name: str) -> bool:
    """Whether a name has the form `org/model` or `model`, and no folder of that name exists.

    >>> [is_hub_name(name) for name in ("Qwen/Qwen3-VL-4B-Instruct", "./Qwen/x", "/data/qwen", "a/b/c")]
    [True, False, False, False]
    """
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not Path(name).is_dir()


def missing_files(folder: Path, config: ModelConfig) -> list[str]:
    """What is missing for `folder` to be a checkpoint, and JSON files that are corrupt; empty where nothing is."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    try:
        read_json(folder / "config.json")
        weights = _weight_files(folder)
    except ModelError as error:
        return [str(error)]
    needed = [*weights, folder / "tokenizer.json"]
    if config.vlm is not None and not _holds_image_processor(folder / "processor_config.json"):
        needed.append(folder / "preprocessor_config.json")
    return [_missing(path) for path in needed if not path.is_file()]


def _holds_image_processor(path: Path) -> bool:
    """Whether a processor_config.json also has what newer checkpoints no longer have in preprocessor_config.json. A
    corrupt one is reported when it is loaded."""
    try:
        return path.is_file() and "image_processor" in read_json(path)
    except ModelError:
        return True


def _missing(path: Path) -> str:
    """That a file is missing, and what is there in its place."""
    other = other_tokenizer(path.parent) if path.name == "tokenizer.json" else None
    if path.suffix == ".safetensors":
        other = other_format(path.parent)
    return f"{path.name} is missing" + (f" ({other})" if other is not None else "")


def wrong_family(folder: Path, config: ModelConfig) -> list[str]:
    """That config.json belongs to another family than `model.vlm.family`, as a sentence; empty where it does not."""
    family = read_json(folder / "config.json").get("model_type")
    if config.vlm is None or config.vlm.family == family:
        return []
    return [
        f"config.json says model_type={family}, but model.vlm.family={config.vlm.family}: "
        "choose the model/vlm group of that family"
    ]


def wrong_image_token(folder: Path, config: ModelConfig) -> list[str]:
    """That config.json has another image token than `model.vlm.image_token`, as a sentence; empty where it has not, or
    where a file does not say."""
    if config.vlm is None or not (folder / "tokenizer.json").is_file():
        return []
    content = read_json(folder / "config.json")
    key, stated = next(((key, content[key]) for key in IDS if type(content.get(key)) is int), ("", None))
    added = read_json(folder / "tokenizer.json").get("added_tokens")
    ids = {token.get("content"): token.get("id") for token in added if isinstance(token, dict)} if added else {}
    own = ids.get(config.vlm.image_token)
    if stated is None or own is None or own == stated:
        return []
    return [
        f"config.json says {key}={stated}, but model.vlm.image_token={config.vlm.image_token} is token {own} of "
        "tokenizer.json, so a server or an exported model would put the images in other places: use the config.json "
        "and the tokenizer.json that belong together"
    ]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} is corrupt: it has no weight_map, so no weight would be found: download it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} is corrupt: its weight_map names no files: download it again")
    return [folder / name for name in sorted(set(weight_map.values()))]


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def count_parameters(folder: Path) -> int | None:
    """Numbers in the weight files, by their headers; None where a file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        count = 0
        for path in _weight_files(folder):
            with safe_open(path, framework="np") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (ModelError, OSError, SafetensorError):
        return None
    return count


def check_weight_headers(folder: Path) -> None:
    """Raise `ModelError` for a truncated or overwritten weight file, with its name, before transformers reads it."""
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is corrupt ({error}): copy or download the checkpoint again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is corrupt: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is corrupt: it holds no JSON object")
    return content


# ── the machine ─────────────────────────────────────────────────────────────────────────────────────────────


def hub_cache() -> str:
    """The folder in which huggingface_hub caches downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def _cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of a hub name in the local cache, complete or not; None where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except OSError:
        return None


def hub_is_reachable(timeout: float = 4.0) -> bool:
    """Whether a connection to the hub can be opened within `timeout` seconds. With a proxy, always True."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    url = urlsplit(ENDPOINT)
    if os.environ.get(f"{url.scheme}_proxy") or os.environ.get(f"{url.scheme}_proxy".upper()):
        return True
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout).close()
        except OSError:
            return
        connected.set()

    # In a thread, because a name lookup has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return connected.is_set()
