from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from vlmrl.record.logs import MainLog


def library_logger() -> logging.Logger:
    """A logger with its own handler and without propagation, like that of transformers."""
    logger = logging.getLogger("a_library_of_the_test")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.propagate = False
    return logger


def test_everything_goes_to_the_file_and_nothing_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = library_logger()
    with MainLog(tmp_path / "main.log"):
        logging.getLogger("vlmrl.part").info("a plain message")
        library.warning("a library's warning")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("deprecated thing", DeprecationWarning, stacklevel=1)
    text = (tmp_path / "main.log").read_text()
    assert "INFO vlmrl.part: a plain message\n" in text
    assert "WARNING a_library_of_the_test: a library's warning\n" in text
    assert "DeprecationWarning: deprecated thing" in text
    assert capsys.readouterr() == ("", "")


def test_a_library_imported_later_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MainLog(tmp_path / "main.log") as main_log:
        late = logging.getLogger("a_late_library")
        late.addHandler(logging.StreamHandler(sys.stdout))
        main_log.take_over()
        late.warning("hello")
    assert (tmp_path / "main.log").read_text().count("a_late_library: hello") == 1
    assert capsys.readouterr().out == ""


def test_logging_is_as_before_afterwards(tmp_path: Path) -> None:
    library = library_logger()
    root = logging.getLogger()
    before = (list(root.handlers), root.level, list(library.handlers), library.propagate, warnings.showwarning)
    with MainLog(tmp_path / "main.log"):
        assert library.propagate
    after = (list(root.handlers), root.level, list(library.handlers), library.propagate, warnings.showwarning)
    assert after == before
