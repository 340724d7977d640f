"""mode=serve: the `openai` package and a raw request talk to a model behind the chat endpoint."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import signal
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import PIL.Image
import pytest

from support.command_line import PATIENCE, REPOSITORY, Home, keys_found, summary, until
from support.processes import Process, start
from vlmrl.record.rollouts import RolloutRecord, read_rollouts

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-users-own"


@dataclass(frozen=True)
class Served:
    """A model that is served."""

    run: Path
    process: Process
    base_url: str
    key: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0)


def served(home: Home, run: Path, *arguments: str, **options: Any) -> Served:
    process = home.start("mode=serve", "serve.port=0", *arguments, **options)
    address = run / "serve.json"
    until(lambda: address.exists() or process.poll() is not None, "the model is served")
    if process.poll() is not None:
        raise AssertionError(process.communicate())
    content = json.loads(address.read_bytes())
    return Served(run, process, content["base_url"], content["api_key"])


def stopped(server: Served, number: int) -> str:
    """Its output after a signal."""
    server.process.send_signal(number)
    out, err = server.process.communicate(timeout=PATIENCE)
    assert server.process.returncode == 0, (out, err)
    return out


def image(value: int) -> dict[str, Any]:
    pixels = np.full((32, 32, 3), value, np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def question(text: str, *images: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}, *map(image, images)]}


def recorded(run: Path) -> list[RolloutRecord]:
    return [rollout for path in sorted((run / "rollouts").iterdir()) for rollout in read_rollouts(path)]


@pytest.fixture(scope="module")
def server(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The tiny model with its default config."""
    run = tmp_path_factory.mktemp("served") / "run"
    made = served(home, run, f"hydra.run.dir={run}", "monitor.wandb.mode=disabled")
    try:
        yield made
    finally:
        made.process.kill()


def test_the_snippet_of_the_documentation(server: Served, home: Home, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/endpoint.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/latest").symlink_to(server.run)
    PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    process = start("-c", code, cwd=tmp_path, environment=home.environment)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert out.strip()


def test_a_request_as_curl_sends_it(server: Served) -> None:
    """With `-d`, curl names the type of a form."""
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/x-www-form-urlencoded"}
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    answer = httpx.post(f"{server.base_url}/chat/completions", content=body, headers=headers, timeout=PATIENCE)
    assert (answer.status_code, answer.json()["object"]) == (200, "chat.completion")


def test_a_conversation_with_images(server: Served) -> None:
    messages: list[Any] = [question("Squares:", 200)]
    first = server.client.chat.completions.create(model="any", messages=messages, logprobs=True, max_tokens=6)
    (choice,) = first.choices
    assert (first.model, choice.message.role) == ("qwen3vl_tiny", "assistant")
    assert first.usage is not None
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == first.usage.completion_tokens <= 6
    messages += [choice.message.model_dump(exclude_none=True), question("And now?", 50)]
    chunks = list(
        server.client.chat.completions.create(
            model="any", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    again = server.client.chat.completions.create(model="any", messages=messages[:1], temperature=0, max_tokens=6)
    greedy = server.client.chat.completions.create(model="any", messages=messages[:1], temperature=0, max_tokens=6)
    assert again.choices[0].message.content == greedy.choices[0].message.content
    stopped_text = stopped(server, signal.SIGINT)
    assert "finished after step" in stopped_text
    assert "Asked to stop: what was recorded is kept." in stopped_text
    assert "optimizer steps" not in stopped_text, "it makes none"
    conversation = next(each for each in recorded(server.run) if len(each["turns"]) == 2)
    one, two = conversation["turns"]
    known = one["prompt_token_ids"] + one["completion_ids"]
    assert two["prompt_token_ids"][: len(known)] == known
    assert [turn["branch"] for turn in conversation["turns"]] == [0, 0]
    assert [len(turn["placeholders"]) for turn in conversation["turns"]] == [1, 2]
    told = [entry.logprob for entry in choice.logprobs.content]
    assert [np.float32(value) for value in told] == [np.float32(value) for value in one["logprobs"]]
    assert two["text"].strip() == text.strip()
    assert conversation["metrics"]["endpoint/bridged"] == 1.0


def test_what_it_leaves(server: Served) -> None:
    assert summary(server.run)["exit_reason"] == "finished"
    assert not (server.run / "serve.json").exists()
    written = b"".join(path.read_bytes() for path in server.run.rglob("*") if path.is_file())
    assert server.key.encode() not in written
    assert {rollout["dropped"] for rollout in recorded(server.run)} == {"no_reward"}
    assert (server.run / "report.html").exists()


def test_a_checkpoint_of_a_run_with_a_key_of_the_users_own(home: Home, never_stopped: Path) -> None:
    run = home.copy(never_stopped, "to_serve")
    environment = {**home.environment, "VLMRL_API_KEY": KEY}
    process = start(
        *("-m", "vlmrl", f"resume={run}", "mode=serve", "serve.port=0", "monitor.report=false"),
        cwd=home.path,
        environment=environment,
    )
    address = run / "serve" / "serve.json"
    until(lambda: address.exists() or process.poll() is not None, "the model is served")
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    content = json.loads(address.read_bytes())
    assert content["api_key"] == KEY
    made = Served(run / "serve", process, content["base_url"], KEY)

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=made.base_url, api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="any", messages=[question("Squares:", value)], seed=value)  # type: ignore[list-item]
                    for value in range(8)
                )
            )
        return [answer.id for answer in answers]

    assert len(set(asyncio.run(several()))) == 8
    body = {"messages": [question("Squares:", 1)]}
    wrong = httpx.post(f"{made.base_url}/chat/completions", json=body, headers={"Authorization": "Bearer wrong"})
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
    with pytest.raises(openai.BadRequestError, match="n=2 cannot be done here"):
        made.client.chat.completions.create(model="any", messages=[question("Squares:")], n=2)  # type: ignore[list-item]
    out = stopped(made, signal.SIGTERM)
    assert KEY in out
    assert len(recorded(made.run)) == 8
    assert KEY.encode() not in b"".join(path.read_bytes() for path in made.run.rglob("*") if path.is_file())
    assert keys_found(made.run) == set()


def test_a_port_that_is_taken_is_refused(home: Home, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = home.vlmrl("mode=serve", f"serve.port={port}", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 2
    assert f"serve.port={port} cannot be listened on" in ended.err
