"""How an error ends the command: what is printed on stderr, and the exit code.

Exit codes: 0 success, 2 the configuration cannot run, 1 anything else. A message without a traceback is meant for the
user; a traceback is a bug in vlmrl or in the user's own module.
"""

from __future__ import annotations

import sys

from vlmrl.config.secrets import redacted_text
from vlmrl.errors import Interrupted, VlmrlError, format_error, safe_text


class JobError(Exception):
    """Carries a job's exit code through Hydra's sweep. Its message was printed before."""


def report(error: Exception) -> int:
    """Print an error to stderr, with a traceback unless it is a `VlmrlError`; returns the exit code.

    A message may quote a value, so a secret in it is hidden.
    """
    if not isinstance(error, VlmrlError):
        print(format_error(error), end="", file=sys.stderr)
        return 1
    begin = "interrupted" if isinstance(error, Interrupted) else "error"
    print(f"{begin}: {redacted_text(safe_text(error))}", file=sys.stderr)
    return error.exit_code
