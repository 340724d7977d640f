"""An OpenAI-compatible endpoint on this machine that answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request by the next of `answers`, the last of which repeats."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *answers: Callable[[BaseHTTPRequestHandler], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers["Authorization"])
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            answer(self)
        finally:
            with server.lock:
                server.running -= 1

    def log_message(self, format: str, *args: Any) -> None:
        pass


def says(text: str | bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    body = chat(text) if isinstance(text, str) else text

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer
