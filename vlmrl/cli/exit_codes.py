"""How an error ends the command: what is printed on stderr, and the exit code.

Exit codes: 0 success, 2 the configuration cannot run, 1 anything else. A message without a traceback is meant for the
user; a traceback is a bug in vlmrl or in the user's own module.
"""

from __future__ import annotations

import sys
import traceback

from vlmrl.errors import Interrupted, VlmrlError


class JobError(Exception):
    """Carries a job's exit code through Hydra's sweep. Its message was printed before."""


def report(error: Exception) -> int:
    """Print an error to stderr, with a traceback unless it is a `VlmrlError`; returns the exit code."""
    if not isinstance(error, VlmrlError):
        traceback.print_exception(error)
        return 1
    print(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", file=sys.stderr)
    return error.exit_code
