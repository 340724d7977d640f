"""logs/main.log: everything that Python's logging and `warnings` have to say, and nothing of it on the screen."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import TracebackType

from vlmrl.record.files import disk_errors


class MainLog:
    """While entered, the root logger writes to a file and no logger writes to the screen.

    Libraries that bring a handler of their own to stderr (transformers does, when it is first used) are handed
    over by `take_over`, to be called again after imports; on exit they get it back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: list[tuple[logging.Logger, logging.Handler, bool]] = []

    def __enter__(self) -> MainLog:
        with disk_errors(self._path):
            self._handler = logging.FileHandler(self._path, encoding="utf-8", errors="backslashreplace")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(min(logging.INFO, self._level or logging.INFO))
        logging.captureWarnings(True)
        self.take_over()
        return self

    def take_over(self) -> None:
        """Turn loggers that write to the screen towards the file."""
        root = logging.getLogger()
        known = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
        screens = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        for logger in (root, *known):
            for handler in list(logger.handlers):
                if isinstance(handler, logging.StreamHandler) and any(handler.stream is screen for screen in screens):
                    self._taken.append((logger, handler, logger.propagate))
                    logger.removeHandler(handler)
                    logger.propagate = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        root = logging.getLogger()
        for logger, handler, propagate in reversed(self._taken):
            logger.addHandler(handler)
            logger.propagate = propagate
        self._taken.clear()
        logging.captureWarnings(False)
        root.removeHandler(self._handler)
        root.setLevel(self._level)
        self._handler.close()
