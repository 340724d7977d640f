"""Wait for work that an interruption (Ctrl-C, SIGTERM, a lost rank) may cut short."""

from __future__ import annotations

import asyncio
from typing import Any


async def stopped_before(work: asyncio.Task[Any], stop: asyncio.Event) -> bool:
    """Wait for `work` or for `stop`, whichever is first. Returns whether `stop` was; then `work` is cancelled and has
    ended."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if work.done():
        return False
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return True
