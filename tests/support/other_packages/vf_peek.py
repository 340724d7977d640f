"""An environment of verifiers with a tool that returns a picture, played by verifiers' own harness `null`."""

from __future__ import annotations

import base64
import io
from typing import Any

import verifiers.v1 as vf
from mcp.server.mcpserver import Image as ToolImage
from PIL import Image

__all__ = ["PeekTaskset"]


def square(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(file, "PNG")
    return file.getvalue()


class PeekTools(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def peek(self, box: int) -> ToolImage:
        """Look into a box."""
        return ToolImage(data=square(10 * box), format="png")


class PeekTask(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config: Any) -> list[vf.Toolset]:
        return [PeekTools(vf.ToolsetConfig())]

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        last = trace.nodes[-1].message
        return float(last.role == "assistant" and (last.content or "").strip() == "done")


class PeekTaskset(vf.Taskset[PeekTask, vf.TasksetConfig]):
    def load(self) -> Any:
        url = "data:image/png;base64," + base64.b64encode(square(200)).decode()
        for index in range(20):
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"Open box {index}."}]
            yield PeekTask(vf.TaskData(prompt=[vf.UserMessage(content=parts)]), self.config.task)


if __name__ == "__main__":  # verifiers starts the tool server as `python -m vf_peek`
    PeekTools.run()
