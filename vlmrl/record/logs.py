"""logs/main.log: receives all messages of Python's `logging` and `warnings`, and keeps them off the screen."""

from __future__ import annotations

import errno
import logging
import logging.handlers
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from vlmrl.record.files import disk_errors


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file whose failure is no failure of what is logged. With a full disk, `logging` would print a traceback for
    each message and raise when the file is closed. A file that is deleted under the run is made again.
    """

    def _open(self) -> TextIOWrapper:
        """Refuse a pipe, which would be waited for until it has a reader."""
        path = Path(self.baseFilename)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(errno.EINVAL, "it is not a regular file", self.baseFilename)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message; leave it out where the file cannot be made again."""
        with suppress(OSError):
            super().emit(record)

    def reopenIfNeeded(self) -> None:  # noqa: N802 — the name is logging's
        """Make the file again where it is gone."""
        with suppress(OSError):
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            super().reopenIfNeeded()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 — the name is logging's
        """Leave the message out."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class MainLog:
    """A context manager. Inside it, the root logger writes to a file, and no logger writes to the screen.

    Some libraries install their own handler for stderr (transformers does when it is first used). `take_over` removes
    such handlers, so call it again after imports; they are restored on exit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: list[tuple[logging.Logger, logging.Handler, bool]] = []

    def __enter__(self) -> MainLog:
        with disk_errors(self._path):
            self._handler = _LogFile(self._path, encoding="utf-8", errors="backslashreplace")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self._handler)
        root.setLevel(min(logging.INFO, self._level or logging.INFO))
        logging.captureWarnings(True)
        self.take_over()
        return self

    def take_over(self) -> None:
        """Remove handlers that write to the screen, so that their loggers write to the file instead."""
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
