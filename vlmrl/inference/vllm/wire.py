"""The bytes that go to a vLLM server and come back: our records in, bytes out. No I/O, no vLLM.

    Prompt, SamplingParams ──▶ request body     token ids; per image its hash, and its data where the server lacks it
    answer body ──▶ Answer                      token ids, logprobs, which weights sampled which token

This is JSON for vLLM's `POST /inference/v1/generate`, which every server has. Servers of the run have a route of their
own beside it (vllm_route.py), whose bytes are in vllm_frames.py.

An image's data is a msgpack document: vLLM's `MultiModalKwargsItem`, which its server decodes into tensors
(`vllm.entrypoints.scale_out.token_in_token_out.mm_serde`); in JSON, as base64. It is written here without vLLM, in the
dtype that the engine computes in; a test puts it through vLLM's own decoder and encoder and compares the bytes.

Written for vLLM 0.26 to 0.32, which differ in the shape of logprobs and in that only the latter names weight versions.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from vlmrl.config.model import Dtype
from vlmrl.types import FloatArray, ImageItem, IntArray, Placeholder, SamplingParams

BANNED_BIAS = -1e30
"""Added to the logits of banned tokens. JSON has no −inf; in float32, in which vLLM samples, this gives the same: the
probability of a banned token is 0 and those of the others are what they are without it."""

MOST_TOKENS = 1024
"""Of a request's biased tokens, or of its allowed ones: on a GPU vLLM has tables of this size, and its engine dies of
more."""

FINAL_ONLY = 2
"""`output_kind`: one answer at the end. Left out, 0.26 answers with what its last update held."""


class WireError(ValueError):
    """An answer that is not what the protocol says."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a server made of one request. C ≥ 0: empty where the server lacked an image (0.26) or aborted."""

    token_ids: IntArray
    """int64 [C]."""
    logprobs: FloatArray
    """float32 [C]; natural log, of the distribution that was sampled from."""
    versions: IntArray | None
    """int64 [C]; the version of the weights that sampled each token. None where the server does not say."""
    finish_reason: str
    """`stop`, `length` or `abort`."""


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────


def request_body(
    request_id: str,
    token_ids: IntArray,
    placeholders: Collection[Placeholder],
    data: Mapping[str, bytes],
    sampling: SamplingParams,
) -> bytes:
    """The body of a request in JSON. `data` has what `encode_image` made of the images to send along, by hash; the
    others are named by their hash alone, for the server to take from its cache."""
    body: dict[str, Any] = {
        "request_id": request_id,
        "token_ids": token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sampling.stop_token_ids,
            # Only our stop tokens end a completion, not those of the checkpoint's generation config.
            "ignore_eos": True,
            "logit_bias": _logit_bias(sampling.banned_token_ids),
            # The sampled token's own logprob comes with 0 as well, without a ranking of the others.
            "logprobs": 0,
            "detokenize": False,
            "output_kind": FINAL_ONLY,
        },
    }
    if placeholders:
        body["features"] = {
            "mm_hashes": {"image": [placeholder.hash for placeholder in placeholders]},
            "mm_placeholders": {"image": [{"offset": p.offset, "length": p.length} for p in placeholders]},
            "kwargs_data": {
                "image": [
                    orjson.Fragment(b'"%b"' % base64.b64encode(data[p.hash])) if p.hash in data else None
                    for p in placeholders
                ]
            },
        }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


@lru_cache(maxsize=16)
def _logit_bias(banned: tuple[int, ...]) -> orjson.Fragment:
    """The same few hundred ids go with every request of a run: written once."""
    return orjson.Fragment(orjson.dumps({str(token): BANNED_BIAS for token in banned}))


def encode_image(image: ImageItem, dtype: Dtype, flat: Collection[str]) -> bytes:
    """An image's data: vLLM's msgpack, floats in `dtype`.

    `flat` names the `mm_kwargs` that a batch of images concatenates along dim 0 (`pixel_values` of Qwen-VL, whose rows
    are patches); the others have one row per image. Integers are geometry, which vLLM reads on the CPU.
    """
    item = {name: _element(array, dtype, name in flat) for name, array in image.mm_kwargs.items()}
    return _msgpack(item)


def data_size(image: ImageItem, dtype: Dtype) -> int:
    """Bytes that `encode_image` makes of it, but for the hundred or so that name its parts."""
    widths = {"f": 4 if dtype is Dtype.float32 else 2}
    return sum(array.size * widths.get(array.dtype.kind, array.dtype.itemsize) for array in image.mm_kwargs.values())


def _element(array: np.ndarray, dtype: Dtype, is_flat: bool) -> dict[str, Any]:
    keep_on_cpu = np.issubdtype(array.dtype, np.integer)
    if is_flat:
        slices = [[[0, array.shape[0], None]]]  # of the one item, per dim, as (start, stop, step)
        field = ("flat", {"keep_on_cpu": keep_on_cpu, "slices": slices, "dim": 0})
    else:
        assert array.shape[0] == 1, f"{array.shape[0]} rows for one image: is this one of the flat mm_kwargs?"
        array = array[0]
        field = ("batched", {"keep_on_cpu": keep_on_cpu})
    name, raw = _tensor_bytes(array, dtype)
    return {"data": (name, array.shape, raw), "field": field}


def _tensor_bytes(array: np.ndarray, dtype: Dtype) -> tuple[str, memoryview]:
    """torch's name of the dtype, and the bytes of a contiguous tensor of it."""
    if np.issubdtype(array.dtype, np.floating):
        array = to_bfloat16(array) if dtype is Dtype.bfloat16 else array.astype(dtype.value, copy=False)
        return dtype.value, np.ascontiguousarray(array).data.cast("B")
    return array.dtype.name, np.ascontiguousarray(array).data.cast("B")


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 of any shape → uint16 of that shape, the bits of bfloat16; rounds to nearest and ties to even.

    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32))]
    ['0x3f80', '0x3f80', '0x3f82', '0xc020']
    """
    import torch  # in a third of numpy's time; the one thing here that needs it

    floats = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


# ── msgpack, as far as an image needs it ────────────────────────────────────────────────────────────────────

RAW_VIEW = 3
"""vLLM's extension type of a tensor's bytes."""


def _msgpack(value: Any) -> bytes:
    parts: list[bytes | memoryview] = []
    _pack(value, parts)
    return b"".join(parts)


def _pack(value: Any, parts: list[bytes | memoryview]) -> None:
    match value:
        case None:
            parts.append(b"\xc0")
        case bool() | np.bool_():
            parts.append(b"\xc3" if value else b"\xc2")
        case int():
            parts.append(_pack_int(value))
        case str():
            text = value.encode()
            parts.append(_header(len(text), (0xA0, 32), {8: 0xD9, 16: 0xDA}))
            parts.append(text)
        case memoryview():
            parts.append(_extension_header(value.nbytes))
            parts.append(value)
        case dict():
            parts.append(_header(len(value), (0x80, 16), {16: 0xDE}))
            for key, item in value.items():
                _pack(key, parts)
                _pack(item, parts)
        case list() | tuple():
            parts.append(_header(len(value), (0x90, 16), {16: 0xDC}))
            for item in value:
                _pack(item, parts)
        case _:
            raise AssertionError(f"{type(value).__name__} is no part of an image")


def _pack_int(value: int) -> bytes:
    assert value >= 0
    if value < 128:
        return bytes([value])
    code, form = next((c, f) for bits, c, f in _UNSIGNED if value < 1 << bits)
    return struct.pack(f">B{form}", code, value)


_UNSIGNED = ((8, 0xCC, "B"), (16, 0xCD, "H"), (32, 0xCE, "I"), (64, 0xCF, "Q"))


def _header(length: int, short: tuple[int, int], codes: dict[int, int]) -> bytes:
    """`short` is (code, lengths below which it holds the length itself); `codes` has a code per bits of the length."""
    base, limit = short
    if length < limit:
        return bytes([base | length])
    bits = next(bits for bits in codes if length < 1 << bits)
    return struct.pack(f">B{'BH'[bits // 16]}", codes[bits], length)


def _extension_header(length: int) -> bytes:
    if length in (1, 2, 4, 8, 16):
        return struct.pack(">BB", 0xD4 + length.bit_length() - 1, RAW_VIEW)
    code, form = next((c, f) for bits, c, f in ((8, 0xC7, "B"), (16, 0xC8, "H"), (32, 0xC9, "I")) if length < 1 << bits)
    return struct.pack(f">B{form}B", code, length, RAW_VIEW)


# ── answer ──────────────────────────────────────────────────────────────────────────────────────────────────


def parse_answer(body: bytes) -> Answer:
    """Read the answer to one request. Raises `WireError`.

    >>> answer = parse_answer(
    ...     b'{"choices": [{"token_ids": [7, 9], "finish_reason": "length", "logprobs": {"content": ['
    ...     b'{"token_id": 7, "logprob": -0.5}, {"token_id": 9, "logprob": -0.25}]},'
    ...     b'"weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]}]}'
    ... )
    >>> answer.token_ids.tolist(), answer.logprobs.tolist(), answer.versions.tolist(), answer.finish_reason
    ([7, 9], [-0.5, -0.25], [3, 4], 'length')
    """
    try:
        (choice,) = orjson.loads(body)["choices"]
        tokens: list[int] = choice["token_ids"] or []
        entries: list[dict[str, Any]] = choice["logprobs"]["content"] or []
        finish_reason: str = choice["finish_reason"]
        entry_tokens = [_token_of(entry) for entry in entries]
        logprobs = np.array([entry["logprob"] for entry in entries], np.float32)
        versions = _versions(choice.get("weight_versions"))
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"{type(error).__name__}: {error}; the answer began {body[:200]!r}") from error
    if entry_tokens != tokens:
        raise WireError(f"logprobs of the tokens {entry_tokens} for the tokens {tokens}")
    return checked(Answer(np.array(tokens, np.int64), logprobs, versions, finish_reason))


def checked(answer: Answer) -> Answer:
    """The answer, if its parts fit each other. Raises `WireError`."""
    count = len(answer.token_ids)
    if len(answer.logprobs) != count:
        raise WireError(f"{len(answer.logprobs)} logprobs for {count} tokens")
    if answer.versions is not None and len(answer.versions) != count:
        raise WireError(f"weight versions of {len(answer.versions)} tokens for {count}")
    if not (np.isfinite(answer.logprobs).all() and (answer.logprobs > MISSING_LOGPROB).all()):
        raise WireError(f"logprobs {answer.logprobs.tolist()}: one is missing or not a number")
    return answer


MISSING_LOGPROB = -9999.0
"""What vLLM writes for a logprob that it does not have, or that is NaN."""


def _token_of(entry: dict[str, Any]) -> int:
    """0.32 writes `token_id: 7`, 0.26 `token: "token_id:7"`."""
    if "token_id" in entry:
        return int(entry["token_id"])
    return int(str(entry["token"]).removeprefix("token_id:"))


def _versions(spans: list[dict[str, Any]] | None) -> IntArray | None:
    if spans is None:
        return None
    return spread((int(span["version"]), span["start"], span["end"]) for span in spans)


def spread(spans: Iterable[tuple[int, int, int]]) -> IntArray:
    """(version, start, end) of consecutive tokens → int64 [C]."""
    return np.array([version for version, start, end in spans for _ in range(start, end)], np.int64)
