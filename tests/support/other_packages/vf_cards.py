"""An environment of verifiers with a tool that returns a picture: draw a card, and say what its colour stands for.

One tool server serves all episodes, over MCP. The harness runs in the worker's own process: verifiers' `null`, which
does the same, starts a process per episode.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
from typing import Any

import verifiers.v1 as vf
from mcp.server.mcpserver import Image as ToolImage
from openai import AsyncOpenAI
from PIL import Image
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult

__all__ = ["CardsHarness", "CardsTaskset"]

COLORS = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255)}
QUESTION = "Draw a card. Which letter?"
MAX_ANSWERS = 2


class CardTools(vf.Toolset[vf.ToolsetConfig]):
    drawn = random.Random(0)

    @vf.tool
    def draw(self) -> ToolImage:
        """Draw a card."""
        file = io.BytesIO()
        Image.new("RGB", (32, 32), COLORS[self.drawn.choice("ABC")]).save(file, "PNG")
        return ToolImage(data=file.getvalue(), format="png")


def letter_of(message: Any) -> str:
    """What the card of a tool message stands for."""
    (url,) = (part.image_url.url for part in message.content if part.type == "image_url")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        color = image.convert("RGB").getpixel((0, 0))
    return next(letter for letter, each in COLORS.items() if each == color)


class CardTask(vf.Task[vf.TaskData]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        *before, last = (node.message for node in trace.nodes)
        cards = [
            letter_of(message) for message in before if message.role == "tool" and not isinstance(message.content, str)
        ]
        return float(cards != [] and last.role == "assistant" and (last.content or "").strip() == cards[-1])


class CardsConfig(vf.TasksetConfig):
    count: int = 500


class CardsTaskset(vf.Taskset[CardTask, CardsConfig]):
    @classmethod
    def toolsets(cls, config: Any) -> list[vf.Toolset]:
        return [CardTools(vf.ToolsetConfig())]

    def load(self) -> Any:
        for index in range(self.config.count):
            yield CardTask(vf.TaskData(name=str(index), prompt=QUESTION), self.config.task)


class CardsHarnessConfig(vf.HarnessConfig):
    pass


class CardsHarness(vf.Harness[CardsHarnessConfig]):
    SUPPORTS_MCP = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any, *more: Any
    ) -> ProgramResult:
        messages: list[Any] = [{"role": "user", "content": data.prompt}]
        async with contextlib.AsyncExitStack() as stack:
            tools, names, servers = await connect_mcp(
                {"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}, stack
            )
            for tool in tools:  # without a title, as benchmarks/cards_task.py describes the tool
                tool["function"]["parameters"] = {"type": "object", "properties": {}, "required": []}
            client = await stack.enter_async_context(AsyncOpenAI(base_url=endpoint, api_key=secret))
            for _ in range(MAX_ANSWERS):
                response = await client.chat.completions.create(model=ctx.model, messages=messages, tools=tools)
                answer = response.choices[0].message
                messages.append(answer.model_dump(exclude_none=True))
                if not answer.tool_calls:
                    break
                for call in answer.tool_calls:
                    if call.function.name in names:
                        arguments = json.loads(call.function.arguments)
                        content = await call_mcp(servers, names, call.function.name, arguments)
                    else:
                        content = "There is no such tool."
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
        return ProgramResult(0, "", "")


if __name__ == "__main__":  # verifiers starts the tool server as `python -m vf_cards`
    CardTools.run()
