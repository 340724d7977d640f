"""The bytes of the endpoint that the run adds to its own servers (in_server/route.py).

    request    one frame: the requests of a batch │ the data of images, once per image
    response   one frame per request of the batch, in the order in which they finish

A frame is the length of the header and the length of the data (uint32 little-endian each), the header in JSON, and the
data. The content is that of wire.py, but without base64, and one HTTP request holds a batch of requests.
No I/O, no import of vLLM.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from vlmrl.inference.vllm.reported_supports import MOST_LOGPROBS, reported
from vlmrl.inference.vllm.wire import Answer, WireError, checked, versions_of_tokens
from vlmrl.types import TOKEN_TYPES, IntArray, Modality, Placeholder, SamplingParams, Supports

ROUTE = "/vlmrl/generate"

FORGOTTEN = 409
"""Status of a response where the server lacks an image that the request refers to by its hash."""

_LENGTHS = struct.Struct("<II")
_INT32 = 2**31 - 1


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────


def request_header(
    request_id: str,
    token_ids: IntArray,
    placeholders: Collection[Placeholder],
    sampling: SamplingParams,
    *,
    is_whole: bool,
    leads: Collection[Modality] = (),
) -> dict[str, Any]:
    """The header of one request of a batch. `is_whole`: the batch has the data of all the request's images and videos,
    and the server uses that; otherwise the server takes them from its cache. `leads`: the kinds of items whose place in
    vLLM begins one token early (`ImageFields.has_lead`)."""
    return {
        "request_id": request_id,
        "token_ids": token_ids,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "reported": reported(sampling),
        "seed": sampling.seed,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sampling.stop_token_ids,
        "stop": sampling.stop,
        "banned": _runs(sampling.banned_token_ids),
        "items": [[p.hash, p.offset, p.length, p.gaps, p.modality, int(p.modality in leads)] for p in placeholders],
        "is_whole": is_whole,
    }


@lru_cache(maxsize=16)
def _runs(token_ids: tuple[int, ...]) -> orjson.Fragment:
    """JSON of [first, end) for each run of consecutive token ids. Cached, because every request of a run has the same
    ids: up to 150,000 where the vocabulary is larger than the tokenizer's."""
    ids = np.array(sorted(token_ids), np.int64)
    cuts = np.flatnonzero(np.diff(ids) > 1) + 1
    runs = [[int(part[0]), int(part[-1]) + 1] for part in np.split(ids, cuts) if len(part)]
    return orjson.Fragment(orjson.dumps(runs))


def pack_batch(requests: Sequence[Mapping[str, Any]], data: Mapping[str, bytes]) -> bytes:
    """The body of a batch. `data` maps the hash of an image to the output of `wire.encode_item`. If there are no
    requests, the server only keeps the data."""
    sizes = [[hash, len(document)] for hash, document in data.items()]
    return _framed({"requests": requests, "documents": sizes}, *data.values())


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch, as the server reads it."""

    requests: list[dict[str, Any]]
    """Outputs of `request_header`; each of their `items` is [hash, offset, length, gaps, kind, lead], in tokens."""
    documents: dict[str, memoryview]
    """Hash of an image → its data."""


def unpack_batch(body: bytes) -> Batch:
    """Read the body of a batch.

    >>> sampling = SamplingParams(8, 1.0, (2,), (4, 5, 6, 9), seed=7)
    >>> header = request_header("r", np.array([5, 9, 9]), [Placeholder(1, 2, "ab")], sampling, is_whole=True)
    >>> batch = unpack_batch(pack_batch([header], {"ab": b"pixels"}))
    >>> batch.requests[0]["token_ids"], batch.requests[0]["items"], bytes(batch.documents["ab"])
    ([5, 9, 9], [['ab', 1, 2, [], 'image', 0]], b'pixels')
    >>> batch.requests[0]["banned"]
    [[4, 7], [9, 10]]
    """
    ((header, data),) = Frames().feed(body)
    documents, start = {}, 0
    for hash, size in header["documents"]:
        documents[hash] = data[start : start + size]
        start += size
    return Batch(header["requests"], documents)


# ── response ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Response:
    """The server's response to one request of a batch."""

    status: int
    """An HTTP status: 200, `FORGOTTEN`, 400 or 500."""
    header: Mapping[str, Any]
    data: memoryview

    @property
    def complaint(self) -> str:
        """The status and the server's error message, for a `status` other than 200."""
        return f"HTTP {self.status}: {str(self.header.get('error', ''))[:500]}"

    def answer(self) -> Answer:
        """The answer in a response of status 200. Raises `WireError` where it is malformed."""
        try:
            count: int = self.header["tokens"]
            token_ids = np.frombuffer(self.data[: 8 * count], np.int64)
            logprobs = np.frombuffer(self.data[8 * count : 12 * count], np.float32)
            supports = None
            if self.header["has_supports"]:
                sizes = np.frombuffer(self.data[12 * count : 16 * count], np.int32)
                ids = np.frombuffer(self.data[16 * count :], np.int32)
                supports = Supports(ids, np.cumsum([0, *sizes], dtype=np.int64))
            spans = self.header["versions"]
            versions = None if spans is None else versions_of_tokens((int(v), start, end) for v, start, end in spans)
            finish_reason: str = self.header["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"{type(error).__name__}: {error}; the header is {str(self.header)[:200]}") from error
        return checked(Answer(token_ids, logprobs, versions, finish_reason, supports=supports))


def check_request(header: Mapping[str, Any]) -> None:
    """Raise `ValueError` for values that vLLM does not check and its engine would die of, or hang: JSON turns an int
    beyond 64 bits into a float.

    >>> params = {"seed": 0, "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0, "reported": 0}
    >>> params |= {"stop_token_ids": [9], "stop": [], "banned": []}
    >>> good = {"request_id": "a/1", "token_ids": [3, 4], "items": [], "is_whole": True, **params}
    >>> check_request(good)
    >>> check_request(good | {"seed": 1.5})
    Traceback (most recent call last):
    ...
    ValueError: seed=1.5 is no integer from 0 to 18446744073709551615
    """
    bounds = (("seed", 0, 2**64 - 1), ("max_tokens", 1, _INT32), ("top_k", 0, _INT32), ("reported", 0, MOST_LOGPROBS))
    for name, low, high in bounds:
        _check_int(name, header[name], low, high)
    for name in ("token_ids", "stop_token_ids"):
        tokens = np.asarray(header[name])
        if len(tokens) and (tokens.dtype.kind != "i" or tokens.min() < 0 or tokens.max() > _INT32):
            raise ValueError(f"{name} are not all integers from 0 to {_INT32}")
    for first, end in header["banned"]:
        _check_int("banned", first, 0, _INT32)
        _check_int("banned", end, first, _INT32)
    for hash, offset, length, gaps, kind, lead in header["items"]:
        _check_int("items", lead, 0, 1)
        _check_int("items", offset, lead, len(header["token_ids"]))
        _check_int("items", length, 1, len(header["token_ids"]) - offset)
        if kind not in TOKEN_TYPES:
            raise ValueError(f"{kind!r} is no kind of item")
        end = 0
        for start, count in gaps:  # each between two image tokens
            _check_int("gaps", start, end + 1, length - 2)
            _check_int("gaps", count, 1, length - 1 - start)
            end = start + count
        if not isinstance(hash, str):
            raise ValueError(f"{hash!r} is no hash of an image")
    if not all(isinstance(each, str) and each for each in header["stop"]):
        raise ValueError(f"stop={header['stop']!r} are not all texts that are not empty")
    if not isinstance(header["request_id"], str):
        raise ValueError(f"request_id={header['request_id']!r} is no text")
    if not isinstance(header["temperature"], float | int) or not 0 <= header["temperature"] < math.inf:
        raise ValueError(f"temperature={header['temperature']!r} is no number from 0")
    if not isinstance(header["top_p"], float | int) or not 0 < header["top_p"] <= 1:
        raise ValueError(f"top_p={header['top_p']!r} is no number above 0 and at most 1")
    if not isinstance(header["min_p"], float | int) or not 0 <= header["min_p"] <= 1:
        raise ValueError(f"min_p={header['min_p']!r} is no number from 0 to 1")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is no integer from {low} to {high}")


def pack_answer(
    number: int,
    token_ids: list[int],
    logprobs: list[float],
    versions: list[tuple[str, int, int]] | None,
    finish_reason: str,
    supports: Supports | None = None,
) -> bytes:
    """The frame that answers request `number` of a batch; each of `versions` is (version, first token, end)."""
    header = {
        "number": number,
        "status": 200,
        "tokens": len(token_ids),
        "versions": versions,
        "finish_reason": finish_reason,
        "has_supports": supports is not None,
    }
    data = [np.array(token_ids, np.int64).tobytes(), np.array(logprobs, np.float32).tobytes()]
    if supports is not None:
        data += [supports.sizes.astype(np.int32).tobytes(), supports.token_ids.tobytes()]
    return _framed(header, *data)


def pack_error(number: int, status: int, error: str) -> bytes:
    """The frame of a request `number` that failed; `status` is an HTTP status."""
    return _framed({"number": number, "status": status, "error": error})


class ResponseReader:
    """Reads the responses to a batch while they arrive.

    >>> body = pack_answer(1, [7, 9], [-0.5, -0.25], [("3", 0, 1), ("4", 1, 2)], "length")
    >>> body += pack_error(0, 400, "no")
    >>> reader = ResponseReader()
    >>> list(reader.feed(body[:20]))
    []
    >>> (_, first), (number, second) = reader.feed(body[20:])
    >>> answer = first.answer()
    >>> answer.token_ids.tolist(), answer.logprobs.tolist(), answer.versions.tolist(), answer.finish_reason
    ([7, 9], [-0.5, -0.25], [3, 4], 'length')
    >>> number, second.complaint
    (0, 'HTTP 400: no')
    """

    def __init__(self) -> None:
        self._frames = Frames()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, Response]]:
        """The responses that `chunk` completes, each with the number of its request. Raises `WireError` for malformed
        bytes."""
        try:
            for header, data in self._frames.feed(chunk):
                yield header["number"], Response(header["status"], header, data)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise WireError(f"{type(error).__name__}: {error}") from error


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, chunk: bytes) -> Iterator[tuple[dict[str, Any], memoryview]]:
        """(header, data) of each frame that `chunk` completes."""
        buffer = memoryview(self._left + chunk if self._left else chunk)
        start = 0
        while len(buffer) - start >= _LENGTHS.size:
            header_size, data_size = _LENGTHS.unpack_from(buffer, start)
            first = start + _LENGTHS.size
            if len(buffer) - first < header_size + data_size:
                break
            start = first + header_size + data_size
            header: dict[str, Any] = orjson.loads(buffer[first : first + header_size])
            yield header, buffer[first + header_size : start]
        self._left = bytes(buffer[start:])


def _framed(header: Mapping[str, Any], *data: bytes) -> bytes:
    text = orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join((_LENGTHS.pack(len(text), sum(map(len, data))), text, *data))
