"""Refill a step: sample further groups in place of those without a gradient (DAPO's dynamic sampling, arXiv 2503.14476,
section 3.2).

    draw 8 ─▶ play ─▶ 3 with signal ─▶ draw 5 ─▶ play ─▶ 2 with signal ─▶ draw 3 ─▶ … until 8, or the budget is spent

A group has signal where any of its turns has an advantage that is not zero, whatever `algorithm.credit` and
`algorithm.advantage` are. The groups without are recorded with their step and dropped as `zero_advantage`.

The groups of a round are played together, so that the engine gets one batch, and the next round begins when all of them
have ended. Left out on purpose: replacing each group as soon as it ends. The engine would get its requests one by one,
and which problem is drawn next would depend on the timing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.orchestrator.advantages import assign_advantages, has_signal
from vlmrl.orchestrator.stream import Drawn
from vlmrl.types import Group


async def sample_groups(
    wanted: int,
    algorithm: AlgorithmConfig,
    draw: Callable[[int], Awaitable[list[Drawn]]],
    play: Callable[[list[Drawn], int], Awaitable[list[Group]]],
) -> list[Group]:
    """Groups of a step, `wanted` of them with signal unless the budget (`algorithm.refill.budget` times `wanted`
    groups) is spent before; all that were played, in order.

    `draw(count)` returns problems, and `play(problems, first_group)` plays them as groups numbered from there.
    """
    groups: list[Group] = []
    missing, left = wanted, algorithm.refill.budget * wanted
    while count := min(missing, left):
        problems = await draw(count)
        groups += await play(problems, len(groups))
        left -= count
        if left:
            missing = wanted - _with_signal(groups, algorithm)
    return groups


def _with_signal(groups: Sequence[Group], algorithm: AlgorithmConfig) -> int:
    for group in groups:
        assign_advantages(group, algorithm)
    return sum(map(has_signal, groups))


def refill_metrics(groups: Sequence[Group], wanted: int, algorithm: AlgorithmConfig) -> dict[str, float]:
    """`refill/…`: groups that a step sampled, threw away and lacks. Empty without refill. Call after
    `assign_advantages`."""
    if not algorithm.refill.is_on:
        return {}
    found = sum(map(has_signal, groups))
    return {
        "refill/sampled": float(len(groups)),
        "refill/discarded": float(len(groups) - found),
        "refill/missing": float(wanted - found),
    }
