r"""The program of a math worker: it compares answers with math-verify, one at a time, until its input ends.

`vlmrl.rewards.math` runs this file with a Python of its own that imports nothing of vlmrl and no torch.

    stdin   one JSON line per answer: [seconds of processor time, wall-clock seconds, ["1/2", …], "0.5"]
    stdout  "ready" once, then one JSON line per answer: 1.0 | 0.0 | null (no reference can be read)

Sympy cannot be interrupted from within: `9**9**9` is one step of the interpreter, and a thread that wants to stop it
never runs. So the kernel ends the process: a timer's signal with its default action. One timer counts the process's own
time, so that an answer has the same value on a busy machine; one bounds how long a worker outlives a run that was
killed.
"""

import json
import os
import resource
import signal
import sys

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Address space of a worker, which takes about 300 MB. An expression that needs more is no match."""

DELIMITERS = ("$", "\\(", "\\[", "\\boxed")


def delimited(text: str) -> str:
    r"""`text` as math-verify finds LaTeX in it: between dollars, unless it has delimiters of its own. Left bare, `x+1`
    and `\sqrt{2}` would not be found at all. Dollars of money and Markdown's emphasis are removed."""
    text = text.replace("\\$", "").strip("*` \n")
    return text if any(mark in text for mark in DELIMITERS) else f"${' '.join(text.split())}$"


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which closes the input when it ends
    for ending in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    import math_verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))

    def parsed(text: str) -> list[object]:
        return list(math_verify.parse(delimited(text), parsing_timeout=0))

    math_verify.verify(parsed("1/2"), parsed("0.5"), timeout_seconds=0)  # compiles its patterns before the clock runs
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    print("ready", file=replies, flush=True)
    os.dup2(nowhere, 1)  # what the library prints is no reply
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        own_seconds, seconds, references, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, own_seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        wanted = [each for each in map(parsed, references) if each]
        found = parsed(answer) if wanted else []
        value = float(any(math_verify.verify(each, found, timeout_seconds=0) for each in wanted)) if wanted else None
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        print(json.dumps(value), file=replies, flush=True)


if __name__ == "__main__":
    main()
