"""The endpoint on a real chat format: tool calls, reasoning and images of Qwen3-VL, token by token."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.chat import asked, picture, user
from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, VOCAB_SIZE
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.orchestrator.endpoint import answers
from vlmrl.orchestrator.endpoint.sampling import SessionSampling
from vlmrl.orchestrator.endpoint.session import Budgets, ChatSession
from vlmrl.orchestrator.rollout import sampling_seed
from vlmrl.orchestrator.sampling import OwnSampling
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.types import Completion, IntArray, Prompt, SamplingParams, extends

ZOOM = {
    "type": "function",
    "function": {
        "name": "zoom",
        "description": "Enlarge a part of an image.",
        "parameters": {"type": "object", "properties": {"image": {"type": "integer"}, "box": {"type": "array"}}},
    },
}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"image": 1, "box": [0, 0.5, 8, 8]}}\n</tool_call>'


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> FamilyRenderer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder: Path = resolve_checkpoint(MODEL, ("What is this? A zoom of an image, box 0 to 8.",))
        tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
    return make_renderer(RendererConfig(), MODEL, tokenizer, processor, VOCAB_SIZE, PLACEHOLDER_TOKENS)


class Says:
    """An `EngineSession` that says texts, token by token as the tokenizer spells them."""

    def __init__(self, renderer: FamilyRenderer, *texts: str) -> None:
        self.completions = [self.tokens(renderer, text) for text in texts]

    @staticmethod
    def tokens(renderer: FamilyRenderer, text: str) -> IntArray:
        raw: Any = renderer.chat_format.tokenizer
        ids = raw.encode(text, add_special_tokens=False)
        return np.array([*ids, renderer.stop_token_ids[0]], np.int64)

    async def __aenter__(self) -> Says:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        ids = self.completions.pop(0)
        return Completion(ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int64), "stop")


def session(renderer: FamilyRenderer, *texts: str) -> ChatSession:
    own = OwnSampling(1.0, renderer.stop_token_ids, renderer.banned_token_ids)
    sampling = SessionSampling(own, partial(sampling_seed, 0, "r"))
    return ChatSession("r", renderer, Says(renderer, *texts), sampling, Budgets(9, 200, 4000))


async def told(chat: ChatSession, *messages: Any, **body: Any) -> dict[str, Any]:
    """The message that a client reads."""
    request = asked(*messages, **body)
    content = json.loads(answers.to_bytes(answers.response(await chat.answer(request), request, "tiny")))
    message: dict[str, Any] = content["choices"][0]["message"]
    return message


def test_a_tool_call_and_an_image_as_its_result(renderer: FamilyRenderer) -> None:
    chat = session(renderer, f"Let me see. \n{CALL}", "\nIt is a box. ")
    question = user("What is this?", picture(9, size=64))

    async def main() -> dict[str, Any]:
        message = await told(chat, question, tools=[ZOOM])
        (call,) = message["tool_calls"]
        assert (message["content"].strip(), call["function"]["name"]) == ("Let me see.", "zoom")
        assert json.loads(call["function"]["arguments"]) == {"image": 1, "box": [0, 0.5, 8, 8]}
        # a client that writes the call in its own way, as most do
        again = {"box": [0.0, 0.5, 8, 8], "image": 1.0}
        sent = {
            "role": "assistant",
            "content": message["content"].strip(),
            "tool_calls": [{**call, "function": {"name": "zoom", "arguments": json.dumps(again, indent=1)}}],
        }
        result = {"role": "tool", "tool_call_id": call["id"], "content": [picture(20, size=64)]}
        return await told(chat, question, sent, result, tools=[ZOOM])

    assert asyncio.run(main())["content"].strip() == "It is a box."
    first, second = chat.close()
    assert (first.branch, second.branch) == (0, 0)
    assert extends(second.prompt, first.prompt, first.completion.token_ids)
    assert [image.pixels[0, 0, 0] for image in second.prompt.images] == [9, 20]
    assert chat.metrics()["endpoint/bridged"] == 1
    text = renderer.chat_format.tokenizer.decode(second.prompt.token_ids.tolist())
    assert '"name": "zoom"' in text.partition("What is this?")[0], "the tools stand in the prompt"
    assert "<tool_response>" in text.partition(CALL)[2]


def test_reasoning_that_a_client_drops(renderer: FamilyRenderer) -> None:
    chat = session(renderer, "<think>\nA box?\n</think>\n\nA box", "Yes")

    async def main() -> None:
        message = await told(chat, user("What is this?"))
        assert (message["reasoning_content"].strip(), message["content"].strip()) == ("A box?", "A box")
        await told(chat, user("What is this?"), {"role": "assistant", "content": "A box"}, user("Really?"))

    asyncio.run(main())
    first, second = chat.close()
    assert extends(second.prompt, first.prompt, first.completion.token_ids), "the reasoning stays in the prompt"


def test_a_call_that_cannot_be_read_comes_as_text(renderer: FamilyRenderer) -> None:
    broken = '<tool_call>\n{"name": "zoom", "arguments": {\n</tool_call>'
    chat = session(renderer, f"See: {broken}", "Sorry")

    async def main() -> None:
        message = await told(chat, user("What is this?"), tools=[ZOOM])
        assert "tool_calls" not in message
        assert "zoom" in message["content"]
        sent = {"role": "assistant", "content": message["content"]}
        await told(chat, user("What is this?"), sent, user("that is no JSON"), tools=[ZOOM])

    asyncio.run(main())
    assert [turn.branch for turn in chat.close()] == [0, 0]
