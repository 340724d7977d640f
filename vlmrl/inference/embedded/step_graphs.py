"""Decode steps as CUDA graphs: one launch per step in place of thousands, with the layers compiled.

    first step of some code     run as it is, which compiles the layers and prepares the libraries' work spaces
    first step of a kind        captured, then replayed
    later steps                 replayed

A graph holds addresses, not tensors. So the graphs are dropped with the tensors of the steps, and with the KV pool,
whose memory the trainer gets. Capturing again takes 50 ms, as long as running a step of 28 layers as it is; so the
latter is done once per code, not once per kind. On a CPU every step runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlmrl.models.blocks import blocks, compiled_above

_log = logging.getLogger(__name__)


class StepGraphs:
    """Runs steps, each kind of which always does the same work on the same addresses."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        """By kind of step."""
        self._ready: set[Hashable] = set()
        """Codes that have run; they stay when graphs are dropped."""
        self._refused: set[Hashable] = set()
        """Codes whose capture has failed once."""
        self._captures = device.type == "cuda"
        self._memory: Any = None
        """The memory pool of all graphs: they never run at once, and nothing that they allocate is read after them."""
        self._stream: Any = None
        """First steps run where the others are captured, so that the work space of the library of matrix products,
        which belongs to a stream, is not part of a graph's memory."""

    def clear(self) -> None:
        """Drop all graphs: their addresses are no longer valid."""
        self._graphs.clear()
        self._memory = None  # a pool whose graphs are all gone takes no further ones

    def run(self, kind: Hashable, code: Hashable, step: Callable[[], None]) -> None:
        """Run `step` or replay its graph. `code`: what decides which code the step runs; steps of the same code and
        another kind differ in addresses and numbers alone."""
        if not self._captures:
            step()
            return
        graph = self._graphs.get(kind)
        if graph is None and code in self._ready:
            graph = self._capture(code, step)
        if graph is None:
            self._run_apart(step)
            self._ready.add(code)
        else:
            self._graphs[kind] = graph
            graph.replay()

    def _run_apart(self, step: Callable[[], None]) -> None:
        """Run `step` on the stream of the captures."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            step()
        here.wait_stream(self._stream)

    def _capture(self, code: Hashable, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of `step`, which is not run; None where it cannot be captured."""
        try:
            try:
                return self._recorded(step)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # a capture does not take what other passes have left there
                return self._recorded(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # code of any family may wait for the device
            self._ready.discard(code)
            if code in self._refused:
                _log.warning("decode steps of this model cannot be captured as CUDA graphs and are slower: %s", error)
                self._captures = False
            self._refused.add(code)  # something of it may have been compiled just now, so it has one more try
            return None

    def _recorded(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """As by `torch.cuda.graph`, which would wait for the device before, and would free the pinned memory of the
        host, although the next images need it again."""
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            # Thread-local: other threads, as that of the trainer's metrics, may use the device meanwhile.
            graph.capture_begin(self._memory, "thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph


class CompiledLayers:
    """The layers of a decoder, compiled for prefill and decode steps of all sizes."""

    def __init__(self, decoder: Any) -> None:
        self._layers = blocks(decoder)
        # One row would be compiled again.
        self._compiled = [compiled_above(1, layer.forward) for layer in self._layers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The layers run compiled, with their attention as one operation. What the trainer has compiled of them stays
        apart: its passes have other plans."""
        before = [(vars(layer).get("forward"), layer._compiled_call_impl) for layer in self._layers]
        for layer, function in zip(self._layers, self._compiled, strict=True):
            layer.forward, layer._compiled_call_impl = function, None
        try:
            yield
        finally:
            for layer, (forward, call) in zip(self._layers, before, strict=True):
                layer._compiled_call_impl = call
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
