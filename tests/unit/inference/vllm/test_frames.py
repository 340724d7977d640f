"""The server's own check of a request: vLLM's engine dies of some values, or waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrl.inference.vllm.frames import check_request, pack_batch, unpack_batch

GOOD: dict[str, Any] = {
    "request_id": "train/0",
    "token_ids": [5, 6, 7, 8],
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "reported": 0,
    "seed": 2**64 - 1,
    "max_tokens": 2,
    "stop_token_ids": [2],
    "stop": ["END"],
    "banned": [[3, 5]],
    "items": [["h", 1, 2, [], "image", 0]],
    "is_whole": True,
}


def test_requests_of_the_run_are_taken() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"items": [["h", 0, 4, [[1, 2]], "image", 0]]},
        {"items": [["h", 1, 3, [[1, 1]], "video", 1]]},
        {"stop_token_ids": []},
        {"stop": []},
        {"items": []},
        {"temperature": 0},
        {"seed": 0},
    ]
    for changed in cases:
        check_request(GOOD | changed)


@pytest.mark.parametrize(
    "changed",
    [
        *({"seed": value} for value in (2.0**70, 1.5, -1, "a", None, True)),
        *({"max_tokens": value} for value in (2.0**70, 1.5, 0, -1, "a")),
        *({"temperature": value} for value in (float("inf"), -1, "x", None)),
        *({"top_p": value} for value in (0, -1, 1.5, "x", None, float("nan"))),
        *({"top_k": value} for value in (-1, 1.5, 2**31, "a", None)),
        *({"min_p": value} for value in (-0.1, 1.5, "x", None, float("nan"))),
        *({"reported": value} for value in (-1, 1.5, 1033, None)),
        *({"token_ids": value} for value in ([5, 6.5], [2.0**70], ["a"], [-1], [[1], [2]])),
        *({"stop_token_ids": value} for value in ([2.5], [-1], [2**31])),
        *({"stop": value} for value in ([""], [5], ["a", ""])),
        *({"banned": value} for value in ([[0.5, 2]], [[5, 3]], [[-1, 2]], [[1, 2, 3]])),
        *({"items": [["h", offset, length, [], "image", 0]]} for offset, length in ((-1, 1), (0.5, 1), (0, 0), (3, 2))),
        {"items": [[5, 0, 1, [], "image", 0]]},
        {"items": [["h", 0, 1, [], "audio", 0]]},
        *({"items": [["h", 0, 1, [], "video", lead]]} for lead in (1, -1, 2, "a")),
        *(
            {"items": [["h", 0, 4, gaps, "image", 0]]}
            for gaps in ([[0, 1]], [[1, 3]], [[3, 1]], [[1, 1], [2, 1]], [[1, 0]], [[1.5, 1]])
        ),
        {"request_id": 5},
    ],
    ids=str,
)
def test_a_request_that_would_stop_the_engine_is_refused(changed: dict[str, Any]) -> None:
    """The values arrive as JSON, where an integer beyond 64 bits is a float."""
    (header,) = unpack_batch(pack_batch([GOOD | changed], {})).requests
    with pytest.raises((ValueError, TypeError)):
        check_request(header)


def test_what_the_client_packs_is_what_the_server_checks() -> None:
    (header,) = unpack_batch(pack_batch([GOOD], {})).requests
    check_request(header)
