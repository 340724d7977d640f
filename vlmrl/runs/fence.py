"""The fence around the tokenizer, the processor and the chat template of a checkpoint, which may be of any family."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmrl.errors import ModelError, UserFault, VlmrlError, headline

log = logging.getLogger(__name__)


@contextmanager
def files_of(folder: Path) -> Iterator[None]:
    """Whatever the tokenizer, processor and chat template of `folder` raise inside becomes a `ModelError`, and the
    traceback goes to the log."""
    try:
        yield
    except VlmrlError:
        raise
    except UserFault as fault:
        raise ModelError(f"the processor or the chat template of {folder} does not serve: {fault.text}") from fault
    except Exception as error:  # code and files of any family
        log.exception("%s", folder)
        raise ModelError(
            f"no renderer can be made of the tokenizer, the processor and the chat template of {folder} "
            f"({headline(error)}): use the files that belong to the checkpoint, or choose another renderer with "
            "orchestrator.renderer.name"
        ) from error
