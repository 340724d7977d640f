"""The config holds no secrets: it is written to config.yaml, to loggers and to reports."""

from __future__ import annotations

import dataclasses

from vlmrl.config.run import RunConfig
from vlmrl.config.secrets import find_secrets
from vlmrl.errors import ConfigError

VARIABLES = {
    "inference.extra_args": "VLLM_API_KEY or HF_TOKEN",
    "inference.urls": "VLLM_API_KEY",
    "model.name": "HF_TOKEN",
    "reward.terms": "for a judge, the one that its api_key_env names",
}
"""Key → the environment variable that replaces a secret in it."""


def no_secret_is_recorded(config: RunConfig) -> None:
    """Secrets belong in environment variables, which are never recorded. The message does not repeat the secret."""
    for key in find_secrets(dataclasses.asdict(config)):
        variable = next(
            (name for prefix, name in VARIABLES.items() if key.startswith(prefix)), "which your own code reads"
        )
        raise ConfigError(
            f"{key} looks like a secret, and the config is written to config.yaml, loggers and reports: remove it "
            f"from the config and set it as an environment variable ({variable})."
        )
