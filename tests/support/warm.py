"""The server of `support.processes`: imports what every run imports, once, and forks a process for each command.

    python -m support.warm <file descriptor of a Unix socket>

Importing torch, transformers and Qwen3-VL takes four seconds of processor time, more than a short run itself. A forked
process has them already and is otherwise a process like any other: its own pid, environment, folder, signals and exit.

A request is one JSON object and two file descriptors (standard output and standard error); the answer is the pid. When
a process has ended, its pid and exit code follow. The server only imports and composes a config, which fills what Hydra
and its parser keep in a process; it starts no thread, so forking is safe.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import socket
import sys
from typing import Any

IMPORTED = (
    "vlmrl.cli.main",
    "vlmrl.runs.lifecycle",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "torch.distributed.checkpoint.hf_storage",
    "renderers.gpt_oss",
)
"""Modules that a run imports sooner or later."""

REQUEST_BYTES = 1 << 20
"""Largest request: arguments and the environment."""


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the connection closes → None; in a forked process: what it has to do."""
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not connection:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, status = os.waitpid(key.data, 0)
                _send(connection, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})
                continue
            message, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 2)
            if not message:
                return None
            request: dict[str, Any] = json.loads(message)
            pid = os.fork()
            if pid == 0:
                selector.close()
                connection.close()
                _become(request, *descriptors)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            _send(connection, {"pid": pid})


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _become(request: dict[str, Any], out: int, err: int) -> None:
    """Take over what Popen would have given the process."""
    if request["new_session"]:
        os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    if request["file_size_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"],) * 2)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["cwd"]  # as `python -m` and `python -c` have it


def _end_fast() -> None:
    """Freeze again, since a run unfreezes at its end. Triton, which comes with vLLM, would list its objects that are
    left on stderr, so with it everything is collected as usual."""
    (gc.unfreeze if "triton" in sys.modules else gc.freeze)()


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    # transformers imports scikit-learn where it is installed, which imports pandas and pyarrow, which starts threads.
    # While the module is None it counts as absent.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    for name in IMPORTED:
        importlib.import_module(name)
    del sys.modules["sklearn"]
    from support.composing import compose_groups

    compose_groups(())
    assert len(os.listdir("/proc/self/task")) == 1, "a library started a thread while it was imported"
    # What is imported lives until the end. The collector need not visit it in every process, least of all when the
    # interpreter ends, where that takes a second.
    gc.freeze()
    _send(connection, {"ready": True})
    request = serve(connection)
    if request is None:
        return
    atexit.register(_end_fast)
    kind, what, *arguments = request["command"]
    if kind == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # what `python -c` does
    else:
        sys.argv = [kind, what, *arguments]
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
