"""The bytes of the run's own route in its servers (vllm_route.py). No I/O, no vLLM.

    request    one frame: the requests of a batch │ images' data, once per image
    response   a frame per answer, as they come

A frame is its header's length and its data's, uint32 little-endian each, the header in JSON, and the data. The content
is that of vllm_wire.py, without base64 and with one HTTP request for all that is asked at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from vlmrl.inference.vllm.wire import Answer, WireError, checked, spread
from vlmrl.types import IntArray, Placeholder, SamplingParams

ROUTE = "/vlmrl/generate"

FORGOTTEN = 409
"""Status of an answer where the server does not hold an image that went by its hash."""

_LENGTHS = struct.Struct("<II")


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────


def request_header(
    request_id: str,
    token_ids: IntArray,
    placeholders: Collection[Placeholder],
    sampling: SamplingParams,
    *,
    is_whole: bool,
) -> dict[str, Any]:
    """One request of a batch. `is_whole`: the data of all its images comes with the batch, and the server is to use
    that; else it takes from what it holds."""
    return {
        "request_id": request_id,
        "token_ids": token_ids,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sampling.stop_token_ids,
        "banned": _runs(sampling.banned_token_ids),
        "images": [[p.hash, p.offset, p.length] for p in placeholders],
        "is_whole": is_whole,
    }


@lru_cache(maxsize=16)
def _runs(token_ids: tuple[int, ...]) -> orjson.Fragment:
    """[first, end) of each run of successive tokens; the same in every request, so encoded once. Where a vocabulary is
    larger than its tokenizer, 150,000 may be banned."""
    ids = np.array(sorted(token_ids), np.int64)
    cuts = np.flatnonzero(np.diff(ids) > 1) + 1
    runs = [[int(part[0]), int(part[-1]) + 1] for part in np.split(ids, cuts) if len(part)]
    return orjson.Fragment(orjson.dumps(runs))


def pack_batch(requests: Sequence[Mapping[str, Any]], data: Mapping[str, bytes]) -> bytes:
    """`data`: hash → what `vllm_wire.encode_image` made of the image. Without requests, the server just keeps it."""
    sizes = [[hash, len(document)] for hash, document in data.items()]
    return _framed({"requests": requests, "documents": sizes}, *data.values())


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests as the server reads them."""

    requests: list[dict[str, Any]]
    """`request_header`s; `images` are [hash, offset, length] each, in tokens."""
    documents: dict[str, memoryview]
    """Hash → an image's data."""


def unpack_batch(body: bytes) -> Batch:
    """
    >>> sampling = SamplingParams(8, 1.0, (2,), (4, 5, 6, 9), seed=7)
    >>> header = request_header("r", np.array([5, 9, 9]), [Placeholder(1, 2, "ab")], sampling, is_whole=True)
    >>> batch = unpack_batch(pack_batch([header], {"ab": b"pixels"}))
    >>> batch.requests[0]["token_ids"], batch.requests[0]["images"], bytes(batch.documents["ab"])
    ([5, 9, 9], [['ab', 1, 2]], b'pixels')
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
    """What came back for one request of a batch."""

    status: int
    """As of HTTP: 200, `FORGOTTEN`, 400 or 500."""
    header: Mapping[str, Any]
    data: memoryview

    @property
    def complaint(self) -> str:
        """What the server says where `status` is not 200."""
        return f"HTTP {self.status}: {str(self.header.get('error', ''))[:500]}"

    def answer(self) -> Answer:
        """Raises `WireError`."""
        try:
            count: int = self.header["tokens"]
            token_ids = np.frombuffer(self.data[: 8 * count], np.int64)
            logprobs = np.frombuffer(self.data[8 * count :], np.float32)
            spans = self.header["versions"]
            versions = None if spans is None else spread((int(version), start, end) for version, start, end in spans)
            finish_reason: str = self.header["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"{type(error).__name__}: {error}; its header is {str(self.header)[:200]}") from error
        return checked(Answer(token_ids, logprobs, versions, finish_reason))


def pack_answer(
    number: int,
    token_ids: list[int],
    logprobs: list[float],
    versions: list[tuple[str, int, int]] | None,
    finish_reason: str,
) -> bytes:
    """The answer to request `number` of a batch; `versions` are (version, first token, end)."""
    header = {
        "number": number,
        "status": 200,
        "tokens": len(token_ids),
        "versions": versions,
        "finish_reason": finish_reason,
    }
    return _framed(header, np.array(token_ids, np.int64).tobytes(), np.array(logprobs, np.float32).tobytes())


def pack_error(number: int, status: int, error: str) -> bytes:
    """Instead of an answer."""
    return _framed({"number": number, "status": status, "error": error})


class Responses:
    """Reads a response as it arrives.

    >>> response = pack_answer(1, [7, 9], [-0.5, -0.25], [("3", 0, 1), ("4", 1, 2)], "length")
    >>> response += pack_error(0, 400, "no")
    >>> responses = Responses()
    >>> list(responses.feed(response[:20]))
    []
    >>> (_, first), (number, second) = responses.feed(response[20:])
    >>> answer = first.answer()
    >>> answer.token_ids.tolist(), answer.logprobs.tolist(), answer.versions.tolist(), answer.finish_reason
    ([7, 9], [-0.5, -0.25], [3, 4], 'length')
    >>> number, second.complaint
    (0, 'HTTP 400: no')
    """

    def __init__(self) -> None:
        self._frames = Frames()

    def feed(self, chunk: bytes) -> Iterator[tuple[int, Response]]:
        """The responses that `chunk` completes, each with the number of its request. Raises `WireError`."""
        try:
            for header, data in self._frames.feed(chunk):
                yield header["number"], Response(header["status"], header, data)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise WireError(f"{type(error).__name__}: {error}") from error


class Frames:
    """Cuts bytes into frames."""

    def __init__(self) -> None:
        self._left = b""

    def feed(self, chunk: bytes) -> Iterator[tuple[dict[str, Any], memoryview]]:
        """(header, data) of the frames that `chunk` completes."""
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
