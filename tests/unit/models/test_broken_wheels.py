"""Fake wheels that do not fit the installed torch: importing them fails in the same way as the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmrl

TORCHVISION = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
"""
TORCHAUDIO = "raise OSError('Could not load this library')"
INSTALL = "from vlmrl.models import broken_wheels; broken_wheels.install(); broken_wheels.install()\n"
TRY = """
import importlib.util
import torchvision
for name in ("torchaudio", "torchcodec"):
    assert importlib.util.find_spec(name) is None
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
print("imported")
"""


@pytest.fixture
def python(tmp_path: Path) -> list[str]:
    """A Python interpreter that finds the fake wheels first."""
    for name, code in {"torchvision": TORCHVISION, "torchaudio": TORCHAUDIO, "torchcodec": TORCHAUDIO}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        (tmp_path / name / "_C.so").write_text("an extension for another torch")
    path = os.pathsep.join([str(tmp_path), str(Path(vlmrl.__file__).parent.parent)])
    return ["env", f"PYTHONPATH={path}", sys.executable, "-c"]


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_without_install_the_wheels_cannot_be_imported(python: list[str]) -> None:
    assert "operator torchvision::nms does not exist" in output([*python, "import torchvision"])


def test_with_install_the_wheels_are_harmless(python: list[str]) -> None:
    assert output([*python, INSTALL + TRY]) == "imported\n"


@pytest.mark.parametrize("fault", ["", "raise RuntimeError('another part fails')"])
def test_it_may_be_installed_again_after_an_import(fault: str, python: list[str], tmp_path: Path) -> None:
    """An import that failed is tried again, with the operators of the first one in place."""
    package = tmp_path / "torchvision/__init__.py"
    package.write_text(f"{TORCHVISION}\n{fault}")
    again = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)\n"
    forget = "import sys; sys.modules.pop('torchvision', None)\n"
    found = output([*python, (INSTALL + again + forget) * 3])
    if fault:
        assert found == "another part fails\n" * 3
    else:
        assert "already" not in found, found


def test_python_without_docstrings_is_refused_in_words() -> None:
    found = output(["env", "PYTHONOPTIMIZE=2", sys.executable, "-m", "vlmrl"])
    assert found.startswith("error: PYTHONOPTIMIZE=2 (python -OO) removes the docstrings"), found


def test_every_process_of_a_server_installs(python: list[str]) -> None:
    site = Path(vlmrl.__file__).parent / "inference" / "vllm" / "in_server" / "site"
    python[1] = python[1].replace("PYTHONPATH=", f"PYTHONPATH={site}{os.pathsep}")
    assert output([*python, TRY]) == "imported\n"


def test_another_sitecustomize_still_runs(python: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the machine has its own')")
    site = Path(vlmrl.__file__).parent / "inference" / "vllm" / "in_server" / "site"
    python[1] = python[1].replace("PYTHONPATH=", f"PYTHONPATH={site}{os.pathsep}")
    assert output([*python, TRY]) == "the machine has its own\nimported\n"


def test_where_nothing_is_installed_nothing_is_found() -> None:
    code = "import importlib.util; assert importlib.util.find_spec('torchaudio') is None; print('none')"
    assert output([sys.executable, "-c", INSTALL + code]) == "none\n"


def test_without_num2words_a_stand_in_takes_its_place(python: list[str], tmp_path: Path) -> None:
    """SmolVLM's processor only looks whether there is one. An installed one comes first."""
    told = output([*python, INSTALL + "from num2words import num2words; print(num2words(2))"])
    assert "pip install num2words" in told or told == "two\n"
    (tmp_path / "num2words.py").write_text("def num2words(number): return 'installed'")
    assert output([*python, INSTALL + "from num2words import num2words; print(num2words(2))"]) == "installed\n"
