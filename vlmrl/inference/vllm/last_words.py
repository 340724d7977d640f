"""Why a vLLM server ended, from its log: the error that caused it, and what to do where we know it.

A server's log ends with a traceback per process. The engine's traceback has the cause; the API server's, which comes
later, only says that the engine has failed. pydantic puts the cause on the line after the error, argparse prints no
traceback at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_CAUSE = 500
"""Characters of a cause that a message quotes."""

_PREFIX = re.compile(r"^(?:\(.*? pid=\d+\) )?(?:(?:ERROR|CRITICAL) [\d-]+ (?:[\d:]+ )?\[.*?\] )?")
"""What vLLM writes before a line of a traceback: process, level, time and place. Other levels are no errors."""

_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)(?:: .+)?$|Fatal Python error: .+|terminate called after .+")
_OF_ARGPARSE = re.compile(r"\S+: error: (.+)")

_SUMMARIES = (
    "Engine core initialization failed",
    "Engine core proc",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "EngineDeadError",
)
"""Errors that only say that another process has failed."""

_TOO_LITTLE_MEMORY = (
    "give the server more memory (inference.gpu_memory_utilization, on a CPU inference.kv_cache_gib) or a GPU of its "
    "own, or lower inference.max_model_len"
)
REMEDIES = (
    (r"max_model_len .*greater than the derived", "lower inference.max_model_len to what the checkpoint allows"),
    (r"unrecognized arguments|argument --", "correct inference.extra_args"),
    (r"OutOfMemoryError|No available memory|Free memory on device|KV cache is needed", _TOO_LITTLE_MEMORY),
    (r"attention requires BF16", "set inference.dtype=bfloat16 or inference=embedded"),
    (r"Bfloat16 is only supported", "set inference.dtype=float16"),
    (r"Unexpected head dim|[Hh]ead size|head_size", "set inference=embedded, which takes any size of attention heads"),
    (
        r"does not recognize this architecture|Model architectures .* (not supported|failed)|no vLLM implementation",
        "set inference=embedded, or install a vLLM that has this model",
    ),
    (r"no module or parameter named", "set inference=embedded, because vLLM has other names for these weights"),
    (r"divisible by tensor parallel", "choose an inference.tensor_parallel_size that divides the model"),
    (
        r"Can't load (image|feature|video)? ?processor|preprocessor_config",
        "copy preprocessor_config.json or processor_config.json into the folder of model.name",
    ),
    (r"status -9$", "free memory of the machine: the kernel kills the process that takes too much"),
    (r"Can't load tokenizer", "copy the tokenizer's files into the folder of model.name"),
)
"""(pattern of a cause, or of how the server ended, remedy)."""


def cause_of(log: str) -> str | None:
    """The error that ended the server whose launch wrote `log`; None where the log has none.

    >>> print(cause_of('''(EngineCore pid=8) ERROR 11-23 20:40:17 [core.py:9]     assert dtype == torch.bfloat16
    ... (EngineCore pid=8) ERROR 11-23 20:40:17 [core.py:9] AssertionError: CPU GDN attention requires BF16.
    ... (APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.'''))
    AssertionError: CPU GDN attention requires BF16.
    >>> print(cause_of('''pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
    ...   Value error, User-specified max_model_len (9) is too large. [type=value_error, input_type=ArgsKwargs]'''))
    ValidationError for ModelConfig: Value error, User-specified max_model_len (9) is too large.
    """
    errors = list(_errors(log))
    summary = next((at for at, error in enumerate(errors) if any(text in error for text in _SUMMARIES)), len(errors))
    # Behind a summary, the processes that are left fail one after the other.
    found = errors[:summary] or errors
    return found[-1][:LONGEST_CAUSE] if found else None


def remedy_of(cause: str) -> str | None:
    """What to do about a cause, or about how a server ended without one; None where we do not know it.

    >>> remedy_of("error: unrecognized arguments: --max-nun-seqs")
    'correct inference.extra_args'
    """
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, cause)), None)


def _errors(log: str) -> Iterator[str]:
    """The errors of all tracebacks, in the order of the log."""
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    for at, line in enumerate(lines):
        if match := _OF_ARGPARSE.fullmatch(line):
            yield f"error: {match.group(1)}"
        elif _ERROR.match(line):
            if model := re.search(r"(\w+): \d+ validation errors? for (\w+)$", line):
                details = "\n".join(lines[at + 1 :]).partition(" [type=")[0]
                yield f"{model.group(1)} for {model.group(2)}: {' '.join(details.split())}"
            elif ": " in line:
                yield line
            else:  # without words; the line of code before it, which may be underlined, says more
                code = next((each.strip() for each in reversed(lines[:at]) if each.strip(" ^~")), "")
                yield f"{line} at {code}"
