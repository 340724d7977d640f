"""No key in the config: what stands there is written to config.yaml, to Weights & Biases, to reports and logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError

SECRET = re.compile(r"(^|[_-])(api[_-]?key|secret|password|passwd|(access|auth|hf)[_-]token)$", re.IGNORECASE)
"""Names under which people hand in keys. `max_tokens` and `stop_token` are none."""

VARIABLES = {"inference.extra_args": "VLLM_API_KEY or HF_TOKEN"}
"""Dict → the environment variable that its reader takes instead."""


def no_key_is_written_down(config: RunConfig) -> None:
    """Keys belong in environment variables, which are never recorded. The message does not repeat what it found."""
    free = {
        "task.args": getattr(config.task, "args", {}),
        "algorithm.args": config.algorithm.args,
        "inference.extra_args": getattr(config.inference, "extra_args", {}),
    }
    for name, tree in free.items():
        for key in _secrets(tree, name):
            raise ConfigError(
                f"{key} requires to be kept out of the config, else the key is written to config.yaml and logged: "
                f"set it as an environment variable ({VARIABLES.get(name, 'read by os.environ in your own code')})"
            )
    for url in getattr(config.inference, "urls", []):
        if urlsplit(url).password is not None:
            raise ConfigError(
                "inference.urls requires addresses without a password, else it is written to config.yaml and logged: "
                "set VLLM_API_KEY in the environment"
            )


def _secrets(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Dotted names of the texts that look like keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _secrets(value, f"{prefix}.{name}")
        elif isinstance(value, str) and value and SECRET.search(str(name)):
            yield f"{prefix}.{name}"
