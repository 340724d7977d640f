"""From the JSON of a chat request to a `ChatRequest`. What the endpoint cannot do is refused with words, never ignored.

    messages, tools, stop, max_tokens, stream, logprobs    taken
    temperature, top_p, top_k, seed                        the run's own; taken with `client_samples`
    penalties, logit_bias, n > 1, response_format, …       refused, unless their value changes nothing
    user, metadata                                         part of the request's identity, without another effect

A request with the same values is the same request (session.py gives it the same answer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmrl.orchestrator.endpoint.media import DataMedia
from vlmrl.orchestrator.endpoint.messages import read_messages, read_tools
from vlmrl.orchestrator.endpoint.reading import flag, mapping, number, quoted, texts, whole
from vlmrl.orchestrator.endpoint.refusal import RefusedError
from vlmrl.types import Message, ToolSpec

MOST_STOPS = 16
"""Stop strings of a request."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
    "echo": (False,),
    "prediction": (),
    "audio": (),
}
"""Keys that the endpoint cannot honour → the values that change nothing."""

WITHOUT_EFFECT = frozenset(
    ("service_tier", "store", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "verbosity")
)
"""Keys for the provider of a paid service, which are ignored."""


@dataclass(frozen=True)
class ClientSampling:
    """How a client wants its answer sampled. None: the client does not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class ChatRequest:
    """One request for an answer."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    max_tokens: int | None = None
    """The most tokens of the answer; the run's own limit counts as well. None: only that limit."""
    stream: bool = False
    include_usage: bool = False
    """With `stream`, send the token counts in a last chunk."""
    logprobs: bool = False
    sampling: ClientSampling = field(default_factory=ClientSampling)
    lane: str = ""
    """The header X-Session-ID of a request to a session's base URL: which of a program's agents asks. Requests of two
    lanes are two requests, and a lane is never bridged from another."""
    tag: str = ""
    """`user` and `metadata` of the request: requests with other values are other requests."""


def read_request(body: Any, media: DataMedia, *, client_samples: bool, temperature: float) -> ChatRequest:
    """The request of a parsed JSON body. Raises `RefusedError`.

    `client_samples`: whether a client's temperature, top_p, top_k and seed are taken. Otherwise they are refused,
    except for values that the run samples with anyway: its own `temperature`, and the whole distribution.

    >>> read_request({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}, DataMedia(),
    ...     client_samples=False, temperature=1.0).max_tokens
    5
    """
    if not isinstance(body, dict):
        raise RefusedError('the body is no JSON object, so there is no request in it: send {"messages": […]}')
    given = {key: value for key, value in body.items() if value is not None}
    _refuse_what_is_not_done(given)
    tools = read_tools(given.get("tools", []))
    options = mapping(given.get("stream_options", {}), "stream_options")
    return ChatRequest(
        messages=read_messages(given.get("messages"), media),
        tools=() if given.get("tool_choice") == "none" else tools,
        stop=_stop(given.get("stop", [])),
        max_tokens=_max_tokens(given),
        stream=flag(given, "stream"),
        include_usage=flag(options, "include_usage"),
        logprobs=flag(given, "logprobs"),
        sampling=_sampling(given) if client_samples else _own_sampling(given, temperature),
        tag=repr((given.get("user"), given.get("metadata"))),
    )


KNOWN = {
    *("model", "messages", "tools", "stop", "max_tokens", "max_completion_tokens", "stream", "stream_options"),
    *("logprobs", "temperature", "top_p", "top_k", "seed", "user", "metadata"),
    *NEUTRAL,
    *WITHOUT_EFFECT,
}


def _refuse_what_is_not_done(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key not in KNOWN:
            raise RefusedError(
                f"{quoted(key)} is not known here, so the answer would not be what you ask for: leave it out", param=key
            )
        if key in NEUTRAL and not _is_one_of(value, NEUTRAL[key]):
            raise RefusedError(
                f"{key}={quoted(value)} cannot be done here, because an answer is sampled in one way only: leave {key} "
                "out",
                param=key,
            )


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value equals one of `values`; True is not 1."""
    return any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in values)


def _stop(value: Any) -> tuple[str, ...]:
    stop = (value,) if isinstance(value, str) else texts(value, "stop")
    if len(stop) > MOST_STOPS or "" in stop:
        raise RefusedError(
            f"stop holds {len(stop)} strings, and it takes at most {MOST_STOPS}, none of them empty", param="stop"
        )
    return tuple(dict.fromkeys(stop))


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    limits = [whole(given, key, low=1) for key in ("max_tokens", "max_completion_tokens") if key in given]
    return min(limits) if limits else None


def _sampling(given: Mapping[str, Any]) -> ClientSampling:
    """The client's own sampling."""
    top_k = whole(given, "top_k", low=-1) if "top_k" in given else None
    return ClientSampling(
        temperature=number(given, "temperature", 0.0, 100.0) if "temperature" in given else None,
        top_p=number(given, "top_p", 1e-6, 1.0) if "top_p" in given else None,
        top_k=None if top_k is None else max(top_k, 0),  # vLLM's −1 means every token, too
        seed=whole(given, "seed", low=0, high=2**63 - 1) if "seed" in given else None,
    )


def _own_sampling(given: Mapping[str, Any], temperature: float) -> ClientSampling:
    """The run's own sampling; another wish is refused."""
    same = {"temperature": (temperature,), "top_p": (1,), "top_k": (0, -1), "seed": ()}
    for key, values in same.items():
        if key in given and not _is_one_of(given[key], values):
            own = f"{values[0]:g}" if values else "derived from the run's seed"
            raise RefusedError(
                f"{key}={quoted(given[key])} is not taken, because the policy learns from what the run samples, whose "
                f"{key} is {own}: leave {key} out",
                param=key,
            )
    return ClientSampling()
