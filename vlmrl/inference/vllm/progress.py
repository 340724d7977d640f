"""Finds a server that hangs: it runs, and may even call itself healthy, but it makes no progress.

    every few seconds:  pulse ─▶ the engine answers, and   tokens were processed since the last pulse, or
                                                           no completion is requested, or
                                                           the run has paused the server for a weight update
                        ─▶ progress; without any for inference.request_timeout_s, the server is given up

A slow server makes progress and is left alone, however long one completion takes. A server that is stopped, whose
engine is stuck, or one of whose threads has died, makes none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vlmrl.errors import EngineError
from vlmrl.inference.vllm.control import ControlClient, ServerLostError

PULSES_PER_TIMEOUT = 10
"""How many pulses a server has within `inference.request_timeout_s`."""

LONGEST_WAIT_S = 10.0
"""Longest wait between two pulses, in seconds."""


async def watch(client: ControlClient, is_waiting: Callable[[], bool]) -> str:
    """Return when the server is given up: why. `is_waiting`: whether a completion is requested from the server, so that
    it must process tokens."""
    wait_s = min(client.timeout_s / PULSES_PER_TIMEOUT, LONGEST_WAIT_S)
    before: float | None = None
    idle_s = 0.0
    """Time without progress. Adding up the waits, instead of reading a clock, leaves out the time in which this process
    was stopped itself."""
    while not client.given_up.is_set():
        must_process = is_waiting() and not client.is_paused
        try:
            tokens = await client.pulse()
        except (ServerLostError, EngineError):
            pass  # no progress; if the server has died, its end is noticed elsewhere
        else:
            if not must_process or tokens is None or tokens != before:
                idle_s = 0.0
            before = tokens
        if idle_s > client.timeout_s:
            client.give_up(f"made no progress within inference.request_timeout_s={client.timeout_s:g}")
        try:
            async with asyncio.timeout(wait_s):
                await client.given_up.wait()
        except TimeoutError:
            idle_s += wait_s
    return client.reason
