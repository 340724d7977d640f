"""A program of another framework: an agent of smolagents that calls a tool, sees a picture and answers.

It is started by the Python of an environment that has smolagents, as `task.command`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from PIL import Image
from smolagents import OpenAIServerModel, Tool, ToolCallingAgent


class Double(Tool):
    name = "double"
    description = "Doubles a number."
    inputs = {"number": {"type": "integer", "description": "the number"}}  # noqa: RUF012 — as smolagents documents it
    output_type = "integer"

    def forward(self, number: int) -> int:
        return 2 * number


def play(problem: dict[str, Any]) -> dict[str, Any]:
    model = OpenAIServerModel(
        "policy",
        api_base=problem["base_url"],
        api_key=problem["api_key"],
        tool_choice="auto",  # the policy is never forced to call a tool, because its answers are sampled in one way
    )
    agent = ToolCallingAgent(tools=[Double()], model=model, max_steps=3, verbosity_level=0)
    answer = agent.run("Double 21.", images=[Image.new("RGB", (8, 8), (90, 90, 90))])
    return {"reward": float(str(answer) == "42"), "metrics": {"steps": len(agent.memory.steps)}}


print(json.dumps(play(json.loads(sys.stdin.readline()))))
