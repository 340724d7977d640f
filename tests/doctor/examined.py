"""The doctor's verdicts on a run."""

from __future__ import annotations

import asyncio

from vlmrl.doctor.checks import Line, Verdict
from vlmrl.doctor.doctor import LINES, Doctor
from vlmrl.run import Run


def examine(run: Run) -> dict[str, Line]:
    async def scenario() -> list[Line]:
        await run.engine.start()
        try:
            return await Doctor(
                config=run.config,
                task=run.task,
                renderer=run.renderer,
                engine=run.engine,
                policy=run.policy,
                trainer=run.trainer,
                weight_sync=run.weight_sync,
                status=lambda line: None,
            ).examine()
        finally:
            await run.engine.stop()

    lines = asyncio.run(scenario())
    assert [line.name for line in lines] == list(LINES)
    return {line.name: line for line in lines}


def those(lines: dict[str, Line], verdict: Verdict) -> set[str]:
    return {name for name, line in lines.items() if line.verdict is verdict}


def failed(run: Run) -> set[str]:
    return those(examine(run), Verdict.FAILED)
