"""The JSON of vLLM's own endpoint `POST /inference/v1/generate`: converts between our records and bytes.

    Prompt, SamplingParams ──▶ request body     token ids; per image its hash, and its data where the server lacks it
    answer body ──▶ Answer                      token ids, logprobs, and the version of the weights for each token

No I/O, no import of vLLM. Every server has this endpoint. Servers that the run starts have an endpoint of their own as
well (in_server/route.py), whose bytes are in frames.py.

An image as tensors is a msgpack document: vLLM's `MultiModalKwargsItem`, which the server decodes into tensors
(`vllm.entrypoints.scale_out.token_in_token_out.mm_serde`); JSON holds it as base64. Floats have the dtype that the
engine computes in. A test passes the document through vLLM's own decoder and encoder and compares the bytes. An image
whose tensors vLLM names or cuts in another way goes as its picture: to the run's own endpoint with digests
(image_fields.py), to vLLM's own endpoint as one of its `content_parts` (content_parts.py).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson

from vlmrl.config.model import Dtype
from vlmrl.inference.vllm import old_vllm
from vlmrl.inference.vllm.image_fields import ImageField, ImageFields, TensorDigest, picture_document
from vlmrl.types import FloatArray, ImageItem, IntArray, MMItem, Modality, Placeholder, SamplingParams, Supports

BANNED_BIAS = -1e30
"""Added to the logits of banned tokens, because JSON has no −inf. vLLM samples in float32, where the result is equal: a
banned token has probability 0, and the other probabilities are exact."""

MAX_LISTED_TOKENS = 1024
"""Largest number of biased tokens, or of allowed tokens, in one request. On a GPU vLLM keeps them in tables of this
size, and its engine dies of a longer list."""


class WireError(ValueError):
    """A server sent a malformed answer."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A server's answer to one request. C ≥ 0: there are no tokens where the server aborted the request or, with vLLM
    0.26, lacked an image."""

    token_ids: IntArray
    """int64 [C]."""
    logprobs: FloatArray
    """float32 [C]; natural log of the token's probability under the distribution that it was sampled from."""
    versions: IntArray | None
    """int64 [C]; the version of the weights that sampled each token. None where the server does not report it."""
    finish_reason: str
    """`stop`, `length` or `abort`."""
    prompt_token_ids: IntArray | None = None
    """int64 [P]; the prompt that the server computed with. None where it was not asked for."""
    supports: Supports | None = None
    """From which tokens each of the C tokens was sampled. None where it was not asked for."""


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────


def request_body(
    request_id: str,
    token_ids: IntArray,
    placeholders: Collection[Placeholder],
    data: Mapping[str, bytes],
    sampling: SamplingParams,
) -> bytes:
    """The body of a request in JSON. `data` maps the hash of each image or video to send to the output of
    `encode_item`. The server takes the others of the request from its cache, by their hash."""
    if not placeholders:
        return _body(request_id, token_ids, sampling, {})
    kinds: dict[Modality, list[Placeholder]] = {}
    for placeholder in placeholders:
        kinds.setdefault(placeholder.modality, []).append(placeholder)
    features = {
        "mm_hashes": {kind: [p.hash for p in places] for kind, places in kinds.items()},
        # without `is_embed`, so the client sends placeholders with gaps in another way
        "mm_placeholders": {
            kind: [{"offset": p.offset, "length": p.length} for p in places] for kind, places in kinds.items()
        },
        "kwargs_data": {
            kind: [
                orjson.Fragment(b'"%b"' % base64.b64encode(data[p.hash])) if p.hash in data else None for p in places
            ]
            for kind, places in kinds.items()
        },
    }
    return _body(request_id, token_ids, sampling, {"features": features})


def picture_request_body(
    request_id: str,
    token_ids: Sequence[int],
    hashes: Sequence[str],
    data: Mapping[str, bytes],
    sampling: SamplingParams,
) -> bytes:
    """The body of a request whose images the server makes from pictures, in JSON. `token_ids` has a placeholder per
    image (`content_parts.unexpanded`); `data` maps the hash of each image to send to its URL. The server takes the
    other images from its cache."""
    parts = [
        {"type": "image_url", "url": orjson.Fragment(b'"%b"' % data[hash]) if hash in data else None, "uuid": hash}
        for hash in hashes
    ]
    return _body(request_id, token_ids, sampling, {"content_parts": parts, "return_token_ids": True})


def _body(
    request_id: str, token_ids: Sequence[int] | IntArray, sampling: SamplingParams, images: Mapping[str, Any]
) -> bytes:
    body = {
        "request_id": request_id,
        "token_ids": token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sampling.stop_token_ids,
            # Only `stop_token_ids` ends a completion, not the EOS tokens of the checkpoint's generation config.
            "ignore_eos": True,
            "logit_bias": _logit_bias(sampling.banned_token_ids),
            # 0 gives the logprob of the sampled token without those of the most probable tokens.
            "logprobs": 0,
            # The server finds stop strings in the text. Only the tokens of its answer are read, so they may stay there.
            "detokenize": bool(sampling.stop),
            "stop": sampling.stop,
            "include_stop_str_in_output": True,
            **old_vllm.SAMPLING_PARAMS,
        },
        **images,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


@lru_cache(maxsize=16)
def _logit_bias(banned: tuple[int, ...]) -> orjson.Fragment:
    """JSON of the bias of banned tokens. Cached, because every request of a run has the same few hundred ids."""
    return orjson.Fragment(orjson.dumps({str(token): BANNED_BIAS for token in banned}))


def encode_item(
    image: MMItem, dtype: Dtype, fields: ImageFields, sizes: Mapping[str, Any] = MappingProxyType({})
) -> bytes:
    """The data of an image or a video, with floats in `dtype`: vLLM's msgpack document of the renderer's tensors where
    vLLM's item consists of these, otherwise an image's picture with their digests and with `sizes` (`image_fields`)."""
    if fields.are_tensors_of(image):
        return _msgpack({field.name: _element(image.mm_kwargs[field.name], dtype, field) for field in fields.fields})
    assert isinstance(image, ImageItem), "the client refuses a video whose tensors are not vLLM's"
    return encode_picture(image, dtype, sizes)


def encode_picture(image: ImageItem, dtype: Dtype, sizes: Mapping[str, Any] = MappingProxyType({})) -> bytes:
    """An image's picture with the digests of the renderer's tensors, floats in `dtype`, and with `sizes`."""
    tensors = {
        name: TensorDigest.of(_in_dtype(array, dtype), is_float=array.dtype.kind == "f")
        for name, array in image.mm_kwargs.items()
    }
    return picture_document(image, tensors, sizes)


def data_size(image: MMItem, dtype: Dtype, fields: ImageFields) -> int:
    """Size of `encode_item`'s output in bytes, without its few hundred bytes of names."""
    if isinstance(image, ImageItem) and not fields.are_tensors_of(image):
        return image.pixels.nbytes
    widths = {"f": 4 if dtype is Dtype.float32 else 2}
    arrays = [image.mm_kwargs[field.name] for field in fields.fields]
    return sum(array.size * widths.get(array.dtype.kind, array.dtype.itemsize) for array in arrays)


def _element(array: np.ndarray, dtype: Dtype, field: ImageField) -> dict[str, Any]:
    if field.kind == "flat":
        slices = [[[0, array.shape[0], None]]]  # for the only item, per dim: (start, stop, step)
        kind = ("flat", {"keep_on_cpu": field.keep_on_cpu, "slices": slices, "dim": 0})
    else:
        array = array[0]
        kind = ("batched", {"keep_on_cpu": field.keep_on_cpu})
    # Positions are counted with the seconds of a video, which bfloat16 would round.
    name, raw = _tensor_bytes(array, Dtype.float32 if field.keep_on_cpu else dtype)
    return {"data": (name, array.shape, raw), "field": kind}


def _tensor_bytes(array: np.ndarray, dtype: Dtype) -> tuple[str, memoryview]:
    """torch's name of the dtype that is sent, and the bytes of the contiguous tensor."""
    name = dtype.value if np.issubdtype(array.dtype, np.floating) else array.dtype.name
    return name, np.ascontiguousarray(_in_dtype(array, dtype)).data.cast("B")


def _in_dtype(array: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Floats in `dtype` (bfloat16 as its bits); other arrays as they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return to_bfloat16(array) if dtype is Dtype.bfloat16 else array.astype(dtype.value, copy=False)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 of any shape → uint16 of the same shape with the bits of bfloat16; rounds to nearest, ties to even.

    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32))]
    ['0x3f80', '0x3f80', '0x3f82', '0xc020']
    """
    import torch  # three times as fast as numpy; imported here because nothing else in this file needs it

    floats = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))
    return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


# ── msgpack, the part that an image needs ────────────────────────────────────────────────────────────────────

RAW_VIEW = 3
"""vLLM's extension type for the bytes of a tensor."""


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
            raise AssertionError(f"{type(value).__name__} cannot be part of an image")


def _pack_int(value: int) -> bytes:
    assert value >= 0
    if value < 128:
        return bytes([value])
    code, form = next((c, f) for bits, c, f in _UNSIGNED if value < 1 << bits)
    return struct.pack(f">B{form}", code, value)


_UNSIGNED = ((8, 0xCC, "B"), (16, 0xCD, "H"), (32, 0xCE, "I"), (64, 0xCF, "Q"))


def _header(length: int, short: tuple[int, int], codes: dict[int, int]) -> bytes:
    """The header of a string, list or dict. `short` is (code, limit): below the limit one byte holds code and length.
    `codes` maps the width of the length in bits to the code for it."""
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
    """Read the body of an answer. Raises `WireError` where it is malformed.

    >>> answer = parse_answer(
    ...     b'{"choices": [{"token_ids": [7, 9], "finish_reason": "length", "logprobs": {"content": ['
    ...     b'{"token_id": 7, "logprob": -0.5}, {"token_id": 9, "logprob": -0.25}]},'
    ...     b'"weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]}]}'
    ... )
    >>> answer.token_ids.tolist(), answer.logprobs.tolist(), answer.versions.tolist(), answer.finish_reason
    ([7, 9], [-0.5, -0.25], [3, 4], 'length')
    """
    try:
        content = orjson.loads(body)
        (choice,) = content["choices"]
        tokens: list[int] = choice["token_ids"] or []
        entries: list[dict[str, Any]] = choice["logprobs"]["content"] or []
        finish_reason: str = choice["finish_reason"]
        entry_tokens = [
            int(entry["token_id"]) if "token_id" in entry else old_vllm.sampled_token(entry) for entry in entries
        ]
        logprobs = np.array([entry["logprob"] for entry in entries], np.float32)
        versions = _versions(choice.get("weight_versions"))
        prompt = content.get("prompt_token_ids")
        prompt_ids = None if prompt is None else np.array(prompt, np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"{type(error).__name__}: {error}; the answer began {body[:200]!r}") from error
    if entry_tokens != tokens:
        raise WireError(f"the logprobs are for the tokens {entry_tokens}, but the tokens are {tokens}")
    return checked(Answer(np.array(tokens, np.int64), logprobs, versions, finish_reason, prompt_ids))


def checked(answer: Answer) -> Answer:
    """Return `answer`. Raises `WireError` where its lengths differ or a logprob is missing or not finite."""
    count = len(answer.token_ids)
    if len(answer.logprobs) != count:
        raise WireError(f"there are {len(answer.logprobs)} logprobs for {count} tokens")
    if answer.versions is not None and len(answer.versions) != count:
        raise WireError(f"there are weight versions of {len(answer.versions)} tokens for {count} tokens")
    if answer.supports is not None and len(answer.supports) != count:
        raise WireError(f"there are supports of {len(answer.supports)} tokens for {count} tokens")
    if not (np.isfinite(answer.logprobs).all() and (answer.logprobs > MISSING_LOGPROB).all()):
        raise WireError(f"one of the logprobs {answer.logprobs.tolist()} is missing or not a number")
    return answer


MISSING_LOGPROB = -9999.0
"""vLLM sends this in place of a logprob that is missing or NaN."""


def _versions(spans: list[dict[str, Any]] | None) -> IntArray | None:
    if spans is None:
        return None
    return versions_of_tokens((int(span["version"]), span["start"], span["end"]) for span in spans)


def versions_of_tokens(spans: Iterable[tuple[int, int, int]]) -> IntArray:
    """Spans (version, first token, end) of consecutive tokens → int64 [C], the version of each token."""
    return np.array([version for version, start, end in spans for _ in range(start, end)], np.int64)
