"""A small program that behaves like a vLLM server: it starts in a moment, and hangs in the ways that real ones do.

It answers on the Unix socket `--uds`, has an engine process, and samples `TOKENS_PER_S` tokens a second for every
request. A file with one of the names in `FAULTS` in the folder `STAND_IN` makes the next server that finds it hang in
that way until its end. The file `requests` there gets a line per request: path, and whether it had a key.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlmrl.inference.vllm.frames import ROUTE, pack_answer, unpack_batch

FAULTS = ("engine_stuck", "tokens_stuck", "pause_stuck", "reload_stuck")
FOLDER = Path(os.environ.get("STAND_IN", ""))
TOKENS_PER_S = float(os.environ.get("STAND_IN_SPEED", "2000"))
KEY = f"Bearer {os.environ.get('VLLM_API_KEY')}"
TOKEN = 7

SETTINGS = {
    "dtype": "float32",
    "head_dtype": "float32",
    "quantization": None,
    "max_model_len": 1024,
    "logprobs_mode": "processed_logprobs",
    "mm_device_do_normalize": False,
    "keeps_images": True,
    "architecture": "Qwen3VLForConditionalGeneration",
    "device": "cpu",
    "is_bidirectional": False,
    "has_deepstack": True,
    "has_recurrent_layers": False,
    "logit_scale": 1.0,
    "image_input_id": 0,
    "images": None,
}


class StandIn:
    def __init__(self) -> None:
        self.tokens = 0
        self.version = "default"
        self.faults: set[str] = set()
        self.running = asyncio.Event()
        self.running.set()

    def has(self, fault: str) -> bool:
        path = FOLDER / fault
        if path.exists():
            path.unlink(missing_ok=True)
            self.faults.add(fault)
        return fault in self.faults

    async def sample(self, number: int, header: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        count = header["max_tokens"]
        for _ in range(count):
            await self.running.wait()
            while self.has("tokens_stuck") or self.has("engine_stuck"):
                await asyncio.sleep(0.01)
            await asyncio.sleep(1 / TOKENS_PER_S)
            self.tokens += 1
        spans = [(self.version, 0, count)]
        chunk(writer, pack_answer(number, [TOKEN] * count, [-1.0] * count, spans, "length"))

    async def answer(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        path, _, _ = path.partition("?")
        if path == ROUTE and method == "POST":
            requests = unpack_batch(body).requests
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            await asyncio.gather(*(self.sample(i, header, writer) for i, header in enumerate(requests)))
            writer.write(b"0\r\n\r\n")
            return
        if path == "/metrics":
            respond(writer, f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n'.encode())
            return
        given: dict[str, Any] = json.loads(body) if body else {}
        is_reload = given.get("method") == "reload_weights"
        stuck = {"/collective_rpc": "reload_stuck" if is_reload else "engine_stuck", "/pause": "pause_stuck"}
        if path in stuck and self.has(stuck[path]):
            await asyncio.sleep(3600)
        match path, given.get("method"):
            case "/collective_rpc", "vlmrl_settings":
                result: Any = {"results": [SETTINGS]}
            case "/collective_rpc", "vlmrl_weights":
                result = {"results": [{"unknown": [], "missing": [], "weights": {}}]}
            case "/collective_rpc", _:
                result = {"results": [None]}
            case "/update_weight_version", _:
                self.version, result = given["new_version"], {}
            case "/weight_info", _:
                result = {"weight_version": self.version}
            case _:
                result = {"success": True}
        if path in ("/pause", "/resume"):
            (self.running.clear if path == "/pause" else self.running.set)()
        respond(writer, json.dumps(result).encode())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                key = headers.get("authorization")
                with (FOLDER / "requests").open("a") as log:
                    log.write(f"{path} {'with' if key else 'without'} key\n")
                if path != "/health" and key != KEY:
                    respond(writer, b"{}", 401)
                else:
                    await self.answer(method, path, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def respond(writer: asyncio.StreamWriter, body: bytes, status: int = 200) -> None:
    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


async def main() -> None:
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    server = await asyncio.start_unix_server(StandIn().serve, sys.argv[sys.argv.index("--uds") + 1])
    await server.start_serving()
    status = await asyncio.to_thread(engine.wait)
    sys.exit(status and 1)  # as vLLM does when its engine dies


if __name__ == "__main__":
    asyncio.run(main())
