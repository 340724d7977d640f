"""The engine of a run with something around its requests: the doctor records them, mode=bench times them."""

from __future__ import annotations

from typing import Self

from vlmrl.types import EngineSession, InferenceEngine


class WrappedEngine:
    """An engine that the run starts and stops. A subclass makes the sessions."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    async def start(self) -> None:
        """Do nothing: the run has started the engine."""

    async def stop(self) -> None:
        """Do nothing: the run stops the engine."""

    def metrics(self) -> dict[str, float]:
        return self._engine.metrics()


class WrappedSession:
    """A session of such an engine. A subclass generates."""

    def __init__(self, session: EngineSession) -> None:
        self._session = session

    async def __aenter__(self) -> Self:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.__aexit__(*exc)
