"""`bench`: how many steps mode=bench takes."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrl.config.fields import Resume, setting


@dataclass
class BenchConfig:
    """mode=bench measures how fast a run is on this machine, and what bounds its step."""

    warmup_steps: int = setting(
        2, on_resume=Resume.refused, low=1, high=10**4, outside="the first step, which compiles, would be measured"
    )
    """Optimizer steps before the measured ones: they compile, fill caches, and bring batches that roll out ahead under
    way. An asynchronous run takes at least `orchestrator.max_staleness` + 1 of them, and more until rollouts or trainer
    wait for the other: until then it learns from batches that were made while the first step compiled."""
    steps: int = setting(4, on_resume=Resume.refused, low=1, high=10**4, outside="nothing is measured")
    """Optimizer steps that are measured."""

    def warmup(self, max_staleness: int) -> int:
        """Steps that warm up in a run with `orchestrator.max_staleness`.

        >>> BenchConfig().warmup(0), BenchConfig().warmup(3)
        (2, 4)
        """
        return max(self.warmup_steps, max_staleness + 1)

    def in_words(self, max_staleness: int) -> str:
        """The steps of a bench.

        >>> BenchConfig().in_words(0), BenchConfig().in_words(1)
        ('2 that warm up, then 4 that are measured', '2 or more that warm up, then 4 that are measured')
        """
        more = " or more" if max_staleness else ""
        return f"{self.warmup(max_staleness)}{more} that warm up, then {self.steps} that are measured"
