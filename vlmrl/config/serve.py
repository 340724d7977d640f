"""`serve`: the chat endpoint of mode=serve."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.fields import Form, Resume, setting


@dataclass
class ServeConfig:
    """mode=serve puts the model behind an OpenAI-style chat endpoint, on 127.0.0.1."""

    port: int = setting(8000, on_resume=Resume.free, low=0, high=65535, outside="there is no such port")
    """The port; 0 takes a free one. The address is printed, and stands in serve.json in the run's folder."""
    api_key_env: str = setting(
        "VLMRL_API_KEY",
        on_resume=Resume.free,
        form=Form(r"[A-Za-z_]\w*", "the name of an environment variable", "no key is found"),
    )
    """Name of the environment variable that holds the key which clients send. Where it is not set, a new key is made.
    The key is printed and stands in serve.json, which only you can read and which is deleted when the server stops. It
    is written nowhere else."""
    idle_s: float = setting(
        60.0, on_resume=Resume.free, low=0.1, high=1e6, outside="conversations end too early or never"
    )
    """Seconds without a request after which a conversation counts as over and is recorded. A later request of it starts
    another one."""
