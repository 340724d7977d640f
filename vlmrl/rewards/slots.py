"""A limit on what runs at the same time, for code that may meet more than one event loop."""

from __future__ import annotations

import asyncio
import weakref


class Slots:
    """`async with slots.mine():` waits for one of `count` slots of the running event loop. A semaphore by itself
    belongs to the first loop in which a caller waits."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def mine(self) -> asyncio.Semaphore:
        return self._of_loop.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._count))
