"""An environment of verifiers whose own harness talks to the policy: name the colours of squares, one after another.

With `raises` the harness fails at that task; with `counts`, HTTP clients that are alive are counted.
"""

from __future__ import annotations

import base64
import gc
import io
import random
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from PIL import Image
from verifiers.v1.clients.eval import EvalClient
from verifiers.v1.runtimes import ProgramResult

__all__ = ["SquaresHarness", "SquaresTaskset"]

COLORS = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255)}


def picture(letter: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), COLORS[letter]).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


class SquaresData(vf.TaskData):
    letters: str
    raises: bool = False
    counts: bool = False


class SquaresTask(vf.Task[SquaresData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        answers = [node.message.content or "" for node in trace.nodes if node.message.role == "assistant"]
        pairs = zip(answers, self.data.letters, strict=False)
        return sum(answer.strip() == letter for answer, letter in pairs) / len(self.data.letters)

    @vf.metric
    async def clients(self, trace: vf.Trace) -> float:
        """How many of the worker's HTTP clients are alive; 0 unless the config wants to know."""
        return float(sum(isinstance(each, EvalClient) for each in gc.get_objects())) if self.data.counts else 0.0

    @vf.metric
    async def answers(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SquaresConfig(vf.TasksetConfig):
    turns: int = 2
    count: int = 200
    raises: int | None = None
    counts: bool = False


class SquaresTaskset(vf.Taskset[SquaresTask, SquaresConfig]):
    def load(self) -> Any:
        draw = random.Random(0)
        for index in range(self.config.count):
            letters = "".join(draw.choice("ABC") for _ in range(self.config.turns))
            raises = index == self.config.raises
            data = SquaresData(prompt="Name the squares.", letters=letters, raises=raises, counts=self.config.counts)
            yield SquaresTask(data, self.config.task)


class SquaresHarnessConfig(vf.HarnessConfig):
    pass


class SquaresHarness(vf.Harness[SquaresHarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any, *more: Any
    ) -> ProgramResult:
        messages: list[Any] = []
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            for letter in data.letters:
                question = [picture(letter), {"type": "text", "text": "Which letter?"}]
                messages.append({"role": "user", "content": question})
                response = await client.chat.completions.create(model=ctx.model, messages=messages)
                # As clients do: white space around the answer is gone.
                messages.append({"role": "assistant", "content": (response.choices[0].message.content or "").strip()})
                if data.raises:
                    raise ValueError("this task fails")
        return ProgramResult(0, "", "")
