"""Whatever a program asks, in whatever order: every sampled token enters the loss exactly once."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support.chat import ChatRenderer, ScriptedSession, asked, assistant, chat_session, user
from support.lockstep import END
from vlmrl.orchestrator.samples import make_samples
from vlmrl.types import Rollout, StopReason, Text

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["new", "extend", "again", "rewrite", "together"]),
        st.integers(0, 10),
        st.sampled_from("pqr"),
    ),
    min_size=1,
    max_size=14,
)


class Program:
    """Plays steps: conversations that begin, go on, fork, are asked again, or are rewritten."""

    def __init__(self, bridges: bool) -> None:
        self.count = 0
        self.engine = ScriptedSession(self.answer)
        self.session = chat_session(
            engine=self.engine, renderer=ChatRenderer(bridges=bridges), max_turns=100, max_model_len=10_000
        )
        self.asked: list[list[Any]] = []
        self.answered: list[list[Any]] = []
        """Conversations that end with an answer."""

    def answer(self, prompt: str) -> str:
        self.count += 1
        return f"<{self.count}>"

    async def ask(self, messages: list[Any]) -> None:
        self.asked.append(messages)
        answer = await self.session.answer(asked(*messages))
        text = "".join(part.text for part in answer.message.content if isinstance(part, Text))
        self.answered.append([*messages, assistant(text)])

    async def step(self, kind: str, which: int, letter: str) -> None:
        if kind == "new" or not self.answered:
            await self.ask([user(letter)])
        elif kind == "again":
            await self.ask(self.asked[which % len(self.asked)])
        elif kind == "rewrite":
            known = self.answered[which % len(self.answered)]
            await self.ask([*known[:-1], assistant("not what was said"), user(letter)])
        else:
            known = self.answered[which % len(self.answered)]
            both = [[*known, user(letter)], [*known, user(letter if which % 2 else "other")]]
            await asyncio.gather(*map(self.ask, both if kind == "together" else both[:1]))


@settings(max_examples=150)
@given(STEPS, st.booleans())
def test_every_sampled_token_is_learned_once(steps: list[tuple[str, int, str]], bridges: bool) -> None:
    program = Program(bridges)

    async def main() -> None:
        for step in steps:
            await program.step(*step)

    asyncio.run(main())
    turns = program.session.close()
    rollout = Rollout("r", "p", 0, turns, 0.0, {}, StopReason.TERMINATED)
    learned: Counter[str] = Counter()
    for sample in make_samples(rollout):
        text = "".join(map(chr, sample.token_ids[sample.loss_mask]))
        learned.update(text.removesuffix(chr(END)).split(chr(END)))
    assert learned == Counter(f"<{number + 1}>" for number in range(program.count))
    assert program.count == len({repr(messages) for messages in program.asked}), "equal requests are sampled once"
    metrics = program.session.metrics()
    assert metrics["endpoint/repeated"] == len(program.asked) - program.count
    for number, turn in enumerate(turns):  # what is recorded is what the policy saw
        seen = [*rollout.messages_before(number), *turn.messages]
        roles = [message.role for message in seen]
        assert "".join(map(chr, turn.prompt.token_ids)).count("user:") == roles.count("user")
